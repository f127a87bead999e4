"""What tests/bench/README.md says of first runs: each script as a newcomer starts it, and with flags
that no other table has.

    python tests/bench/learning.py                   # all of them, one to ten minutes each on 2 cores
    python tests/bench/learning.py --commands "ppo.py --critic shared" --seeds 1    # the others' rows stay

Writes learning.json and learning.md.
"""

import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro

HERE = Path(__file__).resolve().parent
ORDER = (
    "grpo.py",
    "grpo.py --dtype bfloat16",
    "reinforce.py",
    "ppo.py",
    "ppo.py --critic shared",
    "dpo.py",
    "reward_model.py",
    "grpo.py --drop_equal_groups --mask_truncated --clip_high 0.28 --minibatches 4",
    "dpo.py --loss ipo",
    "dpo.py --loss hinge",
    "dpo.py --loss simpo",
    "grpo.py --lora_rank 8",
    "reinforce.py --lora_rank 8",
    "ppo.py --lora_rank 8",
    "dpo.py --lora_rank 8",
    "reward_model.py --lora_rank 8",
)


@dataclass
class Args:
    commands: tuple[str, ...] = tuple(c for c in ORDER if (HERE.parents[1] / c.split()[0]).exists())
    seeds: tuple[int, ...] = (1, 2, 3)


def score(m):
    """What a line of metrics.jsonl says of held-out data: tasks are sampled for, a reward model ranks pairs."""
    return m.get("eval/exact", m.get("eval/accuracy"))


def main(args):
    path = HERE / "learning.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    for command in args.commands:
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as out:
                script, *flags = shlex.split(command)
                whole = [sys.executable, str(HERE.parents[1] / script), *flags]
                whole += ["--seed", str(seed), "--out", out]
                began = time.perf_counter()
                subprocess.run(whole, check=True, capture_output=True)
                seconds = time.perf_counter() - began
                lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
                metrics = [json.loads(line) for line in lines]
            curve = [(m["step"], score(m)) for m in metrics if score(m) is not None]
            memory = max(m.get("memory_gib", 0.0) for m in metrics)
            row = {
                "command": command,
                "seed": seed,
                "seconds": round(seconds),
                "held_out": curve,
                "memory_gib": round(memory, 2),
                "threads": torch.get_num_threads(),
            }
            last = metrics[-1]
            row |= {name: last[name] for name in last if name.startswith("best_of/")}
            if "eval/exact" in last and "eval/accuracy" in last:
                row["eval/accuracy"] = last["eval/accuracy"]
            print(row, flush=True)
            runs = [r for r in runs if (r["command"], r["seed"]) != (command, seed)] + [row]
            runs.sort(key=lambda r: (ORDER.index(r["command"]), r["seed"]))
            write(path, runs)


def write(path, runs):
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
    path.write_text(json.dumps({**versions, "runs": runs}, indent=1) + "\n")
    lines = [
        "| command | held out | at the start | at the end, by seed | seconds |",
        "|---|---|---|---|---|",
    ]
    for command in dict.fromkeys(r["command"] for r in runs):
        mine = [r for r in runs if r["command"] == command]
        ranks = "best_of/true@1" in mine[0]
        what = "pairs right" if ranks else "exact match"
        found = {what: [(r["held_out"][0][1], r["held_out"][-1][1]) for r in mine]}
        if "eval/accuracy" in mine[0]:
            found["pairs right"] = [(None, r["eval/accuracy"]) for r in mine]
        if ranks:
            found["exact match of one sample, and of the best of 16"] = [
                (r["best_of/true@1"], r["best_of/true@16"]) for r in mine
            ]
        for i, (what, scores) in enumerate(found.items()):
            begun = sorted({f"{x:.2f}" for x, _ in scores if x is not None})
            span = " to ".join(begun[:: max(len(begun) - 1, 1)])
            ends = ", ".join(f"{x:.2f}" for _, x in scores)
            first = ""
            seconds = ""
            if i == 0:
                first = f" `python {command}`"
                seconds = ", ".join(str(r["seconds"]) for r in mine)
            lines.append(f"|{first} | {what} | {span} | {ends} | {seconds} |")
    (HERE / "learning.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
