"""grpo.py beside TRL's GRPOTrainer: seconds a step, peak memory, lengths, and what is learnt.

In an environment of its own, because TRL is no dependency of this project:

    pip install -r requirements.txt trl==1.16.0 datasets matplotlib
    python tests/bench/vs_trl.py --model SMOLLM2 --data gsm8k_train.jsonl   # 135M chat model (smollm2.py), about 30 minutes on 2 cores
    python tests/bench/vs_trl.py                                            # the bundled model, 2 minutes
    python tests/bench/vs_trl.py --learn                                    # the bundled model, 3 seeds to the end: 25 minutes

Both get the same rendered prompts, batch, completion length, reward, optimizer, schedule and loss, precision, the same rows
in a micro-batch and no gradient checkpointing. Each measurement is a process of its own; all take turns. Writes
vs_trl_<name>.json with both full configurations, vs_trl.md, and with --learn a picture.

The 135M model is measured in three ways. `full`: a reward under which no group is equal (the text's length and its letters),
so every row is computed, in float32 and in bfloat16 (TRL: bf16=True, whose autocast keeps float32 weights and casts them in
every product). `real`: the last number of the text against GSM8K's answer. Most groups then are equal, and grpo.py leaves their
rows out of the update; it is also measured with nothing left out (`all rows`), and the share of time saved is said with the
share of equal groups. TRL computes every row whatever its reward, so its time is that of `full`.
"""

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

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import grpo
from common import encode, load_prompts, load_reward, load_tokenizer, start


@dataclass
class Args:
    model: str = str(grpo.TINY / "model")
    """the bundled model, or the folder of another"""
    data: str = str(grpo.TINY / "sort_train.jsonl")
    """prompts with answers"""
    learn: bool = False
    """whole runs of the bundled model instead of a few steps, for seeds 1, 2, 3"""
    rounds: int = 3
    """how often each takes its turn"""
    steps: int | None = None
    """in a turn; the first of them, which warms up, is not counted (default: 2, with real rewards 4, bundled model 20,
    --learn grpo.py's own)"""
    child: str = ""
    """(what the script tells its own processes)"""


# who takes turns on the 135M model: the name of the work, who does it, and what differs
CHAT_MODEL = [
    ("full", "grpo.py", {"reward": "varied"}),
    ("full", "TRL", {"reward": "varied"}),
    ("bfloat16", "grpo.py", {"reward": "varied", "dtype": "bfloat16"}),
    ("bfloat16", "TRL", {"reward": "varied", "dtype": "bfloat16"}),
    ("real", "grpo.py", {"reward": "number", "steps": 4}),
    ("real", "grpo.py, all rows", {"reward": "number", "steps": 4}),
]


def settings(args, seed, **changes):
    """What both must have in common."""
    small = args.model == str(grpo.TINY / "model")
    own = grpo.resolve(grpo.Args(model=args.model, data=args.data, device="cpu"))
    common = {
        "seed": seed,
        "steps": own.steps if args.learn else 20 if small else 2,
        "prompts": 32 if small else 4,
        "samples": 8,
        "max_new_tokens": 23 if small else 64,
        "rows": 128 if small else 16,  # in a micro-batch
        "reward": "exact" if small else "number",
        "dtype": "float32",
        "learning_rate": own.learning_rate,
        "warmup": 10,
        "every": 50 if args.learn else 0,
    }
    return common | changes | ({"steps": args.steps} if args.steps else {})


def varied(completion, row):
    """A reward under which two samples of a prompt hardly ever score the same, so that every row has a gradient."""
    return len(completion) + sum(map(ord, completion)) % 1009 / 1009


def prompts_of(args):
    """The rendered prompts, as raw text, so that neither side's template matters; short ones, so that no side cuts any."""
    tokenizer = load_tokenizer(args.model)
    rows = []
    for _, row in load_prompts(args.data, "--data", tokenizer, grpo.Args(), ""):
        text = row["prompt"]
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
        if len(encode(tokenizer, text)) <= 256:
            rows.append({"prompt": text, "answer": str(row["answer"])})
    return tokenizer, rows


