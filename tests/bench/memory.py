"""The memory estimate of common.py against what a training step then takes, as the peak of a process of its own.

python tests/bench/smollm2.py MODEL && python tests/bench/memory.py --model MODEL     # writes memory.json
"""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import load_policy, make_optimizer, memory_needed, memory_used, start


@dataclass
class Args:
    model: str
    """a model folder"""
    rows: int = 0
    """one case alone: rows of `columns` tokens, in this process"""
    columns: int = 256
    checkpointing: bool = False


def step(args):
    """Two training steps; the second has Adam's moments from the first. The head is computed in chunks of 1,024
    positions, recomputed in backward, as the scripts do it."""
    world = start()
    torch.set_num_threads(2)
    model = load_policy(args.model, world, gradient_checkpointing=args.checkpointing)
    optimizer = make_optimizer(model, 1e-6)

    def chunk(hidden, ids):
        return torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), ids, reduction="sum")

    for _ in range(2):
        ids = torch.randint(0, 1000, (args.rows, args.columns), device=world.device)
        mask = torch.ones_like(ids)
        mask[:, 0] = 0  # a padded batch: attention is given a mask, as in training
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.flatten(0, 1)
        loss = sum(checkpoint(chunk, h, i, use_reentrant=False) for h, i in zip(hidden.split(1024), ids.flatten().split(1024)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return memory_used(world)


def main(args):
    if args.rows:
        print(step(args))
        return
    results = []
    for rows, columns, checkpointing in (
        (4, 256, False),
        (16, 256, False),
        (8, 512, False),
        (4, 1024, False),
        (16, 256, True),
        (16, 512, True),
    ):
        case = replace(args, rows=rows, columns=columns, checkpointing=checkpointing)
        needed = memory_needed(args.model, start(), rows * columns, checkpointing=checkpointing)
        flags = [
            "--model",
            args.model,
            "--rows",
            str(rows),
            "--columns",
            str(columns),
            *["--checkpointing"][: case.checkpointing],
        ]
        took = int(subprocess.run([sys.executable, __file__, *flags], check=True, capture_output=True, text=True).stdout)
        row = {
            "rows": rows, "columns": columns, "checkpointing": checkpointing,
            "estimate_gib": round(needed["peak"] / 2**30, 2), "took_gib": round(took / 2**30, 2), "ratio": round(needed["peak"] / took, 3),
        }  # fmt: skip
        print(row, flush=True)
        results.append(row)
    (Path(__file__).resolve().parent / "memory.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
