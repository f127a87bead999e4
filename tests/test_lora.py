"""Adapters (LoRA): --lora_rank in all five scripts.

Some numbers are compared bit by bit, so one thread computes."""

import importlib
import json
import types
from unittest import mock

import pytest
import torch
import transformers
from conftest import family, make_tokenizer
from processes import run
from safetensors.torch import load_file
from test_bfloat16 import MODEL, PROMPTS, ROLLOUTS, TINY, check_equal, lose_last_step, result
from test_bfloat16 import data as data
from test_bfloat16 import one_thread as one_thread
from test_bfloat16 import train as train_briefly
from torch.distributed.tensor import DTensor

import common
import grpo
import ppo

LORA = types.SimpleNamespace(lora_rank=4, lora_alpha=8.0)
DTYPES = ("float32", "bfloat16")
RUNS = ("reinforce", "ppo", "ppo_shared", "grpo", "dpo", "reward_model")
FAMILIES = ("llama", "qwen2", "gemma2", "phi3", "gpt_neox", "mixtral", "mamba")


def start(dtype="float32"):
    return common.start("cpu", dtype)


def load_moved(folder, world, checkpointing=False):
    """A policy whose adapters have learned something: B is not 0."""
    normal = torch.nn.init.normal_
    with mock.patch.object(torch.nn.init, "zeros_", lambda weight: normal(weight, 0.0, 0.1)):
        return common.load_policy(folder, world, checkpointing, LORA)


def train(name, out, data, dtype, **changes):
    changes = {"lora_rank": 4, "lora_alpha": 8.0, "dtype": dtype, **changes}
    if name == "grpo":
        changes = {"ref_update_every": 0, **changes}
    train_briefly(name, out, data, **changes)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("runs")
    made = {}

    def make(name, dtype):
        out = folder / dtype / name
        if (name, dtype) not in made:
            made[name, dtype] = out
            train(name, out, data, dtype)
        return out

    return make