def ours(args, s, out):
    tokenizer, rows = prompts_of(args)
    (out / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    longest = max(len(encode(tokenizer, r["prompt"])) for r in rows)
    budget = s["rows"] // s["samples"] * longest + s["rows"] * s["max_new_tokens"]
    flags = grpo.Args(
        model=args.model, data=str(out / "data.jsonl"), eval_data=str(grpo.TINY / "sort_test.jsonl") if s["every"] else "", chat=False,
        reward=f"{__file__}:varied" if s["reward"] == "varied" else s["reward"], dtype=s["dtype"],
        out=str(out / "run"), seed=s["seed"], device="cpu", steps=s["steps"], prompts_per_step=s["prompts"],
        samples_per_prompt=s["samples"], max_new_tokens=s["max_new_tokens"], max_prompt_tokens=256, tokens_per_micro_batch=budget,
        learning_rate=s["learning_rate"], warmup=s["warmup"], eval_every=s["every"] or 10**9, save_every=10**9,
    )  # fmt: skip
    if s["who"].endswith("all rows"):
        grpo.has_gradient = lambda weights, advantages, beta: torch.ones(
            len(weights), dtype=torch.bool
        )
    grpo.train(flags)
    log = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": [m["time/sample"] + m["time/train"] for m in log[1:]],
        "training": [m["time/train"] for m in log[1:]],
        "equal_groups": [m["equal_groups"] for m in log[1:]],
        "lengths": [m["length"] for m in log[1:]],
        "rewards": [m["reward"] for m in log[1:]],
        "held_out": [(m["step"], m["eval/exact"]) for m in log if "eval/exact" in m],
        "configuration": json.loads((out / "run" / "args.json").read_text()),
    }


def theirs(args, s, out):
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer, rows = prompts_of(args)
    for r in rows[:100]:  # the same ids go into both
        assert tokenizer(r["prompt"]).input_ids == encode(tokenizer, r["prompt"])
    check = {"exact": grpo.exact, "number": grpo.number, "varied": varied}[s["reward"]]

    def reward(completions, answer, **_):
        return [check(c, {"answer": a}) for c, a in zip(completions, answer)]

    total = s["prompts"] * s["samples"]
    config = GRPOConfig(
        output_dir=str(out), seed=s["seed"], max_steps=s["steps"], per_device_train_batch_size=s["rows"],
        gradient_accumulation_steps=total // s["rows"], num_generations=s["samples"], max_completion_length=s["max_new_tokens"],
        temperature=1.0, top_p=1.0, top_k=0, beta=0.0, loss_type="dapo", scale_rewards="group", epsilon=0.2, num_iterations=1,
        learning_rate=s["learning_rate"], lr_scheduler_type="linear", warmup_steps=s["warmup"], adam_beta1=0.9, adam_beta2=0.95,
        weight_decay=0.0, max_grad_norm=1.0, bf16=s["dtype"] == "bfloat16", use_cpu=True, gradient_checkpointing=False, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, model_init_kwargs={"dtype": torch.float32},
    )  # fmt: skip
    held_out, seconds = [], []
    world = start("cpu", seed=s["seed"])

    class Clock(transformers.TrainerCallback):
        def score(self, step, model):
            if s["every"]:
                flags = grpo.resolve(
                    grpo.Args(device="cpu", max_new_tokens=s["max_new_tokens"], reward=s["reward"])
                )
                pairs = load_prompts(flags.eval_data, "--eval_data", tokenizer, flags, "")
                rule = load_reward(s["reward"], grpo.RULES, world)
                scores = grpo.evaluate(model, tokenizer, pairs, rule, flags, world)
                held_out.append((step, scores["eval/exact"]))

        def on_train_begin(self, args, state, control, model=None, **_):
            self.score(0, model)
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, model=None, **_):
            seconds.append(time.perf_counter() - self.began)
            if s["every"] and (
                state.global_step % s["every"] == 0 or state.global_step == s["steps"]
            ):
                self.score(state.global_step, model)
            self.began = time.perf_counter()

    trainer = GRPOTrainer(
        model=args.model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()]
    )  # fmt: skip
    trainer.train()
    log = [m for m in trainer.state.log_history if "completions/mean_length" in m]
    return {
        "seconds": seconds,
        "lengths": [m["completions/mean_length"] for m in log],
        "rewards": [m["reward"] for m in log],
        "held_out": held_out,
        "configuration": json.loads(config.to_json_string()),
    }


def turn(args, who, s):
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--model", args.model, "--data", args.data]
        command += ["--child", json.dumps({"who": who, "out": out, "settings": s})]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=out)
        return json.loads((Path(out) / "result.json").read_text())


