"""What only a GPU can show: python -m pytest tests -m cuda. What a CPU can show as well is in
test_bfloat16.py; with -m cuda it is shown on the GPU."""

import functools
import warnings

import pytest
import torch
import transformers
from conftest import ROOT, family, make_tokenizer

import common

pytestmark = pytest.mark.cuda
TINY = ROOT / "tests" / "tiny"
PROMPTS = ["52817=", "31=", "9074391=", "4213576="]


def whole_gradient(model):
    return torch.cat(
        [common.whole(p.grad).flatten().float() for p in model.parameters() if p.grad is not None]
    )


def test_greedy_samples_are_those_of_generate():
    world = common.start("cuda", "float32")
    model, tokenizer = (
        common.load_policy(TINY / "model", world),
        common.load_tokenizer(TINY / "model"),
    )
    plain = (
        transformers.AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32)
        .cuda()
        .eval()
    )
    for prompt, text in zip(
        PROMPTS, common.sample(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0).texts
    ):
        ids = tokenizer(prompt, return_tensors="pt").input_ids.cuda()
        said = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        assert tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True) == text


def test_gradient_checkpointing_has_the_same_gradient_and_takes_less_memory(tmp_path):
    size = {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "intermediate_size": 2048,
        "max_position_embeddings": 2048,
    }
    family("llama", **size).save_pretrained(tmp_path)
    ids = torch.randint(3, 48, (8, 1024), generator=torch.Generator().manual_seed(0)).cuda()
    gradients, peaks = [], []
    for checkpointing in (False, True):
        world = common.start("cuda")
        model = common.load_policy(tmp_path, world, checkpointing)
        for _ in range(2):  # the first pass makes gradients and workspaces
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            states = common.hidden_states(model, ids, torch.ones_like(ids, dtype=torch.bool))
            states.float().pow(2).mean().backward()
        gradients.append(whole_gradient(model))
        peaks.append(torch.cuda.max_memory_allocated())
        del model, states
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm() and peaks[
        1
    ] < 0.6 * peaks[0], peaks


def test_the_decode_loop_waits_for_the_gpu_once_a_token(tmp_path):
    """Once, to know whether anything is left to do; more where rows are dropped."""
    world = common.start("cuda")
    family("llama").save_pretrained(tmp_path)
    model, tokenizer = common.load_policy(tmp_path, world), make_tokenizer()
    model.generation_config.eos_token_id = None
    common.sample(model, tokenizer, ["w5 w6", "w7"], n=4, max_new_tokens=8, seed=0)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            common.sample(model, tokenizer, ["w5 w6", "w7"], n=4, max_new_tokens=64, seed=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing" in str(w.message) for w in caught)
    assert waits < 2.5 * 64 + 40, waits


def policy_of(tmp_path, dtype, **size):
    world = common.start("cuda", dtype)
    family("llama", max_position_embeddings=1024, **size).save_pretrained(tmp_path)
    model, tokenizer = common.load_policy(tmp_path, world), make_tokenizer()
    return model, tokenizer


def captured_steps(monkeypatch):
    """The captured steps of a rollout, as they are made."""
    steps = []
    record = common.CapturedStep.record

    def counted(self):
        record(self)
        steps.append(self)

    monkeypatch.setattr(common.CapturedStep, "record", counted)
    return steps


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_decoding_draws_what_eager_decoding_draws(dtype, tmp_path, monkeypatch):
    """Over 300 tokens, through full columns and dropped rows, after which it is captured anew."""
    model, tokenizer = policy_of(tmp_path, dtype)
    model.generation_config.eos_token_id = [1, 5]
    steps = captured_steps(monkeypatch)
    settings = {"n": 16, "max_new_tokens": 300, "temperature": 0.7, "seed": 1}
    captured = common.sample(model, tokenizer, ["w5 w6", "w7"], **settings)
    assert len(steps) >= 3 and len({len(step.token) for step in steps}) > 1
    monkeypatch.setattr(common, "CAPTURE_ABOVE", 10**9)
    eager = common.sample(model, tokenizer, ["w5 w6", "w7"], **settings)
    if dtype == "float32":
        assert torch.equal(eager.ids, captured.ids)
        torch.testing.assert_close(eager.logprobs, captured.logprobs, atol=1e-3, rtol=0)
        return
    columns = min(eager.ids.shape[1], captured.ids.shape[1])
    same = (eager.ids[:, :columns] == captured.ids[:, :columns]).cumprod(1).bool()
    assert same[:, :8].float().mean() > 0.9
    gap = (eager.logprobs[:, :columns] - captured.logprobs[:, :columns])[same].abs()
    assert gap.mean() < 0.02, gap.mean()


def test_captured_decoding_follows_an_update_and_keeps_no_memory(tmp_path, monkeypatch):
    model, tokenizer = policy_of(tmp_path, "float32")
    model.generation_config.eos_token_id = None
    steps = captured_steps(monkeypatch)
    settings = {"n": 8, "max_new_tokens": 64, "seed": 1}
    held = []
    drawn = []
    for _ in range(6):
        drawn.append(common.sample(model, tokenizer, ["w5 w6", "w7"], **settings))
        held.append(torch.cuda.memory_reserved())
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.9)
        drawn[-1] = drawn[-1].logprobs.cpu()
        steps.clear()
    assert all(not torch.equal(a, b) for a, b in zip(drawn, drawn[1:]))
    assert held[-1] <= held[2], held


def test_a_forward_that_waits_for_the_gpu_is_not_captured(tmp_path, monkeypatch):
    model, tokenizer = policy_of(tmp_path, "float32")
    steps = captured_steps(monkeypatch)
    forward = type(model).forward

    def waits(self, *given, **named):
        named["input_ids"].sum().item()
        return forward(self, *given, **named)

    settings = {"n": 8, "max_new_tokens": 64, "seed": 1}
    monkeypatch.setattr(type(model), "forward", functools.wraps(forward)(waits))
    a = common.sample(model, tokenizer, ["w5 w6", "w7"], **settings)
    assert not steps and type(model) in common.NOT_CAPTURED
    common.NOT_CAPTURED.clear()
    monkeypatch.setattr(type(model), "forward", forward)
    b = common.sample(model, tokenizer, ["w5 w6", "w7"], **settings)
    assert steps
    torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-3, rtol=0)


def test_prompts_are_not_shared_on_a_gpu_where_it_is_slower(tmp_path, capsys):
    world = common.start("cuda")
    family("llama").save_pretrained(tmp_path)
    model = common.load_policy(tmp_path, world)
    assert not common.prompts_can_be_shared(model, world, False)
    assert "cannot be trained through" not in capsys.readouterr().out, "it was not tried"
