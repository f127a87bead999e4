"""What each patch of tests/changes did to a short run, beside the unchanged script.

    python tests/bench/changes.py                   # 225 runs of 15 to 40 seconds; resumable
    python tests/bench/changes.py --names cispo     # one patch and the unchanged script beside it

Every run starts from the bundled model and ends with the greedy score of its held-out data. A patch
has the flags of the unchanged script beside it, and what the patch needs. The learning rates are
the script's default, its half and its double; ppo.py's critic has its rate times the same factor.
Writes changes.json and changes.md.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / "tiny"))
import sort

# The unchanged runs. Patches of the ratio or the clip act only with several updates per rollout.
PLAIN = {
    "grpo": "--steps 50",
    "grpo, four updates per rollout": "--steps 50 --minibatches 4",
    "grpo, two rewards": "--steps 50 --reward {folder}/rewards.py:both",
    "ppo": "--steps 30",
    "reinforce": "--steps 50",
    "dpo": "--steps 60",
    "reward_model": "--steps 60 --policy= --eval_prompts= "
    "--data {folder}/pairs.jsonl --eval_data {tiny}/pairs_test.jsonl",
}

# patch: the unchanged run beside it, and the flags that it has besides
PATCHES = {
    "cispo": ("grpo, four updates per rollout", ""),
    "sapo": ("grpo, four updates per rollout", ""),
    "truncated_importance_sampling": ("grpo, four updates per rollout", ""),
    "masked_importance_sampling": ("grpo, four updates per rollout", ""),
    "dual_clip": ("grpo, four updates per rollout", ""),
    "entropy_bonus": ("grpo", ""),
    "maxrl": ("grpo", ""),
    "reinforce_plus_plus_baseline": ("grpo", ""),
    "soft_overlong_punishment": ("grpo", ""),
    "gdpo": ("grpo, two rewards", ""),
    "critic_lambda": ("ppo", ""),
    "length_adaptive_lambda": ("ppo", "--lam 1"),
    "ppo_entropy_bonus": ("ppo", ""),
    "remax": ("reinforce", ""),
    "orpo": ("dpo", "--loss orpo"),
    "dpo_norm": ("dpo", "--loss norm --beta 5"),
    "apo_zero": ("dpo", "--loss apo_zero"),
    "margin_from_scores": ("reward_model", "--use_margin"),
}
NAMES = {1.0: "default", 0.5: "half", 2.0: "double"}  # of the rates, by their factor
FACTORS = tuple(NAMES)
RATES = {  # the scripts' defaults for the bundled model
    "grpo": {"learning_rate": 2e-4},
    "ppo": {"learning_rate": 3e-4, "critic_learning_rate": 5e-4},
    "reinforce": {"learning_rate": 3e-4},
    "dpo": {"learning_rate": 3e-4},
    "reward_model": {"learning_rate": 1e-3},
}
REWARDS = """import sys

sys.path.insert(0, {tiny!r})
import sort


def both(completion, row):
    right = float(completion.strip() == row["answer"])
    near = sort.position(completion, row)
    return {{"reward": right + near, "right": right, "near": near}}
"""


@dataclass
class Args:
    names: tuple[str, ...] = (*PLAIN, *PATCHES)
    """patches, and names of unchanged runs"""
    seeds: tuple[int, ...] = (1, 2, 3)
    jobs: int = 2
    """runs at once; give each one thread with OMP_NUM_THREADS=1"""


def script_of(name):
    plain = PATCHES[name][0] if name in PATCHES else name
    return plain.split(",")[0]


def flags_of(name, folder):
    flags = PLAIN[name] if name in PLAIN else " ".join((PLAIN[PATCHES[name][0]], PATCHES[name][1]))
    return flags.format(folder=folder, tiny=ROOT / "tests" / "tiny").split()


def prepare(name, folder):
    """A folder with the scripts, one of them patched, and the data that the flags name."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "tests" / "tiny", folder / "tests" / "tiny")
    if name in PATCHES:
        diff = ROOT / "tests" / "changes" / f"{name}.diff"
        subprocess.run(["patch", "-p1", "--fuzz=0", "-s", "-i", str(diff)], cwd=folder, check=True)
    (folder / "rewards.py").write_text(REWARDS.format(tiny=str(ROOT / "tests" / "tiny")))
    pairs = (ROOT / "tests" / "tiny" / "pairs_train.jsonl").read_text().splitlines()
    with open(folder / "pairs.jsonl", "w") as file:
        for line in pairs:
            pair = json.loads(line)
            for side in ("chosen", "rejected"):  # points from 0 to 10
                pair[f"score_{side}"] = 10 * sort.position(pair[side], pair)
            file.write(json.dumps(pair) + "\n")


