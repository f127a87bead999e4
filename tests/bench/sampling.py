"""`sample` of common.py against transformers' `generate`, on the CPU: the same model, prompts and lengths.

    python tests/bench/sampling.py              # about 5 minutes on 2 cores; writes sampling.json and sampling.md

Random weights serve: speed does not depend on what the tokens mean. Each of the words of a random stop set ends a
completion, and there are as many as make the mean length 0.45 of the longest, as in real rollouts. The two take turns;
a ratio is that of two neighbouring runs, and the table has the median. Tokens are counted as useful ones: those up to
and with the stop token. `generate` returns ids alone where `sample` returns log-probabilities too.
"""

import json
import random
import statistics
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import sample

SHAPES = {  # name: (layers, width, words, prompts, samples of each)
    "12 layers, 512 wide, 32 x 8": (12, 512, 8192, 32, 8),
    "4 layers, 128 wide, 32 x 8": (4, 128, 8192, 32, 8),
    "12 layers, 512 wide, 1 x 1": (12, 512, 8192, 1, 1),
    "4 layers, 128 wide, 1 x 1": (4, 128, 8192, 1, 1),
}


@dataclass
class Args:
    rounds: int = 7
    """how often each of the two runs, after one warm-up; the 1 x 1 shapes run ten times as often"""
    new_tokens: int = 64
    threads: int = 2
    only: str = ""
    """run the shapes whose name contains this"""


class Ids:
    """All that `sample` asks of a tokenizer when prompts are ids."""

    pad_token_id, eos_token_id, chat_template = 0, 1, None

    def decode(self, ids, **kwargs):
        return ""

    def __call__(self, text, **kwargs):
        return types.SimpleNamespace(input_ids=[])


def build(layers, width, words):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 2), num_key_value_heads=max(width // 64, 2), bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    # drawn uniformly, a token ends its row with probability 1/36, and of at most 64 tokens 0.45 are used on average
    model.generation_config.eos_token_id = [1, *range(2, words // 36 + 1)]
    model.generation_config.pad_token_id = 0
    return model


def measure(name, args):
    layers, width, words, count, n = SHAPES[name]
    model, rng = build(layers, width, words), random.Random(0)
    prompts = [
        [rng.randrange(words // 2, words) for _ in range(rng.randint(16, 32))] for _ in range(count)
    ]
    P = max(map(len, prompts))
    ids = torch.tensor([[0] * (P - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts])
    stops = torch.tensor(model.generation_config.eos_token_id)

    def ours(seed):
        s = sample(model, Ids(), prompts, n=n, max_new_tokens=args.new_tokens, seed=seed)
        return int(s.mask.sum())

    def theirs(seed):
        torch.manual_seed(seed)
        settings = {
            "do_sample": True,
            "top_k": 0,
            "top_p": 1.0,
            "temperature": 1.0,
            "num_return_sequences": n,
        }
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=args.new_tokens, **settings
            )
        new = out[:, P:]
        return int((torch.isin(new, stops).cumsum(1) - torch.isin(new, stops).long() == 0).sum())

    if n == 1:  # one row ends wherever it ends: both draw the full length, so that seconds compare
        model.generation_config.eos_token_id = None
        stops = torch.tensor([-1])
        Ids.eos_token_id = None
    rounds = args.rounds * (10 if n == 1 else 1)
    speed = {"sample": [], "generate": []}
    share = []
    for r in range(rounds + 1):
        for which, run in (("sample", ours), ("generate", theirs)):
            begin = time.perf_counter()
            tokens = run(r)
            if r:  # round 0 is the warm-up
                speed[which].append(tokens / (time.perf_counter() - begin))
                share.append(tokens / (count * n * args.new_tokens))
    Ids.eos_token_id = 1
    ratios = [a / b for a, b in zip(speed["sample"], speed["generate"])]
    row = {
        "shape": name, "rounds": rounds, "mean_over_max_length": round(statistics.mean(share), 3),
        **{f"{k}_tokens_per_second": round(statistics.median(v), 1) for k, v in speed.items()},
        "ratio": round(statistics.median(ratios), 2), "ratio_min": round(min(ratios), 2), "ratio_max": round(max(ratios), 2),
    }  # fmt: skip
    return row


def main(args):
    torch.set_num_threads(args.threads)
    results = []
    for name in SHAPES:
        if args.only in name:
            results.append(measure(name, args))
            print(results[-1], flush=True)
    if args.only:
        return
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": args.threads,
    }
    here = Path(__file__).resolve().parent
    (here / "sampling.json").write_text(json.dumps({**versions, "rows": results}, indent=1) + "\n")
    lines = [
        "| model and batch | `sample`, tokens/s | `generate`, tokens/s | ratio (lowest to highest) |",
        "|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r['shape']} | {r['sample_tokens_per_second']:,.0f} | {r['generate_tokens_per_second']:,.0f} "
            f"| {r['ratio']:.2f} ({r['ratio_min']:.2f} to {r['ratio_max']:.2f}) |"
        )
    (here / "sampling.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