# --- The model at the start, and with its adapters off ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROLLOUTS)
def test_ratio_and_kl_start_at_exactly_0(name, dtype, run_of):
    """B is 0 and the reference is the same model: nothing is rounded differently."""
    log, _ = result(run_of(name, dtype))
    assert log[1]["kl/ref"] == 0 and log[2]["kl/ref"] != 0
    assert [m["ratio/first"] for m in log[1:]] == [0] * (len(log) - 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_score_before_training_is_that_of_the_model_without_adapters(dtype, run_of, data):
    out = run_of("grpo", dtype)
    train_briefly("grpo", out.with_name("plain"), data, dtype=dtype, steps=1, eval_every=1)
    assert result(out)[0][0] == result(out.with_name("plain"))[0][0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_with_its_adapters_off_a_model_is_the_base_bit_for_bit(name, dtype, tmp_path):
    family(name).save_pretrained(tmp_path)
    world = start(dtype)
    policy = load_moved(tmp_path, world)
    off = common.load_reference(tmp_path, world, policy)
    alone = common.load_reference(tmp_path, world)
    shared = (1, 2) if name != "mamba" else (1,)  # rows that share a prompt
    with torch.no_grad():
        for rows_per_prompt in shared:
            samples = common.made_up_samples(alone, world.device)
            samples.rows_per_prompt = rows_per_prompt
            base = grpo.token_logprobs(alone, samples, [0, 1, 2, 3], 1.0)[0]
            assert torch.equal(grpo.token_logprobs(off, samples, [0, 1, 2, 3], 1.0)[0], base)
            moved = grpo.token_logprobs(policy, samples, [0, 1, 2, 3], 1.0)[0]
            assert (moved - base).abs().max() > 1e-3, "and on again afterwards"


def test_neither_policy_nor_critic_computes_with_the_others_adapters(tmp_path):
    family("llama").save_pretrained(tmp_path)
    policy = load_moved(tmp_path, start())
    ids = torch.arange(3, 20)[None]

    def logits(model):
        with torch.no_grad():
            return model(input_ids=ids).logits

    before = logits(policy)
    critic, trunk = common.add_critic_adapters(policy, torch.nn.Linear(32, 1))
    base = logits(common.Switched(policy, None))
    assert torch.equal(logits(trunk), base), "B is 0"
    for p in critic.parameters():
        torch.nn.init.normal_(p, 0.0, 0.1)
    assert torch.equal(logits(policy), before)
    assert not torch.equal(logits(trunk), base)


def test_an_error_leaves_the_adapters_as_they_were(tmp_path):
    family("llama").save_pretrained(tmp_path)
    policy = load_moved(tmp_path, start())
    with pytest.raises(ValueError):
        common.Switched(policy, None)()
    assert policy.lora.active == "own"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_base_is_frozen_in_the_computing_dtype_and_adapters_are_float32(dtype, tmp_path):
    family("qwen2").save_pretrained(tmp_path)
    world = start(dtype)
    for name, p in common.load_policy(tmp_path, world, args=LORA).named_parameters():
        assert p.requires_grad == (".lora_" in name), name
        assert p.dtype == (torch.float32 if ".lora_" in name else world.dtype), name
        # on one process FSDP2 would copy frozen weights at each use
        assert isinstance(p, DTensor) == (dtype == "bfloat16" and p.requires_grad), name


def test_every_linear_layer_of_the_blocks_has_adapters_and_the_head_has_none(tmp_path):
    model = family("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    policy = common.load_policy(tmp_path, start(), args=LORA)
    adapted = {n.partition(".lora_A")[0] for n, _ in policy.named_parameters() if ".lora_A" in n}
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert adapted == linear - {"lm_head"} and len(adapted) == 14


def test_blocks_inside_blocks_are_adapted_once(tmp_path):
    family("mamba").save_pretrained(tmp_path)
    policy = common.load_policy(tmp_path, start(), args=LORA)
    names = [name for name, _ in policy.named_parameters() if ".lora_" in name]
    assert names and not any(name.count("lora_") > 1 for name in names)


# --- What is loaded ---


@pytest.mark.parametrize("name", ["reinforce", "grpo", "ppo", "ppo_shared", "dpo"])
def test_neither_a_reference_nor_a_critic_is_a_second_model(name, data, tmp_path):
    with mock.patch.object(common, "load", wraps=common.load) as load:
        train(name, tmp_path / "run", data, "float32", steps=1)
    assert load.call_count == 1


def test_a_separate_critic_learns_its_own_adapters_and_a_head(run_of):
    models = result(run_of("ppo", "float32"))[1]
    count = sum(weight.numel() for weight in models["policy"].values())
    width = models["critic"]["0.weight"].numel()
    assert sum(weight.numel() for weight in models["critic"].values()) == count + width + 1
    moved = [key for key, weight in models["critic"].items() if weight.abs().sum() > 0]
    assert len(moved) == len(models["critic"]) == len(models["policy"]) + 2
    assert not torch.equal(models["critic"]["2.weight"], list(models["policy"].values())[1])


def test_adapters_that_no_text_passes_through_do_not_stop_two_processes(monkeypatch):
    """Those of an image tower in a model that reads text only: they have no gradient."""
    policy = torch.nn.Linear(2, 2)
    critic = torch.nn.ModuleList([torch.nn.Linear(2, 1), torch.nn.Linear(2, 2)])
    policy.weight.grad = torch.ones_like(policy.weight)
    for p in critic[0].parameters():
        p.grad = torch.ones_like(p)
    summed = []
    monkeypatch.setattr(torch.distributed, "all_reduce", summed.append)
    models = {"policy": policy, "critic": critic}
    optimizers = {name: torch.optim.SGD(m.parameters(), lr=0.1) for name, m in models.items()}
    args = types.SimpleNamespace(critic="separate", lora_rank=4, max_grad_norm=1.0)
    world = common.World(0, 2, torch.device("cpu"), torch.float32)
    norms = ppo.take_step(models, optimizers, args, world, 1)
    assert [tuple(g.shape) for g in summed] == [(1, 2), (1,), (2, 2), (2,)]
    assert norms == pytest.approx((2.0, 3**0.5))


def test_prompts_are_shared_although_the_critic_is_the_policy_with_other_adapters(tmp_path):
    family("llama").save_pretrained(tmp_path)
    world = start()
    policy = common.load_policy(tmp_path, world, args=LORA)
    _, trunk = common.add_critic_adapters(policy, torch.nn.Linear(32, 1))
    args = types.SimpleNamespace(samples_per_prompt=2, steps=1, gradient_checkpointing=False)
    args.reference = ""
    assert common.can_share_prompts([policy, trunk], args, world)


def test_what_is_not_adapted_is_said(tmp_path, capsys):
    family("mixtral").save_pretrained(tmp_path)
    common.say_once.cache_clear()
    common.load_policy(tmp_path, start(), args=LORA)
    said = capsys.readouterr().out
    assert "these stay as they are: Mixtral" in said and "Experts" in said


# --- Gradients ---


def loss_of(model, samples, rows, head=None):
    """Divided by the rows of all processes, weighted so that no two rows are alike."""
    if head is None:
        values, _ = grpo.token_logprobs(model, samples, rows, 1.0)
    else:
        states, _, mask = common.completion_states(model, samples, rows)
        values = ppo.values_of(head, states) * mask
    weight = torch.tensor(rows)[:, None] - 1.3
    return (values * weight).sum() / 4


def gradients(folder, out, name, dtype="float32", checkpointing=False, share=False, parts=None):
    """Of the policy's adapters, and the weights of a critic of its own after one step."""
    world = start(dtype)
    policy = load_moved(folder, world, checkpointing)
    args = types.SimpleNamespace(lora_rank=4, critic="separate", gradient_checkpointing=False)
    args.max_grad_norm = 1e9
    critic, trunk, head = ppo.make_critic(policy, "a folder", None, args, world)
    torch.manual_seed(1)
    for p in critic.parameters():
        torch.nn.init.normal_(p, 0.0, 0.1)
    samples = common.made_up_samples(policy, world.device)
    samples.rows_per_prompt = 2 if share else 1
    mine = parts or [[0, 1, 2, 3]]
    if world.size > 1:
        mine = [[2 * world.rank, 2 * world.rank + 1]]
    for rows in mine:
        loss_of(policy, samples, rows).backward()
        loss_of(trunk, samples, rows, head).backward()
    learned = {k: p.grad for k, p in policy.named_parameters() if p.requires_grad}
    grads = {k: common.whole(grad).clone() for k, grad in learned.items()}
    models = {"policy": policy, "critic": critic}
    steps = {key: torch.optim.SGD(model.parameters(), lr=1.0) for key, model in models.items()}
    ppo.take_step(models, steps, args, world, 1)
    for key, p in critic.named_parameters():
        grads[f"critic.{key}"] = p.detach().clone()
        if world.size > 1:
            everywhere = common.all_gather(world, p.detach()[None])
            assert torch.equal(everywhere[0], everywhere[1]), key
    if world.rank == 0:
        torch.save(grads, out / name)
    return grads


def check_close(one, other, tolerance):
    assert one.keys() == other.keys() and len(one) > 30
    for key in one:
        size = one[key].norm()
        assert size > 0, key
        assert (one[key] - other[key]).norm() <= tolerance * size, key


@pytest.mark.parametrize(
    "changes",
    [
        {"parts": [[0], [1, 3], [2]]},
        {"share": True},
        {"share": True, "parts": [[3, 2], [0, 1]]},
        {"checkpointing": True},
    ],
    ids=str,
)
def test_the_gradient_is_the_same_however_it_is_computed(changes, tmp_path):
    """With checkpointing, backward computes a critic's forward again when the policy's adapters
    are on: it must use the critic's."""
    family("qwen2", tie_word_embeddings=True).save_pretrained(tmp_path)
    whole = gradients(tmp_path, tmp_path, "a.pt")
    check_close(whole, gradients(tmp_path, tmp_path, "b.pt", **changes), 1e-4)


@pytest.mark.parametrize("share", [False, True])
def test_two_processes_and_one_have_the_same_gradient(share, tmp_path):
    family("qwen2", tie_word_embeddings=True).save_pretrained(tmp_path)
    one = gradients(tmp_path, tmp_path, "one.pt")
    run(gradients, 2, tmp_path, tmp_path, "two.pt", "float32", False, share)
    check_close(one, torch.load(tmp_path / "two.pt"), 1e-4)


@pytest.mark.parametrize("changes", [{}, {"share": True}, {"checkpointing": True}], ids=str)
def test_the_gradient_in_bfloat16_is_that_of_float32_but_for_rounding(changes, tmp_path):
    """Under FSDP2, where the critic's adapters are no weights that it knows."""
    family("qwen2", scale=0.3).save_pretrained(tmp_path)
    exact = gradients(tmp_path, tmp_path, "a.pt")
    check_close(exact, gradients(tmp_path, tmp_path, "b.pt", "bfloat16", **changes), 0.1)


# --- What is saved ---


@pytest.mark.parametrize("name", [*FAMILIES, "zamba2"])  # zamba2: two layers with one weight
def test_the_saved_model_is_the_adapted_one_for_plain_transformers(name, tmp_path):
    family(name).save_pretrained(tmp_path / "start")
    world = start()
    policy = load_moved(tmp_path / "start", world).eval()
    common.save_model(policy, make_tokenizer(), tmp_path / "model", world)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        adapted = policy(input_ids=ids).logits
        limit = (
            1e-4 if name not in ("mamba", "zamba2") else 1e-3
        )  # a recurrence carries rounding from token to token
        assert (plain(input_ids=ids).logits - adapted).abs().max() < limit
        assert (common.Switched(policy, None)(input_ids=ids).logits - adapted).abs().max() > 0.01
    names = [load_file(tmp_path / n / "model.safetensors").keys() for n in ("start", "model")]
    assert names[0] == names[1]


def test_an_adapter_is_that_of_the_model_beside_it_also_if_the_disk_is_full(tmp_path):
    """best/ stays as it was if it cannot be written, and best_adapter/ with it."""
    family("llama").save_pretrained(tmp_path / "start")
    world = start()
    policy = load_moved(tmp_path / "start", world)
    common.save_model(policy, make_tokenizer(), tmp_path / "best", world, {"step": 1})
    before = (tmp_path / "best_adapter" / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        for layer in policy.lora.layers:
            layer.lora_B.weight.add_(0.1)
    write = common.write

    def full(path, data):
        if "adapter" in path.name:
            raise OSError("full")
        write(path, data)

    for name, stand_in in (("replace", OSError("full")), ("write", full)):
        with (
            mock.patch.object(common, name, side_effect=stand_in),
            pytest.raises(common.Stop, match="full"),
        ):
            common.save_model(policy, make_tokenizer(), tmp_path / "best", world, {"step": 2})
        assert json.loads((tmp_path / "best" / "score.json").read_text()) == {"step": 1}
        assert (tmp_path / "best_adapter" / "adapter_model.safetensors").read_bytes() == before
        assert not list(tmp_path.glob("*.tmp"))
    common.save_model(policy, make_tokenizer(), tmp_path / "best", world, {"step": 2})
    assert (tmp_path / "best_adapter" / "adapter_model.safetensors").read_bytes() != before


def test_the_saved_model_is_merged_in_float32_and_rounded_once(bfloat16, tmp_path):
    family("llama").save_pretrained(tmp_path / "start")
    policy = load_moved(tmp_path / "start", bfloat16)
    common.save_model(policy, make_tokenizer(), tmp_path / "model", bfloat16)
    merged = load_file(tmp_path / "model" / "model.safetensors")
    pair = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base = load_file(tmp_path / "start" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    A, B = [pair[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB"]
    wanted = base[f"{name}.weight"].bfloat16().float() + 2.0 * B @ A
    assert torch.equal(merged[f"{name}.weight"], wanted.bfloat16())
    assert A.dtype == B.dtype == torch.float32


def test_a_saved_reward_model_is_an_ordinary_classifier(tmp_path):
    family("llama").save_pretrained(tmp_path / "start")
    world = start()
    normal = torch.nn.init.normal_
    with mock.patch.object(torch.nn.init, "zeros_", lambda weight: normal(weight, 0.0, 0.1)):
        model = common.load_scalar(
            tmp_path / "start", world, make_tokenizer(), head_std=0.2, args=LORA
        )
    learn = [name for name, p in model.named_parameters() if p.requires_grad]
    assert "score.weight" in learn and len(learn) == 29
    common.save_model(model, make_tokenizer(), tmp_path / "model", world)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        score = plain.eval()(input_ids=ids).logits
        torch.testing.assert_close(score, model.eval()(input_ids=ids).logits, atol=1e-4, rtol=0)
    assert score.shape == (1, 1)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in saved


def test_the_adapter_is_saved_in_the_format_of_peft(run_of):
    out = run_of("grpo", "float32")
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["base_model_name_or_path"] == str(MODEL)
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    names = {f"base_model.model.{name}" for name in config["target_modules"]}
    assert {key.rpartition(".lora_")[0] for key in saved} == names and len(names) == 21
    learned = result(out)[1]["policy"]
    for key, value in saved.items():
        assert torch.equal(value, learned[key.removeprefix("base_model.model.")])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_holds_what_learns_and_nothing_else(name, dtype, run_of):
    state = common.read_checkpoint(run_of(name, dtype))
    for key, weights in state["models"].items():
        assert len(state["optimizers"][key]) == len(weights)
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        if key == "policy":
            assert all(".lora_" in weight for weight in weights)
    if name == "reward_model":
        others = [key for key in state["models"]["model"] if ".lora_" not in key]
        assert others == ["score.weight"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_one_that_never_stopped(name, dtype, run_of, data, tmp_path):
    out = run_of(name, dtype)
    whole = result(out)
    model = load_file(out / "model" / "model.safetensors")
    lose_last_step(out)
    train(name, out, data, dtype, resume=True)
    check_equal(whole, result(out))
    again = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(model[key], again[key]) for key in model)


def train_in_a_process(name, out, data, changes):
    train(name, out, data, "float32", **changes)


def test_two_processes_sample_train_save_and_resume(data, tmp_path):
    out = tmp_path / "two"
    run(train_in_a_process, 2, "ppo", out, data, {})
    log, models = result(out)
    assert log[1]["kl/ref"] == 0 and log[1]["ratio/first"] == 0
    lose_last_step(out)
    run(train_in_a_process, 2, "ppo", out, data, {"resume": True})
    check_equal((log, models), result(out))


def test_the_saved_model_samples_as_the_adapted_one(run_of):
    """What a user loads is what was trained."""
    out = run_of("grpo", "float32")
    world = start()
    policy = common.load_policy(MODEL, world, args=LORA)
    optimizer = common.make_optimizer(policy, 1.0)
    common.load_checkpoint(common.read_checkpoint(out), {"policy": policy}, {"policy": optimizer})
    saved = common.load_policy(out / "model", world)
    tokenizer = common.load_tokenizer(MODEL)
    drawn = []
    for model in (policy, saved):
        texts = common.sample(model, tokenizer, PROMPTS, n=4, max_new_tokens=12, seed=1).texts
        drawn.append(texts)
    assert drawn[0] == drawn[1]


# --- Memory, learning rates and mistakes ---


@pytest.mark.parametrize("learning, frozen", [(1, 0), (2, 0), (1, 1), (0, 1)])
def test_the_memory_estimate_counts_one_base_and_what_learns(learning, frozen):
    config = common.read_config(MODEL)
    H, M = config.hidden_size, config.intermediate_size
    adapters = config.num_hidden_layers * 4 * (4 * (H + H) + 3 * (H + M))
    plain, _ = common.lasting_memory(MODEL, start())
    world = common.World(0, 1, torch.device("cpu"), torch.bfloat16)
    count, needed = common.lasting_memory(MODEL, world, learning, frozen, LORA)
    assert count == plain
    bases = frozen + (learning > 0)
    assert needed == 16 * learning * adapters + 2 * bases * count


@pytest.mark.parametrize("name", ["reinforce", "ppo", "grpo", "dpo", "reward_model"])
def test_the_default_learning_rate_is_ten_times_that_of_full_training(name):
    module = importlib.import_module(name)
    for model in (str(MODEL), str(TINY)):
        flags = {"model": model, "data": "mine.jsonl"}
        full = module.resolve(module.Args(**flags))
        with mock.patch.object(common, "empty_model"):
            adapted = module.resolve(module.Args(**flags, lora_rank=8))
            given = module.resolve(module.Args(**flags, lora_rank=8, learning_rate=1e-4))
        factor = 3 if name == "reward_model" and model == str(MODEL) else 10
        assert adapted.learning_rate == pytest.approx(factor * full.learning_rate)
        assert given.learning_rate == 1e-4
        if name == "ppo":
            assert adapted.critic_learning_rate == pytest.approx(10 * full.critic_learning_rate)


MISTAKES = {
    "--lora_rank -1: must be 0 or more": {"lora_rank": -1},
    "--lora_rank 129: above the width": {"lora_rank": 129},
    "--lora_alpha 0.0: must be above 0": {"lora_alpha": 0.0},
    "--ref_update_every: with --lora_rank": {"ref_update_every": 2},
    "has no nn.Linear in its blocks, but Conv1D": {"model": "gpt2"},
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_a_mistake_is_said_and_nothing_is_written(sentence, data, tmp_path, capsys):
    changes = dict(MISTAKES[sentence])
    if "model" in changes:
        family("gpt2").save_pretrained(tmp_path / "gpt2")
        make_tokenizer().save_pretrained(tmp_path / "gpt2")
        changes["model"] = str(tmp_path / "gpt2")
    with pytest.raises(SystemExit) as stop:
        train("grpo", tmp_path / "run", data, "float32", **changes)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_width_itself_is_a_rank(tmp_path):
    args = types.SimpleNamespace(lora_rank=128, lora_alpha=8.0)
    assert common.empty_model(MODEL, args).lora.rank == 128


@pytest.mark.parametrize("changes", [{"lora_rank": 8}, {"lora_rank": 0}, {"lora_alpha": 4.0}])
def test_a_run_is_not_resumed_with_other_adapters(changes, run_of, data, capsys):
    out = run_of("reinforce", "float32")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        train("reinforce", out, data, "float32", resume=True, **changes)
    (name,) = changes
    assert stop.value.code == 2 and f"--resume: --{name} is" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_sampling_needs_nothing_but_the_models_forward(tmp_path):
    """A forward reads no number back from the device: it can be captured in a CUDA graph."""
    family("llama").save_pretrained(tmp_path)
    policy = load_moved(tmp_path, start())
    layer = policy.lora.layers[0].to("meta")
    assert layer(torch.zeros(2, 3, 32, device="meta")).shape == (2, 3, 32)