def main(args):
    if args.child:
        told = json.loads(args.child)
        out = Path(told["out"])
        result = (theirs if told["who"] == "TRL" else ours)(
            args, told["settings"] | {"who": told["who"]}, out
        )
        result["gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        (out / "result.json").write_text(json.dumps(result))
        return

    import transformers
    import trl

    small = args.model == str(grpo.TINY / "model")
    name = "learn" if args.learn else "tiny" if small else "135M"
    todo = [("", "grpo.py", {}), ("", "TRL", {})] if small else CHAT_MODEL
    progress = (
        HERE / f"vs_trl_{name}.part.json"
    )  # what an interrupted run has done is not done again
    turns = json.loads(progress.read_text()) if progress.exists() else []
    seeds = (1, 2, 3) if args.learn else range(1, args.rounds + 1)
    plan = [(seed, *entry) for seed in seeds for entry in todo]
    for seed, work, who, changes in plan[len(turns) :]:
        s = settings(args, seed, **changes)
        result = turn(args, who, s)
        plain = {
            k: v
            for k, v in result["configuration"].items()
            if "dir" not in k and k not in ("out", "data", "model")
        }
        result["configuration"] = {
            k: Path(v).name if str(v).startswith("/") else v for k, v in plain.items()
        }
        turns.append({"who": who, "work": work, "settings": s, **result})
        progress.write_text(json.dumps(turns))
        seconds = statistics.median(result["seconds"][1:])
        print(
            work,
            who,
            seed,
            f"{seconds:.2f} s a step, {result['gib']:.2f} GiB",
            result["held_out"][-1:],
            flush=True,
        )
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "threads": torch.get_num_threads(),
    }
    (HERE / f"vs_trl_{name}.json").write_text(
        json.dumps({**versions, "turns": turns}, indent=1) + "\n"
    )
    progress.unlink(missing_ok=True)
    table()
    if args.learn:
        picture(turns)


def saved(turns):
    """The share of training time that leaving rows out saves, and the mean share of equal groups, over the counted steps: both
    runs of a seed draw the same samples until their updates round differently."""
    fewer = [t for t in turns if t["work"] == "real" and t["who"] == "grpo.py"]
    every = [t for t in turns if t["work"] == "real" and t["who"] == "grpo.py, all rows"]
    times = [sum(x for t in group for x in t["training"][1:]) for group in (fewer, every)]
    return 1 - times[0] / times[1], statistics.mean(x for t in fewer for x in t["equal_groups"][1:])


def table():
    lines = [
        "| model and batch | | seconds a step | peak memory | mean length | held-out exact match |",
        "|---|---|---|---|---|---|",
    ]
    chat = "135M chat model, GSM8K, 4 x 8, 64 tokens"
    names = {
        ("135M", "full"): f"{chat}, no equal group",
        ("135M", "bfloat16"): "the same in bfloat16",
        ("135M", "real"): f"{chat}, real rewards",
        ("tiny", ""): "bundled model, 32 x 8",
        ("learn", ""): "the same, whole runs",
    }
    share = ""
    for (name, work), words in names.items():
        path = HERE / f"vs_trl_{name}.json"
        if not path.exists():
            continue
        turns = [t for t in json.loads(path.read_text())["turns"] if t.get("work", "") == work]
        for who in dict.fromkeys(t["who"] for t in turns):
            mine = [t for t in turns if t["who"] == who]
            seconds = statistics.median(x for t in mine for x in t["seconds"][1:])
            length = statistics.mean(x for t in mine for x in t["lengths"])
            memory = statistics.median(t["gib"] for t in mine)
            scores = ", ".join(f"{t['held_out'][-1][1]:.2f}" for t in mine if t["held_out"])
            # whole runs take a quarter of an hour, so they are not kept from sharing the machine: no times from them
            cost = " | " if name == "learn" else f"{seconds:.2f} | {memory:.2f} GiB"
            lines.append(f"| {words} | {who} | {cost} | {length:.1f} | {scores} |")
        if work == "real":
            less, equal = saved(turns)
            share = f"\nWith real rewards {equal:.0%} of the groups were equal, and leaving their rows out saved {less:.0%} of the training time.\n"
    (HERE / "vs_trl.md").write_text("\n".join(lines) + "\n" + share)


def picture(turns):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6.4, 3.6), facecolor="white")
    for who, color in (("grpo.py", "tab:blue"), ("TRL", "tab:orange")):
        curves = [t["held_out"] for t in turns if t["who"] == who]
        steps = [x for x, _ in curves[0]]
        values = torch.tensor([[y for _, y in c] for c in curves])
        ax.plot(steps, values.mean(0), color=color, label=who)
        ax.fill_between(steps, values.amin(0), values.amax(0), color=color, alpha=0.2)
    ax.set(
        xlabel="step (32 prompts x 8 samples)",
        ylabel="held-out exact match, greedy",
        ylim=(0, 1),
        title="Sorting, 3 seeds: mean and range",
    )
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(HERE / "vs_trl_learn.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
