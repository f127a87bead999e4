"""DPO on the model's own samples, and on somebody else's: the same prompts, as many pairs, the same flags.

    python tests/bench/on_policy.py                     # about fifteen minutes on 2 cores

Three sets of pairs on the same prompts:

    own        of 4 samples of the model that is trained, the best and the worst by `position` (the bundled pairs)
    foreign    the same of another model, made by the same recipe from another seed
    corrected  the right answer, and the worst sample of that other model: chosen sides better than either model's

A prompt is taken where all three have a pair. Writes on_policy.json and on_policy.md: held-out greedy exact match.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "tiny"
sys.path[:0] = [str(HERE.parents[1]), str(TINY)]
import make

import common


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    other: int = 100
    """the other model's seed"""


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sets_of_pairs(folder, other):
    """The three sets, on the same prompts, as files."""
    make.main(make.Args(out=folder / "other", seed=other))
    model, own = (
        common.load_policy(folder / "other" / "model", common.start("cpu")),
        read(TINY / "pairs_train.jsonl"),
    )
    theirs = {r["prompt"]: r for r in make.pairs(model, own, other)}
    rows = [
        r for r in own if r["prompt"] in theirs and theirs[r["prompt"]]["rejected"] != r["answer"]
    ]
    foreign = [theirs[r["prompt"]] for r in rows]
    sets = {
        "own": rows,
        "foreign": foreign,
        "corrected": [r | {"chosen": r["answer"]} for r in foreign],
    }
    for name, pairs in sets.items():
        make.write(folder / f"{name}.jsonl", pairs)
    return {
        name: sum(r["chosen"] == r["answer"] for r in pairs) / len(pairs)
        for name, pairs in sets.items()
    }, len(rows)


def main(args):
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        right, count = sets_of_pairs(folder, args.other)
        for seed in args.seeds:
            for name in right:  # in turns
                out = folder / f"{name}-{seed}"
                command = [
                    sys.executable,
                    str(HERE.parents[1] / "dpo.py"),
                    "--data",
                    str(folder / f"{name}.jsonl"),
                ]
                command += [
                    "--eval_data",
                    str(TINY / "pairs_test.jsonl"),
                    "--eval_prompts",
                    str(TINY / "sort_test.jsonl"),
                ]
                subprocess.run(
                    [*command, "--seed", str(seed), "--out", str(out)],
                    check=True,
                    capture_output=True,
                )
                metrics = read(out / "metrics.jsonl")
                curve = [(m["step"], m["eval/exact"]) for m in metrics if "eval/exact" in m]
                row = {
                    "pairs": name,
                    "seed": seed,
                    "held_out": curve,
                    "accuracy": metrics[-1]["eval/accuracy"],
                }
                runs.append(
                    row | {k: metrics[-1][k] for k in ("logprobs/chosen", "logprobs/rejected")}
                )
                print(runs[-1], flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    result = {**versions, "pairs": count, "chosen_right": right, "runs": runs}
    (HERE / "on_policy.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        "| pairs | chosen sides that are right | exact match, each seed | mean |",
        "|---|---|---|---|",
    ]
    for name in right:
        last = [r["held_out"][-1][1] for r in runs if r["pairs"] == name]
        scores = ", ".join(f"{x:.2f}" for x in last)
        lines.append(f"| {name} | {right[name]:.2f} | {scores} | {statistics.mean(last):.2f} |")
    (HERE / "on_policy.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
