"""What the README says of first runs: each script with no flags but a seed, as a newcomer starts it.

python tests/bench/learning.py                    # 3 seeds, two to three minutes each on 2 cores; writes learning.json, .md
"""

import json
import platform
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


@dataclass
class Args:
    scripts: tuple[str, ...] = ("grpo", "reinforce")
    seeds: tuple[int, ...] = (1, 2, 3)


def main(args):
    results = []
    for script in args.scripts:
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as out:
                began = time.perf_counter()
                command = [sys.executable, str(HERE.parents[1] / f"{script}.py"), "--seed", str(seed), "--out", out]
                subprocess.run(command, check=True, capture_output=True)
                seconds = time.perf_counter() - began
                metrics = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
            curve = [(m["step"], m["eval/exact"]) for m in metrics if "eval/exact" in m]
            row = {
                "script": script,
                "seed": seed,
                "seconds": round(seconds),
                "eval_exact": curve,
                "memory_gib": round(metrics[-1]["memory_gib"], 2),
            }
            print(row, flush=True)
            results.append(row)
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    path = HERE / "learning.json"
    before = json.loads(path.read_text())["runs"] if path.exists() else []  # those of other scripts stay
    results = [r for r in before if r["script"] not in args.scripts] + results
    results.sort(key=lambda r: (("grpo", "reinforce", "ppo", "dpo", "reward_model").index(r["script"]), r["seed"]))
    path.write_text(json.dumps({**versions, "runs": results}, indent=1) + "\n")
    lines = ["| command | seed | held-out greedy exact match | seconds |", "|---|---|---|---|"]
    for r in results:
        before, after = r["eval_exact"][0][1], r["eval_exact"][-1][1]
        lines.append(f"| `python {r['script']}.py` | {r['seed']} | {before:.2f} to {after:.2f} | {r['seconds']} |")
    (HERE / "learning.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
