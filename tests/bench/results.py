"""The methods beside each other, each at the best of its own settings: one task, start and budget.

    pip install -r requirements.txt matplotlib
    python tests/bench/results.py             # many hours on 2 cores; goes on where it was stopped
    python tests/bench/results.py --tables    # tables and pictures of the rows so far
    python tests/bench/results.py --methods "fine-tuning" "GRPO, one update" --out /tmp/again

Methods with a reward draw 51,200 completions of training prompts of the sorting task, 256 in each
of 200 rollouts, and train on each at most once: in one update or, a quarter at a time, in four.
(Rows whose gradient is 0 are skipped.) REINFORCE and "GRPO, small rollouts" have rollouts of 64 in
place of four updates. Fine-tuning sees as many right answers, DPO and the reward model as many
sides of pairs; they have fewer, and see each about six times. So a run has 200 or 800 updates. GRPO
as published and the adapters have one update a rollout, GSPO and CISPO four. There is no KL penalty but where a
method has it by definition (DPO, GRPO as published).

A grid of learning rates, a factor of 2 apart, is run with seeds 1 to 3 and scored on 512 prompts
that are neither training nor test prompts. The best mean chooses a method's setting (of equal ones
that with the better curve). If the best rate of a variant is at the edge of its grid, the grid is
widened by one rate, until it is not. (Rates far below the best with seed 1 get their other seeds
last of all. The choice is made again when they have them.) PPO's critic has a learning rate in a
fixed ratio to the policy's. A run that ends because of a gradient that is not finite has a score of
0; any other failure stops this script.

The chosen setting is run with seeds 11 to 20, and the model at the end answers 2,048 new prompts
greedily. Best-of-N trains nothing but the reward model by whose scores it takes one of N samples of
the start for each of these prompts. Curves are of the bundled 512 held-out prompts.

Controls repeat a chosen setting with something changed that could explain a difference, or with
nothing changed, on another processor. They have seeds 11 to 15 and the same 2,048 prompts.

The same run on the same kind of processor gives the same row (but for its seconds). Others round
differently, and single scores then differ by some hundredths, a few by more. Later rows say which processor, which
code and which flags they are of.

Writes results.jsonl, a row for each run, and from its rows the four tables results*.md and
the pictures results.png and results_rates.png. Rows that are there are not run again.
"""

import hashlib
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
import transformers
import tyro
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  imported once for all runs
from transformers import LlamaForCausalLM  # noqa: F401

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TINY = ROOT / "tests" / "tiny"
sys.path.insert(0, str(TINY))
import sort

BUDGET = 51_200
ROLLOUT = 256
STEPS = BUDGET // ROLLOUT
REACHED = 0.8
GRID_SEEDS = (1, 2, 3)
FINAL_SEEDS = tuple(range(11, 21))
CONTROL_SEEDS = FINAL_SEEDS[:5]
MARGIN = 0.1
VALIDATION = 1000  # the seed of the validation prompts
TEST = (2048, 2000)  # the number of test prompts, and their seed
RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
N_OF_BEST = (1, 4, 16)


@dataclass
class Method:
    command: str
    """the script, and flags of all its runs"""
    variants: dict
    """{name: flags}. The grid of rates is run with each of them"""
    rates: tuple = RATES
    critic: float = 0.0
    """the critic's learning rate, times the policy's"""
    patch: str = ""
    """a file of tests/changes, applied to a copy of the script"""


