"""How far a learned reward can be trusted: its score and the true one against KL, for PPO with and without a leash and for best-of-N.

    pip install -r requirements.txt matplotlib
    python tests/bench/overoptimisation.py           # about 12 minutes on 2 cores

Trains the reward model of the bundled pairs (reward_model.py with no flags), then ppo.py on its scores with several betas. Every few
steps 4 completions of each held-out prompt are drawn at temperature 1, and their mean learned score, true score (`exact`) and
KL to the model that PPO began with are noted. Best-of-N draws from that model; its KL is the bound log N - (N - 1) / N. Writes
overoptimisation.json, .md and .png.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import common
import ppo
import reward_model


@dataclass
class Args:
    betas: tuple[float, ...] = (0.0, 0.05, 0.3)
    """of PPO"""
    best_of: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """N of best-of-N"""
    steps: int = 150
    """of PPO"""
    every: int = 10
    """steps between measurements"""
    seed: int = 1


def rows_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def measure(reference):
    """A stand-in for ppo.evaluate: sampled, not greedy, and with the KL."""

    def evaluate(policy, tokenizer, held_out, reward, args, world, stop_asked=None):
        ids, rows = zip(*held_out)
        rows = [row for row in rows for _ in range(4)]
        s = common.sample(
            policy, tokenizer, list(ids), n=4, max_new_tokens=args.max_new_tokens, seed=0
        )
        s.rows_per_prompt = 4
        parts = ppo.micro_batches(range(len(s.mask)), s.mask.any(1), s, 4096, world)
        now, then = (ppo.rollout_logprobs(m, s, [parts], 1.0) for m in (policy, reference))
        true = [ppo.exact(t, r) for t, r in zip(s.texts, rows)]
        learned = reward.score(s, rows)["reward"]
        mean = {"eval/learned": sum(learned) / len(rows), "eval/true": sum(true) / len(rows)}
        return mean | {"eval/kl": ((now - then) * s.mask).sum().item() / len(rows)}

    return evaluate


def main(args):
    with tempfile.TemporaryDirectory() as out:
        reward_model.train(
            reward_model.Args(
                out=f"{out}/reward", device="cpu", seed=args.seed, best_of=args.best_of
            )
        )
        last = rows_of(f"{out}/reward")[-1]
        best = [
            (n, last[f"best_of/kl@{n}"], last[f"best_of/score@{n}"], last[f"best_of/true@{n}"])
            for n in args.best_of
        ]
        ppo.evaluate, curves = (
            measure(common.load_reference(ppo.Args.model, common.start("cpu"))),
            {},
        )
        for beta in args.betas:
            flags = {
                "reward": f"{out}/reward/model",
                "beta": beta,
                "steps": args.steps,
                "eval_every": args.every,
            }
            ppo.train(ppo.Args(out=f"{out}/{beta}", device="cpu", seed=args.seed, **flags))
            log = [m for m in rows_of(f"{out}/{beta}") if "eval/kl" in m]
            curves[beta] = [
                (m["step"], m["eval/kl"], m["eval/learned"], m["eval/true"]) for m in log
            ]
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seed": args.seed,
    }
    result = {**versions, "best_of": best, "ppo": {str(b): c for b, c in curves.items()}}
    (HERE / "overoptimisation.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = ["| policy | KL, nats | learned score | true score |", "|---|---|---|---|"]
    for n, kl, learned, true in best:
        if n in (1, 4, 16, 64):
            lines.append(f"| best of {n} | {kl:.2f} | {learned:.2f} | {true:.2f} |")
    for beta, curve in curves.items():
        peak = max(curve, key=lambda row: row[3])
        for words, (step, kl, learned, true) in (("its best", peak), ("its last", curve[-1])):
            lines.append(
                f"| PPO, beta {beta:g}, {words} (step {step}) | {kl:.2f} | {learned:.2f} | {true:.2f} |"
            )
    (HERE / "overoptimisation.md").write_text("\n".join(lines) + "\n")
    picture(best, curves)
    print("\n".join(lines))


def picture(best, curves):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), facecolor="white")
    for ax, column, words in zip(axes, (2, 3), ("learned score", "true score (exact match)")):
        for beta, curve in curves.items():
            ax.plot(
                [r[1] for r in curve], [r[column] for r in curve], ".-", label=f"PPO, beta {beta:g}"
            )
        ax.plot(
            [r[1] for r in best], [r[column] for r in best], "k^:", label="best of N (KL: bound)"
        )
        ax.set(xlabel="KL to the first policy, nats a completion", ylabel=words)
        ax.grid(alpha=0.3)
    axes[1].legend()
    fig.savefig(HERE / "overoptimisation.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
