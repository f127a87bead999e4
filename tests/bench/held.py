"""What each method holds in memory besides activations, from a model's config alone: weights, gradients, Adam's moments.

python tests/bench/held.py                       # the tables of tests/docs/running.md; writes held.md, held_sizes.md; takes seconds
python tests/bench/held.py --model FOLDER        # another model's

Two counts. The usual one on slides: everything in 16 bits, Adam's two moments for what learns, no gradients. And this project's:
float32 masters, gradients and moments for what learns (16 bytes a parameter) and bfloat16 for what is frozen (2 bytes). While the
policy samples, the whole bfloat16 weights of a GPU (2 bytes) take the place of the gradients (4 bytes). With adapters (--lora_rank)
there is one frozen model, 2 bytes a parameter, and 16 bytes for each parameter of the adapters; nothing is copied on one GPU.
"""

import math
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import common

#         method: (models that learn, frozen models besides a reward model, does it draw samples)
METHODS = {
    "REINFORCE with its KL": (1, 1, True),
    "PPO with its KL, a separate critic": (2, 1, True),
    "PPO with its KL, a shared critic": (1, 1, True),
    "GRPO with its KL": (1, 1, True),
    "GRPO without (beta 0)": (1, 0, True),
    "DPO, reference scored before": (1, 0, False),
    "fine-tuning, or a reward model from pairs": (1, 0, False),
}


@dataclass
class Args:
    model: str = ""
    """folder of a model (default: a config in the shape of Llama 3 8B)"""
    rank: int = 16
    """of the adapters"""


def llama_8b():
    return transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    )  # fmt: skip


SIZES = {  # shapes of Qwen2.5: width, the MLP's width, layers, heads
    "0.5 B": (896, 4864, 24, 14),
    "1.5 B": (1536, 8960, 28, 12),
    "3 B": (2048, 11008, 36, 16),
    "7 B": (3584, 18944, 28, 28),
}


def qwen(size):
    width, inner, layers, heads = SIZES[size]
    large = size == "7 B"
    return transformers.Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=4 if large else 2,
        vocab_size=152064 if large else 151936,
        tie_word_embeddings=not large,
    )


def table_of_sizes(rank):
    """The columns "here" and "here, adapters" of some methods, for models of several sizes."""
    shown = (
        "GRPO without (beta 0)",
        "GRPO with its KL",
        "PPO with its KL, a separate critic",
        "DPO, reference scored before",
    )
    lines = [f"| model | parameters | {' | '.join(shown)} |", "|---|---|" + "---|" * len(shown)]
    for size in SIZES:
        count, rows = held(qwen(size), rank)
        cells = [f"{rows[name][1] / 1e9:.0f} GB, {rows[name][2] / 1e9:.1f} GB" for name in shown]
        lines.append(f"| {size} | {count / 1e9:.2f} B | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def held(config, rank):
    """{method: bytes (in 16 bits without gradients, here, here with adapters; the first two with a reward model that
    scores the samples)}."""
    flags = types.SimpleNamespace(lora_rank=rank, lora_alpha=32.0)
    with torch.device("meta"):  # a model without memory: its count is exact
        model = transformers.AutoModelForCausalLM.from_config(config)
        count = sum(p.numel() for p in model.parameters())
        common.add_adapters(model, flags, torch.bfloat16)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def both(learn, frozen):
        return (3 * learn + frozen) * 2 * count, (16 * learn + 2 * frozen) * count

    return count, {
        name: (
            *both(learn, frozen),
            2 * count + 16 * learn * adapters,
            *(both(learn, frozen + 1) if samples else ()),
        )
        for name, (learn, frozen, samples) in METHODS.items()
    }


def keys_and_values(config, rows, tokens):
    """Bytes of the bfloat16 cache of a rollout's completions, in buffers of a multiple of 64 tokens."""
    room = 64 * math.ceil(tokens / 64)
    width = config.hidden_size // config.num_attention_heads
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * width * rows * room


def main(args):
    config = common.read_config(args.model) if args.model else llama_8b()
    count, rows = held(config, args.rank)
    lines = [
        f"| {count / 1e9:.1f} B parameters | learns + frozen | 16 bits, no gradients | here | here, adapters of rank {args.rank} | first two with a reward model |",
        "|---|---|---|---|---|---|",
    ]
    for name, (slides, here, adapted, *scored) in rows.items():
        learn, frozen, _ = METHODS[name]
        more = f"{scored[0] / 1e9:.0f} and {scored[1] / 1e9:.0f} GB" if scored else ""
        lines.append(
            f"| {name} | {learn} + {frozen} | {slides / 1e9:.0f} GB | {here / 1e9:.0f} GB | {adapted / 1e9:.1f} GB | {more} |"
        )
    print("\n".join(lines))
    if not args.model:
        (HERE / "held.md").write_text("\n".join(lines) + "\n")
        (HERE / "held_sizes.md").write_text(table_of_sizes(args.rank))
        print("\n" + table_of_sizes(args.rank))
        for config, rows, tokens in ((llama_8b(), 256, 662), (qwen("1.5 B"), 1024, 3200)):
            size = keys_and_values(config, rows, tokens) / 1e9
            print(f"keys and values of {rows} completions of {tokens} tokens: {size:.0f} GB")


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
