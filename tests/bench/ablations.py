"""One choice at a time: what it does on the sorting task, measured, whatever it shows.

    pip install -r requirements.txt matplotlib
    python tests/bench/ablations.py                    # 40 minutes on 2 cores, one run on each; goes on where it was stopped
    python tests/bench/ablations.py --only "GAE's lambda" --seeds 1 --completions 2560 --out /tmp/few

Every run draws 25,600 completions of training prompts (half as many for PPO, whose updates are four) from the bundled model, with the
flags named and otherwise a script's default, two seeds (of all arms one seed, then the other). Two ablations train nothing: they
look at gradients of the bundled model.
Writes ablations.json, ablations.md, and a picture for each, ablation_*.png.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "tiny"
sys.path[:0] = [str(HERE.parents[1]), str(TINY)]
import make

import common
import grpo
import reinforce

ARMS = {  # label: (script, samples a step, flags)
    "raw rewards": ("reinforce", 256, "--baseline none"),
    "less the prompt's mean": ("reinforce", 256, "--baseline prompt"),
    "less the mean, by the std": ("reinforce", 256, "--baseline prompt --normalize"),
    "only the best of a prompt": ("reinforce", 256, "--baseline none --keep_max"),
    "grpo.py as it is": ("grpo", 256, ""),
    "reward: right places": ("grpo", 256, f"--reward {TINY / 'sort.py'}:position"),
    "reward: neighbours in order": ("grpo", 256, f"--reward {TINY / 'sort.py'}:adjacent"),
    "not divided by the std": ("grpo", 256, "--scale none"),
    "mean over each sequence": ("grpo", 256, "--aggregate sequence"),
    "divided by a constant": ("grpo", 256, "--aggregate constant"),
    "four updates, clipped": ("grpo", 256, "--epochs 4"),
    "four updates, no clip": ("grpo", 256, "--epochs 4 --clip_low 1 --clip_high 1e9"),
    "no KL": ("grpo", 256, "--eval_samples 16"),
    "KL, beta 0.1": ("grpo", 256, "--eval_samples 16 --beta 0.1 --kl k3"),
    "lambda 0": ("ppo", 128, "--lam 0"),
    "lambda 0.5": ("ppo", 128, "--lam 0.5"),
    "lambda 0.95": ("ppo", 128, "--lam 0.95"),
    "lambda 1": ("ppo", 128, "--lam 1"),
    "from random weights": ("grpo", 256, ("sft", 0)),
    "after 46 steps of fine-tuning": ("grpo", 256, ("sft", 46)),
}
PICTURES = {  # title: (arms, the other numbers that are of interest; the first is drawn)
    "Raw and centred rewards": (tuple(ARMS)[:4], "grad_norm"),
    "Three rewards": (
        ("grpo.py as it is", "reward: right places", "reward: neighbours in order"),
        "eval/reward",
    ),
    "Divided by the group's std, or not": (
        ("grpo.py as it is", "not divided by the std"),
        "grad_norm",
    ),
    "What a token's loss is divided by": (
        ("grpo.py as it is", "mean over each sequence", "divided by a constant"),
        "length",
    ),
    "Updates per rollout": (
        ("grpo.py as it is", "four updates, clipped", "four updates, no clip"),
        "kl/old",
    ),
    "Variety": (("no KL", "KL, beta 0.1"), "eval/pass@16", "eval/pass@1"),
    "GAE's lambda": (("lambda 0", "lambda 0.5", "lambda 0.95", "lambda 1"), "value/explained"),
    "Cold start": (
        ("from random weights", "after 46 steps of fine-tuning", "grpo.py as it is"),
        "reward",
    ),
}
GRADIENTS = ("Noise of the gradient", "Where the gradient comes from")


@dataclass
class Args:
    only: tuple[str, ...] = (*PICTURES, *GRADIENTS)
    seeds: tuple[int, ...] = (1, 2)
    jobs: int = 2
    """runs at once, each on one thread"""
    completions: int = 25_600
    out: str = str(HERE)


def call(script, *flags):
    command = [sys.executable, str(HERE.parents[1] / f"{script}.py"), "--device", "cpu", *flags]
    subprocess.run(
        command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def train(label, seed, completions):
    script, drawn, flags = ARMS[label]
    steps = completions // 256
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(
            flags, tuple
        ):  # a start of our own: random weights, and as much fine-tuning as was asked for
            make.untrained(f"{folder}/start", 0)
            make.tokenizer().save_pretrained(f"{folder}/start")
            if flags[1]:
                sft = f"--demos {TINY / 'sort_train.jsonl'} --steps {flags[1]} --learning_rate 1e-3 --save_every 1000".split()
                call(
                    "reinforce",
                    *sft,
                    "--model",
                    f"{folder}/start",
                    "--eval_data",
                    "",
                    "--out",
                    f"{folder}/sft",
                )
            flags = f"--model {folder}/{'sft/model' if flags[1] else 'start'} --learning_rate 2e-4"
            flags += f" --data {TINY / 'sort_train.jsonl'}"
        every = steps if "eval_samples" in flags else max(steps // 10, 1)
        run = [
            "--steps",
            str(steps),
            "--eval_every",
            str(every),
            "--save_every",
            str(steps),
            "--seed",
            str(seed),
        ]
        call(
            script,
            *flags.split(),
            *run,
            "--eval_data",
            str(TINY / "sort_test.jsonl"),
            "--out",
            f"{folder}/run",
        )
        log = [
            json.loads(line)
            for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()
        ]
    names = {"eval/exact", *(name for _, *others in PICTURES.values() for name in others)}
    return {
        "arm": label,
        "seed": seed,
        "drawn": drawn,
        "log": [{"step": m["step"], **{k: m[k] for k in names & set(m)}} for m in log],
    }


def rollout(model, tokenizer, prompts, n, seed):
    samples = common.sample(
        model, tokenizer, [ids for ids, _ in prompts], n=n, max_new_tokens=22, seed=seed
    )
    samples.rows_per_prompt = n
    return samples, torch.tensor(
        [reinforce.exact(t, prompts[i // n][1]) for i, t in enumerate(samples.texts)]
    )


def noise(batches):
    """Gradients of many batches of 32 prompts x 8, for each baseline from the same samples: how much larger than the gradient itself
    is the spread of one batch's? Without bias: the mean of K gradients holds a K-th of the spread."""
    model, tokenizer = (
        common.load_policy(str(TINY / "model"), common.start("cpu")),
        common.load_tokenizer(str(TINY / "model")),
    )
    rows = common.load_prompts(
        str(TINY / "sort_train.jsonl"), "--data", tokenizer, reinforce.Args(), ""
    )
    found = {b: [] for b in ("none", "batch", "prompt", "loo")}
    for k in range(batches):
        samples, rewards = rollout(
            model,
            tokenizer,
            [rows[common.nth_row(len(rows), 32 * k + i, 1)] for i in range(32)],
            8,
            k,
        )
        for b in found:
            # a forward for each: the shared prompts' graph is gone after a backward
            logprobs, _ = reinforce.token_logprobs(model, samples, list(range(256)), 1.0)
            A = (rewards - reinforce.baselines(rewards, rewards, 8, b))[:, None].expand_as(logprobs)
            loss, _ = reinforce.policy_loss(logprobs, logprobs.detach(), A, samples.mask, 256)
            loss.backward()
            found[b].append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())
            model.zero_grad()
    result = {}
    for b, grads in found.items():
        grads = torch.stack(grads)
        spread = grads.var(0).sum().item()
        signal = grads.mean(0).square().sum().item() - spread / batches
        result[b] = spread / signal
    return {"batches": batches, "spread_to_signal": result}


