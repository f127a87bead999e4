"""bfloat16 weights compute and float32 weights learn: a GPU's arithmetic, tested on a CPU by
--dtype bfloat16.

Tests that take `device` run on the CPU among the fast tests, and on a GPU with -m cuda. Some
numbers are compared bit by bit, so one thread computes: the number of threads decides in which
order sums are added."""

import functools
import importlib
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, family, make_tokenizer
from processes import run
from safetensors import safe_open
from test_processes import train_on_given_samples
from torch.distributed.tensor import DTensor
from transformers.cache_utils import DynamicLayer

import common
import grpo
import ppo
import reward_model

TINY = ROOT / "tests" / "tiny"
MODEL = TINY / "model"
PROMPTS = ["52817=", "31=", "9074391=", "4213576="]
REWARD = f"{TINY / 'sort.py'}:position"  # hardly ever equal for all samples of a prompt
CLOCKS = ("time/sample", "time/reward", "time/train", "tokens_per_second", "memory_gib")
BFLOAT16, FLOAT32 = {torch.bfloat16}, {torch.float32}

# a few steps of every script, with several micro-batches to a step
RUNS = {
    "reinforce": {"epochs": 2, "samples_per_prompt": 4},
    "ppo": {"critic": "separate"},
    "ppo_shared": {"critic": "shared", "samples_per_prompt": 2},
    "grpo": {"epochs": 2, "samples_per_prompt": 4, "ref_update_every": 2},
    "dpo": {},
    "reward_model": {"best_of": (1, 2)},
}
RESUMED = ("ppo_shared", "grpo", "dpo")  # on two processes
ROLLOUTS = ("reinforce", "ppo", "ppo_shared", "grpo")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return request.param


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the first rows of the embedded prompts and pairs."""
    folder = tmp_path_factory.mktemp("data")
    rows_of = {"sort_train": 32, "sort_test": 8, "pairs_train": 32, "pairs_test": 8}
    for name, rows in rows_of.items():
        lines = (TINY / f"{name}.jsonl").read_text().splitlines()[:rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def train(name, out, data, device="cpu", **changes):
    """Three steps of a script. The run keeps the checkpoints of steps 2 and 3."""
    flags = {
        "device": device,
        "dtype": "bfloat16",
        "out": str(out),
        "steps": 3,
        "save_every": 2,
        "keep": 2,
        "eval_every": 3,
        "learning_rate": 1e-3,
        "warmup": 0,
        "max_new_tokens": 12,
        "tokens_per_micro_batch": 100,
    }
    if name in ROLLOUTS:
        flags["prompts_per_step"] = 4
        flags["beta"] = 0.05
        flags["reward"] = REWARD
        flags["data"] = f"{data}/sort_train.jsonl"
        flags["eval_data"] = f"{data}/sort_test.jsonl"
    else:
        flags["pairs_per_step"] = 8
        flags["data"] = f"{data}/pairs_train.jsonl"
        flags["eval_data"] = f"{data}/pairs_test.jsonl"
        flags["eval_prompts"] = f"{data}/sort_test.jsonl"
    if name == "reward_model":
        flags["policy"] = str(MODEL)
    module = importlib.import_module(name.removesuffix("_shared"))
    module.train(module.Args(**(flags | RUNS[name] | changes)))


def result(out):
    """What a run has logged, without clocks, and the weights of its newest checkpoint."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]
    return rows, common.read_checkpoint(out)["models"]


def lose_last_step(out):
    common.checkpoints(out)[-1].unlink()


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, data):
    """run_of(name, device): the folder of a run in one process. The first test that asks makes
    it."""
    folder = tmp_path_factory.mktemp("one")

    @functools.cache
    def made(name, device):
        out = folder / device / name
        train(name, out, data, device)
        return out

    return lambda name, device="cpu": made(name, device)


# --- Every script, in one process ---


@pytest.mark.parametrize("name", ROLLOUTS)
def test_ratio_and_kl_start_at_exactly_0(name, device, run_of):
    """Policy and reference compute with the same bfloat16 weights, in the same micro-batches."""
    check_start(result(run_of(name, device))[0])


