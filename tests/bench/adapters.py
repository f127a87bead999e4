"""Adapters (--lora_rank): the same numbers as peft, and what they save.

    pip install peft
    python tests/bench/adapters.py MODEL        # fifteen minutes with one thread; MODEL as smollm2.py makes it

Parts, written to adapters.json and adapters.md:

    peft    with the same A and B: logits and gradients here and by peft, in float32; and a saved folder loaded by peft
    steps   seconds and peak memory of a step of grpo.py (with its KL) and dpo.py on MODEL, with and without adapters
    held    memory between two steps, without activations, beside what the script says at its start
    peak    the peak of small steps of the scripts, beside the same
    sums    grpo.py on the task of tests/tiny/sums.py, in bfloat16, three seeds with adapters and three without (half an hour;
            only if named in --parts)
    8 B     bytes that each method holds besides activations, counted by held.py from a config (the table is held.md)
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
import held

import common

IDS = torch.arange(5, 45).view(2, 20)
STEPS = 3
SMALL = (
    "--dtype float32 --device cpu --steps 2 --eval_every 1000 --eval_data= --gradient_checkpointing"
)
SMALL_ROLLOUT = "--prompts_per_step 2 --samples_per_prompt 2 --max_new_tokens 16 --beta 0.04"
PEAKS = ("grpo", "ppo", "ppo --critic shared", "dpo", "reward_model")
SUMS = "--dtype bfloat16 --device cpu --max_new_tokens 16 --prompts_per_step 8 --steps 40 --warmup 5 --eval_every 20 --save_every 1000"


@dataclass
class Args:
    model: tyro.conf.Positional[Path]
    rank: int = 16
    parts: tuple[str, ...] = ("peft", "steps", "held", "peak", "8 B")


def random_pairs(model):
    """Adapters that do something: B starts at 0."""
    torch.manual_seed(1)
    for layer in model.lora.layers:
        torch.nn.init.normal_(layer.lora_B.weight, 0.0, 0.01)


def distance(a, b):
    """The norm of the difference as a share of the norm."""
    return ((a - b).norm() / b.norm()).item()


def loss_of(output):
    return (output * torch.linspace(-1, 1, output.shape[-1])).mean()


def beside_peft(folder, rank, is_scalar):
    """How far logits and gradients here are from those of peft, which loads the folder that is saved here."""
    import peft

    flags = types.SimpleNamespace(lora_rank=rank, lora_alpha=32.0)
    world = common.start("cpu")
    tokenizer = common.load_tokenizer(folder)
    if is_scalar:
        model = common.load_scalar(folder, world, tokenizer, head_std=0.02, args=flags)
        auto = transformers.AutoModelForSequenceClassification
        settings = {"num_labels": 1}
    else:
        model = common.load_policy(folder, world, args=flags)
        auto = transformers.AutoModelForCausalLM
        settings = {}
    random_pairs(model)
    ours = model.eval()(input_ids=IDS).logits
    loss_of(ours).backward()
    with tempfile.TemporaryDirectory() as out:
        common.save_model(model, tokenizer, Path(out) / "model", world)
        merged = auto.from_pretrained(Path(out) / "model", dtype=torch.float32).eval()
        with torch.no_grad():
            merged_logits = merged(input_ids=IDS).logits
        del merged
        base = auto.from_pretrained(folder, dtype=torch.float32, **settings)
        base.config.pad_token_id = model.config.pad_token_id
        theirs = peft.PeftModel.from_pretrained(base, Path(out) / "adapter", is_trainable=True)
    logits = theirs.eval()(input_ids=IDS).logits
    loss_of(logits).backward()
    gradients = {}
    for name, p in theirs.named_parameters():
        if p.grad is not None:
            name = name.removeprefix("base_model.model.").replace(".default", "")
            gradients[name.replace(".modules_to_save", "")] = p.grad
    learned = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert learned.keys() == gradients.keys(), learned.keys() ^ gradients.keys()
    return {
        "weights that learn": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "logits": distance(ours.detach(), logits.detach()),
        "gradients": max(distance(grad, gradients[name]) for name, grad in learned.items()),
        "merged logits": distance(merged_logits, ours.detach()),
    }


def step(script, folder, rank, dtype, data, out):
    """Seconds of a step (the mean, without the first) and the peak memory of a short run."""
    flags = ["--model", str(folder), "--dtype", dtype, "--device", "cpu", "--steps", str(STEPS)]
    flags += ["--eval_every", "1000", "--eval_data=", "--out", str(out), "--lora_rank", str(rank)]
    if script == "grpo":
        flags += ["--data", f"{data}/sums_train.jsonl", "--prompts_per_step", "2", "--beta", "0.04"]
        flags += ["--reward", f"{data}/r.py:vowels", "--max_new_tokens", "32", "--kl", "k3"]
    else:
        flags += ["--data", f"{data}/pairs.jsonl", "--pairs_per_step", "8"]
    # seconds of the processor, so that what else the machine does counts less
    code = "import runpy, sys, time; time.perf_counter = time.process_time; sys.argv.pop(0); "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(HERE.parents[1] / f"{script}.py"), *flags]
    subprocess.run(command, check=True, capture_output=True)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "time/train" in row]
    times = [row["time/train"] + row.get("time/sample", 0.0) for row in rows[1:]]
    checkpoint = max((out / "checkpoint").glob("*.pt")).stat().st_size
    return {
        "seconds": sum(times) / len(times),
        "peak GiB": rows[-1]["memory_gib"],
        "checkpoint MB": checkpoint / 1e6,
    }


def make_data(folder):
    """The sums of tests/tiny/sums.py, a reward that differs between samples, and pairs of right and wrong sums."""
    subprocess.run([sys.executable, str(HERE.parent / "tiny" / "sums.py"), folder], check=True)
    reward = "def vowels(completion, row):\n    return sum(map(completion.count, 'aeiou')) / 100\n"
    (Path(folder) / "r.py").write_text(reward)
    pairs = []
    for line in (Path(folder) / "sums_train.jsonl").read_text().splitlines()[:200]:
        row = json.loads(line)
        right = str(row["answer"])
        pair = {"prompt": row["prompt"], "chosen": right, "rejected": f"It is {int(right) + 1}."}
        pairs.append(json.dumps(pair) + "\n")
    (Path(folder) / "pairs.jsonl").write_text("".join(pairs))


def hold(folder, rank, dtype):
    """Prints what a process holds after an update on a short text, less what the libraries hold, and the estimate."""
    world = common.start("cpu", dtype)
    before = resident()
    flags = types.SimpleNamespace(lora_rank=rank, lora_alpha=32.0)
    model = common.load_policy(folder, world, args=flags)
    optimizer = common.make_optimizer(model, 1e-6)
    for _ in range(2):
        loss_of(model(input_ids=IDS[:1, :8]).logits).backward()
        optimizer.step()
    _, estimate = common.lasting_memory(folder, world, args=flags)
    print(json.dumps({"held GiB": (resident() - before) / 2**30, "estimate GiB": estimate / 2**30}))


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held_memory(folder, rank):
    rows = []
    for dtype in ("float32", "bfloat16"):
        for r in (0, rank):
            code = f"import adapters; adapters.hold({str(folder)!r}, {r}, {dtype!r})"
            command = [sys.executable, "-c", code]
            said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=HERE)
            rows.append({"dtype": dtype, "rank": r, **json.loads(said.stdout.splitlines()[-1])})
    return rows


def high_water():
    """The most that this process has held since it was asked to forget."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) * 1024