def origin(prompts, n=16):
    """Each prompt's own gradient, by its share of right answers: how much of the squared norm do prompts of each share bring?"""
    model, tokenizer = (
        common.load_policy(str(TINY / "model"), common.start("cpu")),
        common.load_tokenizer(str(TINY / "model")),
    )
    rows = common.load_prompts(
        str(TINY / "sort_train.jsonl"), "--data", tokenizer, reinforce.Args(), ""
    )[:prompts]
    edges = ("0", "up to 1/4", "to 1/2", "to 3/4", "below 1", "1")
    bins = {e: {"prompts": 0, "none": 0.0, "group": 0.0} for e in edges}
    for k in range(0, len(rows), 16):
        samples, rewards = rollout(model, tokenizer, rows[k : k + 16], n, k)
        for i in range(len(rewards) // n):
            mine = list(range(i * n, i * n + n))
            p = rewards[mine].mean().item()
            which = bins[edges[0 if p == 0 else 5 if p == 1 else 1 + min(math.ceil(p * 4) - 1, 3)]]
            which["prompts"] += 1
            if 0 < p < 1:
                for scale in ("none", "group"):
                    logprobs, _ = grpo.token_logprobs(model, samples, mine, 1.0)
                    mask = samples.mask[mine, : logprobs.shape[1]]
                    A = grpo.group_advantages(rewards[mine], rewards[mine], n, scale, False)
                    (-(A[:, None] * logprobs * mask).sum()).backward()
                    which[scale] += sum(q.grad.square().sum().item() for q in model.parameters())
                    model.zero_grad()
    return {"prompts": len(rows), "samples": n, "bins": bins}


def first(log, name):
    return next((m[name] for m in log if name in m), math.nan)


def last(log, name):
    return next((m[name] for m in reversed(log) if name in m), math.nan)


def table(known):
    lines = [
        "| choice | arm | exact match at the end, mean (lowest to highest) | also, from the first to the last |",
        "|---|---|---|---|",
    ]
    for title, (arms, *others) in PICTURES.items():
        for arm in arms:
            mine = [r["log"] for r in known["runs"] if r["arm"] == arm]
            if mine:
                exact = [last(m, "eval/exact") for m in mine]
                score = f"{statistics.mean(exact):.2f} ({min(exact):.2f} to {max(exact):.2f})"
                ends = [
                    [statistics.mean(of(m, name) for m in mine) for of in (first, last)]
                    for name in others
                ]
                also = ", ".join(
                    f"`{name}` {a:.3g} to {b:.3g}" for name, (a, b) in zip(others, ends)
                )
                lines.append(f"| {title} | {arm} | {score} | {also} |")
    if GRADIENTS[0] in known:
        lines += [
            "",
            "| baseline | spread of a batch's gradient / the gradient, both squared |",
            "|---|---|",
        ]
        lines += [
            f"| {base} | {ratio:.2f} |"
            for base, ratio in known[GRADIENTS[0]]["spread_to_signal"].items()
        ]
    if GRADIENTS[1] in known:
        bins = known[GRADIENTS[1]]["bins"]
        total = {s: sum(b[s] for b in bins.values()) for s in ("none", "group")}
        lines += [
            "",
            "| share of right samples | prompts | of the gradient | if divided by the std |",
            "|---|---|---|---|",
        ]
        for edge, b in bins.items():
            lines.append(
                f"| {edge} | {b['prompts']} | {b['none'] / total['none']:.2f} | {b['group'] / total['group']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def pictures(known, out):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    def finish(fig, title):
        fig.suptitle(title, fontsize=10)
        fig.tight_layout()
        name = "".join(c if c.isalnum() else "_" for c in title.lower().replace("'", ""))
        fig.savefig(out / f"ablation_{name}.png", dpi=90)
        plt.close(fig)

    for title, (arms, other, *_) in PICTURES.items():
        fig, axes = plt.subplots(1, 2, figsize=(8, 2.8), facecolor="white")
        for color, arm in zip(plt.get_cmap("tab10").colors, arms):
            runs = [r for r in known["runs"] if r["arm"] == arm]
            for ax, name in zip(axes, ("eval/exact", other)):
                curves = [
                    [(m["step"] * r["drawn"], m[name]) for m in r["log"] if name in m] for r in runs
                ]
                if curves and curves[0]:
                    values = torch.tensor([[y for _, y in c] for c in curves])
                    drawn = [x for x, _ in curves[0]]
                    ax.plot(drawn, values.mean(0), color=color, label=arm)
                    ax.fill_between(drawn, values.amin(0), values.amax(0), color=color, alpha=0.12)
                ax.set_xlabel("completions seen", fontsize=8)
                ax.set_ylabel(name, fontsize=8)
                ax.tick_params(labelsize=8)
                ax.grid(alpha=0.3)
        axes[0].set_ylim(0, 1)
        if axes[0].lines:
            axes[0].legend(fontsize=7)
        if any(r["arm"] in arms for r in known["runs"]):
            finish(fig, title)
    if GRADIENTS[0] in known:
        fig, ax = plt.subplots(figsize=(4.5, 2.8), facecolor="white")
        ratios = known[GRADIENTS[0]]["spread_to_signal"]
        ax.bar(list(ratios), list(ratios.values()))
        ax.set_ylabel("spread / gradient, squared", fontsize=8)
        finish(fig, GRADIENTS[0])
    if GRADIENTS[1] in known:
        fig, ax = plt.subplots(figsize=(5.5, 2.8), facecolor="white")
        bins = known[GRADIENTS[1]]["bins"]
        for i, (name, label) in enumerate(
            {"prompts": "prompts", "none": "gradient", "group": "gradient, by the std"}.items()
        ):
            values = torch.tensor([float(b[name]) for b in bins.values()])
            ax.bar(
                torch.arange(len(bins)) + 0.27 * (i - 1),
                values / values.sum(),
                width=0.27,
                label=label,
            )
        ax.set_xticks(range(len(bins)), list(bins), fontsize=8)
        ax.set_xlabel("share of a prompt's samples that are right", fontsize=8)
        ax.set_ylabel("share of all", fontsize=8)
        ax.legend(fontsize=7)
        finish(fig, GRADIENTS[1])


def main(args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "ablations.json"
    known = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "completions": args.completions,
        "runs": [],
    }
    if path.exists():
        known = json.loads(path.read_text())
        if known["completions"] != args.completions:
            sys.exit(f"{path} is of {known['completions']} completions")

    def save():
        path.write_text(json.dumps(known, indent=1) + "\n")

    for title, measure in zip(
        GRADIENTS, (lambda: noise(args.completions // 256), lambda: origin(args.completions // 50))
    ):
        if title in args.only and title not in known:
            known[title] = measure()
            save()
    done = {(r["arm"], r["seed"]) for r in known["runs"]}
    wanted = dict.fromkeys(
        arm for title in PICTURES if title in args.only for arm in PICTURES[title][0]
    )
    todo = [(arm, seed) for seed in args.seeds for arm in wanted if (arm, seed) not in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        for ended in as_completed([pool.submit(train, *job, args.completions) for job in todo]):
            row = ended.result()
            print(row["arm"], row["seed"], last(row["log"], "eval/exact"), flush=True)
            known["runs"].append(row)
            known["runs"].sort(key=lambda r: (list(ARMS).index(r["arm"]), r["seed"]))
            save()
    (out / "ablations.md").write_text(table(known))
    pictures(known, out)
    print(table(known))


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
