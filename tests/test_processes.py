"""One process and two: the same gradient, the same weights, the same samples (field notes, test 3)."""

import importlib
import json
import os
import time
import types

import pytest
import torch
from conftest import family, load_scorer, make_tokenizer
from processes import run

import common
from common import load_policy, make_optimizer, sample, start, whole

BATCH = torch.randint(3, 48, (6, 10), generator=torch.Generator().manual_seed(0))
LENGTHS = [10, 9, 10, 3, 2, 4]  # tokens that count: the first half of the rows has 29, the second 9


def stand_in_loss(model, rows):
    """Mean log-probability over the tokens of the WHOLE batch: each process divides by the global count."""
    ids, total = BATCH[rows], sum(n - 1 for n in LENGTHS)
    logprobs = (
        model(input_ids=ids)
        .logits.float()
        .log_softmax(-1)[:, :-1]
        .gather(2, ids[:, 1:, None])[..., 0]
    )
    mask = torch.arange(1, 10) < torch.tensor([LENGTHS[r] for r in rows])[:, None]
    return -(logprobs * mask).sum() / total


def one_step(folder, out, checkpointing):
    world = start("cpu", seed=0)
    model = load_policy(folder, world, gradient_checkpointing=checkpointing)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    rows = list(range(6))[world.rank * 6 // world.size : (world.rank + 1) * 6 // world.size]
    # micro-batches of two unequal sizes, as a token budget makes them
    for part in (rows[:1], rows[1:]):
        stand_in_loss(model, part).backward()
    grads = {k: whole(p.grad).clone() for k, p in model.named_parameters()}
    norm = common.clip_gradients(model, 0.01)
    optimizer = make_optimizer(model, 0.1)
    # Adam divides a gradient by its own size: one of rounding alone would move its weight by
    # the whole rate, up or down. With eps at the size of the gradients here it moves little.
    for group in optimizer.param_groups:
        group["eps"] = 1e-3
    optimizer.step()
    common.save_checkpoint(out, world, 1, {"policy": model}, {"policy": optimizer})
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(out / "tokenizer")
    common.save_model(model, tokenizer, out / "model", world)
    s = sample(model, tokenizer, [[5, 6], [7, 8, 9, 10]], n=2, max_new_tokens=6, seed=3)
    # after sampling the model is sharded again and trains on
    optimizer.zero_grad()
    stand_in_loss(model, rows).backward()
    again = {k: whole(p.grad).clone() for k, p in model.named_parameters()}
    if world.rank == 0:
        torch.save(
            {"grads": grads, "norm": norm, "ids": s.ids, "logprobs": s.logprobs, "again": again},
            out / "result.pt",
        )


def close(a, b, tolerance=1e-6):
    for k in a:
        assert (a[k] - b[k]).norm() <= tolerance * max(b[k].norm(), 1e-3), k


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "mamba"])  # tied head and biases; blocks inside blocks
def test_two_processes_and_one_have_the_same_gradient(name, checkpointing, tmp_path):
    """FSDP2 averages over processes: a loss over global counts would come out halved (trl 3021 and many more)."""
    if name == "mamba" and checkpointing:
        pytest.skip("recurrent models are not checkpointed")
    family(name, tie_word_embeddings=True).save_pretrained(tmp_path / "start")
    for size in (1, 2):
        (tmp_path / str(size)).mkdir()
    one_step(tmp_path / "start", tmp_path / "1", checkpointing)
    run(one_step, 2, tmp_path / "start", tmp_path / "2", checkpointing)
    one, two = (torch.load(tmp_path / n / "result.pt") for n in "12")
    close(two["grads"], one["grads"])
    assert abs(two["norm"] / one["norm"] - 1) < 1e-6
    close(two["again"], one["again"], 1e-5)
    assert torch.equal(two["ids"], one["ids"])
    torch.testing.assert_close(two["logprobs"], one["logprobs"], atol=1e-5, rtol=0)