def watch(script, flags):
    """Starts a script. Prints its estimate, and the peak from when its models are loaded until its
    second step is done, less what the process held before."""
    found = {}

    def then(name, what):
        """After the function of this name in common.py, `what` gets what it returned."""
        plain = getattr(common, name)

        def followed(*args, **kwargs):
            returned = plain(*args, **kwargs)
            what(returned)
            return returned

        setattr(common, name, followed)

    def said(counted):  # just before the first model is loaded; a reference is counted apart
        found["estimate"] = found.get("estimate", 0) + counted[1]
        found["before"] = resident()

    def loaded(optimizer):
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak

    def stepped(used):
        found["updates"] = found.get("updates", 0) + 1
        if found["updates"] == 2:  # Adam's moments exist since the first
            peak = (high_water() - found["before"]) / 2**30
            estimate = found["estimate"] / 2**30
            print(json.dumps({"estimate GiB": estimate, "peak GiB": peak}), flush=True)
            os._exit(0)  # saves nothing: that would be the slowest part

    then("lasting_memory", said)
    then("make_optimizer", loaded)
    then("memory_used", stepped)
    module = importlib.import_module(script)
    module.train(tyro.cli(module.Args, args=flags, use_underscores=True))


def peaks(folder, rank):
    """Small steps, so that little of them is activations. Each is run twice: as it is, and with a
    malloc that returns freed memory at once, so that the peak is of what is in use."""
    rows = []
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with tempfile.TemporaryDirectory() as data:
        make_data(data)
        for command in PEAKS:
            for r in (0, rank):
                script, *flags = f"{command} {SMALL} --lora_rank {r}".split()
                flags += ["--model", str(folder)]
                if script in ("grpo", "ppo"):
                    flags += SMALL_ROLLOUT.split() + ["--reward", f"{data}/r.py:vowels"]
                    flags += ["--data", f"{data}/sums_train.jsonl"]
                else:
                    flags += ["--data", f"{data}/pairs.jsonl", "--pairs_per_step", "2"]
                row = {"script": command, "rank": r}
                for name, settings in (("process GiB", {}), ("peak GiB", at_once)):
                    its_flags = [*flags, "--out", f"{data}/{command}-{r}-{name}"]
                    code = f"import adapters; adapters.watch({script!r}, {its_flags!r})"
                    said = subprocess.run(
                        [sys.executable, "-c", code],
                        **{"check": True, "capture_output": True, "text": True, "cwd": HERE},
                        env={**os.environ, **settings},
                    )
                    found = json.loads(said.stdout.splitlines()[-1])
                    row |= {"estimate GiB": found["estimate GiB"], name: found["peak GiB"]}
                rows.append(row)
                print(row, flush=True)
    return rows


