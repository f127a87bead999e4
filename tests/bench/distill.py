"""On-policy distillation beside GRPO: the bundled model learns from a model that grpo.py has trained.

    python tests/bench/distill.py                   # about half an hour on one core; goes on where it was stopped

The teacher is a default run of grpo.py, seed 1. The student is the bundled model, from which the teacher started, too:

    python reinforce.py --reward none --reference runs/distill/teacher/model --beta 1 --gamma 0 --steps 200

51,200 completions in each run, with three seeds at the script's learning rate, 3e-4, and one at 1e-3. It sees no answer and no reward.
The curves of GRPO are those of results.jsonl ("GRPO, one update", 200 steps, 2e-4, the best of five learning rates) and of
learning.json (400 steps, the default). Scores are greedy exact match on 512 held-out prompts. Writes distill.json and distill.md.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro

HERE = Path(__file__).resolve().parent
FLAGS = "--reward none --beta 1 --gamma 0 --steps 200 --eval_every 10 --save_every 200"
ROLLOUT = 256  # completions of a step: 32 prompts x 8
PLACES = (12_800, 25_600, 51_200)
RUNS = (("3e-4", 1), ("3e-4", 2), ("3e-4", 3), ("1e-3", 1))  # (learning rate, seed)
REACHED = 0.9


@dataclass
class Args:
    folder: str = "runs/distill"
    """of the runs"""


def call(script, out, *flags):
    """The numbers of a run on one thread, made now or earlier."""
    if not (out / "model").is_dir():
        command = [sys.executable, str(HERE.parents[1] / script), "--device", "cpu"]
        command += ["--out", str(out), *flags]
        if (out / "args.json").is_file():
            command.append("--resume")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def row_of(name, curves):
    """A line of the table. curves: one for each seed, [(completions, score), ...]."""
    cells = [name, str(len(curves))]
    for place in PLACES:
        cells.append(f"{statistics.mean(dict(curve)[place] for curve in curves):.3f}")
    firsts = []
    for curve in curves:
        first = next((x for x, score in curve if score >= REACHED), None)
        if first:
            firsts.append(f"{first:,}")
    return f"| {' | '.join([*cells, '; '.join(firsts) or 'not reached'])} |"


def table(runs):
    lines = [f"| method | seeds | {' | '.join(f'at {x:,}' for x in PLACES)} | completions to 0.9 |"]
    lines.append("|---|---|---|---|---|---|")
    for rate in dict.fromkeys(run["rate"] for run in runs):
        curves = [run["curve"] for run in runs if run["rate"] == rate]
        lines.append(row_of(f"distillation, learning rate {rate}", curves))
    results = [json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()]
    rows = [row for row in results if row["method"] == "GRPO, one update" and "right" in row]
    curves = [[(2560 * i, score) for i, score in enumerate(row["curve"])] for row in rows]
    lines.append(row_of("GRPO, 200 steps", curves))
    default = json.loads((HERE / "learning.json").read_text())["runs"]
    default = [run["held_out"] for run in default if run["command"] == "grpo.py"]
    curves = [[(step * ROLLOUT, score) for step, score in curve] for curve in default]
    lines.append(row_of("GRPO, 400 steps", curves))
    return "\n".join(lines) + "\n"


def main(args):
    folder = Path(args.folder)
    teacher = call("grpo.py", folder / "teacher", "--seed", "1")
    model = str(folder / "teacher" / "model")
    runs = []
    for rate, seed in RUNS:
        flags = [*FLAGS.split(), "--learning_rate", rate, "--seed", str(seed)]
        lines = call("reinforce.py", folder / f"{rate}-{seed}", "--reference", model, *flags)
        curve = [(m["step"] * ROLLOUT, m["eval/exact"]) for m in lines if "eval/exact" in m]
        kl = [round(m["kl/ref"], 3) for m in lines[1:]]
        runs.append({"rate": rate, "seed": seed, "curve": curve, "kl/ref": [kl[0], kl[-1]]})
        print(rate, seed, curve[-1], kl[0], kl[-1], flush=True)
    found = {"torch": torch.__version__, "transformers": transformers.__version__, "flags": FLAGS}
    found |= {"teacher": teacher[-1]["eval/exact"], "runs": runs}
    (HERE / "distill.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "distill.md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
