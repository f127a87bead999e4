"""Four ways to train a real chat model of 135 M parameters on two tasks, with form and result apart.

    pip install -r requirements.txt matplotlib gguf accelerate
    python tests/bench/smollm2.py smollm2                # makes the model
    python tests/bench/real.py smollm2                   # hours on 2 cores; resumable
    python tests/bench/real.py smollm2 --tasks sums --methods GRPO

The tasks are those of tests/tiny: `sums` (one number) and `chain` (an answer of several lines).
All methods see the same number of completions, one update per rollout, no KL penalty, and rewards
of the same function. The learning rate of a method is the best of RATES on `sums`, with seed 1 and
60 of the training prompts held out; `chain` takes the same rate. Then three new seeds run, and the
model before and after answers the test prompts greedily.

Writes real.jsonl, a row for each run, and from its rows real.md and real.png.
"""

import functools
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import results

TINY = HERE.parent / "tiny"
RATES = (1e-5, 2e-5, 4e-5)
SEEDS = (11, 12, 13)
COMMON = "--epochs 1 --minibatches 1 --warmup 3 --device cpu"
TASKS = {  # the script that makes the data, and flags
    "sums": f"--reward {TINY / 'sums.py'}:brief --max_new_tokens 16 --steps 30",
    "chain": f"--reward {TINY / 'chain.py'}:parts --max_new_tokens 96 --steps 20",
}
GROUPS = "--prompts_per_step 8 --samples_per_prompt 8"
METHODS = {
    "GRPO": f"grpo.py {GROUPS}",
    "REINFORCE, leave one out": f"reinforce.py {GROUPS} --beta 0",
    "rejection fine-tuning": f"reinforce.py {GROUPS} --beta 0 --baseline none --keep_max",
    "PPO, shared critic": "ppo.py --critic shared --prompts_per_step 64 --samples_per_prompt 1 "
    "--beta 0",
}
CRITIC = 100  # the learning rate of PPO's new layer, times the policy's
PARTS = ("reward", "form", "right")


@dataclass
class Args:
    model: tyro.conf.Positional[Path]
    tasks: tuple[str, ...] = tuple(TASKS)
    methods: tuple[str, ...] = tuple(METHODS)
    dtype: str = "bfloat16"
    """float32 on a processor without instructions for bfloat16"""
    jobs: int = 2
    """runs at once, each on one thread"""
    out: str = str(HERE)


def best_rate(rows, method):
    """The rate with the highest reward on held-out training prompts, or None."""
    scores = {}
    for row in rows:
        if (row["task"], row["method"], row["seed"]) == ("sums", method, 1):
            scores[row["rate"]] = row["curve"][-1]["reward"]
    return max(scores, key=scores.get) if set(RATES) <= set(scores) else None


def jobs_of(rows, args):
    """(task, method, rate, seed) of the runs that are still to be made."""
    jobs = [("sums", method, rate, 1) for rate in RATES for method in args.methods]
    for seed in SEEDS:
        for task in args.tasks:
            for method in args.methods:
                rate = best_rate(rows, method)
                if rate:
                    jobs.append((task, method, rate, seed))
    done = {(row["task"], row["method"], row["rate"], row["seed"]) for row in rows}
    return [job for job in jobs if job not in done]


def make_data(task, folder, is_final):
    """-> the files of training and of held-out prompts."""
    subprocess.run([sys.executable, str(TINY / f"{task}.py"), str(folder)], check=True)
    train, test = sorted(folder.glob("*train.jsonl"))[0], sorted(folder.glob("*test.jsonl"))[0]
    if is_final:
        return train, test
    lines = train.read_text().splitlines(keepends=True)
    test.write_text("".join(lines[:60]))
    train.write_text("".join(lines[60:]))
    return train, test


def command_of(task, method, rate):
    words = [*METHODS[method].split(), *TASKS[task].split(), *COMMON.split()]
    words += ["--learning_rate", f"{rate:g}"]
    if words[0] == "ppo.py":
        words += ["--critic_learning_rate", f"{CRITIC * rate:g}"]
    return words