def steps(folder, rank):
    rows = []
    with tempfile.TemporaryDirectory() as data:
        make_data(data)
        for script in ("grpo", "dpo"):
            for dtype in ("float32", "bfloat16"):
                for r in (0, rank):
                    out = Path(data) / f"{script}-{dtype}-{r}"
                    found = step(script, folder, r, dtype, data, out)
                    rows.append({"script": script, "dtype": dtype, "rank": r, **found})
                    print(rows[-1], flush=True)
    return rows


def sums(folder, rank):
    """Held-out scores of 40 steps, two runs at a time with one thread each."""
    with tempfile.TemporaryDirectory() as data:
        make_data(data)

        def run(job):
            seed, r = job
            out = Path(data) / f"{seed}-{r}"
            flags = SUMS.split() + ["--learning_rate", "1e-4" if r else "1e-5"]
            flags += ["--lora_rank", str(r), "--seed", str(seed), "--out", str(out)]
            flags += ["--model", str(folder), "--data", f"{data}/sums_train.jsonl"]
            flags += ["--eval_data", f"{data}/sums_test.jsonl"]
            flags += ["--reward", str(HERE.parent / "tiny" / "sums.py") + ":brief"]
            command = [sys.executable, str(HERE.parents[1] / "grpo.py"), *flags]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, capture_output=True, env=environment)
            log = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
            curve = [
                [m["step"], m["eval/reward"], m["eval/exact"]] for m in log if "eval/exact" in m
            ]
            found = {"rank": r, "seed": seed, "step, reward, exact": curve}
            print(found, flush=True)
            return found

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, [(seed, r) for seed in (1, 2, 3) for r in (0, rank)]))


def table(result):
    lines = [
        "| 135M model | processor seconds a step | peak memory | checkpoint |",
        "|---|---|---|---|",
    ]
    for row in result["steps"]:
        numbers = (
            f"{row['seconds']:.1f} | {row['peak GiB']:.2f} GiB | {row['checkpoint MB']:.0f} MB"
        )
        lines.append(f"| {row['script']}.py, {row['dtype']}, {how(row)} | {numbers} |")
    lines += ["", "| 135M model | said at the start | held between steps |", "|---|---|---|"]
    for row in result["held"]:
        numbers = f"{row['estimate GiB']:.2f} GiB | {row['held GiB']:.2f} GiB"
        lines.append(f"| {row['dtype']}, {how(row)} | {numbers} |")
    lines += [
        "",
        "| 135M model, float32, small steps | said at the start | peak in use | beside what was said | peak of the process |",
        "|---|---|---|---|---|",
    ]
    for row in result.get("peak", []):
        said = row["estimate GiB"]
        peak = row["peak GiB"]
        script, space, flag = row["script"].partition(" ")
        numbers = f"{said:.2f} GiB | {peak:.2f} GiB | {100 * (peak / said - 1):+.0f} %"
        numbers += f" | {row['process GiB']:.2f} GiB"
        lines.append(f"| {script}.py{space}{flag}, {how(row)} | {numbers} |")
    lines += [
        "",
        "| 135M model, 40 steps of sums | exact match at the end | reward |",
        "|---|---|---|",
    ]
    for r in sorted({row["rank"] for row in result.get("sums", [])}):
        ends = [row["step, reward, exact"][-1] for row in result["sums"] if row["rank"] == r]
        exact = ", ".join(f"{end[2]:.2f}" for end in ends)
        reward = ", ".join(f"{end[1]:.2f}" for end in ends)
        lines.append(f"| {how({'rank': r})} | {exact} | {reward} |")
    return "\n".join(lines) + "\n"


def how(row):
    return f"adapters of rank {row['rank']}" if row["rank"] else "all weights"


def main(args):
    path = HERE / "adapters.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    if "peft" in args.parts:
        result["peft"] = {"version": importlib.import_module("peft").__version__}
        for name, is_scalar in (("policy", False), ("reward model", True)):
            result["peft"][name] = beside_peft(args.model, args.rank, is_scalar)
        print(json.dumps(result["peft"], indent=1))
    if "steps" in args.parts:
        result["steps"] = steps(args.model, args.rank)
    if "held" in args.parts:
        result["held"] = held_memory(args.model, args.rank)
    if "peak" in args.parts:
        result["peak"] = peaks(args.model, args.rank)
    if "sums" in args.parts:
        result["sums"] = sums(args.model, args.rank)
    if "8 B" in args.parts:
        _, rows = held.held(held.llama_8b(), args.rank)
        result["8 B"] = {name: {"all": row[1], "adapters": row[2]} for name, row in rows.items()}
    path.write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "adapters.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
