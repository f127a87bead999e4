"""Scripts as a newcomer starts them, until they have learnt (pytest tests -m learning)."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.learning


def scores(script, out, *flags):
    subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), "--out", str(out), *flags],
        check=True,
        cwd=out.parent,
    )
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [m["eval/exact"] for m in log if "eval/exact" in m]


def test_the_first_numbers_are_those_of_the_readme():
    """What is drawn may differ by a completion or two elsewhere; what is 0, 1 or log 2 may not."""
    sys.path.insert(0, str(ROOT / "tests" / "bench"))
    import first

    known = json.loads((ROOT / "tests" / "bench" / "first.json").read_text())
    for script in first.SCRIPTS:
        for when, numbers in first.measure(script).items():
            assert numbers.keys() == known[script][when].keys()
            for name, value in known[script][when].items():
                firm = (
                    value in (0.0, 1.0)
                    or name == "kl/sample"
                    or (script == "dpo" and not name.startswith("eval/exact"))
                )
                assert numbers[name] == pytest.approx(
                    value, rel=1e-3 if firm else 0.2, abs=1e-5 if firm else 0.02
                ), (
                    script,
                    name,
                )


def test_grpo_learns_to_sort(tmp_path):
    """The README's first command, whole."""
    curve = scores("grpo", tmp_path / "run")
    assert curve[0] <= 0.40 and curve[-1] >= 0.90, curve


def test_grpo_learns_to_sort_in_bfloat16(tmp_path):
    """The GPU's arithmetic. A quarter of the steps, because a processor without instructions for
    bfloat16 takes more than twenty minutes for all. (learning.py makes whole runs.)"""
    curve = scores("grpo", tmp_path / "run", "--dtype", "bfloat16", "--steps", "100")
    assert curve[0] <= 0.40 and curve[-1] >= 0.50, curve


def test_a_reward_model_learns_and_makes_best_of_n(tmp_path):
    command = [sys.executable, str(ROOT / "reward_model.py"), "--out", str(tmp_path / "run")]
    subprocess.run(command, check=True, cwd=tmp_path)
    log = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    last = {k: v for m in log for k, v in m.items()}
    assert (
        last["eval/accuracy"] >= 0.95 and last["best_of/true@16"] >= last["best_of/true@1"] + 0.20
    )


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_ppo_learns_to_sort(critic, tmp_path):
    """Shortened: from at most 0.40 to at least 0.60 in a third of the steps."""
    curve = scores(
        "ppo", tmp_path / "run", "--critic", critic, "--steps", "50", "--eval_every", "50"
    )
    assert curve[0] <= 0.40 and curve[-1] >= 0.60, curve


def test_dpo_learns_to_rank_and_to_sort(tmp_path):
    """Whole."""
    out = tmp_path / "run"
    curve = scores("dpo", out)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/accuracy"] >= 0.90 and curve[-1] >= curve[0] + 0.15, (curve, last)


def test_reinforce_learns_to_sort(tmp_path):
    """Shortened: from at most 0.40 to at least 0.60 in half the steps."""
    curve = scores("reinforce", tmp_path / "run", "--steps", "125")
    assert curve[0] <= 0.40 and curve[-1] >= 0.60, curve


@pytest.mark.parametrize(
    "command, least",
    [
        ("grpo --lora_rank 8", {"eval/exact": 0.85}),
        ("dpo --lora_rank 8", {"eval/exact": 0.41, "eval/accuracy": 0.85}),
        ("reinforce --lora_rank 8 --steps 125", {"eval/exact": 0.55}),
        ("ppo --lora_rank 8 --steps 50 --eval_every 50", {"eval/exact": 0.55}),
        ("ppo --lora_rank 8 --steps 50 --eval_every 50 --critic shared", {"eval/exact": 0.55}),
        ("reward_model --lora_rank 8 --policy= --eval_prompts=", {"eval/accuracy": 0.90}),
    ],
)
def test_adapters_learn_as_full_training_does(command, least, tmp_path):
    """The runs above with their thresholds, less 0.05."""
    script, *flags = command.split()
    scores(script, tmp_path / "run", *flags)
    log = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = {name: value for line in log for name, value in json.loads(line).items()}
    assert all(last[name] >= value for name, value in least.items()), last


def test_fine_tuning_on_demonstrations_learns_to_sort(tmp_path):
    curve = scores(
        "reinforce",
        tmp_path / "run",
        "--demos",
        str(ROOT / "tests" / "tiny" / "sort_train.jsonl"),
        "--steps",
        "150",
    )
    assert curve[0] <= 0.40 and curve[-1] >= 0.80, curve


@pytest.mark.parametrize(
    "command, least",
    [
        ("grpo.py --steps 100", {"eval/exact": 0.50}),
        ("ppo.py --steps 50 --eval_every 50", {"eval/exact": 0.60}),
        ("reinforce.py --steps 125", {"eval/exact": 0.60}),
        ("dpo.py", {"eval/exact": 0.46, "eval/accuracy": 0.90}),
        ("reward_model.py --policy= --eval_prompts=", {"eval/accuracy": 0.95}),  # without best-of-N
    ],
)
def test_two_processes_learn_as_one_does(command, least, tmp_path):
    """The runs above, or shorter ones, with their thresholds, by torchrun."""
    script, *flags = command.split()
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(ROOT / script),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*launch, *flags, "--device", "cpu", "--out", str(tmp_path / "run")],
        check=True,
        env=environment,
    )
    log = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    last = {k: v for m in log for k, v in m.items()}
    assert all(last[name] >= value for name, value in least.items()), last