def check_start(log):
    assert log[1]["kl/ref"] == 0
    assert [m["ratio/first"] for m in log[1:]] == [0] * (len(log) - 1)
    assert 0 < log[1]["kl/sample"] < 0.05, "in other shapes the sampler rounds otherwise"
    assert log[2]["kl/ref"] != 0, "the policy has moved, and the reference has not"


def test_a_reference_that_becomes_the_policy_computes_what_the_policy_does(device, run_of):
    """--ref_update_every 2 rounds float32 masters into a bfloat16 reference, as FSDP2 rounds them
    to compute."""
    log, saved = result(run_of("grpo", device))
    assert log[2]["kl/ref"] != 0 and log[3]["kl/ref"] == 0
    assert {w.dtype for w in saved["reference"].values()} == BFLOAT16


def test_dpo_starts_at_log_2_but_for_rounding(device, run_of):
    """The reference scores a pair in another micro-batch than training: its log-ratio is off by
    hundredths."""
    log, _ = result(run_of("dpo", device))
    assert abs(log[0]["eval/loss"] - math.log(2)) < 0.02 and abs(log[0]["eval/margin"]) < 0.02
    assert abs(log[1]["loss"] - math.log(2)) < 0.02 and abs(log[1]["margin"]) < 0.02


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_one_that_never_stopped(name, device, run_of, data, tmp_path):
    """Bit for bit on a CPU. A GPU adds in an order of its own."""
    out = tmp_path / "run"
    shutil.copytree(run_of(name, device), out)
    whole = result(out)
    lose_last_step(out)
    train(name, out, data, device, resume=True)
    check_equal(whole, result(out), 0 if device == "cpu" else 0.05)


def check_equal(one, other, tolerance=0.0):
    for a, b in zip(one[0], other[0], strict=True):
        assert a.keys() == b.keys()
        for k in a:
            assert b[k] == pytest.approx(a[k], rel=tolerance, abs=tolerance), k
    for model, weights in one[1].items():
        for k, weight in weights.items():
            assert tolerance or torch.equal(weight, other[1][model][k]), (model, k)


@pytest.mark.parametrize("name", RUNS)
def test_the_saved_model_is_the_float32_masters_rounded_once(name, run_of):
    """It is an ordinary folder in bfloat16, which plain transformers loads."""
    check_saved(run_of(name))


