"""reward_model.py beside TRL's RewardTrainer on real pairs: the same loss, seconds a step, peak memory, and what is learnt.

In an environment of its own, because TRL is no dependency of this project:

    pip install -r requirements.txt trl==1.16.0 datasets
    python tests/bench/vs_trl_reward.py --agree                       # loss and gradient, seconds; fails above 1e-6
    python tests/bench/vs_trl_reward.py --model SMOLLM2 --train gsm8k_pairs_train.jsonl --test gsm8k_pairs_test.jsonl
                                                                      # about 40 minutes on 2 cores

Both get the same token ids (no chat template), the same 8 pairs in each step, optimizer, rate, float32, no gradient checkpointing, and a
linear schedule with 10 steps of warm-up (TRL's first step has rate 0); the start of the head is each one's own.
Speed: short runs that take turns. Learning: 40 steps of each, held-out accuracy with a 95 % interval that draws whole questions, because
pairs of one question are not independent. Writes vs_trl_reward.json and .md.
"""

import dataclasses
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import common
import reward_model


@dataclass
class Args:
    model: str = ""
    """folder of the model to start from"""
    train: str = ""
    """pairs to learn from"""
    test: str = ""
    """held-out pairs"""
    steps: int = 40
    """of the runs whose accuracy is measured"""
    rounds: int = 3
    """how often each takes its turn of four steps, the first of which is not timed"""
    agree: bool = False
    """only compare loss and gradient, on the bundled model"""
    child: str = ""
    """(what the script tells its own processes)"""


def flags(args, out, steps):
    return reward_model.Args(
        model=args.model, data=args.train, eval_data="", policy="", chat=False, out=str(out), device="cpu", steps=steps, pairs_per_step=8,
        learning_rate=1e-5, schedule="linear", warmup=10, eval_every=10**6, save_every=10**6, unit_scale=False,
    )  # fmt: skip


def pairs_of(args, path):
    """The tokenizer, the pairs as reward_model.py has them (what both sides begin with, the rests) and their rows."""
    tokenizer = common.load_tokenizer(args.model)
    common.own_pad(tokenizer)
    tokenizer.chat_template = None
    rows = reward_model.read_pairs(path, "--data")
    return tokenizer, *reward_model.encode_pairs(rows, tokenizer, flags(args, "", 1), "--data")


def measure(args, model, tokenizer, world):
    """Whether each held-out pair is ranked right, by question."""
    _, pairs, rows = pairs_of(args, args.test)
    settings = reward_model.resolve(flags(args, "", 1))
    scores = reward_model.score_all(model.eval(), tokenizer, pairs, False, settings, world).tolist()
    return [(str(row["prompt"]), float(c > r)) for row, (c, r) in zip(rows, scores)]


def ours(args, out, steps, final):
    reward_model.train(flags(args, out / "run", steps))
    log = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    result = {
        "seconds": [m["time/train"] for m in log if "time/train" in m],
        "loss": [m["loss"] for m in log if "loss" in m],
    }
    if final:
        world = common.start("cpu")
        tokenizer = common.load_tokenizer(str(out / "run" / "model"))
        result["right"] = measure(
            args, common.load_scalar(str(out / "run" / "model"), world, tokenizer), tokenizer, world
        )
    return result | {
        "configuration": dataclasses.asdict(reward_model.resolve(flags(args, "", steps)))
    }


def trainer_of(args, out, pairs, tokenizer, margins=None, **settings):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    config = RewardConfig(
        output_dir=str(out), per_device_train_batch_size=8, gradient_accumulation_steps=1, learning_rate=1e-5, lr_scheduler_type="linear",
        warmup_steps=10, adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0, max_length=1024, bf16=False, use_cpu=True,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=1,
        model_init_kwargs={"dtype": torch.float32}, **settings,
    )  # fmt: skip
    rows = [
        {"chosen_ids": start + chosen, "rejected_ids": start + rejected}
        for start, chosen, rejected in pairs
    ]
    if margins:
        rows = [row | {"margin": margin} for row, margin in zip(rows, margins)]

    class InOrder(RewardTrainer):
        """No shuffle of its own: the rows come in the order that reward_model.py takes them in."""

        def _get_train_sampler(self, *everything):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return config, InOrder(
        model=args.model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def theirs(args, out, steps, final):
    import transformers

    seconds, world = [], common.start("cpu")
    tokenizer, pairs, _ = pairs_of(args, args.train)
    visited = [pairs[common.nth_row(len(pairs), i, 1)] for i in range(8 * steps)]
    config, trainer = trainer_of(args, out, visited, tokenizer, max_steps=steps)

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.began)

    trainer.add_callback(Clock())
    trainer.train()
    result = {
        "seconds": seconds,
        "loss": [m["loss"] for m in trainer.state.log_history if "loss" in m],
    }
    if final:
        result["right"] = measure(args, trainer.model, tokenizer, world)
    return result | {"configuration": json.loads(config.to_json_string())}


