"""Four ways to weigh the samples of a real chat model of 135 M parameters, on two tasks.

    pip install -r requirements.txt matplotlib gguf accelerate
    python tests/bench/smollm2.py smollm2                # makes the model
    python tests/bench/real.py smollm2                   # goes on where it was stopped
    python tests/bench/real.py smollm2 --jobs 14         # on a GPU, in some minutes
    python tests/bench/real.py smollm2 --tasks sums --methods GRPO
    python tests/bench/real.py smollm2 --tables          # table and picture of the rows so far

The tasks are those of tests/tiny: `sums` (one number) and `chain` (an answer of several lines).
In a step, all methods draw 8 completions of each of 8 new prompts, the same for one seed, and make
one update of them, without a KL penalty. So what differs is what a sample's log-probability is
multiplied by: its reward less the group's mean (GRPO: divided by the std; REINFORCE: the mean of
the others), the reward itself for the best of a prompt and nothing for the rest, or PPO's
advantages, with a critic that shares the policy's layers. (With one update the clip does nothing.) No training prompt comes twice in a
run, so its rewards are those of new prompts.

The learning rate of a method is the one of RATES with the highest mean reward over the second half
of a run on `sums` with seed 1; if it is at the edge, one more is tried. `chain` takes the same
rate, and for GRPO half and twice that rate show whether another would have been better. Then three
new seeds run, and the models before and after answer all test prompts greedily.

Writes real.jsonl, a row for each run, and from its rows real.md, real_rates.md and real.png.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
import tyro

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import results

TINY = HERE.parent / "tiny"
RATES = (1e-5, 2e-5, 4e-5, 8e-5)
SEEDS = (11, 12, 13)
COMMON = "--epochs 1 --minibatches 1 --warmup 3"
TASKS = {  # reward and length, and the number of steps
    "sums": (f"--reward {TINY / 'sums.py'}:brief --max_new_tokens 16", 30),
    "chain": (f"--reward {TINY / 'chain.py'}:parts --max_new_tokens 64", 48),
}
GROUPS = "--prompts_per_step 8 --samples_per_prompt 8"
METHODS = {
    "GRPO": f"grpo.py {GROUPS}",
    "REINFORCE, leave one out": f"reinforce.py {GROUPS} --beta 0",
    "the best of 8": f"reinforce.py {GROUPS} --beta 0 --baseline none --keep_max",
    "PPO, shared critic": f"ppo.py {GROUPS} --critic shared --beta 0",
}
START = "the start"
# The learning rate of PPO's new layer, times the policy's. Adam moves its value of a state by up to
# this rate times the sum of the state's absolute numbers, about 800 here and 110 in the bundled
# model, for which 50/3 was good. So 2 to 3 would be its equal at rates ten times as low: 20 to 30.
CRITIC = 20


@dataclass
class Args:
    model: tyro.conf.Positional[Path]
    tasks: tuple[Literal["sums", "chain"], ...] = tuple(TASKS)
    methods: tuple[Literal[tuple(METHODS)], ...] = tuple(METHODS)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """float32 on a processor without instructions for bfloat16"""
    device: Literal["auto", "cpu"] = "auto"
    jobs: int = 2
    """runs at once, each with one thread of the processor; on a GPU they share it"""
    out: str = str(HERE)
    tables: bool = False
    """make the table and the picture of the rows so far, instead"""


def grid_of(rows, method):
    """{rate: mean reward over the second half of the run} with seed 1 on sums; a run that has
    failed has 0."""
    scores = {}
    for row in rows:
        if (row["task"], row["method"], row["seed"]) == ("sums", method, 1):
            scores[row["rate"]] = late_reward(row)
    return scores


def late_reward(row):
    """The mean over the second half of a run, 0 if it has failed."""
    if row["status"]:
        return 0.0
    return statistics.mean(step["reward"] for step in row["train"][len(row["train"]) // 2 :])


def best_rate(rows, method):
    """-> (the best rate, or None if it is not known yet; the rates to be run before it is)."""
    scores = grid_of(rows, method)
    needed = [rate for rate in RATES if rate not in scores]
    if needed:
        return None, needed
    best = max(sorted(scores), key=scores.get)
    if len(scores) == len(RATES) and best in (min(RATES), max(RATES)):  # at the edge: one more
        return None, [best / 2 if best == min(RATES) else 2 * best]
    return best, []


def jobs_of(rows, args):
    """(task, method, rate, seed) of the runs that are still to be made."""
    jobs = [(task, START, 0.0, 0) for task in args.tasks]
    chosen = {}
    grids = []
    for method in args.methods:
        chosen[method], needed = best_rate(rows, method)
        grids += [("sums", method, rate, 1) for rate in needed]
    jobs += sorted(grids, key=lambda job: job[2])
    known = [method for method in args.methods if chosen[method]]
    for seed in SEEDS:
        jobs += [(task, method, chosen[method], seed) for task in args.tasks for method in known]
    if "GRPO" in known and "chain" in args.tasks:
        jobs += [("chain", "GRPO", times * chosen["GRPO"], SEEDS[0]) for times in (0.5, 2.0)]
    done = {(row["task"], row["method"], row["rate"], row["seed"]) for row in rows}
    return [job for job in jobs if job not in done]


def command_of(task, method, rate):
    flags, steps = TASKS[task]
    words = [*METHODS[method].split(), *flags.split(), "--steps", f"{steps}", *COMMON.split()]
    words += ["--learning_rate", f"{rate:g}"]
    if words[0] == "ppo.py":
        words += ["--critic_learning_rate", f"{CRITIC * rate:g}"]
    return words


def call(command, args, log):
    """Runs a script as a user would -> its exit status. (Not in a copy of this process, as
    results.py does: a GPU that has been asked for its name is of no use to a copy.)"""
    command = [sys.executable, *command, "--device", args.device, "--dtype", args.dtype]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        return subprocess.call(command, cwd=results.ROOT, env=threads, stdout=file, stderr=file)


def run(job, path, args, device):
    task, method, rate, seed = job
    row = dict(zip(("task", "method", "rate", "seed"), job)) | {"status": 0, "dtype": args.dtype}
    row |= {"torch": torch.__version__, "transformers": transformers.__version__}
    row |= {"device": device, "jobs": args.jobs, "date": time.strftime("%Y-%m-%d")}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        subprocess.run([sys.executable, str(TINY / f"{task}.py"), str(folder)], check=True)
        train = next(folder.glob("*train.jsonl"))
        test = next(folder.glob("*test.jsonl"))
        model = args.model
        if method != START:
            model = folder / "run" / "model"
            command = command_of(task, method, rate)
            row["flags"] = " ".join(command).replace(str(TINY), "tests/tiny")
            command += ["--model", str(args.model), "--seed", f"{seed}"]
            command += ["--data", str(train), "--save_every", "1000", "--no-keep_best"]
            command += ["--out", str(folder / "run")]
            row["status"] = call(command, args, folder / "log")
            words = (folder / "log").read_text()
            if row["status"]:
                print(words[-2000:], flush=True)
                if "gradient is" not in words:
                    sys.exit(1)  # memory, a signal, a wrong path: this says nothing of the method
            row["notes"] = [x for x in words.splitlines() if x.startswith(("note:", "warning:"))]
            lines = results.numbers(folder / "run")
            row["train"] = [parts_of(line) for line in lines if "reward" in line]
        if row["status"]:  # the gradient was not finite: nothing is right
            nothing = "0" * len(test.read_text().splitlines())
            row |= {"reward": 0.0, "form": nothing, "right": nothing, "both": nothing}
        elif seed != 1:
            row |= answers(task, model, test, folder, args)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(job, row["status"], row.get("train", [])[-1:], flush=True)


def parts_of(line):
    """What is kept of a line of metrics.jsonl."""
    names = {"reward": "reward", "form": "reward/form", "right": "reward/right"}
    names |= {x: x for x in ("length", "grad_norm", "equal_groups", "time/sample", "time/train")}
    return {name: round(line[key], 4) for name, key in names.items() if key in line}


def answers(task, model, test, folder, args):
    """The greedy answers to the test prompts: rewards, and one digit a prompt for each part."""
    command = ["grpo.py", "--model", str(model), "--data", str(test), "--eval_data", str(test)]
    command += [*TASKS[task][0].split(), "--steps", "0", "--prompts_per_step", "8"]
    command += ["--out", str(folder / "test")]
    if call(command, args, folder / "test_log"):
        sys.exit((folder / "test_log").read_text()[-2000:])
    lines = (folder / "test" / "eval_samples.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    digits = {p: "".join(f"{x[f'reward/{p}']:.0f}" for x in found) for p in ("form", "right")}
    both = "".join(f"{int(f + r == '11')}" for f, r in zip(digits["form"], digits["right"]))
    return {"reward": round(statistics.mean(x["reward"] for x in found), 4), **digits, "both": both}


def final_rows(rows, task, method):
    rate = 0.0 if method == START else best_rate(rows, method)[0]
    wanted = (task, method, rate)
    found = [r for r in rows if (r["task"], r["method"], r["rate"]) == wanted and "right" in r]
    return [row for row in found if row["seed"] in SEEDS or method == START]


def interval(rows):
    """95 %, of the mean share of right results: seeds and prompts drawn anew."""
    means = results.resampled([{"right": row["right"]} for row in rows])
    low, high = np.quantile(means, (0.025, 0.975)).clip(0, 1)
    return f"{low:.2f} to {high:.2f}"


def table(rows):
    lines = [
        "| task | method | rate | completions | reward | right form | right result, mean and 95 % "
        "interval | seeds 11, 12, 13 | both | seconds a step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task, (_, steps) in TASKS.items():
        for method in (START, *METHODS):
            mine = final_rows(rows, task, method)
            if not mine:
                continue
            shares = {p: [results.share(row[p]) for row in mine] for p in ("form", "right", "both")}
            mean = {part: f"{statistics.mean(values):.2f}" for part, values in shares.items()}
            reward = f"{statistics.mean(row['reward'] for row in mine):.2f}"
            right = mean["right"]
            setting = " | "
            seeds = ""
            seconds = ""
            if method != START:
                setting = f"{results.short(mine[0]['rate'])} | {64 * steps:,}"
                right += f" ({interval(mine)})" if len(mine) > 1 else " (1 seed so far)"
                of_seed = {row["seed"]: f"{results.share(row['right']):.2f}" for row in mine}
                seeds = ", ".join(of_seed.get(seed, "-") for seed in SEEDS)
                usual = statistics.mode(row.get("device") for row in mine)
                same = [row for row in mine if row.get("device") == usual]
                times = [s["time/sample"] + s["time/train"] for row in same for s in row["train"]]
                seconds = f"{statistics.median(times):.1f}" if times else ""
            cells = [
                task,
                method,
                setting,
                reward,
                mean["form"],
                right,
                seeds,
                mean["both"],
                seconds,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rates_table(rows):
    """The runs that chose the rates, and those of other rates on chain."""
    lines = ["| task | method | learning rate | reward, second half of the run, seed |"]
    lines.append("|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row["task"], row["method"], row["rate"])):
        is_probe = (row["task"], row["method"], row["seed"]) == ("chain", "GRPO", SEEDS[0])
        if row["seed"] == 1 or is_probe:
            words = f"{late_reward(row):.3f}, {row['seed']}"
            name = f"{row['task']} | {row['method']} | {results.short(row['rate'])}"
            lines.append(f"| {name} | {words} |")
    return "\n".join(lines) + "\n"


def smooth(values, width=5):
    """Means of up to `width` values, this one the last."""
    return [statistics.mean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def draw(rows, path):
    """Form (dashed) and result (full line) of the samples against completions."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(TASKS), len(METHODS), figsize=(13, 5.6), sharey=True)
    for line, task in zip(axes, TASKS):
        for axis, (method, color) in zip(line, zip(METHODS, results.COLORS)):
            results.tidy(axis, f"{task}: {method}")
            end = 64 * TASKS[task][1]
            axis.set_xlim(0, 1.25 * end)
            curves = [row["train"] for row in final_rows(rows, task, method) if row["train"]]
            if not curves:
                continue
            heights = []
            for style, part in (("--", "form"), ("-", "right")):
                shares = [smooth([step[part] for step in curve]) for curve in curves]
                for share in shares:
                    seen = [64 * (i + 1) for i in range(len(share))]
                    axis.plot(seen, share, style, color=color, lw=1.3)
                heights.append(statistics.mean(share[-1] for share in shares))
            for label, height in zip(("form", "result"), results.apart(heights, 0.1)):
                axis.text(1.03 * end, height, label, color=color, va="center", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("completions")
    for axis in axes[:, 0]:
        axis.set_ylabel("share of samples")
    figure.tight_layout()
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def main(args):
    args.model = args.model.resolve()  # the scripts run in the repository's folder
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "real.jsonl"
    import matplotlib  # noqa: F401  for the picture: better missed now than after hours

    if not args.tables:
        if not (args.model / "config.json").is_file():
            sys.exit(f"{args.model}: no model; python tests/bench/smollm2.py {args.model} makes it")
        on_gpu = torch.cuda.is_available() and args.device != "cpu"
        device = torch.cuda.get_device_name() if on_gpu else results.processor()
        run_one = functools.partial(run, args=args, device=device)
        results.run_all(lambda rows: jobs_of(rows, args), run_one, path, args.jobs)
    rows = results.read(path)
    (out / "real.md").write_text(table(rows))
    (out / "real_rates.md").write_text(rates_table(rows))
    draw(rows, out / "real.png")
    print(table(rows))
    print(rates_table(rows))
    print(f"{len(jobs_of(rows, args))} runs are left")


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
