"""What a critic costs: a step of ppo.py with each critic, and of grpo.py, which has none, on a real model.

    python tests/bench/critics.py --model SMOLLM2 --data gsm8k_train.jsonl       # 135M chat model (smollm2.py), about 15 minutes

32 completions of 64 tokens a step, KL 0.05, 2 passes of 2 updates, float32 on the CPU; ppo.py draws one of each of 32 prompts,
grpo.py 8 of each of 4. Each measurement is a process of its own of one step; they take turns.
Writes critics.json and .md.
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
WHO = {
    "ppo.py, separate critic": ("ppo.py", "--prompts_per_step", "32", "--critic", "separate"),
    "ppo.py, shared critic": ("ppo.py", "--prompts_per_step", "32", "--critic", "shared"),
    "grpo.py": ("grpo.py", "--prompts_per_step", "4", "--samples_per_prompt", "8"),
}
SAME = "--beta 0.05 --epochs 2 --minibatches 2 --max_new_tokens 64 --steps 1 --reward number --device cpu --seed 1"


@dataclass
class Args:
    model: str
    """folder of the model"""
    data: str
    """prompts with answers"""
    rounds: int = 2
    """how often each takes its turn"""


def main(args):
    turns = []
    for _ in range(args.rounds):
        for who, (script, *flags) in WHO.items():
            with tempfile.TemporaryDirectory() as out:
                command = [
                    sys.executable,
                    str(HERE.parents[1] / script),
                    "--model",
                    args.model,
                    "--data",
                    args.data,
                    "--out",
                    out,
                ]
                subprocess.run([*command, *flags, *SAME.split()], check=True, capture_output=True)
                m = json.loads((Path(out) / "metrics.jsonl").read_text().splitlines()[-1])
            turn = {"who": who} | {
                k: m[k] for k in ("time/sample", "time/train", "memory_gib", "length")
            }
            turns.append(turn)
            print(turn, flush=True)
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    (HERE / "critics.json").write_text(
        json.dumps({**versions, "flags": SAME, "turns": turns}, indent=1) + "\n"
    )
    lines = [
        "| 135M model, 32 completions a step | sampling, s | training, s | peak memory |",
        "|---|---|---|---|",
    ]
    for who in WHO:
        sample, train, memory = (
            statistics.median(t[k] for t in turns if t["who"] == who)
            for k in ("time/sample", "time/train", "memory_gib")
        )
        lines.append(f"| {who} | {sample:.1f} | {train:.1f} | {memory:.1f} GiB |")
    (HERE / "critics.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
