"""dpo.py beside TRL's DPOTrainer on real pairs: the same loss, seconds a step, peak memory, and what is learnt.

In an environment of its own, because TRL is no dependency of this project:

    pip install -r requirements.txt trl==1.16.0 datasets
    python tests/bench/vs_trl_dpo.py --agree                          # loss and gradient, seconds; fails above 1e-5
    python tests/bench/vs_trl_dpo.py --model SMOLLM2 --train gsm8k_pairs_train.jsonl --test gsm8k_pairs_test.jsonl
                                                                      # about two hours on 2 cores

Both get the same token ids (no chat template), the same 8 pairs in each step, beta 0.1, optimizer, rate, float32, no gradient checkpointing, and a linear
schedule with 10 steps of warm-up (TRL's first step has rate 0). dpo.py scores the
pairs it will visit once, before training; that time, divided by the steps, is added to its step's. TRL scores with a second model
in every step. Speed: short runs that take turns. Learning: 40 steps of each, held-out accuracy with a
95 % interval that draws whole questions, because pairs of one question are not independent. Writes vs_trl_dpo.json and .md.
"""

import dataclasses
import json
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
from vs_trl_reward import interval

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import common
import dpo


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
    """how often each takes its turn of three steps, the first of which is not timed; 0: only the runs whose accuracy is measured"""
    agree: bool = False
    """only compare loss and gradient, on the bundled model"""
    child: str = ""
    """(what the script tells its own processes)"""


def flags(args, out, steps):
    return dpo.Args(
        model=args.model, data=args.train, eval_data="", eval_prompts="", chat=False, out=str(out), device="cpu", steps=steps, pairs_per_step=8,
        learning_rate=1e-6, beta=0.1, schedule="linear", warmup=10, eval_every=10**6, save_every=10**6,
    )  # fmt: skip


def pairs_of(args, path):
    tokenizer = common.load_tokenizer(args.model)
    return tokenizer, dpo.encode_preferences(
        dpo.read_pairs(path, "--data"), tokenizer, flags(args, "", 1), "--data"
    )


def measure(args, model, world):
    """Whether the implicit reward ranks each held-out pair right, by question."""
    tokenizer, pairs = pairs_of(args, args.test)
    settings, reference = dpo.resolve(flags(args, "", 1)), common.load_reference(args.model, world)
    now, before = (
        dpo.score_pairs(m, tokenizer, pairs, True, settings, world)
        for m in (model.eval(), reference)
    )
    margin = (now - before) @ torch.tensor([1.0, -1.0])
    return [(str(p[0]), float(m > 0)) for p, m in zip(pairs, margin)]


def ours(args, out, steps, final):
    clock = {}
    honest = dpo.reference_scores

    def timed(*everything):
        start = time.perf_counter()
        scores = honest(*everything)
        clock["reference"] = time.perf_counter() - start
        return scores

    dpo.reference_scores = timed
    dpo.train(flags(args, out / "run", steps))
    log = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    world = common.start("cpu")
    result = {
        "seconds": [m["time/train"] for m in log if "time/train" in m],
        "loss": [m["loss"] for m in log if "loss" in m],
    }
    result |= {"reference_seconds": clock["reference"] / steps}  # of a step
    if final:
        result["right"] = measure(
            args, common.load_policy(str(out / "run" / "model"), world), world
        )
    return result | {"configuration": dataclasses.asdict(dpo.resolve(flags(args, "", steps)))}


