"""The methods beside each other: the sorting task, one start, as many completions for each, five seeds.

    pip install -r requirements.txt matplotlib
    python tests/bench/results.py                      # about four hours on 2 cores, one run on each; goes on where it was stopped
    python tests/bench/results.py --time               # two minutes, on a quiet machine, before or after
    python tests/bench/results.py --seeds 1 --methods "GRPO" "PPO, separate critic" --completions 2560 --out /tmp/few

Each online method draws 51,200 completions of training prompts; fine-tuning sees as many demonstrations, DPO as many sides of
pairs. Every other flag is the script's default, and the schedule fits the number of steps. A seed that fails or collapses counts. Best-of-N
draws from the start, by the score of a reward model trained on the bundled pairs. Seconds are steps times the median seconds of a
step, measured apart (--time: a few steps of each method, in turns, alone on all cores), because the runs keep each other company.
Writes results.json, results.md, results.png.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "tiny"
METHODS = {
    "fine-tuning on right answers": (
        "reinforce.py",
        256,
        "--demos",
        str(TINY / "sort_train.jsonl"),
        "--prompts_per_step",
        "256",
    ),
    "DPO": ("dpo.py", 128),
    "REINFORCE, no baseline": ("reinforce.py", 256, "--baseline", "none"),
    "REINFORCE, leave one out": ("reinforce.py", 256),
    "PPO, separate critic": ("ppo.py", 128),
    "PPO, shared critic": ("ppo.py", 128, "--critic", "shared"),
    "GRPO": ("grpo.py", 256),
    "GRPO as published": (
        "grpo.py",
        256,
        "--aggregate",
        "sequence",
        "--beta",
        "0.04",
        "--kl",
        "k3",
    ),
    "Dr. GRPO": ("grpo.py", 256, "--scale", "none", "--aggregate", "constant"),
    "reward model": ("reward_model.py", None),  # for best-of-N
}
REACHED = 0.8


@dataclass
class Args:
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    jobs: int = 2
    """runs at once, each on one thread"""
    completions: int = 51_200
    out: str = str(HERE)
    time: bool = False


def call(method, seed, steps, out, threads, *more):
    """-> (the lines of a run's metrics.jsonl, its exit status)."""
    script, _, *flags = METHODS[method]
    flags += ["--steps", str(steps), "--save_every", str(steps)] if steps else []
    command = [sys.executable, str(HERE.parents[1] / script), *flags, *more]
    command += ["--seed", str(seed), "--out", out, "--device", "cpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
    )
    return [
        json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()
    ], done.returncode


def one(method, seed, completions):
    drawn = METHODS[method][1]
    steps = completions // drawn if drawn else 0
    with tempfile.TemporaryDirectory() as out:
        lines, status = call(
            method,
            seed,
            steps,
            out,
            1,
            *(["--eval_every", str(max(steps // 20, 1))] if drawn else []),
        )
    row = {"method": method, "seed": seed, "status": status}
    row["memory_gib"] = round(max(m.get("memory_gib", 0.0) for m in lines), 2)
    row["curve"] = [(m["step"] * (drawn or 0), m["eval/exact"]) for m in lines if "eval/exact" in m]
    return row | {k: v for k, v in lines[-1].items() if k.startswith("best_of/")}


def seconds_of_steps(turns=2, steps=12):
    """{method: median seconds of a step, the first two of a run left out}."""
    found = {method: [] for method in METHODS if METHODS[method][1]}
    for _ in range(turns):
        for method, seconds in found.items():
            with tempfile.TemporaryDirectory() as out:
                lines, _ = call(
                    method, 1, steps, out, os.cpu_count(), "--eval_data", "", "--warmup", "0"
                )
            seconds += [m.get("time/sample", 0.0) + m["time/train"] for m in lines if m["step"] > 2]
    return {method: statistics.median(seconds) for method, seconds in found.items()}


def interval(values):
    """Mean and half of its 95 % interval, by Student's t."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), math.nan)
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values)) if len(
        values
    ) > 1 else math.nan


def table(runs, seconds):
    lines = [
        "| method | seeds | exact match, mean and 95 % interval | lowest | completions to 0.8 | seconds to 0.8 | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        mine = [r for r in runs if r["method"] == method]
        if not mine:
            continue
        if method == "reward model":
            for n in (1, 4, 16):
                mean, half = interval([r[f"best_of/true@{n}"] for r in mine])
                lowest = min(r[f"best_of/true@{n}"] for r in mine)
                lines.append(
                    f"| best of {n} samples of the start, by a reward model | {len(mine)} | {mean:.3f} ± {half:.3f} | {lowest:.3f} | | | |"
                )
            continue
        mean, half = interval([r["curve"][-1][1] for r in mine])
        reached = [next((x for x, y in r["curve"] if y >= REACHED), None) for r in mine]
        times = [x for x in reached if x]
        words = ["", ""]
        if times:
            some = "" if len(times) == len(mine) else f" ({len(times)} of {len(mine)} seeds)"
            words = [f"{statistics.median(times):,.0f}{some}", ""]
            if method in seconds:
                words[1] = f"{statistics.median(times) / METHODS[method][1] * seconds[method]:.0f}"
        lowest, memory = min(r["curve"][-1][1] for r in mine), max(r["memory_gib"] for r in mine)
        score = f"{mean:.3f} ± {half:.3f} | {lowest:.3f}"
        lines.append(
            f"| {method} | {len(mine)} | {score} | {words[0]} | {words[1]} | {memory:.2f} GiB |"
        )
    return "\n".join(lines) + "\n"


def picture(runs, path):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7.5, 4.5), facecolor="white")
    for color, method in zip(
        plt.get_cmap("tab10").colors, [m for m in METHODS if m != "reward model"]
    ):
        curves = [r["curve"] for r in runs if r["method"] == method]
        if curves:
            values = torch.tensor([[y for _, y in c] for c in curves])
            drawn = [x for x, _ in curves[0]]
            ax.plot(drawn, values.mean(0), color=color, label=method)
            ax.fill_between(drawn, values.amin(0), values.amax(0), color=color, alpha=0.12)
    ax.set(
        xlabel="completions seen",
        ylabel="held-out exact match, greedy",
        ylim=(0, 1),
        title="Sorting: mean and range of the seeds",
    )
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    fig.savefig(path, dpi=120, bbox_inches="tight")


def main(args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    known = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "completions": args.completions,
        "runs": [],
    }
    if (out / "results.json").exists():
        known = json.loads((out / "results.json").read_text())
        if known["completions"] != args.completions:
            sys.exit(f"{out / 'results.json'} is of {known['completions']} completions")
    runs = known["runs"]

    def save():
        runs.sort(key=lambda r: (list(METHODS).index(r["method"]), r["seed"]))
        (out / "results.json").write_text(json.dumps(known, indent=1) + "\n")

    if args.time:
        known["seconds_a_step"] = seconds_of_steps()
        save()
    done = {(r["method"], r["seed"]) for r in runs}
    todo = [
        (m, s) for s in args.seeds for m in args.methods if (m, s) not in done and not args.time
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        for ended in as_completed([pool.submit(one, *job, args.completions) for job in todo]):
            row = ended.result()
            print({k: v for k, v in row.items() if k != "curve"}, row["curve"][-1:], flush=True)
            runs.append(row)
            save()
    (out / "results.md").write_text(table(runs, known.get("seconds_a_step", {})))
    picture(runs, out / "results.png")
    print((out / "results.md").read_text())


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