def run(job, path, args):
    task, method, rate, seed = job
    row = dict(zip(("task", "method", "rate", "seed"), job))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        train, test = make_data(task, folder, seed in SEEDS)
        command = command_of(task, method, rate)
        command += ["--model", str(args.model), "--dtype", args.dtype, "--seed", f"{seed}"]
        command += ["--data", str(train), "--eval_data", str(test), "--eval_every", "10"]
        command += ["--eval_rows", "128", "--save_every", "1000", "--no-keep_best"]
        command += ["--out", str(folder / "run")]
        row["status"] = results.call_in_child(command, results.ROOT, folder / "log")
        if row["status"]:
            print((folder / "log").read_text()[-2000:], flush=True)
        row["curve"] = []
        for line in results.numbers(folder / "run"):
            if "eval/reward" in line:
                scores = {part: line.get(f"eval/reward/{part}") for part in PARTS[1:]}
                scores |= {"step": line["step"], "reward": line["eval/reward"]}
                row["curve"].append(scores)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(job, row["status"], row["curve"][-1:], flush=True)


def final_rows(rows, task, method):
    rate = best_rate(rows, method)
    wanted = (task, method, rate)
    found = [r for r in rows if (r["task"], r["method"], r["rate"]) == wanted]
    return [row for row in found if row["seed"] in SEEDS]


def table(rows):
    lines = [
        "| task | method | learning rate | completions | updates | reward, before and after "
        "| right form | right result | right result, by seed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task, flags in TASKS.items():
        words = flags.split()
        steps = int(words[words.index("--steps") + 1])
        for method in METHODS:
            mine = final_rows(rows, task, method)
            if not mine:
                continue
            cells = [task, method, results.short(mine[0]["rate"]), f"{64 * steps:,}", f"{steps}"]
            for part in PARTS:
                before = statistics.mean(row["curve"][0][part] for row in mine)
                after = statistics.mean(row["curve"][-1][part] for row in mine)
                cells.append(f"{before:.2f} to {after:.2f}")
            cells.append(", ".join(f"{row['curve'][-1]['right']:.2f}" for row in mine))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows, path):
    """Form (dashed) and result (full line) against completions, a panel for each task."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(TASKS), len(METHODS), figsize=(13, 5.6), sharey=True)
    for line, task in zip(axes, TASKS):
        for axis, (method, color) in zip(line, zip(METHODS, results.COLORS)):
            ends = []
            for style, part in (("--", "form"), ("-", "right")):
                curves = [r["curve"] for r in final_rows(rows, task, method)]
                for curve in curves:
                    seen = [64 * scores["step"] for scores in curve]
                    axis.plot(seen, [scores[part] for scores in curve], style, color=color, lw=1.3)
                ends.append((seen[-1], statistics.mean(curve[-1][part] for curve in curves)))
            heights = results.apart([height for _, height in ends], 0.1)
            for label, (place, _), height in zip(("form", "result"), ends, heights):
                axis.text(1.03 * place, height, label, color=color, va="center", fontsize=8)
            results.tidy(axis, f"{task}: {method}")
            axis.set_xlim(0, 1.25 * seen[-1])
    for axis in axes[-1]:
        axis.set_xlabel("completions")
    for axis in axes[:, 0]:
        axis.set_ylabel("share, held out")
    figure.tight_layout()
    figure.savefig(path, dpi=110, facecolor="white")


def main(args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "real.jsonl"
    run_one = functools.partial(run, args=args)
    results.run_all(lambda rows: jobs_of(rows, args), run_one, path, args.jobs)
    rows = results.read(path)
    if all(final_rows(rows, task, method) for task in TASKS for method in METHODS):
        (out / "real.md").write_text(table(rows))
        draw(rows, out / "real.png")
        print(table(rows))


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