def trainer_of(args, out, pairs, tokenizer, **settings):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(out), per_device_train_batch_size=8, gradient_accumulation_steps=1, learning_rate=1e-6, lr_scheduler_type="linear",
        warmup_steps=10, adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0, max_length=1024, bf16=False, use_cpu=True,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=1,
        model_init_kwargs={"dtype": torch.float32}, **{"beta": 0.1} | settings,
    )  # fmt: skip
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs]

    class Given(DPOTrainer):
        """Its own preparation would tokenise texts; these ids are what dpo.py trains on, in its order."""

        def _get_train_sampler(self, *everything):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def _prepare_dataset(self, dataset, *everything):
            return dataset

    return config, Given(
        model=args.model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def theirs(args, out, steps, final):
    import transformers

    seconds, world = [], common.start("cpu")
    tokenizer, pairs = pairs_of(args, args.train)
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
        result["right"] = measure(args, trainer.model, world)
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


def agree():
    """Loss and gradient of both on the same pairs and weights; the policy is moved, so that the reference is another."""
    args = Args(model=str(dpo.TINY / "model"), train=str(dpo.TINY / "pairs_train.jsonl"))
    world, worst = common.start("cpu"), 0.0
    tokenizer, pairs = pairs_of(args, args.train)
    pairs = pairs[:8]
    for loss in ("sigmoid", "ipo", "hinge"):
        with tempfile.TemporaryDirectory() as out:
            _, trainer = trainer_of(
                args, out, pairs, tokenizer, max_steps=1, loss_type=[loss], beta=0.3
            )
        model = trainer.model.train()
        reference = dpo.score_pairs(
            model, tokenizer, pairs, False, dpo.resolve(flags(args, "", 1)), world
        )
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for p in model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
        batch = trainer.data_collator([dict(x) for x in trainer.train_dataset])
        model.zero_grad()
        a = trainer.compute_loss(model, batch)
        a.backward()
        one = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        settings = dpo.resolve(dataclasses.replace(flags(args, "", 1), loss=loss, beta=0.3))
        for share in (False, True):
            model.zero_grad()
            chosen, rejected = dpo.pair_logprobs(model, tokenizer, pairs, share, world).T
            n = torch.tensor([[len(c), len(r)] for _, c, r in pairs])
            b = dpo.preference_loss(chosen, rejected, *reference.T, *n.T, settings).mean()
            b.backward()
            two = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            apart = (
                abs(a.item() - b.item()) / abs(a.item()),
                ((one - two).norm() / one.norm()).item(),
            )
            print(
                f"{loss}, shared prompt {share}: loss {b.item():.6f}, apart {apart[0]:.1e}, gradient {apart[1]:.1e}"
            )
            worst = max(worst, *apart)
    print(f"largest difference: {worst:.1e}")
    sys.exit(worst > 1e-5)


def table(turns):
    lines = [
        "| 135M model, 8 real pairs a step | seconds a step | with the reference's | peak memory | held-out accuracy after 40 steps (95 % interval) |",
        "|---|---|---|---|---|",
    ]
    for who in ("dpo.py", "TRL"):
        short = [t for t in turns if t["who"] == who and "right" not in t]
        mean, low, high, questions = interval(
            next(t["right"] for t in turns if t["who"] == who and "right" in t)
        )
        seconds = statistics.median(x for t in short for x in t["seconds"][1:])
        scoring = statistics.median(t.get("reference_seconds", 0.0) for t in short)
        memory = statistics.median(t["gib"] for t in short)
        lines.append(
            f"| {who} | {seconds:.1f} | {seconds + scoring:.1f} | {memory:.1f} GiB | {mean:.3f} ({low:.3f} to {high:.3f}, {questions} questions) |"
        )
    one, two = (t["loss"] for t in turns if "right" in t)
    apart = max(abs(a - b) for a, b in zip(one, two))
    return (
        "\n".join(
            [*lines, "", f"The losses of the {len(one)} steps are at most {apart:.4f} apart."]
        )
        + "\n"
    )


def main(args):
    if args.agree:
        return agree()
    if args.child:
        told = json.loads(args.child)
        out = Path(told["out"])
        result = (ours if told["who"] == "dpo.py" else theirs)(
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
    # the runs whose accuracy is measured, then those that are timed; what an interrupted run has done is not done again
    progress, both = HERE / "vs_trl_dpo.part.json", ("dpo.py", "TRL")
    turns = json.loads(progress.read_text()) if progress.exists() else []
    todo = [
        (who, steps, final)
        for steps, final in [(args.steps, True), *[(3, False)] * args.rounds]
        for who in both
    ]
    for who, steps, final in todo[len(turns) :]:
        turns.append(turn(args, who, steps, final))
        t = turns[-1]
        progress.write_text(json.dumps(turns))
        print(
            who,
            steps,
            f"{statistics.median(t['seconds'][1:]):.1f} s a step, {t['gib']:.1f} GiB",
            flush=True,
        )
    if not args.rounds:
        return
    for t in turns:
        plain = {
            k: v
            for k, v in t["configuration"].items()
            if "dir" not in k and k not in ("model", "data", "out")
        }
        t["configuration"] = {
            k: Path(v).name if str(v).startswith("/") else v for k, v in plain.items()
        }
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }
    for t in turns:  # the questions themselves are not ours to copy
        if "right" in t:
            number = {q: i for i, q in enumerate(dict.fromkeys(q for q, _ in t["right"]))}
            t["right"] = [(number[q], r) for q, r in t["right"]]
    (HERE / "vs_trl_dpo.json").write_text(json.dumps({**versions, "turns": turns}, indent=1) + "\n")
    (HERE / "vs_trl_dpo.md").write_text(table(turns))
    progress.unlink()
    print(table(turns))


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