def save_and_count(folder, out):
    """How many weights this process copies to the CPU to save a model and a checkpoint."""
    world, count, copy = start("cpu"), [], torch.Tensor.cpu
    model = load_policy(folder, world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", lambda tensor: count.append(tensor) or copy(tensor))
        common.save_checkpoint(out, world, 1, {"policy": model}, {})
        common.save_model(model, make_tokenizer(), out / "model", world)
    weights = [tensor for tensor in count if tensor.is_floating_point()]  # no messages
    (out / f"{world.rank}").write_text(str(len(weights)))


def test_only_the_process_that_writes_copies_whole_weights_to_the_cpu(tmp_path):
    """All take part in gathering them; on a machine of eight GPUs eight copies would be made, seven for nothing."""
    model = family("llama")
    model.save_pretrained(tmp_path / "start")
    run(save_and_count, 2, tmp_path / "start", tmp_path)
    counts = [int((tmp_path / n).read_text()) for n in "01"]
    assert counts == [2 * len(list(model.parameters())), 0]


def sample_and_train(folder, out, dtype):
    """Gradients without sampling, and after it, of models that have run nothing else."""
    world, tokenizer = start("cpu", dtype), make_tokenizer()
    assert common.is_sharded(world)
    prompts = [[5, 6], [7, 8, 9, 10]]
    grads, drawn = [], []
    for order in ("train", "sample train", "train sample train sample train"):
        model = load_policy(folder, world)
        for what in order.split():
            if what == "sample":
                with torch.profiler.profile() as seen:
                    drawn.append(sample(model, tokenizer, prompts, n=2, max_new_tokens=6, seed=3))
                events = {event.key: event.count for event in seen.key_averages()}
                forwards = 1 + max(
                    s.ids.shape[1] for s in drawn
                )  # the root's hooks run in each, and no block's
                assert 0 < events["FSDP::pre_forward"] <= forwards
            else:
                model.zero_grad()
                with torch.profiler.profile() as seen:
                    stand_in_loss(model, [world.rank]).backward()
                assert "FSDP::pre_forward" in {event.key for event in seen.key_averages()}
                grads.append({k: whole(p.grad) for k, p in model.named_parameters()})
        assert not any(p.grad is None for p in model.parameters())
    for other in grads[1:]:
        assert all(torch.equal(other[k], grads[0][k]) for k in other)
    for s in drawn[1:]:
        assert torch.equal(s.ids, drawn[0].ids) and torch.equal(s.logprobs, drawn[0].logprobs)
    (out / f"{world.rank}").touch()


@pytest.mark.parametrize("size, dtype", [(1, "bfloat16"), (2, "float32")])
def test_sampling_runs_none_of_fsdps_hooks_and_training_after_it_is_as_before(
    size, dtype, tmp_path
):
    """The hooks take time of the CPU for every token. They are private attributes of torch's modules, and a
    forward that trained without them would leave every gradient where it is."""
    family("qwen2", tie_word_embeddings=True).save_pretrained(tmp_path / "start")
    run(sample_and_train, size, tmp_path / "start", tmp_path, dtype)
    assert {p.name for p in tmp_path.iterdir()} == {"start", *map(str, range(size))}


def test_a_model_without_blocks_is_refused_and_not_left_untrained(tmp_path, capfd):
    """With the root as the only unit FSDP2 would never reduce a gradient, and no weight would move."""
    import transformers

    config = transformers.BioGptConfig(
        vocab_size=48,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
    )
    model = transformers.BioGptForCausalLM(config)
    if model._no_split_modules:
        pytest.skip("this version of transformers names its blocks")
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match="exit code 2"):
        run(only_load, 2, tmp_path)
    assert "names no blocks" in capfd.readouterr().err


def only_load(folder):
    load_policy(folder, start("cpu"))


def test_saved_on_two_processes_loaded_on_one(tmp_path):
    """Weights and Adam's moments are saved whole, so another number of processes takes them up."""
    from transformers import AutoModelForCausalLM

    family("llama").save_pretrained(tmp_path / "start")
    run(one_step, 2, tmp_path / "start", tmp_path, False)
    world = start("cpu")
    model = load_policy(tmp_path / "start", world)
    optimizer = make_optimizer(model, 1.0)
    state = common.read_checkpoint(tmp_path)
    assert state["step"] == 1 and state["world"] == 2
    common.load_checkpoint(state, {"policy": model}, {"policy": optimizer})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert type(plain).__name__ == "LlamaForCausalLM" and plain.config.architectures == [
        "LlamaForCausalLM"
    ]
    for (k, a), (_, b) in zip(model.state_dict().items(), plain.state_dict().items()):
        assert torch.equal(a, b), k
    moments = state["optimizers"]["policy"]
    for i, p in enumerate(model.parameters()):
        assert moments[i]["exp_avg"].shape == p.shape and torch.equal(
            optimizer.state[p]["exp_avg"], moments[i]["exp_avg"]
        )
        assert (
            optimizer.state[p]["exp_avg_sq"].abs().sum() > 0
            and optimizer.state[p]["step"].item() == 1
        )


def train(flags):
    import reinforce

    reinforce.train(reinforce.Args(device="cpu", **flags))


