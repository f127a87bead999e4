"""What only a GPU can show: python -m pytest tests -m cuda. What a CPU can show as well is in
test_bfloat16.py; with -m cuda it is shown on the GPU."""

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
