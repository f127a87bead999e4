"""What the first lines of a run should say: the scores before the first step, and the first step's numbers, of every script as it is
started without flags (but for --steps 1: a first step does not know how many follow).

    python tests/bench/first.py                        # a minute; writes first.json and first.md

Another machine rounds otherwise, and a completion drawn from 256 may differ; what is 0 or 1 here is so everywhere.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = ("reinforce", "ppo", "grpo", "dpo", "reward_model")
BEFORE = ("eval/exact", "eval/accuracy", "eval/loss")
NAMES = (
    "reward", "loss", "kl/ref", "kl/old", "kl/sample", "ratio/first", "ratio/mean", "clip/low", "clip/high", "entropy", "grad_norm",
    "value/explained", "value/loss", "length", "truncated", "equal_groups", "accuracy", "margin", "logprobs/chosen", "logprobs/rejected",
)  # fmt: skip


def measure(script):
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(HERE.parents[1] / f"{script}.py"), "--steps", "1", "--device", "cpu", "--out", out]
        command += ["--policy", "", "--eval_prompts", ""] if script == "reward_model" else []  # no best-of-N
        subprocess.run(command, check=True, capture_output=True)
        before, first = (json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()[:2])
    return {"before": {k: before[k] for k in BEFORE if k in before}, "first": {k: first[k] for k in NAMES if k in first}}


def shown(value):
    if value is None:
        return ""
    return f"{value:.0e}" if 0 < abs(value) < 1e-4 else f"{value:.3f}".rstrip("0").rstrip(".")


def table(found):
    lines = ["| | " + " | ".join(f"{s}.py" for s in found) + " |", "|---|" + "---|" * len(found)]
    for when, names in (("before", BEFORE), ("first", NAMES)):
        for name in names:
            values = [shown(found[s][when].get(name)) for s in found]
            if any(values):
                lines.append(f"| {'before: ' * (when == 'before')}`{name}` | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    found = {script: measure(script) for script in SCRIPTS}
    (HERE / "first.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "first.md").write_text(table(found))
    print(table(found))
