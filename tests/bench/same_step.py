"""Shows that a change of the code changed no result: `python tests/bench/same_step.py COMMIT`.

Runs the first steps of every script twice, with the code of COMMIT and with the code as it stands,
and compares what they log: the largest relative difference of loss, gradient norm and scores.
Rounding moves them by less than 1e-6 in float32. In bfloat16 it moves them by percents.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNS = [
    "grpo.py",
    "grpo.py --beta 0.04 --aggregate sequence --minibatches 2 --epochs 2 --ref_update_every 2",
    "grpo.py --ratio sequence --minibatches 4 --temperature 0.8 --eval_samples 4",
    "grpo.py --scale none --aggregate constant --keep_max --mask_truncated --max_new_tokens 8",
    "grpo.py --dtype bfloat16 --minibatches 2",
    "reinforce.py",
    "reinforce.py --baseline prompt --normalize --gamma 0.95 --epochs 2 --minibatches 2",
    "reinforce.py --dtype bfloat16",
    "ppo.py",
    "ppo.py --critic shared --kl_stop 0.001 --missing_eos_penalty 0.5 --max_new_tokens 8",
    "ppo.py --dtype bfloat16",
    "dpo.py",
    "dpo.py --loss ipo --sft_coef 0.1",
    "dpo.py --loss simpo",
    "dpo.py --dtype bfloat16",
    "reward_model.py",
    "reward_model.py --center 0.01",
    "reward_model.py --dtype bfloat16",
]
COMPARED = ("loss", "grad_norm", "value/loss", "reward", "accuracy", "eval/reward", "eval/accuracy")


def run(command, code, out):
    script, *flags = command.split()
    short = ["--steps", "3", "--device", "cpu", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(code / script), *flags, *short],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def main(commit):
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        git = ["git", "-C", str(ROOT)]
        subprocess.run([*git, "worktree", "add", "--detach", str(before), commit], check=True)
        try:
            for number, command in enumerate(RUNS):
                old = run(command, before, Path(folder) / f"{number}-old")
                new = run(command, ROOT, Path(folder) / f"{number}-new")
                largest = 0.0
                for a, b in zip(old, new, strict=True):
                    for name in COMPARED:
                        if name in a or name in b:
                            x = a.get(name, math.nan)
                            y = b.get(name, math.nan)
                            largest = max(largest, abs(x - y) / max(abs(x), 1e-3))
                print(f"{largest:8.1e}  {command}", flush=True)
                worst = max(worst, largest)
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(before)], check=True)
    print(f"{worst:8.1e}  largest relative difference")
    return worst < 1e-6


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(0 if main(sys.argv[1]) else 1)
