"""What only a GPU can show: python -m pytest tests -m cuda. The scripts compute in bfloat16 there and learn in float32."""

import importlib
import json
import warnings

import pytest
import torch
import transformers
from conftest import ROOT, family, make_tokenizer

import common
import grpo

pytestmark = pytest.mark.cuda
TINY = ROOT / "tests" / "tiny"
PROMPTS = ["52817=", "31=", "9074391=", "4213576="]
CLOCKS = ("time/sample", "time/train", "tokens_per_second", "memory_gib")


def whole_gradient(model):
    return torch.cat([common.whole(p.grad).flatten().float() for p in model.parameters() if p.grad is not None])


def train(script, folder, **flags):
    """A short run of a script on the GPU -> its logged numbers."""
    module = importlib.import_module(script)
    few = {"prompts_per_step": 8} if hasattr(module.Args, "prompts_per_step") else {"pairs_per_step": 8}
    if script in ("dpo", "reward_model"):
        few |= {"data": str(TINY / "pairs_train.jsonl"), "eval_data": str(TINY / "pairs_test.jsonl")}
    module.train(module.Args(**(few | {"device": "cuda", "steps": 3, "out": str(folder)} | flags)))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_computes_is_bfloat16_and_what_learns_is_float32():
    world = common.start("cuda")
    model, seen = common.load_policy(TINY / "model", world), []
    model.model.layers[0].mlp.register_forward_hook(lambda m, i, o: seen.append((o.dtype, m.up_proj.weight.dtype)))
    ids = torch.tensor([[5, 6, 7]], device="cuda")
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert seen == [(torch.bfloat16, torch.bfloat16)] and all(
        p.dtype == torch.float32 for p in common.at_rest(model).parameters()
    )
    optimizer = common.make_optimizer(model, 1e-6)
    before = [common.whole(p).clone() for p in model.parameters()]
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().logsumexp(-1).sum().backward()
    optimizer.step()
    moved = [(common.whole(p) != b).float().mean().item() for p, b in zip(common.at_rest(model).parameters(), before)]
    assert max(moved) > 0.9, "a step at 1e-6 moves float32 weights; bfloat16 ones would stay"


@pytest.mark.parametrize("dtype, mean, most", [("float32", 1e-5, 1e-3), ("bfloat16", 2e-2, 0.5)])
def test_the_sampler_and_the_trainer_agree_as_far_as_the_type_allows(dtype, mean, most):
    world = common.start("cuda", dtype)
    model, tokenizer = common.load_policy(TINY / "model", world), common.load_tokenizer(TINY / "model")
    s = common.sample(model, tokenizer, PROMPTS, n=8, max_new_tokens=12, seed=0)
    parts = grpo.micro_batches(range(len(s.mask)), s.prompt_mask, s.mask, 8, 2048, world)
    for group in (1, 8):
        apart = (grpo.rollout_logprobs(model, s, parts, group, 1.0) - s.logprobs).abs()[s.mask]
        assert apart.mean() < mean and apart.max() < most


def test_greedy_samples_are_those_of_generate():
    world = common.start("cuda", "float32")
    model, tokenizer = common.load_policy(TINY / "model", world), common.load_tokenizer(TINY / "model")
    plain = transformers.AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32).cuda().eval()
    for prompt, text in zip(PROMPTS, common.sample(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0).texts):
        ids = tokenizer(prompt, return_tensors="pt").input_ids.cuda()
        said = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True) == text


@pytest.mark.parametrize("script", ["reinforce", "grpo", "ppo"])
def test_ratio_and_kl_start_at_exactly_0_in_bfloat16(script, tmp_path):
    log = train(script, tmp_path / "run", beta=0.05, epochs=2, steps=1)
    assert log[1]["kl/ref"] == 0 and log[1]["ratio/first"] == 0 and 0 < log[1]["kl/sample"] < 0.05


@pytest.mark.parametrize("script", ["reinforce", "ppo", "grpo", "dpo", "reward_model"])
def test_every_script_trains_saves_and_resumes(script, tmp_path):
    straight = train(script, tmp_path / "a")
    saved = transformers.AutoConfig.from_pretrained(tmp_path / "a" / "model")
    assert saved.dtype == torch.bfloat16 and (tmp_path / "a" / "model" / "model.safetensors").is_file()
    train(script, tmp_path / "b", steps=2, schedule="constant")
    resumed = train(script, tmp_path / "b", steps=3, schedule="constant", resume=True)
    unbroken = train(script, tmp_path / "c", steps=3, schedule="constant")
    for a, b in zip(unbroken, resumed, strict=True):
        for k in a.keys() - set(CLOCKS):
            assert b[k] == pytest.approx(a[k], rel=0.05, abs=0.05), k
    assert all(x == x and abs(x) != float("inf") for m in straight for x in m.values())


def test_gradient_checkpointing_has_the_same_gradient_and_takes_less_memory(tmp_path):
    size = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 2048, "max_position_embeddings": 2048}
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
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm() and peaks[1] < 0.6 * peaks[0], peaks


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