ONE, FOUR = "one update", "four updates"
SMALL = "four times as many rollouts"
UPDATES = {
    ONE: "--steps 200 --epochs 1 --minibatches 1",
    FOUR: "--steps 200 --epochs 1 --minibatches 4",
}
PAIRS = {
    ONE: "--steps 200 --pairs_per_step 128",
    FOUR: "--steps 800 --pairs_per_step 32 --warmup 40",
}
DEMOS = {
    ONE: "--steps 200 --prompts_per_step 256",
    FOUR: "--steps 800 --prompts_per_step 64 --warmup 40",
}
PAIR_DATA = f"--data {TINY / 'pairs_train.jsonl'} --eval_data {TINY / 'pairs_test.jsonl'}"
BETAS = {name + ", beta 0.1": f"{flags} --beta 0.1" for name, flags in PAIRS.items()}
GROUPS = "--prompts_per_step 32 --samples_per_prompt 8"
ON_POLICY = {
    ONE: UPDATES[ONE],
    SMALL: "--steps 800 --prompts_per_step 8 --warmup 40 --epochs 1 --minibatches 1",
}
SINGLE = "--prompts_per_step 256 --samples_per_prompt 1 --beta 0"
METHODS = {
    "fine-tuning": Method(f"reinforce.py --demos {TINY / 'sort_train.jsonl'}", DEMOS),
    "DPO": Method(f"dpo.py {PAIR_DATA}", PAIRS | BETAS),
    "best of N, by a reward model": Method(
        f"reward_model.py {PAIR_DATA} --schedule linear --policy {TINY / 'model'} --best_of 1 4 16",
        PAIRS,
        (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    ),
    "REINFORCE, no baseline": Method(f"reinforce.py {GROUPS} --beta 0 --baseline none", ON_POLICY),
    "REINFORCE, leave one out": Method(f"reinforce.py {GROUPS} --beta 0", ON_POLICY),
    "PPO, separate critic": Method(f"ppo.py {SINGLE}", UPDATES, critic=5 / 3),
    "PPO, shared critic": Method(f"ppo.py {SINGLE} --critic shared", UPDATES, critic=50 / 3),
    "GRPO, one update": Method(f"grpo.py {GROUPS}", {ONE: UPDATES[ONE]}),
    "GRPO, four updates": Method(f"grpo.py {GROUPS}", {FOUR: UPDATES[FOUR]}),
    "GRPO, small rollouts": Method(f"grpo.py {GROUPS}", {SMALL: ON_POLICY[SMALL]}),
    "GRPO as published": Method(
        f"grpo.py {GROUPS} --aggregate sequence --beta 0.04 --kl k3", {ONE: UPDATES[ONE]}
    ),
    "Dr. GRPO": Method(f"grpo.py {GROUPS} --scale none --aggregate constant", UPDATES),
    # With one update the ratios of the next two are 1, and they are GRPO.
    "GSPO": Method(
        f"grpo.py {GROUPS} --ratio sequence",
        {
            "four updates, its clip": UPDATES[FOUR],
            "four updates, clip 0.05": f"{UPDATES[FOUR]} --clip_low 0.05 --clip_high 0.05",
        },
    ),
    "CISPO": Method(f"grpo.py {GROUPS} --clip_high 4", {FOUR: UPDATES[FOUR]}, patch="cispo"),
    "GRPO with adapters": Method(
        f"grpo.py {GROUPS} --lora_rank 8", {ONE: UPDATES[ONE]}, tuple(10 * rate for rate in RATES)
    ),
}
START = "the start"
ALONE, GROUPED = "one sample a prompt", "32 prompts x 8"
ONE_EACH = "--prompts_per_step ALL --samples_per_prompt 1"
PPO = ("PPO, separate critic", "PPO, shared critic")
UNBOUND = ("no bound of the norm", "--max_grad_norm 100")
AGAIN = "nothing: run again"
CONTROLS = {
    ("REINFORCE, no baseline", ALONE): ONE_EACH,
    ("REINFORCE, no baseline", UNBOUND[0]): UNBOUND[1],
    ("REINFORCE, leave one out", UNBOUND[0]): UNBOUND[1],
    # with one sample a prompt there are no others to leave it out of: then the batch's mean
    ("REINFORCE, leave one out", f"{ALONE}, the batch's mean"): f"{ONE_EACH} --baseline batch",
    **{(name, GROUPED): GROUPS for name in PPO},
    **{(name, "critic's rate halved"): "" for name in PPO},
    **{(name, "critic's rate doubled"): "" for name in PPO},
    # V stays the 0 that it begins with: the advantage is the reward, less its mean if whitened
    ("PPO, separate critic", "no critic"): "--lam 1",
    ("PPO, separate critic", "no critic, no whitening"): "--lam 1 --no_whiten",
    ("PPO, separate critic", UNBOUND[0]): UNBOUND[1],
    ("GRPO, four updates", UNBOUND[0]): UNBOUND[1],
    ("GRPO, four updates", "128 prompts x 2"): "--prompts_per_step 128 --samples_per_prompt 2",
    ("GRPO, four updates", "mean over each sequence"): "--aggregate sequence",
    ("GRPO as published", "no KL penalty"): "--beta 0",
    # all final seeds ran on other processors than most controls, with older versions of the code
    ("REINFORCE, no baseline", AGAIN): "",
    ("PPO, separate critic", AGAIN): "",
    ("GRPO, four updates", AGAIN): "",
    ("GRPO as published", AGAIN): "",
    ("GRPO with adapters", AGAIN): "",
}
"""{(method, what is changed): flags, after those of the method's chosen setting}"""
TIMES = {
    "critic's rate halved": 0.5,
    "critic's rate doubled": 2.0,
    "no critic": 0.0,
    "no critic, no whitening": 0.0,
}


def method_of(name):
    """A method, or a control, "its method: what is changed"."""
    if name in METHODS:
        return METHODS[name]
    base, _, change = name.partition(": ")
    method = METHODS[base]
    variants = {}
    for variant, words in method.variants.items():
        rows = ROLLOUT // 4 if variant == SMALL else ROLLOUT
        variants[variant] = f"{words} {CONTROLS[base, change]}".replace("ALL", f"{rows}")
    return replace(method, variants=variants, critic=method.critic * TIMES.get(change, 1))


@dataclass
class Args:
    methods: tuple[str, ...] = tuple(METHODS)
    jobs: int = 2
    """runs at once, each on one thread"""
    out: str = str(HERE)
    tables: bool = False
    """make tables and pictures of the rows so far, instead"""


# -- What is to be run -------------------------------------------------------------------------


def key_of(row):
    return row["method"], row["variant"], row["rate"], row["seed"]


def grid_of(rows, name):
    """{(variant, rate): {seed: (validation score, mean of the curve)}} of the runs so far."""
    method = METHODS[name]
    found = {(variant, rate): {} for variant in method.variants for rate in method.rates}
    for row in rows:
        if row["method"] == name and row["seed"] in GRID_SEEDS:
            curve = row.get("curve", [row["score"]])
            setting = (row["variant"], row["rate"])
            found.setdefault(setting, {})[row["seed"]] = (row["score"], statistics.mean(curve))
    return found


def means_of(rows, name, complete=False):
    """{(variant, rate): (mean validation score, mean of the curves)} of the seeds so far, or of the
    settings that have all seeds."""
    least = len(GRID_SEEDS) if complete else 1
    grid = grid_of(rows, name).items()
    kept = {setting: seeds.values() for setting, seeds in grid if len(seeds) >= least}
    return {setting: tuple(map(statistics.mean, zip(*runs))) for setting, runs in kept.items()}


def chosen(rows, name):
    """-> (the variant and rate of the best mean, or None if it is not known yet; the runs of the
    grid that are needed before it is, (variant, rate, seed); runs that can wait).

    Those of rates can wait which with seed 1 are more than MARGIN below the best of their variant:
    the best with seed 1, and then the best mean.
    """
    grid = grid_of(rows, name)
    means = means_of(rows, name, complete=True)
    needed = []
    later = []
    for variant in METHODS[name].variants:
        mine = {setting: seeds for setting, seeds in grid.items() if setting[0] == variant}
        first = {s: seeds[1][0] for s, seeds in mine.items() if 1 in seeds}
        if len(first) < len(mine):
            needed += [(*setting, 1) for setting in mine if setting not in first]
            continue
        missing = []
        for setting, seeds in mine.items():
            missing += [(*setting, seed) for seed in GRID_SEEDS if seed not in seeds]
        near = near_best(missing, first, max(first.values()))
        if not near:
            best = max((s for s in mine if s in means), key=means.get)
            near = near_best(missing, first, means[best][0])
        later += [run for run in missing if run not in near]
        needed += near
        if not near:
            rates = [rate for _, rate in mine]
            if best[1] == max(rates):
                needed.append((variant, 2 * best[1], 1))
            if best[1] == min(rates):
                needed.append((variant, best[1] / 2, 1))
    return None if needed else max(means, key=means.get), needed, later


def near_best(runs, first, best):
    return [run for run in runs if first[run[:2]] >= best - MARGIN]


def jobs_of(rows, methods):
    """Runs that are still to be made, (method, variant, rate, seed), in the order to make them."""
    grid, finals, controls, last = [], [], [], []
    for name in methods:
        setting, needed, later = chosen(rows, name)
        grid += [(name, *run) for run in needed]
        last += [(name, *run) for run in later]
        if setting:
            finals += [(name, *setting, seed) for seed in FINAL_SEEDS]
            for base, change in CONTROLS:
                if base == name:
                    controls += [(f"{name}: {change}", *setting, seed) for seed in CONTROL_SEEDS]
    if set(methods) == set(METHODS):
        finals.append((START, "", 0.0, 0))
    done = {key_of(row) for row in rows}
    order = {name: place for place, name in enumerate((START, *METHODS))}

    def place(job):
        return job[3], order[job[0].partition(": ")[0]]

    jobs = []
    for part in (grid, finals, controls, last):
        jobs += sorted(part, key=place)
    return [job for job in jobs if job not in done]


# -- One run -----------------------------------------------------------------------------------


def command_of(name, variant, rate):
    """The script's name and its flags, as they are typed."""
    method = method_of(name)
    words = [*method.command.split(), *method.variants[variant].split()]
    words += ["--learning_rate", f"{rate:g}"]
    if words[0] == "ppo.py":
        words += ["--critic_learning_rate", f"{rate * method.critic:.3g}"]
    return words


def prepare(name, folder):
    """-> the folder of the scripts: the repository, or a copy with the method's patch."""
    patch = method_of(name).patch
    if not patch:
        return ROOT
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(TINY, folder / "tests" / "tiny")
    diff = ROOT / "tests" / "changes" / f"{patch}.diff"
    subprocess.run(["patch", "-p1", "--fuzz=0", "-s", "-i", str(diff)], cwd=folder, check=True)
    return folder


def call(command, scripts, log, threads=1):
    """Runs a script in this process, which was made for it, as if it had been started alone."""
    torch.set_num_threads(threads)  # here and not before: a pool of threads does not survive a fork
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [str(scripts / command[0]), *command[1:]]
    sys.path.insert(0, str(scripts))
    runpy.run_path(sys.argv[0], run_name="__main__")


def call_in_child(*given):
    """A child copies this process and with it the imports, which take as long as many steps."""
    child = multiprocessing.get_context("fork").Process(target=call, args=given)
    child.start()
    child.join()
    return child.exitcode


def numbers(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(job, path):
    """One run from start to score; its row is added to the file `path`. In a process of its own."""
    name, variant, rate, seed = job
    row = dict(zip(("method", "variant", "rate", "seed"), job))
    row |= {"torch": torch.__version__, "transformers": transformers.__version__}
    row["processor"] = processor()
    if name == START:
        with tempfile.TemporaryDirectory() as temporary:
            row |= {"status": 0, "right": answers(Path(temporary), TINY / "model")}
        row["score"] = share(row["right"])
        return add(row, path)
    is_final = seed in FINAL_SEEDS
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        command = command_of(name, variant, rate)
        held_out = TINY / "sort_test.jsonl"
        if not is_final:
            held_out = temporary / "validation.jsonl"
            write_lists(held_out, 512, VALIDATION)
        elif command[0] == "reward_model.py":
            held_out = temporary / "test.jsonl"
            write_lists(held_out, *TEST)
        row["flags"] = " ".join(command).replace(str(TINY), "tests/tiny")
        row["code"] = code_of(name)
        steps = int(command[command.index("--steps") + 1])
        every = steps // (20 if is_final else 4)
        command += ["--seed", f"{seed}", "--device", "cpu", "--eval_every", f"{every}"]
        prompts = "--eval_prompts" if "--eval_data" in command else "--eval_data"
        command += [prompts, str(held_out), "--save_every", f"{steps}", "--no-keep_best"]
        command += ["--out", str(temporary / "run")]
        scripts = prepare(name, temporary)
        row["status"] = call_in_child(command, scripts, temporary / "log")
        lines = numbers(temporary / "run")
        spent = sum(line.get("time/sample", 0) + line.get("time/train", 0) for line in lines)
        row |= {"score": 0.0, "seconds": round(spent, 1)}
        if row["status"]:
            words = (temporary / "log").read_text()
            print(words[-2000:], flush=True)
            if "gradient is" not in words:
                sys.exit(1)  # no room, no memory, a signal: this says nothing about the method
        elif command[0] == "reward_model.py":
            row |= {f"best of {n}": round(lines[-1][f"best_of/true@{n}"], 4) for n in N_OF_BEST}
            row["score"] = row[f"best of {N_OF_BEST[-1]}"]
        else:
            row["curve"] = [round(line["eval/exact"], 4) for line in lines if "eval/exact" in line]
            row["score"] = row["curve"][-1]
        if is_final and "curve" in row:
            row["right"] = answers(temporary, temporary / "run" / "model")
            row["score"] = share(row["right"])
    add(row, path)


def add(row, path):
    line = json.dumps(row) + "\n"
    with open(path, "a") as file:
        file.write(line)
    print(key_of(row), row["status"], row["score"], flush=True)


def processor():
    """Its name and model, "" where there is no /proc."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    found = dict(re.findall(r"^(cpu family|model|model name)\s*: (.*)$", text, re.M))
    return ", ".join(found[key] for key in ("model name", "cpu family", "model") if key in found)


def code_of(name):
    """A few digits that change with the code of a method, and with its comments."""
    method = method_of(name)
    paths = [ROOT / method.command.split()[0], ROOT / "common.py"]
    if method.patch:
        paths.append(ROOT / "tests" / "changes" / f"{method.patch}.diff")
    text = "".join(path.read_text() for path in paths)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def share(right):
    return round(right.count("1") / len(right), 4)


def answers(folder, model):
    """One digit for each of the new prompts, 1 if the model's greedy answer is right."""
    write_lists(folder / "test.jsonl", *TEST)
    prompts = ["--data", str(folder / "test.jsonl"), "--eval_data", str(folder / "test.jsonl")]
    command = ["grpo.py", "--model", str(model), *prompts, "--steps", "0"]
    command += ["--device", "cpu", "--out", str(folder / "test")]
    if call_in_child(command, ROOT, folder / "log"):
        sys.exit((folder / "log").read_text()[-2000:])
    rows = (folder / "test" / "eval_samples.jsonl").read_text().splitlines()
    return "".join(f"{json.loads(row)['reward']:.0f}" for row in rows)


def write_lists(path, count, seed):
    """New lists to sort: none is in the files of tests/tiny, nor with another seed among these."""
    known = set()
    for name in ("sort_train", "sort_test", "pairs_train", "pairs_test"):
        for line in (TINY / f"{name}.jsonl").read_text().splitlines():
            known.add(json.loads(line)["prompt"])
    if seed != VALIDATION:
        known |= {row["prompt"] for row in sort.lists(512, seed=VALIDATION, without=known)}
    rows = sort.lists(count, seed, without=known)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# -- The runs ----------------------------------------------------------------------------------


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_all(jobs_of_rows, run_one, path, at_once):
    """Starts the next run whenever one has ended, since what is next depends on the rows so far.
    Each run has a process of its own."""
    context = multiprocessing.get_context("fork")
    running = {}
    while True:
        jobs = [job for job in jobs_of_rows(read(path)) if job not in running.values()]
        while jobs and len(running) < at_once:
            child = context.Process(target=run_one, args=(jobs[0], path))
            child.start()
            running[child] = jobs.pop(0)
        if not running:
            return
        wait([child.sentinel for child in running])
        for child in [child for child in running if not child.is_alive()]:
            if child.exitcode:
                sys.exit(f"{running[child]} ended with status {child.exitcode}")
            del running[child]


# -- Tables, pictures --------------------------------------------------------------------------


def student(df, chance=0.05):
    """How many standard errors an interval reaches to each side by Student's t, if it is to miss
    with this chance. (sqrt(df) tan(angle) has that distribution if the angle has a density
    proportional to cos(angle)^(df - 1).)"""
    edges = np.linspace(0, math.pi / 2, 20_001)
    below = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (df - 1))
    return math.sqrt(df) * math.tan(np.interp(1 - chance, below / below[-1], edges[1:]))


def widened(count):
    """A bootstrap of few values has too small a variance, (n - 1) / n of the right one, and does
    not know that it estimates it. So draws of the seeds are moved this many times as far from
    the mean."""
    if count == 1:
        return 1.0
    return student(count - 1) / 1.96 * math.sqrt(count / (count - 1))


def right_of(rows):
    """[seeds, prompts], 1 where the answer is right. A run that has failed is right nowhere."""
    known = [row["right"] for row in rows if "right" in row]
    nothing = "0" * (len(known[0]) if known else TEST[0])
    return np.array([[int(x) for x in row.get("right", nothing)] for row in rows])


def resampled(rows, draws=4000):
    """A bootstrap of a method's mean: its seeds are drawn anew, and the test prompts, too."""
    right = right_of(rows)

    def weights(rng, count):
        return rng.multinomial(count, np.full(count, 1 / count), size=draws) / count

    prompts = weights(np.random.default_rng(0), right.shape[1])  # [draws, prompts]
    equal = 1 / len(right)
    seeds = weights(np.random.default_rng(1), len(right))  # [draws, seeds]
    seeds = equal + (seeds - equal) * widened(len(right))
    return (prompts @ right.T * seeds).sum(axis=1)


def interval(rows, score, draws=4000):
    """The 95 % interval of the mean."""
    if any("right" in row for row in rows):
        means = resampled(rows, draws=draws)
    else:  # of best-of-N the score alone is known: prompts drawn anew are a binomial draw
        rng = np.random.default_rng(0)
        scores = np.array([row.get(score, 0.0) for row in rows])
        means = scores[rng.integers(len(rows), size=(draws, len(rows)))].mean(axis=1)
        means = scores.mean() + (means - scores.mean()) * widened(len(rows))
        means = rng.binomial(TEST[0], means.clip(0, 1)) / TEST[0]
    return np.quantile(means, (0.025, 0.975)).clip(0, 1)


def difference(first, second):
    """Two methods' `right_of` -> the difference of their means, its standard error, and the degrees
    of freedom of Student's t. (Welch's: the seeds of one may differ by more than the other's.) The
    prompts, which are the same for both, are a sample, as the seeds are. The noise of single
    answers is in both variances, so the error is a little too large."""
    apart = first.mean(0) - second.mean(0)  # by prompt
    of_prompts = apart.var(ddof=1) / len(apart)
    of_seeds = [part.mean(1).var(ddof=1) / len(part) for part in (first, second)]
    variance = of_prompts + sum(of_seeds)
    if variance == 0:
        return apart.mean(), 0.0, 1.0
    shares = [x**2 / (len(part) - 1) for x, part in zip(of_seeds, (first, second))]
    df = variance**2 / (sum(shares) + of_prompts**2 / (len(apart) - 1))
    return apart.mean(), math.sqrt(variance), df


def reached(row):
    """Completions to the first of two scores of 0.8 in a row; infinite if there were none."""
    curve = row.get("curve", [])
    places = [i for i in range(len(curve) - 1) if min(curve[i : i + 2]) >= REACHED]
    return places[0] * BUDGET // (len(curve) - 1) if places else math.inf


def final_rows(rows, name):
    setting, *_ = chosen(rows, name)
    found = [r for r in rows if r["method"] == name and (r["variant"], r["rate"]) == setting]
    return [row for row in found if row["seed"] in FINAL_SEEDS]


def table(rows):
    counts = [len(final_rows(rows, name)) for name in METHODS]
    counts = [count for count in counts if count] or [len(FINAL_SEEDS)]
    usual = max(set(counts), key=counts.count)
    lines = [
        f"| method | rate | updates | KL | mean of {usual} seeds, 95 % interval | lowest seed | "
        "completions to 0.8 | updates to 0.8 | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    start = [row for row in rows if row["method"] == START]
    if start:
        lines.append(f"| {START} |  |  |  | {score_cells(start, 'score')} |  |  |  |")
    for name in METHODS:
        mine = final_rows(rows, name)
        if not mine:
            continue
        variant, rate = mine[0]["variant"], mine[0]["rate"]
        times = [row["seconds"] for row in mine if "seconds" in row]  # not of runs that were paused
        times = f"{statistics.median(times):.0f}"
        setting = f"{short(rate)} | {updates_of(variant)} | {penalty_of(name, variant)}"
        so_far = "" if len(mine) == usual else f" ({len(mine)} seeds)"
        if name.startswith("best of N"):
            for n in N_OF_BEST:
                label = name.replace("N", f"{n}") + so_far
                cells = score_cells(mine, f"best of {n}")
                lines.append(f"| {label} | {setting} | {cells} |  |  | {times} |")
            continue
        places = [reached(row) for row in mine]
        middle = statistics.median(places)
        count = sum(place < math.inf for place in places)
        if middle == math.inf:
            words = f"{count} of {len(places)} seeds | "
        else:
            so_many = "" if count == len(places) else f" ({count} of {len(places)})"
            words = f"{middle:,.0f}{so_many} | {middle / BUDGET * updates_of(variant):.0f}"
        label = label_of(name, variant) + so_far
        lines.append(f"| {label} | {setting} | {score_cells(mine, 'score')} | {words} | {times} |")
    return "\n".join(lines) + "\n"


def updates_of(variant):
    return 4 * STEPS if "four" in variant else STEPS


def penalty_of(name, variant):
    """The weight of the KL penalty; nothing for the methods that have none to set."""
    words = command_of(name, variant, 1.0)
    if "--beta" in words:
        return words[len(words) - words[::-1].index("--beta")]  # the last of them counts
    return {"dpo.py": "0.5", "grpo.py": "0"}.get(words[0] if "--demos" not in words else "", "")


def label_of(name, variant):
    """The method, and what its variant has beside the number of updates."""
    special = variant.partition(", ")[2]
    special = "small rollouts" if variant == SMALL else special
    if not special or len(METHODS[name].variants) == 1:
        return name
    return f"{name}, {special}"


def settings_table(rows):
    """The best rate of each variant, of which the best was chosen."""
    lines = [
        "| method | variant | learning rate | exact match on the validation prompts, mean "
        "(lowest to highest seed) | chosen |",
        "|---|---|---|---|---|",
    ]
    for name in METHODS:
        means = means_of(rows, name, complete=True)
        setting, *_ = chosen(rows, name)
        for variant in METHODS[name].variants:
            mine = [key for key in means if key[0] == variant]
            if not mine:
                continue
            best = max(mine, key=means.get)
            words = f"{short(best[1])} | {spread(rows, name, *best)}"
            mark = "yes" if best == setting else ""
            lines.append(f"| {name} | {variant} | {words} | {mark} |")
    return "\n".join(lines) + "\n"


def spread(rows, name, variant, rate):
    keys = [(name, variant, rate, seed) for seed in GRID_SEEDS]
    scores = [row["score"] for row in rows if key_of(row) in keys]
    return f"{statistics.mean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})"


def controls_table(rows):
    lines = [
        "| method | its variant and rate | changed | exact match on the test prompts, as chosen | "
        "changed | difference, 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for name, change in CONTROLS:
        setting, *_ = chosen(rows, name)
        plain = final_rows(rows, name)
        control = f"{name}: {change}"
        changed = [r for r in rows if setting and key_of(r)[:3] == (control, *setting)]
        if len(changed) < len(CONTROL_SEEDS) or not plain:
            continue  # still to be run
        apart, error, df = difference(right_of(changed), right_of(plain))
        reach = student(df) * error
        means = [statistics.mean(score_of(row) for row in part) for part in (plain, changed)]
        cells = f"{means[0]:.3f} | {means[1]:.3f} | {apart - reach:+.3f} to {apart + reach:+.3f}"
        lines.append(f"| {name} | {setting[0]}, {short(setting[1])} | {change} | {cells} |")
    return "\n".join(lines) + "\n"


def differences_table(rows):
    """Which methods ten seeds and 2,048 prompts tell apart, in the order of their means: by
    Welch's t, and Bonferroni's bound, the chance 0.05 divided by the number of pairs."""
    final = {name: final_rows(rows, name) for name in METHODS}
    final = {name: mine for name, mine in final.items() if any("right" in row for row in mine)}
    means = {name: statistics.mean(map(score_of, mine)) for name, mine in final.items()}
    right = {name: right_of(mine) for name, mine in final.items()}
    order = sorted(final, key=lambda name: -means[name])
    chance = 0.05 / max(math.comb(len(order), 2), 1)
    lines = ["| method | exact match | not told apart from |", "|---|---|---|"]
    for name in order:
        alike = []
        for other in order:
            if other == name:
                continue
            apart, error, df = difference(right[name], right[other])
            if abs(apart) <= student(df, chance) * error:
                alike.append(other)
        lines.append(f"| {name} | {means[name]:.3f} | {'; '.join(alike)} |")
    return "\n".join(lines) + "\n"


def short(rate):
    """1.25e-4, and 2e-4 without a dot."""
    digits, _, power = f"{rate:.2e}".partition("e-0")
    return f"{float(digits):g}e-{power}"


def score_of(row, score="score"):
    """Not rounded, where the answers are known."""
    right = row.get("right")
    return right.count("1") / len(right) if right else row.get(score, 0.0)


def score_cells(rows, score):
    scores = [score_of(row, score) for row in rows]
    low, high = interval(rows, score)
    return f"{statistics.mean(scores):.3f} ({low:.3f} to {high:.3f}) | {min(scores):.3f}"


# Colours that colour-blind readers tell apart (Okabe and Ito). Lines have their names beside them.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000")
PANELS = {
    "Right answers and pairs": ("fine-tuning", "DPO", "best of N, by a reward model"),
    "REINFORCE and PPO": tuple(m for m in METHODS if m.startswith(("REINFORCE", "PPO"))),
    "GRPO and its variants": (
        *(m for m in METHODS if "GRPO" in m),
        *("GSPO", "CISPO"),
    ),
}
COLOR_OF = {name: color for names in PANELS.values() for name, color in zip(names, COLORS)}


def apart(heights, distance):
    """The heights of labels, moved so that neighbours keep a distance and none is above 1."""
    if not heights:
        return []
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = list(heights)
    for _ in range(200):
        moved[order[-1]] = min(moved[order[-1]], 1.0)
        for low, high in zip(order, order[1:]):
            missing = distance - (moved[high] - moved[low])
            if missing > 0:
                moved[low] -= missing / 2
                moved[high] += missing / 2
    return moved


def tidy(axis, title):
    """What all panels have in common."""
    axis.set_title(title, fontsize=10)
    axis.set_ylim(0, 1.03)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def draw_curves(rows, path):
    """Score against completions at the chosen settings: mean and range of the ten seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 4.6), sharey=True)
    for axis, (title, names) in zip(axes, PANELS.items()):
        ends = []
        for name in names:
            mine = final_rows(rows, name)
            if not mine:
                continue
            if name.startswith("best of N"):
                best = f"best of {N_OF_BEST[-1]}"
                mean = statistics.mean(row.get(best, 0.0) for row in mine)
                axis.plot([0, BUDGET], [mean, mean], ":", color=COLOR_OF[name], linewidth=1.5)
                ends.append((best, mean, COLOR_OF[name]))
                continue
            length = max(len(row.get("curve", [0.0])) for row in mine)
            curves = np.array([row.get("curve", [0.0] * length) for row in mine])  # 0: failed
            seen = np.linspace(0, BUDGET, curves.shape[1])
            axis.plot(seen, curves.mean(axis=0), color=COLOR_OF[name], linewidth=1.8)
            low, high = curves.min(axis=0), curves.max(axis=0)
            axis.fill_between(seen, low, high, color=COLOR_OF[name], alpha=0.13, linewidth=0)
            ends.append((name, curves.mean(axis=0)[-1], COLOR_OF[name]))
        for (name, _, color), height in zip(ends, apart([end[1] for end in ends], 0.05)):
            axis.text(1.02 * BUDGET, height, name, color=color, va="center", fontsize=9)
        tidy(axis, title)
        axis.set(xlabel="completions", xlim=(0, 1.55 * BUDGET))
        axis.set_xticks([0, BUDGET // 2, BUDGET], ["0", f"{BUDGET // 2:,}", f"{BUDGET:,}"])
    axes[0].set_ylabel("exact match on 512 held-out prompts (dotted: test)")
    figure.tight_layout()
    figure.savefig(path, dpi=110, facecolor="white")


def draw_rates(rows, path):
    """Validation score against learning rate: a panel for each method, a line for each variant."""
    import matplotlib.pyplot as plt

    columns = 4
    lines = math.ceil(len(METHODS) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(14, 2.7 * lines), sharey=True)
    for axis in axes.flat[len(METHODS) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, METHODS):
        means = means_of(rows, name)
        ends = []
        for style, variant in zip(("-", "--", ":", "-."), METHODS[name].variants):
            rates = sorted(rate for v, rate in means if v == variant)
            if not rates:
                continue
            scores = [means[variant, rate][0] for rate in rates]
            axis.plot(rates, scores, style, marker="o", markersize=4, color=COLOR_OF[name])
            label = "small rollouts" if variant == SMALL else variant
            if name == "GSPO":
                label = label.removeprefix("four updates, ")
            ends.append((label, rates[-1], scores[-1]))
        for (label, place, _), height in zip(ends, apart([end[2] for end in ends], 0.1)):
            axis.text(place * 1.15, height, label, fontsize=8, va="center")
        setting, *_ = chosen(rows, name)
        if setting:
            ring = {"markersize": 11, "fillstyle": "none", "color": "#000000"}
            axis.plot(setting[1], means[setting][0], "o", **ring)
        axis.set_xscale("log", base=2)
        rates = sorted({rate for _, rate in means}) or RATES
        ticks = rates[::2]  # with all of them the labels would touch
        axis.set_xticks(ticks, [short(rate) for rate in ticks], fontsize=8)
        axis.minorticks_off()
        tidy(axis, name)
        axis.set_xlim(rates[0] / 1.3, rates[-1] * 4)
    for axis in axes[:, 0]:
        axis.set_ylabel("exact match, validation")
    figure.tight_layout()
    figure.savefig(path, dpi=110, facecolor="white")


def main(args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if not args.tables:
        path = out / "results.jsonl"
        run_all(lambda rows: jobs_of(rows, args.methods), run, path, args.jobs)
    rows = read(out / "results.jsonl")
    if set(args.methods) == set(METHODS):
        (out / "results.md").write_text(table(rows))
        (out / "results_settings.md").write_text(settings_table(rows))
        (out / "results_controls.md").write_text(controls_table(rows))
        (out / "results_differences.md").write_text(differences_table(rows))
        draw_curves(rows, out / "results.png")
        draw_rates(rows, out / "results_rates.png")
        print((out / "results.md").read_text())
        left = len(jobs_of(rows, args.methods))
        if left:
            print(f"incomplete: {left} runs are left")


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
