"""Rows whose tokens have no gradient are not computed: the same loss, gradient and weights as if they were."""

import importlib
import itertools
import json

import pytest
import torch
from conftest import ROOT
from processes import run as run_in_processes

import common
import grpo
import reinforce

TINY = ROOT / "tests" / "tiny"
SCRIPTS = {"grpo": grpo, "reinforce": reinforce}
REWARDS = """
def by_length(completion, row):
    # groups of prompts with 1 in their answer are equal; of the others, most rewards differ
    return 0.7 if "1" in row["answer"] else len(completion) % 3 * 0.3

def all_equal(completion, row):
    return 0.7

def first_half_equal(completion, row):
    return 0.7 if row["half"] == 0 else 0.1 * len(completion)
"""


def sgd(model, learning_rate):
    """In place of AdamW, whose moments move weights without a gradient, too."""
    weights = [p for p in common.at_rest(model).parameters() if p.requires_grad]
    return torch.optim.SGD(weights, lr=learning_rate)


def train(script, folder, everything, flags):
    """A short run, with `everything` one that computes every row -> logged numbers, weights, rows that went forward."""
    module, rows = SCRIPTS[script], []
    honest = module.token_logprobs

    def count(model, samples, part, *rest):
        rows.append(len(part))
        return honest(model, samples, part, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "token_logprobs", count)
        patch.setattr(common, "make_optimizer", sgd)
        if everything:
            name = "has_gradient" if script == "grpo" else "rows_to_train"
            patch.setattr(module, name, lambda x, *a: torch.ones(len(x), dtype=torch.bool))
        module.train(
            module.Args(
                **{"out": str(folder), "device": "cpu", "eval_data": "", "warmup": 0} | flags
            )
        )
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return log, common.read_checkpoint(folder)["models"]["policy"], sum(rows)


def same(tmp_path, script, **flags):
    """Both ways; returns the rows that each sent forward, and the log of the one that leaves rows out."""
    (tmp_path / "r.py").write_text(REWARDS)
    small = {
        "steps": 2,
        "prompts_per_step": 8,
        "samples_per_prompt": 4,
        "max_new_tokens": 10,
        "learning_rate": 0.01,
        "schedule": "constant",
        "reward": f"{tmp_path}/r.py:by_length",
    }
    full, wanted, all_rows = train(script, tmp_path / "full", True, small | flags)
    log, weights, rows = train(script, tmp_path / "fewer", False, small | flags)
    for a, b in zip(full[1:], log[1:], strict=True):
        for name in (
            "reward",
            "loss",
            "grad_norm",
            "length",
            "truncated",
            "equal_groups",
            "learning_rate",
        ):
            assert (name in a) == (name in b)
            assert b.get(name, 0) == pytest.approx(a.get(name, 0), rel=1e-5, abs=1e-6), name
    start = dict(common.load_policy(TINY / "model", common.start("cpu")).named_parameters())
    moved = max((wanted[k] - start[k]).abs().max() for k in wanted)
    assert moved > 1e-4, "the runs have learnt something"
    for k in wanted:
        assert (weights[k] - wanted[k]).abs().max() < 1e-5 * moved + 2e-7, k
    return all_rows, rows, log


@pytest.mark.parametrize("epochs, minibatches", [(1, 1), (2, 4)])
@pytest.mark.parametrize(
    "ratio, aggregate",
    [("token", "sequence"), ("token", "token"), ("token", "constant"), ("sequence", None)],
)
def test_grpo_without_the_rows_of_equal_groups_is_grpo(
    ratio, aggregate, epochs, minibatches, tmp_path
):
    all_rows, rows, log = same(
        tmp_path, "grpo", ratio=ratio, aggregate=aggregate, epochs=epochs, minibatches=minibatches
    )
    passes = epochs + (epochs * minibatches > 1)
    assert all_rows == 2 * 32 * passes
    trained = sum(round((1 - m["equal_groups"]) * 32) for m in log[1:])
    assert 0 < trained < 48 and rows == trained * passes, (
        "no row of another group was computed, and none twice"
    )


@pytest.mark.parametrize(
    "flags, fewer",
    [
        ({"keep_max": True}, True),
        ({"mask_truncated": True, "max_new_tokens": 8}, True),
        ({"beta": 0.1}, False),  # the KL has a gradient in every row
        ({"beta": 0.1, "mask_truncated": True, "max_new_tokens": 8}, True),
        ({"scale": "batch", "minibatches": 2, "tokens_per_micro_batch": 60}, True),
        ({"drop_equal_groups": True}, False),
    ],
)
def test_what_else_leaves_rows_without_gradient(flags, fewer, tmp_path):
    all_rows, rows, _ = same(tmp_path, "grpo", **flags)
    assert rows < all_rows if fewer else rows <= all_rows