def turn(args, who, steps, final):
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable,
            __file__,
            "--model",
            args.model,
            "--train",
            args.train,
            "--test",
            args.test,
        ]
        command += ["--child", json.dumps({"who": who, "out": out, "steps": steps, "final": final})]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=out)
        return {"who": who, "steps": steps, **json.loads((Path(out) / "result.json").read_text())}


def interval(right, draws=10_000):
    """Mean, and the middle 95 % of means over questions drawn with replacement, each with all of its pairs."""
    by_question = {}
    for question, r in right:
        by_question.setdefault(question, []).append(r)
    groups, generator, means = list(by_question.values()), random.Random(0), []
    for _ in range(draws):
        drawn = [r for _ in groups for r in generator.choice(groups)]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    return (
        sum(r for _, r in right) / len(right),
        means[int(0.025 * draws)],
        means[int(0.975 * draws)],
        len(groups),
    )


def agree():
    """Loss and gradient of both on the same pairs and weights."""
    args = Args(
        model=str(reward_model.TINY / "model"), train=str(reward_model.TINY / "pairs_train.jsonl")
    )
    world, worst = common.start("cpu"), 0.0
    tokenizer, pairs, _ = pairs_of(args, args.train)
    pairs = pairs[:8]
    for use_margin in (False, True):
        for center in (None, 0.01):
            margins = [0.1 * i for i in range(8)] if use_margin else None
            with tempfile.TemporaryDirectory() as out:
                _, trainer = trainer_of(
                    args,
                    out,
                    pairs,
                    tokenizer,
                    margins,
                    max_steps=1,
                    center_rewards_coefficient=center,
                )
            model = trainer.model.train()
            with torch.no_grad():
                common.scalar_head(model).weight.normal_(0, 0.3)
            batch = trainer.data_collator([dict(x) for x in trainer.train_dataset])
            model.zero_grad()
            a = trainer.compute_loss(model, batch)
            a.backward()
            one = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            for share in (False, True):
                model.zero_grad()
                chosen, rejected = reward_model.pair_scores(model, tokenizer, pairs, share, world).T
                margin = torch.tensor(margins or [0.0] * 8)
                b = reward_model.pair_loss(chosen, rejected, margin, 8, center or 0.0)
                b.backward()
                two = torch.cat(
                    [p.grad.flatten() for p in model.parameters() if p.grad is not None]
                )
                apart = abs(a.item() - b.item()), ((one - two).norm() / one.norm()).item()
                print(
                    f"margin {use_margin}, center {center}, shared start {share}: loss {b.item():.6f}, apart {apart[0]:.1e}, {apart[1]:.1e}"
                )
                worst = max(worst, *apart)
    print(f"largest difference: {worst:.1e}")
    sys.exit(worst > 1e-6)


def main(args):
    if args.agree:
        return agree()
    if args.child:
        told = json.loads(args.child)
        out = Path(told["out"])
        result = (ours if told["who"] == "reward_model.py" else theirs)(
            args, out, told["steps"], told["final"]
        )
        result["gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        (out / "result.json").write_text(json.dumps(result))
        return

    import transformers
    import trl

    args = dataclasses.replace(
        args, **{k: str(Path(getattr(args, k)).resolve()) for k in ("model", "train", "test")}
    )
    turns, both = [], ("reward_model.py", "TRL")
    for steps, final in [(4, False)] * args.rounds + [(args.steps, True)]:
        for who in both:
            turns.append(turn(args, who, steps, final))
            t = turns[-1]
            print(
                who,
                steps,
                f"{statistics.median(t['seconds'][1:]):.1f} s a step, {t['gib']:.1f} GiB",
                flush=True,
            )
    for t in turns:
        plain = {
            k: v
            for k, v in t["configuration"].items()
            if "dir" not in k and k not in ("model", "data", "out")
        }
        t["configuration"] = {
            k: Path(v).name if str(v).startswith("/") else v for k, v in plain.items()
        }
    lines = [
        "| 135M model, 8 real pairs a step | seconds a step | peak memory | held-out accuracy after 40 steps (95 % interval) |",
        "|---|---|---|---|",
    ]
    for who in both:
        short = [t for t in turns if t["who"] == who and "right" not in t]
        mean, low, high, questions = interval(
            next(t["right"] for t in turns if t["who"] == who and "right" in t)
        )
        seconds = statistics.median(x for t in short for x in t["seconds"][1:])
        memory = statistics.median(t["gib"] for t in short)
        lines.append(
            f"| {who} | {seconds:.1f} | {memory:.1f} GiB | {mean:.3f} ({low:.3f} to {high:.3f}, {questions} questions) |"
        )
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }
    for t in turns:  # the questions themselves are not ours to copy
        if "right" in t:
            number = {q: i for i, q in enumerate(dict.fromkeys(q for q, _ in t["right"]))}
            t["right"] = [(number[q], r) for q, r in t["right"]]
    (HERE / "vs_trl_reward.json").write_text(
        json.dumps({**versions, "turns": turns}, indent=1) + "\n"
    )
    (HERE / "vs_trl_reward.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