def check_saved(out):
    log, checkpoint = result(out)
    masters = checkpoint.get("policy") or checkpoint["model"]
    assert {w.dtype for w in masters.values()} == FLOAT32
    if "scale/spread" in log[-1]:
        masters["score.weight"] = masters["score.weight"] / log[-1]["scale/spread"]  # `fold_scale`
    assert json.loads((out / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(out / "model" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(k).dtype for k in file.keys()} == BFLOAT16
    kind = transformers.AutoModelForCausalLM
    if "score.weight" in masters:
        kind = transformers.AutoModelForSequenceClassification
    plain = kind.from_pretrained(out / "model")
    assert plain.dtype == torch.bfloat16
    for k, weight in plain.named_parameters():
        assert torch.equal(weight, masters[k].bfloat16()), k
    everything = torch.cat([w.flatten() for w in masters.values()])
    assert rounded(everything) < 0.3, "masters have digits that bfloat16 has not"


def rounded(x):
    """The share of numbers that bfloat16 can hold."""
    return (x.bfloat16().to(x.dtype) == x).double().mean().item()


def test_a_critic_and_all_moments_are_saved_in_float32(run_of):
    for name in RUNS:
        state = common.read_checkpoint(run_of(name))
        learning = {k: v for k, v in state["models"].items() if k != "reference"}
        assert {w.dtype for weights in learning.values() for w in weights.values()} == FLOAT32
        assert learning.keys() == {k for k, moments in state["optimizers"].items() if moments}
        for moments in state["optimizers"].values():
            everything = [x.flatten() for moment in moments.values() for x in moment.values()]
            assert not moments or {x.dtype for x in everything} == FLOAT32, name
            assert not moments or rounded(torch.cat(everything)) < 0.3, name


def test_a_run_from_the_shell_ends_well_and_says_nothing_on_stderr(data, tmp_path):
    """No warning at its end that a process group, or a thread of it, is still there."""
    command = [sys.executable, str(ROOT / "grpo.py"), "--dtype", "bfloat16", "--steps", "1"]
    command += ["--data", str(data / "sort_train.jsonl"), "--prompts_per_step", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    # gloo's word on machines that do not know their own name
    said = [line for line in done.stderr.splitlines() if "Unable to resolve hostname" not in line]
    assert done.returncode == 0 and said == []
    assert "1 x cpu in bfloat16" in done.stdout


# --- Precision: what computes, what learns ---


def weights(model):
    """A model's weights as they are between two forwards, whole."""
    return [common.whole(p) for p in common.at_rest(model).parameters()]


def whole_gradient(model):
    return torch.cat([common.whole(p.grad).flatten() for p in model.parameters()])


def test_auto_is_float32_on_a_cpu_and_bfloat16_on_a_gpu(device):
    world = common.start(device)
    assert world.dtype == (torch.float32 if device == "cpu" else torch.bfloat16)
    assert common.dist.is_initialized() == (device == "cuda"), "FSDP2 wants a process group"


def test_what_computes_is_bfloat16_and_what_learns_is_float32(device):
    world = common.start(device, "bfloat16")
    policy, seen = common.load_policy(MODEL, world), {}

    def look(name):
        def hook(module, inputs, output):
            for x in (*inputs, output, *module.parameters(recurse=False)):
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    seen.setdefault(name, set()).add(x.dtype)

        return hook

    for name, module in policy.named_modules():
        module.register_forward_hook(look(name))
    ids = torch.tensor([[5, 6, 7]], device=device)
    logits = policy(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    logits.float().logsumexp(-1).sum().backward()
    for kind in ("embed_tokens", "q_proj", "up_proj", "input_layernorm", "lm_head"):
        found = set.union(*(dtypes for name, dtypes in seen.items() if name.endswith(kind)))
        assert found == (BFLOAT16 if kind != "lm_head" else BFLOAT16 | FLOAT32), kind
    assert logits.dtype == torch.float32, "from bfloat16 states and weights, and not rounded to it"
    optimizer = common.make_optimizer(policy, 1e-6)
    optimizer.step()
    assert {p.dtype for p in common.at_rest(policy).parameters()} == FLOAT32
    assert {p.grad.dtype for p in policy.parameters()} == FLOAT32
    moments = [x for state in optimizer.state.values() for x in state.values()]
    assert {x.dtype for x in moments} == FLOAT32
    assert len(moments) == 3 * len(list(policy.parameters()))


def test_frozen_models_rest_in_bfloat16(device):
    """They need no master, and take half of one."""
    world, tokenizer = common.start(device, "bfloat16"), common.load_tokenizer(MODEL)
    judge = common.load_scalar(MODEL, world, tokenizer, 0.1, frozen=True)
    for model in (common.load_reference(MODEL, world), judge):
        assert {p.dtype for p in common.at_rest(model).parameters()} == BFLOAT16
        assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_weights_are_copied_from_shard_to_shard(device):
    """After a forward the root holds whole weights for a time; what is written to those is lost."""
    world = common.start(device, "bfloat16")
    policy, reference = common.load_policy(MODEL, world), common.load_reference(MODEL, world)
    optimizer = common.make_optimizer(policy, 1e-2)
    ids = torch.tensor([[5, 6, 7]], device=device)
    common.hidden_states(policy, ids, ids > 0).float().square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        for model in (policy, reference):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    common.copy_weights(policy, reference)
    for master, weight in zip(weights(policy), weights(reference), strict=True):
        assert torch.equal(master.bfloat16(), weight)


def test_masters_move_at_a_rate_of_1e_6(device):
    """Bfloat16 weights under the same AdamW stay where they are. A step has the size of the rate,
    and moves a bfloat16 weight only if it is more than about 1/500 of the weight."""

    def moved(model, optimizer):
        before = [w.clone() for w in weights(model)]
        ids = torch.tensor([[5, 6, 7]], device=device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        logits.float().logsumexp(-1).sum().backward()
        optimizer.step()
        pairs = [(a != b).flatten() for a, b in zip(weights(model), before)]
        return torch.cat(pairs).double().mean().item()

    policy = common.load_policy(MODEL, common.start(device, "bfloat16"))
    assert moved(policy, common.make_optimizer(policy, 1e-6)) > 0.9
    broken = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    broken.to(device)
    assert moved(broken, torch.optim.AdamW(broken.parameters(), lr=1e-6, weight_decay=0.0)) < 0.1


def test_a_reward_models_scores_are_not_rounded(tmp_path):
    """In bfloat16 scores between 4 and 8 have steps of 0.03: most groups would have false ties."""
    world, tokenizer = common.start("cpu", "bfloat16"), make_tokenizer()
    family("llama").save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    model = common.load_scalar(tmp_path / "start", world, tokenizer, 0.5, frozen=True)
    texts = [[5, 6, i, 1] for i in range(3, 48)]
    scores = common.score_ids(model, tokenizer, texts, world)
    assert len(set(scores)) == len(texts)
    rounded = [torch.tensor(score).bfloat16().item() for score in scores]
    assert sum(a == b for a, b in zip(scores, rounded)) < 3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral", "mamba", "glm4_moe"])
def test_the_saved_model_computes_what_the_policy_computed(name, tmp_path):
    """To the last bit, in transformers without FSDP2: what a bfloat16 model rounds is rounded, and
    nothing else but the logits, which are float32 here. Mamba's blocks hand each other a float32
    sum, which must not be cast. GLM's router adds a float32 buffer to its scores. The reference is
    the same model."""
    model = family(name)
    for key, buffer in model.named_buffers():
        if "correction_bias" in key:
            buffer.normal_(6.9, 0.06)
    model.save_pretrained(tmp_path / "start")
    world, tokenizer = common.start("cpu", "bfloat16"), make_tokenizer()
    policy = common.load_policy(tmp_path / "start", world)
    ids = torch.randint(3, 48, (3, 12), generator=torch.Generator().manual_seed(0))

    def logits(model):
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits

    optimizer = common.make_optimizer(policy, 1e-3)
    logits(policy).float().logsumexp(-1).sum().backward()
    optimizer.step()
    common.save_model(policy, tokenizer, tmp_path / "model", world)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert plain.dtype == torch.bfloat16, "its config says so, and not float32 as before"
    reference = common.load_reference(tmp_path / "model", world)
    policy.eval()
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        states = common.hidden_states(plain, ids, mask)
        assert torch.equal(common.hidden_states(policy, ids, mask), states)
        assert torch.equal(common.hidden_states(reference, ids, mask), states)
        assert torch.equal(logits(policy), logits(reference))
        torch.testing.assert_close(logits(policy), logits(plain).float(), rtol=2**-7, atol=2**-7)


def test_policy_reference_critic_and_reward_model_have_the_same_states(device):
    """They read the same weights, so their trunks say the same, whether they learn or not."""
    world, tokenizer = common.start(device, "bfloat16"), common.load_tokenizer(MODEL)
    s = fixed_samples(world)[0]
    models = (
        common.load_policy(MODEL, world),
        common.load_reference(MODEL, world),
        common.load_scalar(MODEL, world, tokenizer, 0.0),
        common.load_scalar(MODEL, world, tokenizer, 0.1, frozen=True),
    )
    ids, mask = torch.cat([s.prompt_ids, s.ids], 1), torch.cat([s.prompt_mask, s.mask], 1)
    with torch.no_grad():
        states = [common.hidden_states(model, ids, mask)[mask] for model in models]
    assert states[0].dtype == torch.bfloat16
    for other in states[1:]:
        assert torch.equal(states[0], other)


def test_a_frozen_reward_model_scores_as_the_one_that_learnt(run_of):
    world = common.start("cpu", "bfloat16")
    folder = run_of("reward_model") / "model"
    tokenizer = common.load_tokenizer(folder)
    texts = [tokenizer(text).input_ids for text in ("52817=12578", "31=13", "9=99")]
    learning = common.load_scalar(folder, world, tokenizer)
    frozen = common.load_scalar(folder, world, tokenizer, frozen=True)
    scores = common.score_ids(learning, tokenizer, texts, world)
    assert scores == common.score_ids(frozen, tokenizer, texts, world) and len(set(scores)) == 3


def test_scores_and_values_are_multiplied_in_float32(run_of):
    """Bfloat16 has steps of 0.01 between 1 and 2. The head's weights are those that compute,
    rounded once."""
    world = common.start("cpu", "bfloat16")
    folder = run_of("reward_model") / "model"
    tokenizer = common.load_tokenizer(folder)
    model = common.load_scalar(folder, world, tokenizer)
    with torch.no_grad():
        common.at_rest(model).score.weight.mul_(1 + 2**-12)  # to between two bfloat16 numbers
    head = common.whole(model.score.weight).bfloat16().float()[0]
    sides = [tokenizer("52=25").input_ids, tokenizer("52=525").input_ids]
    scores = reward_model.pair_scores(model, tokenizer, [([], *sides)], False, world)[0]
    s = common.as_samples([[], []], sides, tokenizer, world)
    states = common.hidden_states(model, s.ids, s.mask)
    values = ppo.values_of(common.scalar_head(model), states)
    assert states.dtype == torch.bfloat16 and rounded(values[s.mask]) == 0
    at_the_end = values[[0, 1], s.mask.sum(1) - 1]
    torch.testing.assert_close(values, states.float() @ head, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(scores, at_the_end, atol=1e-6, rtol=1e-6)


def test_a_model_without_blocks_is_left_to_float32(capsys):
    """FSDP2 never reduces the gradient of a model that is one unit, so no weight would move."""
    model = family("llama")
    model._no_split_modules = []
    with pytest.raises(SystemExit):
        common.shard(model, common.start("cpu", "bfloat16"))
    said = capsys.readouterr().err
    assert "names no blocks" in said and "float32 only" in said


@pytest.mark.parametrize("dtype, mean, most", [("float32", 1e-5, 1e-3), ("bfloat16", 2e-2, 0.5)])
def test_the_sampler_and_the_trainer_agree_as_far_as_the_type_allows(dtype, mean, most, device):
    world = common.start(device, dtype)
    policy, tokenizer = common.load_policy(MODEL, world), common.load_tokenizer(MODEL)
    s = common.sample(policy, tokenizer, PROMPTS, n=8, max_new_tokens=12, seed=0)
    s.rows_per_prompt = 8
    parts = grpo.micro_batches(range(32), s.mask.any(1), s, 2048, world)
    for group in (1, 8):
        s.rows_per_prompt = group
        apart = (grpo.rollout_logprobs(policy, s, [parts], 1.0) - s.logprobs).abs()[s.mask]
        assert apart.mean() < mean and apart.max() < most


def test_weights_stay_whole_while_a_rollout_lasts_and_no_longer(monkeypatch):
    """Otherwise every token gathers them all. Afterwards a block gives up its whole weights when
    its forward is over; the root keeps its own, because the head needs them once more."""
    world, tokenizer = common.start("cpu", "bfloat16"), common.load_tokenizer(MODEL)
    policy, choose, in_rollout = common.load_policy(MODEL, world), common.choose, []

    def whole(model):
        two = model.model.layers[0].mlp.up_proj.weight, model.lm_head.weight
        return [not isinstance(p, DTensor) for p in two]

    def look(*inputs):
        in_rollout.append(whole(policy))
        return choose(*inputs)

    ids = torch.tensor([[5, 6, 7]])
    common.hidden_states(policy, ids, ids > 0)
    assert whole(policy) == [False, True]
    monkeypatch.setattr(common, "choose", look)
    common.sample(policy, tokenizer, PROMPTS, max_new_tokens=3, seed=0)
    assert in_rollout == [[True, True]] * 3 and whole(policy) == [False, False]
    common.hidden_states(policy, ids, ids > 0)
    assert whole(policy) == [False, True]


def test_a_heads_float32_copy_lives_as_long_as_a_rollout_and_no_longer(monkeypatch):
    """Kept for the next one, it would sample from the weights before the update."""
    world, tokenizer = common.start("cpu", "bfloat16"), common.load_tokenizer(MODEL)
    policy, choose, copies = common.load_policy(MODEL, world), common.choose, []

    def look(*inputs):
        copies.append(policy.lm_head.wide_weight)
        return choose(*inputs)

    monkeypatch.setattr(common, "choose", look)
    common.sample(policy, tokenizer, PROMPTS, max_new_tokens=3, seed=0)
    assert all(copy is copies[0] for copy in copies) and copies[0].dtype == torch.float32
    assert policy.lm_head.wide_weight is None
    with pytest.raises(ZeroDivisionError):
        monkeypatch.setattr(common, "choose", lambda *inputs: 1 / 0)
        common.sample(policy, tokenizer, PROMPTS, max_new_tokens=3, seed=0)
    assert policy.lm_head.wide_weight is None


# --- Gradients ---


def fixed_samples(world):
    """16 completions of unequal lengths, 4 to a prompt, and an advantage for each."""
    tokenizer = common.load_tokenizer(MODEL)
    prompts = [tokenizer(p).input_ids for p in PROMPTS for _ in range(4)]
    completions = []
    for i, prompt in enumerate(prompts):
        length = 1 + 3 * i % (2 * len(prompt) - 2)
        completions.append((prompt[:-1] + prompt)[:length] + [tokenizer.eos_token_id])
    advantages = torch.randn(16, generator=torch.Generator().manual_seed(0)).to(world.device)
    return common.as_samples(prompts, completions, tokenizer, world), advantages


def policy_gradient(world, rows, group=1, checkpointing=False):
    """The gradient of these rows' part in the loss of all 16, added up over micro-batches."""
    policy = common.load_policy(MODEL, world, checkpointing)
    s, advantages = fixed_samples(world)
    s.rows_per_prompt = group
    trained = torch.zeros(16, dtype=torch.bool)
    trained[list(rows)] = True  # a process may fill up with the others, of weight 0
    token_weights = s.mask / s.mask.sum() * trained[:, None].to(world.device)
    for part in grpo.micro_batches(ROWS, trained, s, 60, world):
        logprobs, _ = grpo.token_logprobs(policy, s, part, 1.0)
        w = token_weights[part, : logprobs.shape[1]]
        (-(advantages[part, None] * logprobs * w).sum()).backward()
    assert {p.grad.dtype for p in policy.parameters()} == FLOAT32
    return whole_gradient(policy)


ROWS = list(range(16))


@pytest.fixture(scope="module")
def gradient():
    """gradient(device, dtype, rows=, group=, checkpointing=), in one process, computed once."""

    @functools.cache
    def computed(device, dtype, first=0, last=16, group=1, checkpointing=False):
        return policy_gradient(common.start(device, dtype), ROWS[first:last], group, checkpointing)

    return computed


def test_prompts_that_are_shared_have_a_gradient_as_good_as_that_of_others(device, gradient):
    """Both are off the float32 gradient by bfloat16's rounding, about a hundredth."""
    exact = gradient(device, "float32")
    plain = gradient(device, "bfloat16")
    shared = gradient(device, "bfloat16", group=4)
    off = [((g - exact).norm() / exact.norm()).item() for g in (plain, shared)]
    assert 1e-3 < min(off) and max(off) < 0.03 and max(off) < 2 * min(off), off
    assert not torch.equal(plain, shared)


def test_gradient_checkpointing_has_the_same_gradient(device, gradient):
    """The second forward is the first one again."""
    plain = gradient(device, "bfloat16")
    again = gradient(device, "bfloat16", checkpointing=True)
    assert (plain - again).norm() <= (0 if device == "cpu" else 0.01) * plain.norm()


def test_with_gradient_checkpointing_kl_and_ratio_start_at_0_too(data, tmp_path):
    train("grpo", tmp_path / "run", data, gradient_checkpointing=True)
    check_start(result(tmp_path / "run")[0])


@pytest.mark.parametrize("name", ["tiny", "llama", "qwen2", "gemma3_text", "mistral", "gpt2"])
def test_prompts_can_be_shared_in_bfloat16(name, tmp_path):
    folder = MODEL
    if name != "tiny":
        folder = tmp_path
        family(name).save_pretrained(folder)
    world = common.start("cpu", "bfloat16")
    policy = common.load_policy(folder, world)
    assert common.prompts_can_be_shared(policy, world, False)
    assert all(p.grad is None for p in policy.parameters())


def test_a_cache_that_drops_the_gradient_is_found_in_bfloat16(monkeypatch, capsys):
    world, update = common.start("cpu", "bfloat16"), DynamicLayer.update

    def without_gradient(self, keys, values, *args, **kwargs):
        keys, values = update(self, keys, values, *args, **kwargs)
        self.keys, self.values = self.keys.detach(), self.values.detach()
        return keys, values

    policy = common.load_policy(MODEL, world)
    monkeypatch.setattr(DynamicLayer, "update", without_gradient)
    assert not common.prompts_can_be_shared(policy, world, False)
    assert "computed anew" in capsys.readouterr().out


def test_grpo_shares_prompts_in_bfloat16(data, tmp_path, monkeypatch):
    shared, honest = [], common.completion_states

    def look(model, samples, rows):
        shared.append(samples.rows_per_prompt)
        return honest(model, samples, rows)

    train("grpo", tmp_path / "once", data, steps=1)  # the self-check calls it, too
    monkeypatch.setattr(common, "prompts_can_be_shared", lambda *a: True)
    monkeypatch.setattr(common, "completion_states", look)
    train("grpo", tmp_path / "run", data, steps=1)
    logs = [
        (tmp_path / name / "metrics.jsonl").read_text().splitlines()[1] for name in ("once", "run")
    ]
    once, run = (json.loads(line) for line in logs)
    assert shared and min(shared) > 1 and once["grad_norm"] == run["grad_norm"]


# --- Two processes ---

FIXED = {
    "dtype": "bfloat16",
    "steps": 2,
    "tokens_per_micro_batch": 100,
    "warmup": 0,
    "learning_rate": 1e-4,
    "eval_data": "",
}


def same_batches(data):
    """Flags with which `train_on_given_samples` has the same batches on any number of processes."""
    rollouts = FIXED | {"prompts_per_step": 4, "data": f"{data}/sort_train.jsonl", "reward": REWARD}
    pairs = FIXED | {"pairs_per_step": 8, "eval_prompts": "", "data": f"{data}/pairs_train.jsonl"}
    return {
        "reinforce": rollouts | {"samples_per_prompt": 4},
        "ppo": rollouts | {"epochs": 1, "minibatches": 1},
        "grpo": rollouts | {"samples_per_prompt": 4, "beta": 0.05},
        "dpo": pairs,
        "reward_model": pairs | {"policy": ""},
    }


def in_two_processes(folder, data):
    """Everything that the tests below look at, in one start of two processes."""
    world = common.start("cpu", "bfloat16")
    mine = ROWS[8 * world.rank :][:8]
    gradients = {group: policy_gradient(world, mine, group) for group in (1, 4)}
    if world.rank == 0:
        torch.save(gradients, folder / "gradients.pt")
    train_on_given_samples(same_batches(data), folder / "same")
    with pytest.MonkeyPatch.context() as patch:
        # one group for all of them
        patch.setattr(common.dist, "destroy_process_group", lambda: None)
        for name in RUNS:
            train(name, folder / name, data, steps=2, save_every=1)
        for name in RESUMED:
            if world.rank == 0:
                shutil.copytree(folder / name, folder / f"{name}-whole")
                lose_last_step(folder / name)
            common.dist.barrier()
            train(name, folder / name, data, steps=2, save_every=1, resume=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("two")
    run(in_two_processes, 2, folder, data)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_start_at_0_and_save_as_one_does(name, two):
    if name in ROLLOUTS:
        check_start(result(two / name)[0])
    check_saved(two / name)


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_resume_bit_for_bit(name, two):
    check_equal(result(two / f"{name}-whole"), result(two / name))


def test_the_gradient_of_two_processes_is_the_float32_sum_of_theirs(two, gradient):
    """Each computes as one process does with the same rows. They are added in float32, and not
    averaged: a sum in bfloat16 would be off by thousandths."""
    found = torch.load(two / "gradients.pt")
    for group, both in found.items():
        halves = [gradient("cpu", "bfloat16", *rows, group=group) for rows in ((0, 8), (8, 16))]
        assert (both - sum(halves)).norm() < 1e-6 * both.norm()
        assert not rounded(both) > 0.5


def test_the_gradient_of_two_processes_is_as_good_as_that_of_one(two, gradient):
    exact, found = gradient("cpu", "float32"), torch.load(two / "gradients.pt")
    for group, both in found.items():
        one = gradient("cpu", "bfloat16", group=group)
        assert (both - exact).norm() < 2 * (one - exact).norm()


def test_two_processes_log_what_one_does(two, data, tmp_path):
    """The same batches; micro-batches are others, and with them the rounding."""
    train_on_given_samples(same_batches(data), tmp_path)
    for name in same_batches(data):
        logs = [result(folder / name)[0] for folder in (tmp_path, two / "same")]
        for a, b in zip(*logs, strict=True):
            assert a.keys() == b.keys()
            for k in a.keys() - {"accuracy"}:  # before the first step, rounding decides who wins
                assert b[k] == pytest.approx(a[k], rel=0.05, abs=0.01), (name, a["step"], k)


def test_sampling_puts_the_hooks_of_the_shards_aside_and_back(device):
    """FSDP2's hooks take time for every token and have nothing to do while the weights are whole. Without them, a forward
    must still see the whole weights, and after it, even after one that failed, training must go on as before."""
    world = common.start(device, "bfloat16")
    model, tokenizer = common.load_policy(MODEL, world), common.load_tokenizer(MODEL)
    units = [m for m in model.modules() if isinstance(m, common.FSDPModule) and m is not model]

    def hooks():
        return [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in units]

    def gradient():
        ids = torch.tensor([[5, 6, 7, 8]], device=world.device)
        common.hidden_states(model, ids, ids > 0).float().square().sum().backward()
        found = [common.whole(p.grad) for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return torch.cat([g.flatten() for g in found])

    before, before_gradient = hooks(), gradient()
    assert len(units) == 3 and all(pre and post for pre, post in before), (
        "FSDP2 has hooks on each block"
    )
    with common.whole_weights(model):
        assert not any(pre or post for pre, post in hooks())
    inner = model.model.layers[1].mlp.register_forward_pre_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        common.sample(model, tokenizer, PROMPTS, n=2, max_new_tokens=8, seed=0)
    inner.remove()
    assert hooks() == before and torch.equal(gradient(), before_gradient), (
        "after a forward that failed, too"
    )
    first = common.sample(model, tokenizer, PROMPTS, n=2, max_new_tokens=8, seed=0)
    assert hooks() == before
    assert torch.equal(gradient(), before_gradient)
    again = common.sample(model, tokenizer, PROMPTS, n=2, max_new_tokens=8, seed=0)
    assert torch.equal(first.ids, again.ids) and torch.equal(first.logprobs, again.logprobs)


def test_a_reference_that_only_scores_is_let_go_before_the_policy_learns(
    data, tmp_path, monkeypatch
):
    """FSDP2's modules and their hooks hold each other, so `del` alone would keep a second model beside the training."""
    import gc
    import weakref

    scorers, alive, honest_load, honest_clip = [], [], common.load_reference, common.clip_gradients

    def load(*a):
        model = honest_load(*a)
        scorers.append(weakref.ref(model))
        return model

    def clip(*a):
        alive.extend(s() is not None for s in scorers)
        return honest_clip(*a)

    monkeypatch.setattr(common, "load_reference", load)
    monkeypatch.setattr(common, "clip_gradients", clip)
    gc.disable()  # as where no collection happens to come by
    try:
        train("dpo", tmp_path / "run", data, reference=str(MODEL), steps=1)
    finally:
        gc.enable()
    assert alive == [False]
