"""What the first lines of a run should say: the scores before the first step, and the first step's numbers, of every script as it is
started without flags (but for --steps 1: a first step does not know how many follow).

    python tests/bench/first.py                        # a minute; writes first.json and first.md
    python tests/bench/first.py MODEL                  # and how far sampler and trainer are apart for a model of your own

Another machine rounds otherwise, and a completion drawn from 256 may differ; on a CPU what is 0 or 1 here is so everywhere.
How far apart sampler and trainer are in bfloat16 (`kl/sample`) is measured on a CPU, too: the rounding is that of the format.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import common
import grpo

SCRIPTS = ("reinforce", "ppo", "grpo", "dpo", "reward_model")
BEFORE = ("eval/exact", "eval/accuracy", "eval/loss")
NAMES = (
    "reward", "loss", "kl/ref", "kl/old", "kl/sample", "ratio/first", "ratio/mean", "clip/low", "clip/high", "entropy", "grad_norm",
    "value/explained", "value/loss", "length", "truncated", "equal_groups", "accuracy", "margin", "logprobs/chosen", "logprobs/rejected",
)  # fmt: skip


def measure(script):
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable,
            str(HERE.parents[1] / f"{script}.py"),
            "--steps",
            "1",
            "--device",
            "cpu",
            "--out",
            out,
        ]
        command += (
            ["--policy", "", "--eval_prompts", ""] if script == "reward_model" else []
        )  # no best-of-N
        subprocess.run(command, check=True, capture_output=True)
        before, first = (
            json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()[:2]
        )
    return {
        "before": {k: before[k] for k in BEFORE if k in before},
        "first": {k: first[k] for k in NAMES if k in first},
    }


def apart(path, dtype):
    """`kl/sample` of the first 64 completions (of at most 22 tokens) that a model draws for the sorting task's prompts."""
    world = common.start("cpu", str(dtype)[6:])
    model, tokenizer = common.load_reference(path, world), common.load_tokenizer(path)
    prompts = [
        ids
        for ids, _ in common.load_prompts(
            str(grpo.TINY / "sort_test.jsonl"), "--data", tokenizer, grpo.Args(), ""
        )[:8]
    ]
    samples = common.sample(model, tokenizer, prompts, n=8, max_new_tokens=22, seed=0)
    samples.rows_per_prompt = 8
    with torch.no_grad():
        logprobs, _ = grpo.token_logprobs(model, samples, list(range(64)), 1.0)
    return (((logprobs - samples.logprobs).abs() * samples.mask).sum() / samples.mask.sum()).item()


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
                lines.append(
                    f"| {'before: ' * (when == 'before')}`{name}` | " + " | ".join(values) + " |"
                )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    found = {script: measure(script) for script in SCRIPTS}
    (HERE / "first.md").write_text(table(found))
    known = json.loads((HERE / "first.json").read_text()) if (HERE / "first.json").exists() else {}
    found["kl/sample"] = (
        known.get("kl/sample", {})
        | {  # what was measured of other models stays
            f"{name}, {str(dtype)[6:]}": apart(path, dtype)
            for name, path in (
                ("bundled model", str(grpo.TINY / "model")),
                *((Path(p).name, p) for p in sys.argv[1:]),
            )
            for dtype in (torch.float32, torch.bfloat16)
        }
    )
    (HERE / "first.json").write_text(json.dumps(found, indent=1) + "\n")
    print((HERE / "first.md").read_text(), found["kl/sample"])