@pytest.mark.parametrize(
    "flags, fewer",
    [
        ({"beta": 0.0}, True),
        ({"beta": 0.0, "epochs": 2, "minibatches": 4}, True),
        (
            {"beta": 0.0, "baseline": "none", "minibatches": 2},
            True,
        ),  # a sample that is paid nothing has no gradient
        ({"beta": 0.0, "keep_max": True, "normalize": True}, True),
        ({"beta": 0.0, "baseline": "batch"}, False),
        ({"beta": 0.1, "minibatches": 2}, False),
    ],
)
def test_reinforce_without_the_rows_of_no_advantage_is_reinforce(flags, fewer, tmp_path):
    all_rows, rows, _ = same(tmp_path, "reinforce", **flags)
    assert rows < all_rows if fewer else rows == all_rows


@pytest.mark.parametrize(
    "script, flags",
    [("grpo", {}), ("grpo", {"epochs": 2, "minibatches": 2}), ("reinforce", {"beta": 0.0})],
)
def test_a_step_in_which_no_row_has_a_gradient_makes_no_update(script, flags, tmp_path):
    """AdamW with moments from an earlier step would move the weights at a gradient of 0, too."""
    (tmp_path / "r.py").write_text(REWARDS)
    flags = flags | {
        "prompts_per_step": 2,
        "samples_per_prompt": 4,
        "max_new_tokens": 6,
        "reward": f"{tmp_path}/r.py:all_equal",
    }
    module, steps = SCRIPTS[script], []

    class Counted(torch.optim.AdamW):
        def step(self, *args):
            steps.append(1)
            return super().step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            common, "make_optimizer", lambda model, rate: Counted(model.parameters(), lr=rate)
        )
        patch.setattr(common, "hidden_states", lambda *a: 1 / 0)
        patch.setattr(common, "check_head", lambda model: None)
        patch.setattr(common, "prompts_can_be_shared", lambda *a: True)
        module.train(
            module.Args(out=str(tmp_path / "run"), device="cpu", eval_data="", steps=2, **flags)
        )
    log = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert not steps
    for m in log[1:]:
        assert (
            m["loss"] == 0
            and m["grad_norm"] == 0
            and m.get("equal_groups", 1) == 1
            and m["reward"] == pytest.approx(0.7)
        )
        assert not m.keys() & {
            "entropy",
            "ratio/mean",
            "ratio/first",
            "kl/sample",
            "kl/old",
            "clip/low",
        }
    start = dict(common.load_policy(TINY / "model", common.start("cpu")).named_parameters())
    saved = common.read_checkpoint(tmp_path / "run")["models"]["policy"]
    assert all(torch.equal(saved[k], start[k]) for k in start)


def train_here(script, out, flags):
    """One of several processes; completions depend on the prompt alone, so that any number of processes has the same batches."""
    module = importlib.import_module(script)

    def stand_in(model, tokenizer, prompts, *, n=1, **settings):
        lengths = [(p, 1 + (len(p) + j) % (len(p) + 2)) for p in prompts for j in range(n)]
        texts = [
            [*itertools.islice(itertools.cycle(p[::-1]), length), tokenizer.eos_token_id]
            for p, length in lengths
        ]
        return common.as_samples([p for p, _ in lengths], texts, tokenizer, common.start("cpu"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "sample", stand_in)
        module.train(module.Args(device="cpu", out=str(out), **flags))


@pytest.mark.parametrize("reward", ["first_half_equal", "by_length", "all_equal"])
@pytest.mark.parametrize("script", ["grpo", "reinforce"])
def test_processes_with_unequal_numbers_of_rows_have_the_gradient_of_one(script, reward, tmp_path):
    """The first process has no row left with the first reward, and no process has one with the last."""
    (tmp_path / "r.py").write_text(REWARDS)
    count, step = (
        8,
        4,
    )  # rows in the file; prompts of a step, the first half of which is the first process's
    rows = [
        {"prompt": f"{'92417368'[i]}{'53' * (1 + i % 3)}=", "answer": str(i)} for i in range(count)
    ]
    order = [common.nth_row(count, i, 1) for i in range(2 * step)]
    for place, number in enumerate(order):
        rows[number]["half"] = place % step // (step // 2)
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = {
        "data": str(tmp_path / "d.jsonl"),
        "eval_data": "",
        "reward": f"{tmp_path}/r.py:{reward}",
        "prompts_per_step": step,
        "samples_per_prompt": 4,
        "steps": 2,
        "beta": 0.0,
        "tokens_per_micro_batch": 30,
        "learning_rate": 2e-4,
        "warmup": 2,
    }
    train_here(script, tmp_path / "1", flags)
    run_in_processes(train_here, 2, script, tmp_path / "2", flags)
    one, two = (common.read_checkpoint(tmp_path / n)["models"]["policy"] for n in "12")
    assert all((one[k] - two[k]).abs().max() < 1e-5 for k in one)
    logs = [
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in "12"
    ]
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        for k in a.keys() - {
            "time/sample",
            "time/reward",
            "time/train",
            "tokens_per_second",
            "memory_gib",
        }:
            assert b[k] == pytest.approx(a[k], rel=1e-3, abs=1e-5), k
    start = dict(common.load_policy(TINY / "model", common.start("cpu")).named_parameters())
    still = all(torch.equal(two[k], start[k]) for k in start)
    assert still == (reward == "all_equal")