def run(name, factor, seed):
    script = script_of(name)
    with tempfile.TemporaryDirectory() as folder:
        prepare(name, Path(folder))
        command = [sys.executable, f"{script}.py", *flags_of(name, folder)]
        for flag, rate in RATES[script].items():
            command += [f"--{flag}", str(rate * factor)]
        command += ["--seed", str(seed), "--out", "run", "--device", "cpu"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        row = {"name": name, "factor": factor, "seed": seed, "status": done.returncode}
        if done.returncode:
            print(done.stderr[-2000:])
            return row  # a failed run counts as a score of 0
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    for key in ("eval/exact", "eval/accuracy"):
        scores = [json.loads(line)[key] for line in lines if key in json.loads(line)]
        if scores:
            row[key] = round(scores[-1], 4)
    return row


def score(row):
    return row.get("eval/exact", row.get("eval/accuracy", 0.0))


def main(args):
    path = HERE / "changes.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    done = {(row["name"], row["factor"], row["seed"]) for row in rows}
    wanted = [
        (name, factor, seed) for factor in FACTORS for name in args.names for seed in args.seeds
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(run, *each) for each in wanted if each not in done]
        for finished in as_completed(runs):
            rows.append(finished.result())
            print(rows[-1], flush=True)
            path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    rows.sort(key=wanted_order)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    if rows:
        (HERE / "changes.md").write_text(table(rows))


def wanted_order(row):
    return [*PLAIN, *PATCHES].index(row["name"]), FACTORS.index(row["factor"]), row["seed"]


def scores_of(rows, name, factor):
    return [score(row) for row in rows if row["name"] == name and row["factor"] == factor]


def cell(rows, name, factor):
    """Empty if not all seeds were run."""
    scores = scores_of(rows, name, factor)
    if len(scores) < len(Args.seeds):
        return ""
    return f"{statistics.mean(scores):.2f} ({min(scores):.2f} to {max(scores):.2f})"


def best(rows, name):
    """The name of the rate whose runs have the highest mean; empty if one was not run."""
    means = {}
    for factor, words in NAMES.items():
        scores = scores_of(rows, name, factor)
        if len(scores) < len(Args.seeds):
            return ""
        means[words] = statistics.mean(scores)
    return max(means, key=means.get)


def table(rows):
    lines = [
        "| run | flags | score, default rate | half the rate | double the rate | best of the three |",
        "|---|---|---|---|---|---|",
    ]
    for plain in PLAIN:
        for name in [plain, *(patch for patch, (beside, _) in PATCHES.items() if beside == plain)]:
            if not any(row["name"] == name for row in rows):
                continue
            flags = " ".join(flags_of(name, "FOLDER")) if name in PLAIN else PATCHES[name][1]
            flags = flags.replace(f"{ROOT}/", "").replace("{folder}", "FOLDER")
            cells = [cell(rows, name, factor) for factor in FACTORS]
            what = f"**{name}**, unchanged" if name in PLAIN else name
            shown = f"`{flags}`" if flags else ""
            lines.append(f"| {what} | {shown} | {' | '.join(cells)} | {best(rows, name)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Args))