def test_reinforce_on_two_processes_is_reinforce_on_one(tmp_path):
    """The same global batch (demonstrations, so that nothing is drawn), unequal lengths per process, a micro-batch budget
    that gives the processes unequal numbers of parts: the same weights; and saved on two, resumed on one."""
    rows = [
        {"prompt": "5" * (1 + i % 4) + "=", "answer": "7" * (1 + (5 * i) % 11)} for i in range(8)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = {
        "demos": str(tmp_path / "d.jsonl"),
        "prompts_per_step": 8,
        "steps": 3,
        "tokens_per_micro_batch": 30,
        "eval_data": "",
    }
    train(flags | {"out": str(tmp_path / "one")})
    run(train, 2, flags | {"out": str(tmp_path / "two")})
    one, two = (common.read_checkpoint(tmp_path / n)["models"]["policy"] for n in ("one", "two"))
    for k in one:
        assert (one[k] - two[k]).abs().max() < 1e-5, k
    logs = [
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    for a, b in zip(*logs):
        for k in ("loss", "grad_norm", "entropy", "length"):
            assert abs(a.get(k, 0) - b.get(k, 0)) < 1e-3 * max(1, abs(a.get(k, 0))), k
    train(flags | {"out": str(tmp_path / "two"), "resume": True, "steps": 4})
    assert common.read_checkpoint(tmp_path / "two")["step"] == 4


def test_reinforce_samples_and_evaluates_on_two_processes(tmp_path):
    """Sharded policy and reference start alike to the last bit; prompts are shared out, none twice; one writer."""
    flags = {
        "prompts_per_step": 4,
        "samples_per_prompt": 4,
        "steps": 2,
        "max_new_tokens": 8,
        "tokens_per_micro_batch": 60,
        "eval_every": 1,
    }
    run(train, 2, flags | {"out": str(tmp_path / "two")})
    log = [json.loads(x) for x in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert (
        [m["step"] for m in log] == [0, 1, 2]
        and log[1]["kl/ref"] == 0
        and log[1]["ratio/first"] == 0
    )
    assert log[1]["kl/sample"] < 1e-5
    assert log[0]["eval/exact"] * 512 == pytest.approx(160, abs=1), "that of the greedy completions"
    assert (tmp_path / "two" / "model" / "model.safetensors").is_file()


def grpo_gradient(folder, out, dtype="float32"):
    """The gradient of one GRPO step for every aggregation, with prompts shared (two forwards before one backward) and not."""
    import grpo

    world = start("cpu", dtype, seed=0)
    model = load_policy(folder, world)
    model.generation_config.eos_token_id = [1, 5, 9, 20]
    prompts = [[7, 12, 3], [5, 9, 11, 30, 31, 14], [6], [33, 21]]
    s = sample(
        model, make_tokenizer(), prompts, n=4, max_new_tokens=8, seed=3
    )  # the same on every process
    A = torch.randn(16, generator=torch.Generator().manual_seed(0))
    mine = list(range(16))[world.rank * 16 // world.size : (world.rank + 1) * 16 // world.size]
    results = {}
    for aggregate in ("sequence", "token", "constant"):
        weights = torch.zeros_like(s.logprobs)
        weights[mine] = grpo.token_weights(s.mask[mine], aggregate, 8, world)
        for group in (1, 4):
            s.rows_per_prompt = group
            for part in grpo.micro_batches(mine, s.mask[mine].any(1), s, 40, world):
                logprobs, _ = grpo.token_logprobs(model, s, part, 1.0)
                w = weights[part, : logprobs.shape[1]]
                rows = torch.tensor(part)
                old = logprobs.detach() + 0.4 * torch.sin(
                    torch.arange(logprobs.shape[1]) + rows[:, None]
                )
                loss = grpo.clipped_loss((logprobs - old).exp(), A[rows, None], w, 0.2, 0.2)
                (loss + 0.1 * (grpo.k3(logprobs, old) * w).sum()).backward()
            results[aggregate, group] = {
                k: whole(p.grad).clone() for k, p in model.named_parameters()
            }
            model.zero_grad()
    if world.rank == 0:
        torch.save({"results": results, "ids": s.ids}, out)


def test_two_processes_and_one_have_the_same_grpo_gradient(tmp_path):
    """For every aggregation, unequal lengths and unequal numbers of micro-batches; prompts shared or not."""
    family("llama").save_pretrained(tmp_path / "start")
    grpo_gradient(tmp_path / "start", tmp_path / "1.pt")
    run(grpo_gradient, 2, tmp_path / "start", tmp_path / "2.pt")
    one, two = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / "2.pt")
    assert torch.equal(one["ids"], two["ids"])
    for case, grads in one["results"].items():
        close(two["results"][case], grads, 1e-5)
        close(grads, one["results"][case[0], 1], 1e-4)


def test_two_processes_and_one_have_the_same_grpo_gradient_in_bfloat16(tmp_path):
    """What GPUs compute: up to the rounding of a batch of another shape, and with prompts shared or not."""
    family("llama").save_pretrained(tmp_path / "start")
    for size in (1, 2):
        run(grpo_gradient, size, tmp_path / "start", tmp_path / f"{size}.pt", "bfloat16")
    one, two = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / "2.pt")

    def flat(grads):
        return torch.cat([g.flatten() for g in grads.values()])

    for case, grads in one["results"].items():
        size = flat(grads).norm()
        assert (flat(two["results"][case]) - flat(grads)).norm() < 0.05 * size, case
        assert (flat(one["results"][case[0], 1]) - flat(grads)).norm() < 0.05 * size, case


def train_grpo(flags):
    import grpo

    grpo.train(grpo.Args(device="cpu", **flags))


def grpo_model():
    import grpo

    return grpo.Args.model


def test_grpo_on_two_processes_draws_again_moves_its_reference_and_resumes_on_one(tmp_path):
    flags = {
        "prompts_per_step": 4,
        "steps": 2,
        "max_new_tokens": 8,
        "beta": 0.1,
        "ref_update_every": 1,
        "scale": "batch",
        "drop_equal_groups": True,
        "eval_samples": 2,
        "eval_every": 10,
        "warmup": 0,
        "learning_rate": 1e-3,
        "out": str(tmp_path / "two"),
    }
    run(train_grpo, 2, flags)
    log = [json.loads(x) for x in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in log] == [0, 1, 2] and log[1]["kl/ref"] == log[2]["kl/ref"] == 0, (
        "the reference is the policy"
    )
    assert 0 < log[0]["eval/pass@1"] < log[0]["eval/pass@2"]
    saved = common.read_checkpoint(tmp_path / "two")["models"]
    assert all(torch.equal(saved["reference"][k], saved["policy"][k]) for k in saved["policy"])
    before = dict(load_policy(grpo_model(), start("cpu")).named_parameters())
    assert all(not torch.equal(saved["policy"][k], before[k]) for k in before), (
        "two processes learn, too"
    )
    train_grpo(flags | {"resume": True, "steps": 3})
    assert common.read_checkpoint(tmp_path / "two")["step"] == 3


def train_reward_model(flags):
    import reward_model

    reward_model.train(reward_model.Args(device="cpu", **flags))


def test_a_reward_model_on_two_processes_is_one_on_one(tmp_path):
    """The same weights, evaluation and folded head; unequal lengths, parts that one process has and the other not; saved on two,
    resumed on one; best-of-N with more processes than some have prompts."""
    import reward_model

    lines = (reward_model.TINY / "pairs_train.jsonl").read_text().splitlines()[:15]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    prompts = (reward_model.TINY / "sort_test.jsonl").read_text().splitlines()[:1]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    flags = {
        "data": str(tmp_path / "pairs.jsonl"),
        "eval_data": str(tmp_path / "pairs.jsonl"),
        "policy": str(reward_model.TINY / "model"),
        "eval_prompts": str(tmp_path / "prompts.jsonl"),
        "best_of": (1, 2),
        "max_new_tokens": 8,
        "pairs_per_step": 8,
        "steps": 3,
        "tokens_per_micro_batch": 60,
        "learning_rate": 1e-4,
    }
    train_reward_model(flags | {"out": str(tmp_path / "one")})
    run(train_reward_model, 2, flags | {"out": str(tmp_path / "two")})
    one, two = (common.read_checkpoint(tmp_path / n)["models"]["model"] for n in ("one", "two"))
    for k in one:
        assert (one[k] - two[k]).abs().max() < 1e-5, k
    logs = [
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    for a, b in zip(*logs):
        for k in (
            "loss",
            "accuracy",
            "margin",
            "grad_norm",
            "eval/accuracy",
            "eval/margin",
            "eval/calibration",
        ):
            assert abs(a.get(k, 0) - b.get(k, 0)) < 1e-3 * max(1, abs(a.get(k, 0))), k
    assert logs[1][-1]["best_of/kl@2"] > 0 and len(logs[0]) == len(logs[1]) == 5
    scores = [
        load_scorer(str(tmp_path / n / "model"), start("cpu"))(["12578"], [{"prompt": "52817="}])
        for n in ("one", "two")
    ]
    assert abs(scores[0][0] - scores[1][0]) < 1e-3, "the folded heads"
    train_reward_model(flags | {"out": str(tmp_path / "two"), "resume": True, "steps": 4})
    assert common.read_checkpoint(tmp_path / "two")["step"] == 4


def train_ppo(flags):
    """PPO on completions that do not depend on who draws them, so that one process and two have the same global batch."""
    import ppo

    def stand_in(model, tokenizer, prompts, *, n=1, **settings):
        texts = [
            p[::-1] + p[: 1 + len(p) // 2] + [tokenizer.eos_token_id]
            for p in prompts
            for _ in range(n)
        ]
        return common.as_samples(
            [p for p in prompts for _ in range(n)], texts, tokenizer, start("cpu")
        )

    honest, common.sample = common.sample, stand_in
    try:
        ppo.train(ppo.Args(device="cpu", **flags))
    finally:
        common.sample = honest


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_ppo_on_two_processes_is_ppo_on_one(critic, tmp_path):
    """Actor, critic and both optimizers; whitening, the KL stop and token means are global; parts that one process has and the
    other not; saved on two, resumed on one."""
    rows = [{"prompt": f"{'92417'[: 1 + i % 5]}=", "answer": "1"} for i in range(8)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "r.py").write_text(
        "def reward(completion, row):\n    return len(completion) * 0.3 - len(row['prompt']) ** 0.5\n"
    )
    flags = {
        "data": str(tmp_path / "d.jsonl"),
        "eval_data": "",
        "reward": f"{tmp_path}/r.py:reward",
        "critic": critic,
        "prompts_per_step": 8,
        "steps": 4,
        "epochs": 3,
        "minibatches": 1,
        "tokens_per_micro_batch": 40,
        "warmup": 0,
        "schedule": "constant",
        "kl_stop": 1.0,
        "critic_warmup": 1,
    }
    train_ppo(flags | {"out": str(tmp_path / "one")})
    run(train_ppo, 2, flags | {"out": str(tmp_path / "two")})
    saved = [common.read_checkpoint(tmp_path / n)["models"] for n in ("one", "two")]
    before = dict(load_policy(grpo_model(), start("cpu")).named_parameters())
    assert all(not torch.equal(saved[1]["policy"][k], before[k]) for k in before), (
        "two processes learn, too"
    )
    for which in ("policy", "critic"):
        for k, a in saved[0][which].items():
            # of the way it has come: Adam makes a step of the size of the rate out of a gradient that is 0 but for rounding
            way = a - before[k] if which == "policy" else a
            assert (a - saved[1][which][k]).norm() < 1e-3 * way.norm(), (which, k)
    logs = [
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    for a, b in zip(*logs, strict=True):
        for k in (
            "reward",
            "loss",
            "value/loss",
            "value/explained",
            "returns",
            "kl/ref",
            "kl/old",
            "updates",
            "grad_norm",
        ):
            assert abs(a.get(k, 0) - b.get(k, 0)) < 1e-3 * max(1, abs(a.get(k, 0))), k
    assert logs[0][-1]["value/explained"] > 0.05, "and the critic has learnt something"
    train_ppo(flags | {"out": str(tmp_path / "two"), "resume": True, "steps": 5})
    assert common.read_checkpoint(tmp_path / "two")["step"] == 5


def train_dpo(flags):
    import dpo

    dpo.train(dpo.Args(device="cpu", **flags))


def test_dpo_on_two_processes_is_dpo_on_one(tmp_path):
    """The same weights and numbers; the reference's scores are shared out and come back in order; saved on two, resumed on one."""
    import dpo

    lines = (dpo.TINY / "pairs_train.jsonl").read_text().splitlines()[:17]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    prompts = (dpo.TINY / "sort_test.jsonl").read_text().splitlines()[:3]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    flags = {
        "data": str(tmp_path / "pairs.jsonl"),
        "eval_data": str(tmp_path / "pairs.jsonl"),
        "eval_prompts": str(tmp_path / "prompts.jsonl"),
        "pairs_per_step": 8,
        "steps": 3,
        "tokens_per_micro_batch": 60,
        "schedule": "constant",
        "warmup": 0,
    }
    train_dpo(flags | {"out": str(tmp_path / "one")})
    run(train_dpo, 2, flags | {"out": str(tmp_path / "two")})
    one, two = (common.read_checkpoint(tmp_path / n)["models"]["policy"] for n in ("one", "two"))
    before = dict(load_policy(grpo_model(), start("cpu")).named_parameters())
    for k in one:
        assert (one[k] - two[k]).norm() < 1e-3 * (one[k] - before[k]).norm(), k
    logs = [
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    for a, b in zip(*logs, strict=True):
        for k in (
            "loss",
            "accuracy",
            "margin",
            "grad_norm",
            "eval/accuracy",
            "eval/margin",
            "eval/loss",
            "logprobs/chosen",
        ):
            if k == "accuracy" and a["step"] == 1:
                continue  # policy and reference are equal: which side is ahead is rounding
            assert abs(a.get(k, 0) - b.get(k, 0)) < 1e-3 * max(1, abs(a.get(k, 0))), k
    tables = [torch.load(tmp_path / n / "reference.pt", weights_only=True) for n in ("one", "two")]
    scores = [table["scores"] for table in tables]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=0, equal_nan=True)
    train_dpo(flags | {"out": str(tmp_path / "two"), "resume": True, "steps": 4})
    assert common.read_checkpoint(tmp_path / "two")["step"] == 4


def train_on_given_samples(everything, out):
    """All five scripts; what a rollout draws depends on the prompt alone, so that any number of processes has the same batches."""
    import importlib

    def stand_in(model, tokenizer, prompts, *, n=1, **settings):
        texts = [
            p[::-1] + p[: 1 + (len(p) + j) % len(p)] + [tokenizer.eos_token_id]
            for p in prompts
            for j in range(n)
        ]
        return common.as_samples(
            [p for p in prompts for _ in range(n)], texts, tokenizer, start("cpu")
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "sample", stand_in)
        patch.setattr(
            common.dist, "destroy_process_group", lambda: None
        )  # one group for all of them
        for script, flags in everything.items():
            module = importlib.import_module(script)
            module.train(module.Args(device="cpu", out=f"{out}/{script}", **flags))


def test_one_two_and_four_processes_make_the_same_weights(tmp_path):
    """Five steps of the same batches of the same samples; unequal lengths, so unequal numbers of micro-batches. With two steps of
    warm-up, because Adam's first step has the size of the rate however small a gradient is: without them, one of PPO's 650,000
    weights, whose first gradient is rounding, is off by 2e-5."""
    import dpo

    rows = [{"prompt": f"{'9241736'[: 3 + i % 5]}=", "answer": "1"} for i in range(8)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "r.py").write_text(
        "def f(completion, row):\n    return len(completion) * 0.3 - completion.count('2')\n"
    )
    (tmp_path / "p.jsonl").write_text(
        "\n".join((dpo.TINY / "pairs_train.jsonl").read_text().splitlines()[:16])
    )
    flags = {
        "steps": 5,
        "learning_rate": 2e-4,
        "tokens_per_micro_batch": 60,
        "warmup": 2,
        "eval_data": "",
    }
    rollouts = flags | {
        "data": f"{tmp_path}/d.jsonl",
        "prompts_per_step": 8,
        "reward": f"{tmp_path}/r.py:f",
        "beta": 0.05,
    }
    pairs = flags | {"data": f"{tmp_path}/p.jsonl", "pairs_per_step": 8, "eval_prompts": ""}
    everything = {
        "reinforce": rollouts | {"samples_per_prompt": 4},
        "grpo": rollouts | {"samples_per_prompt": 4},
        "ppo": rollouts | {"epochs": 1, "minibatches": 1},
        "dpo": pairs,
        "reward_model": pairs | {"policy": ""},
    }
    train_on_given_samples(everything, tmp_path / "1")
    for size in (2, 4):
        run(train_on_given_samples, size, everything, tmp_path / str(size))
    before = dict(load_policy(grpo_model(), start("cpu")).named_parameters())
    for script in everything:
        one, two, four = (common.read_checkpoint(tmp_path / n / script)["models"] for n in "124")
        for name, weights in one.items():
            for k, w in weights.items():
                assert max((w - other[name][k]).abs().max() for other in (two, four)) < 1e-5, (
                    script,
                    name,
                    k,
                )
        policy = next(iter(one.values()))
        assert all((policy[k] - w).abs().max() > 1e-4 for k, w in before.items() if k in policy), (
            f"{script} has learnt nothing"
        )


def fail_in_one(folder):
    world = start("cpu")

    def reward(completions, rows):
        if world.rank == 1:
            raise common.Stop("the reward of the second process failed")
        return [1.0]

    try:
        common.stop_together(reward, world)(["c"], [{}])
    except common.Stop as error:
        (folder / f"{world.rank}").write_text(str(error))


def test_a_reward_that_fails_in_one_process_stops_both(tmp_path):
    run(fail_in_one, 2, tmp_path)
    said = [(tmp_path / n).read_text() for n in "01"]
    assert said == ["the reward of the second process failed"] * 2, "the first process prints it"


def other_names_in_one(folder):
    world = start("cpu")
    mask = torch.ones(1, 1)
    samples = common.Samples(None, None, mask, mask, mask, mask[0], ["c"])
    score = common.checked(lambda c, row: row["value"], "r.py:f", world)
    values = [{"reward": 1.0, "form": 0.0}, {"reward": 1.0}, {"reward": 0.5, "form": 1}]
    said = []
    for other in values[1:]:
        try:
            score(samples, [{"prompt": "p", "value": other if world.rank else values[0]}])
        except common.Stop as error:
            said.append(str(error))
    (folder / f"{world.rank}").write_text("\n".join(said))


def test_all_processes_must_have_the_same_parts_of_a_reward(tmp_path):
    run(other_names_in_one, 2, tmp_path)
    said = [(tmp_path / n).read_text() for n in "01"]
    assert said[0] == said[1] and said[0].count("\n") == 0
    assert said[0].endswith(
        "the same names for all completions, returned (form, reward) and (reward)"
    )


def refuse(folder, ranks, words):
    rank = int(os.environ["RANK"])
    os.dup2(os.open(folder / f"said{rank}", os.O_WRONLY | os.O_CREAT), 2)
    if rank in ranks:
        common.fail(f"{words} {rank}")
    time.sleep(60)


@pytest.mark.parametrize("ranks", [(0, 1), (1,)])
def test_a_mistake_that_all_processes_find_is_printed_once(ranks, tmp_path):
    """The others are ended before they speak. One that is alone with its mistake says it."""
    with pytest.raises(Exception, match="exit code 2"):
        run(refuse, 2, tmp_path, ranks, "a mistake of")
    # the second may be ended before it opens its file
    said = [path.read_text() for path in sorted(tmp_path.glob("said*"))]
    assert "".join(said).strip() == f"error: a mistake of {ranks[0]}"


@pytest.mark.parametrize("script", ["reinforce", "ppo", "grpo", "dpo", "reward_model"])
def test_a_count_that_processes_cannot_share_names_those_near_it(script, capsys):
    module = importlib.import_module(script)
    takes_pairs = script in ("dpo", "reward_model")
    flags = {} if takes_pairs else {"minibatches": 1}
    world = common.World(0, 2, torch.device("cpu"), torch.float32)
    for count, near in ((1, "2 or 4"), (5, "4 or 6"), (31, "30 or 32")):
        flags["pairs_per_step" if takes_pairs else "prompts_per_step"] = count
        with pytest.raises(SystemExit):
            module.load_task(module.resolve(module.Args(**flags)), world)
        assert f"{count} must be a multiple of" in (said := capsys.readouterr().err)
        assert said.endswith(f"2 processes: {near}\n")


def fill_the_disk_of_the_first(folder):
    def write_model(*everything):
        raise common.Stop("no room for the model")

    world = start("cpu")
    model = load_policy(folder / "start", world)
    common.write_model = write_model
    try:
        common.save_model(model, make_tokenizer(), folder / "model", world)
    except common.Stop as error:
        (folder / f"{world.rank}").write_text(str(error))


def test_a_model_that_the_first_process_cannot_write_stops_both(tmp_path):
    """The other one must not wait for it."""
    family("llama").save_pretrained(tmp_path / "start")
    run(fill_the_disk_of_the_first, 2, tmp_path)
    assert [(tmp_path / n).read_text() for n in "01"] == ["no room for the model"] * 2


def keep_the_best_in_two(folder):
    """Only the first process can read the log, as if the disk of the other were late."""
    world = start("cpu")
    model = load_policy(folder / "start", world)
    args = types.SimpleNamespace(keep_best=True)
    out = folder / "run" if world.rank == 0 else folder / "nothing"
    for step, score in ((1, 0.1), (2, 0.5), (3, 0.4)):
        if world.rank == 0:
            with open(out / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "eval/reward": score}) + "\n")
        metrics = {"eval/reward": score}
        common.save_best(out, args, world, step, metrics, model, make_tokenizer())


def test_two_processes_agree_on_the_best_model(tmp_path):
    first = family("llama")
    first.save_pretrained(tmp_path / "start")
    (tmp_path / "run").mkdir()
    run(keep_the_best_in_two, 2, tmp_path)
    note = (tmp_path / "run" / "best" / "score.json").read_text()
    assert json.loads(note) == {"step": 2, "eval/reward": 0.5}
    world = common.World(0, 1, torch.device("cpu"), torch.float32)
    kept = load_policy(tmp_path / "run" / "best", world)
    for (name, p), (_, q) in zip(first.named_parameters(), kept.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert not (tmp_path / "nothing").exists()


def stop_an_evaluation_in_one(folder):
    """The signal reaches the second process only, in the second part of three."""
    world = start("cpu")
    args = types.SimpleNamespace(eval_every=1, steps=9)
    seen = []

    def held_out_scores():
        asked = (lambda: len(seen) == 2) if world.rank == 1 else (lambda: False)
        for part in common.until_stopped(range(3), world, asked):
            seen.append(part)
        return {"eval/reward": 1.0}

    found = common.scores_if_due(1, args, held_out_scores)
    (folder / f"{world.rank}").write_text(json.dumps([seen, found]))


def test_a_signal_to_one_process_ends_the_evaluation_of_both(tmp_path):
    run(stop_an_evaluation_in_one, 2, tmp_path)
    assert [json.loads((tmp_path / rank).read_text()) for rank in "01"] == [[[0, 1], {}]] * 2


def measure_in_one(folder):
    world, meter = start("cpu"), common.Meter()
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    meter.mean("all", rows[world.rank])
    meter.mean("second", rows, torch.full((2, 2), world.rank == 1))
    meter.mean("nowhere", rows, torch.zeros(2, 2))
    meter.sum("total", rows[world.rank].sum())
    meter.sum("total", torch.tensor(0.5))
    meter.max("largest", rows[world.rank])
    meter.max("largest", torch.zeros(3))
    (folder / f"{world.rank}").write_text(json.dumps(meter.result(world)))


def test_a_meter_has_the_mean_of_all_processes(tmp_path):
    """A process without rows has its share in the sums: none."""
    run(measure_in_one, 2, tmp_path)
    expected = {"all": 2.5, "second": 2.5, "total": 11.0, "largest": 4.0}
    for rank in "01":
        assert json.loads((tmp_path / rank).read_text()) == expected


def stop_one_of_two(folder):
    world = start("cpu")
    args = types.SimpleNamespace(steps=5, save_every=5, keep=1)
    try:
        common.save_if_due(folder, args, world, 1, {}, {}, lambda: world.rank == 1)
    except common.Ended as ended:
        (folder / f"{world.rank}").write_text(str(ended))


def test_a_signal_that_one_process_got_ends_both_after_they_have_saved(tmp_path):
    run(stop_one_of_two, 2, tmp_path)
    assert [p.name for p in common.checkpoints(tmp_path)] == ["000001.pt"]
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()


def resume_with_disks_of_their_own(everything, folder):
    """The first process sees the run; to the second its folder is empty."""
    import importlib

    world = start("cpu")
    honest = common.open_run
    own = "elsewhere" if world.rank else ""
    common.open_run = lambda *given: honest(*given) / own
    for script, flags in everything.items():
        module = importlib.import_module(script)
        try:
            module.train(module.Args(device="cpu", out=f"{folder}/{script}", resume=True, **flags))
        except SystemExit as stopped:
            (folder / f"{script}.{world.rank}").write_text(str(stopped.code))


def test_processes_that_see_different_checkpoints_stop_before_they_spoil_one(tmp_path, capfd):
    """The second process would begin at step 1, and the next save would write the mixed weights."""
    rollouts = dict.fromkeys(("reinforce", "ppo", "grpo"), {"steps": 9, "prompts_per_step": 8})
    pairs = dict.fromkeys(("dpo", "reward_model"), {"steps": 9, "pairs_per_step": 8})
    everything = rollouts | pairs
    for script in everything:
        (tmp_path / script / "checkpoint").mkdir(parents=True)
        (tmp_path / script / "args.json").write_text(json.dumps({"script": script}))
        torch.save({"step": 5}, tmp_path / script / "checkpoint" / "000005.pt")
    run(resume_with_disks_of_their_own, 2, everything, tmp_path)
    said = capfd.readouterr().err
    for script in everything:
        assert [(tmp_path / f"{script}.{rank}").read_text() for rank in range(2)] == ["2", "2"]
        assert (tmp_path / script / "checkpoint" / "000005.pt").exists()
    words = (
        "the last checkpoint is of step [5, 0], in the order of the processes; put --out on a disk"
    )
    assert said.count(words) == len(everything), said


def test_processes_that_see_different_scores_of_the_reference_stop(tmp_path, capfd):
    """The second process would score pairs that the first has, and wait for it without end."""
    import dpo

    lines = (dpo.TINY / "pairs_train.jsonl").read_text().splitlines()[:4]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    flags = {"data": f"{tmp_path}/pairs.jsonl", "steps": 1, "pairs_per_step": 4}
    flags |= {"eval_data": "", "eval_prompts": ""}
    train_dpo(flags | {"out": str(tmp_path / "dpo")})
    for checkpoint in common.checkpoints(tmp_path / "dpo"):
        checkpoint.unlink()
    run(resume_with_disks_of_their_own, 2, {"dpo": flags}, tmp_path)
    assert [(tmp_path / f"dpo.{rank}").read_text() for rank in range(2)] == ["2", "2"]
    assert "the reference has scored is [4, 0], in the order" in capfd.readouterr().err
