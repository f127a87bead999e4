"""What one GPU does with these scripts, in five pieces.

    python tests/bench/gpu.py --only decode token train step learn
    python tests/bench/gpu.py --device cpu --tiny --out /tmp/gpu_tiny   # tries this script, no results

`step` also wants trl and datasets. The large models have the shapes of Qwen2.5-0.5B and 1.5B and
random weights: speed does not depend on what tokens mean. (What is learnt by a real model on a GPU
is in real.py.) A row is in gpu.json as soon as it is measured, in the place of an older one of the
same case and device; gpu.md is written from it.
"""

import functools
import itertools
import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import transformers
import tyro

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
import common
import grpo


@dataclass
class Shape:
    vocabulary: int
    width: int
    inner_width: int
    layers: int
    heads: int


SHAPES = {  # all have two heads of keys and values, and a tied head
    "0.5B": Shape(151936, 896, 4864, 24, 14),
    "1.5B": Shape(151936, 1536, 8960, 28, 12),
    "tiny": Shape(512, 64, 128, 2, 4),
}


@dataclass
class Size:
    """How much is measured: `Size()` on a GPU, SMALL to try this script."""

    decode_shapes: tuple = ("0.5B",)
    train_shapes: tuple = ("0.5B", "1.5B")
    group: int = 8
    prompt: int = 448
    rows: tuple = (64, 256, 1024)
    new: int = 128
    copied_bytes: int = 2**32
    square: int = 8192
    length: int = 2048
    tokens: tuple = (8192, 32768)
    step_prompts: int = 32
    step_prompt: int = 256
    step_new: int = 256
    part: int = 16
    seeds: tuple = (1, 2, 3)
    flags: tuple = ()


SMALL = Size(
    decode_shapes=("tiny",),
    train_shapes=("tiny",),
    group=4,
    prompt=16,
    rows=(8, 16),
    new=40,
    copied_bytes=2**20,
    square=128,
    length=32,
    tokens=(128, 256),
    step_prompts=4,
    step_prompt=16,
    step_new=8,
    part=8,
    seeds=(1, 2),
    flags=("--steps", "2"),
)


@dataclass
class Args:
    only: tuple[Literal["decode", "token", "train", "step", "learn"], ...] = (
        "decode",
        "token",
        "train",
        "step",
        "learn",
    )
    out: str = str(HERE)
    """folder of gpu.json and gpu.md"""
    jobs: tuple[str, ...] = ()
    """only these: of decode and token a number of rows, of train a model, of step grpo.py or TRL, of learn a
    script"""
    device: Literal["auto", "cpu"] = "auto"
    tiny: bool = False
    """a few tokens of a model of two layers"""


def is_wanted(job, args):
    return not args.jobs or str(job) in args.jobs


def build(shape, device, folder):
    """A folder with a model that knows nothing and a tokenizer for it: the bundled model's, one
    character a token, with a word for every further id, so that texts of random ids differ."""
    size = SHAPES[shape]
    config = transformers.Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer = json.loads((grpo.TINY / "model" / "tokenizer.json").read_text())
    settings = json.loads((grpo.TINY / "model" / "tokenizer_config.json").read_text())
    words = tokenizer["model"]["vocab"]
    words |= {f"w{i}": i for i in range(len(words), size.vocabulary)}
    settings["model_max_length"] = 32768
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def seconds_of(run, rounds=2, times=1):
    """The seconds of one call; the shortest round, because whatever else happens adds to it."""
    took = []
    for _ in range(rounds):
        synchronize()
        began = time.perf_counter()
        for _ in range(times):
            run()
        synchronize()
        took.append(time.perf_counter() - began)
    return min(took) / times


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget_peak():
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def record(args, piece, case, got):
    """Puts a row into gpu.json, in the place of an older one of the same case and device."""
    path = Path(args.out) / "gpu.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    if args.tiny:
        device += ", with the sizes of --tiny"
    rows = [r for r in rows if (r["piece"], r["case"], r["device"]) != (piece, case, device)]
    row = {"piece": piece, "case": case, "device": device, "date": time.strftime("%Y-%m-%d")}
    row["torch"] = torch.__version__
    row["transformers"] = transformers.__version__
    row["got"] = got
    rows.append(row)
    rows.sort(key=lambda r: list(PIECES).index(r["piece"]))
    path.write_text(json.dumps(rows, indent=1) + "\n")
    path.with_suffix(".md").write_text(tables(rows))
    print(piece, json.dumps(case | got), flush=True)


# -- decode ----------------------------------------------------------------------------------------


def decode(args, size, shape, folder):
    """`sample` of common.py beside transformers' `generate`: 8 samples of each prompt, one prompt a
    token shorter than the rest, and no row ends before the last token. ms: of a token of all rows,
    the time for all new tokens less that for one, divided by their difference; tokens/s: with the
    prompts' time and, for `captured`, with its captures. floor: as long as a large copy takes for
    the bytes that a token must read, weights and every row's keys and values. captured and eager
    are grpo.py's model, float32 weights under FSDP2, computing in bfloat16 with float32 logits;
    generate's model and its logits are bfloat16."""
    world = common.start(args.device)
    build(shape, args.device, folder)
    policy = common.load_policy(folder, world)
    tokenizer = common.load_tokenizer(folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=world.dtype)
    plain = plain.to(world.device).eval()
    never_end(policy, tokenizer)
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    plain.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    capture_above = common.CAPTURE_ABOVE

    def sample(prompts, new, above=capture_above):
        common.CAPTURE_ABOVE = above
        drawn = common.sample(policy, tokenizer, prompts, n=size.group, max_new_tokens=new, seed=0)
        assert drawn.mask.all() and drawn.mask.shape == (len(prompts) * size.group, new)
        return drawn

    def generate(prompts, new):
        torch.backends.cuda.enable_cudnn_sdp(True)  # as torch has it; common.py turns it off
        # for its padding on the left
        given = common.as_samples(prompts, [[0]] * len(prompts), tokenizer, world)
        ids = plain.generate(
            given.prompt_ids,
            attention_mask=given.prompt_mask.long(),
            max_new_tokens=new,
            num_return_sequences=size.group,
        )
        torch.backends.cuda.enable_cudnn_sdp(False)
        assert ids.shape == (len(prompts) * size.group, size.prompt + new)

    ways = {
        "captured": sample,
        "eager": functools.partial(sample, above=10**9),
        "generate": generate,
    }
    bandwidth = bytes_per_second(size, world)
    weights = sum(p.nbytes for p in plain.parameters())
    width = plain.config.hidden_size // plain.config.num_attention_heads
    cached = 2 * 2 * width * plain.config.num_hidden_layers * world.dtype.itemsize  # of a token
    for rows in size.rows:
        if not is_wanted(rows, args):
            continue
        prompts = random_prompts(plain, size, rows)
        bytes_of_token = weights + rows * cached * (size.prompt + size.new / 2)
        got = {"floor: ms": bytes_of_token / bandwidth * 1e3}
        for name, run in ways.items():
            forget_peak()
            run(prompts, min(size.new, 40))  # warms up
            first = seconds_of(functools.partial(run, prompts, 1))
            every = seconds_of(functools.partial(run, prompts, size.new))
            got[f"{name}: ms"] = (every - first) / (size.new - 1) * 1e3
            got[f"{name}: tokens/s"] = rows * size.new / every
            got[f"{name}: GiB"] = common.memory_used(world) / 2**30
        got["eager / captured"] = got["eager: ms"] / got["captured: ms"]
        got["generate / captured"] = got["generate: ms"] / got["captured: ms"]
        got["largest difference of a log-probability"] = difference(sample, prompts, size)
        got["copy, GB/s"] = bandwidth / 1e9
        record(args, "decode", {"model": shape, "rows": rows}, got)


def never_end(policy, tokenizer):
    """The model has no such word, so no row ends; all look for it. And no text is made, which takes
    time that `generate` does not need."""
    tokenizer.add_special_tokens({"eos_token": "<never>"})
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    tokenizer.decode = lambda *_, **__: ""


def random_prompts(model, size, rows):
    prompts = torch.randint(2, model.config.vocab_size, (rows // size.group, size.prompt))
    prompts = prompts.tolist()
    prompts[0] = prompts[0][1:]
    return prompts


def difference(sample, prompts, size):
    """Between captured and eager, over the rows up to where they first draw another token."""
    a = sample(prompts, size.new)
    b = sample(prompts, size.new, above=10**9)
    same = (a.ids == b.ids).cumprod(1).bool()
    return (a.logprobs - b.logprobs)[same].abs().max().item()


def bytes_per_second(size, world):
    """Read and written by a large copy."""
    copied = torch.zeros(2, size.copied_bytes, dtype=torch.uint8, device=world.device)
    run = functools.partial(copied[0].copy_, copied[1])
    return 2 * size.copied_bytes / seconds_of(run, rounds=5, times=20)


def token(args, size, shape, folder):
    """Where the time of a captured token goes. capture: seconds, twice in decode's 128 tokens;
    replay and draw: each alone; kernels: of a replay, their number, the sum of their times and
    that of attention's, by torch's profiler."""
    world = common.start(args.device)
    build(shape, args.device, folder)
    policy = common.load_policy(folder, world)
    tokenizer = common.load_tokenizer(folder)
    never_end(policy, tokenizer)
    if args.tiny:
        common.CAPTURE_ON = ("cuda", "cpu")
    record_graph = common.CapturedStep.record
    call = common.CapturedStep.__call__

    def timed_record(step):
        got["capture, s"] = seconds_of(functools.partial(record_graph, step), rounds=1)

    def measured_call(step, *given):
        logits = call(step, *given)
        replay = step.graph.replay if step.graph else step.compute
        u = torch.rand(len(logits), 1, dtype=torch.float64, device=world.device)
        draw = functools.partial(common.choose, logits, 1.0, u)
        got["replay, ms"] = seconds_of(replay, times=30) * 1e3
        got["draw, ms"] = seconds_of(draw, times=30) * 1e3
        with torch.profiler.profile() as profiler:
            replay()
            synchronize()
        kernels = [k for k in profiler.events() if k.device_type.name == "CUDA"]
        got["kernels"] = len(kernels)
        got["kernels, ms"] = sum(k.device_time_total for k in kernels) / 1e3
        of_attention = [k.device_time_total for k in kernels if "fmha" in k.name]
        got["of attention, ms"] = sum(of_attention) / 1e3
        common.CapturedStep.__call__ = call
        return logits

    common.CapturedStep.record = timed_record
    for rows in size.rows:
        if not is_wanted(rows, args):
            continue
        got = {}
        common.CapturedStep.__call__ = measured_call
        prompts = random_prompts(policy, size, rows)
        common.sample(policy, tokenizer, prompts, n=size.group, max_new_tokens=40, seed=0)
        record(args, "token", {"model": shape, "rows": rows}, got)


# -- train -----------------------------------------------------------------------------------------


def train(args, size, job, folder):
    """grpo.py's forward, backward and optimizer step on given tokens, two micro-batches of each
    size, sequences of 2,048 tokens, one a token shorter; half of each is a prompt, and shared means
    that the four sequences of a group compute it once. tokens/s count it for each sequence.
    (On a GPU the scripts do not share prompts, because of these figures.)
    model TFLOP/s: tokens/s x (6 x parameters + 12 x layers x width x length / 2), without what
    checkpointing computes again; share: of a large matrix product's. said: the memory for weights,
    gradients and moments that a script says at its start; peak: the highest in use. With adapters
    (--lora_rank 16) only they learn, and no weight of the model has a gradient to compute: then 4
    and not 6 x parameters."""
    shape, _, word = job.partition(" ")
    world = common.start(args.device)
    build(shape, args.device, folder)
    square = torch.randn(2, size.square, size.square, dtype=world.dtype, device=world.device)
    product = functools.partial(torch.mm, *square)
    reached = 2 * size.square**3 / seconds_of(product, rounds=5, times=20)
    del square, product
    flags = types.SimpleNamespace(lora_rank=16 if word == "adapters" else 0, lora_alpha=32.0)
    policy = common.load_policy(folder, world, word == "checkpointing", flags)
    optimizer = common.make_optimizer(policy, 1e-6)
    config = policy.config
    parameters = sum(p.numel() for p in policy.parameters())
    work_of_token = (4 if word == "adapters" else 6) * parameters
    work_of_token += 12 * config.num_hidden_layers * config.hidden_size * size.length / 2
    parts = 2

    def update(advantages, samples):
        weights = grpo.token_weights(samples.mask, "token", 0, world) / parts
        rows = list(range(len(advantages)))
        for _ in range(parts):
            logprobs, _ = grpo.token_logprobs(policy, samples, rows, 1.0)
            ratio = (logprobs - logprobs.detach()).clamp(-20, 20).exp()
            grpo.clipped_loss(ratio, advantages[:, None], weights, 0.2, 0.2).backward()
        common.clip_gradients(policy, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    # with checkpointing grpo.py computes every prompt anew
    ways = (False,) if word else (False, True)
    for tokens, shared in itertools.product(size.tokens, ways):
        length = size.length
        rows = tokens // length
        prompt = length // 2
        ids = torch.randint(2, config.vocab_size, (rows, length), device=world.device)
        ids[:, :prompt] = ids[0, :prompt]
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[-1, -1] = False
        advantages = torch.randn(rows, device=world.device)
        halves = (ids[:, :prompt], mask[:, :prompt], ids[:, prompt:], mask[:, prompt:])
        samples = common.Samples(*halves, None, None, None, 4 if shared else 1)
        run = functools.partial(update, advantages, samples)
        case = {"model": shape, "learns": "adapters" if word == "adapters" else "all weights"}
        case |= {"checkpointing": word == "checkpointing"}
        case |= {"tokens in a micro-batch": tokens, "shared": shared}
        try:
            run()  # warms up, and makes Adam's moments
            forget_peak()
            speed = parts * ids.numel() / seconds_of(run)
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
            record(args, "train", case, {"tokens/s": "out of memory"})
            continue
        work = work_of_token * speed
        got = {"tokens/s": speed, "model TFLOP/s": work / 1e12}
        got["matrix product TFLOP/s"] = reached / 1e12
        got["share"] = work / reached
        _, said = common.lasting_memory(str(folder), world, 1, 0, flags)
        got["said, GiB"] = said / 2**30
        got["peak, GiB"] = common.memory_used(world) / 2**30
        record(args, "train", case, got)


# -- step ------------------------------------------------------------------------------------------


def step(args, size, who, folder):
    """Whole steps of grpo.py beside those of TRL's GRPOTrainer, which samples with transformers'
    `generate` (no vLLM): 32 prompts of 256 tokens (every second one of 255), 8 samples of each, at
    most 256 new tokens, 16 completions in a micro-batch, one update, no gradient checkpointing;
    steps 2 and 3 of a run. Both keep float32 weights and compute in bfloat16, grpo.py by FSDP2,
    TRL by autocast. grpo.py's seconds are its own time/sample + time/train, without logging."""
    build(size.decode_shapes[0], args.device, folder / "start")
    prompts = [f"{i:=>{size.step_prompt - i % 2}}" for i in range(4 * size.step_prompts)]
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
    (folder / "data.jsonl").write_text("".join(lines))
    reward = "def score(completion, row):\n    return float(len(completion))\n"
    (folder / "reward.py").write_text(reward)
    run = {"grpo.py": step_of_grpo, "TRL": step_of_trl}[who]
    try:
        got = run(args, size, folder)
    except ImportError as error:
        got = {"note": f"{who} is left out: {error}."}
    record(args, "step", {"model": size.decode_shapes[0], "who": who}, got)


def run_script(args, script, out, flags):
    """A script's metrics.jsonl, and the seconds that it took."""
    command = [sys.executable, str(ROOT / script), "--device", args.device, "--out", str(out)]
    began = time.perf_counter()
    command += map(str, flags)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{script} {flags}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return log, time.perf_counter() - began


def step_of_grpo(args, size, folder):
    # whole groups, as many rows in a micro-batch as TRL has
    tokens = size.part // size.group * size.step_prompt + size.part * size.step_new
    flags = ["--model", folder / "start", "--data", folder / "data.jsonl"]
    flags += ["--reward", f"{folder}/reward.py:score", "--steps", 3]
    flags += ["--prompts_per_step", size.step_prompts, "--samples_per_prompt", size.group]
    flags += ["--max_new_tokens", size.step_new, "--tokens_per_micro_batch", tokens]
    log, _ = run_script(args, "grpo.py", folder / "run", flags)
    log = [m for m in log if m["step"] > 1]  # the first step warms up
    assert all(m["equal_groups"] < 1 and m["grad_norm"] > 0 for m in log)
    return {
        "seconds": [m["time/sample"] + m["time/train"] for m in log],
        "of them sampling": [m["time/sample"] for m in log],
        "length": [m["length"] for m in log],
        "peak, GiB": log[-1]["memory_gib"],
    }


def step_of_trl(args, size, folder):
    import trl
    from datasets import Dataset

    on_gpu = args.device == "cuda"
    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            synchronize()
            ends.append(time.perf_counter())

    config = trl.GRPOConfig(
        output_dir=str(folder / "run"),
        seed=1,
        max_steps=3,
        per_device_train_batch_size=size.part,
        gradient_accumulation_steps=size.step_prompts * size.group // size.part,
        num_generations=size.group,
        max_completion_length=size.step_new,
        use_vllm=False,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        loss_type="dapo",
        epsilon=0.2,
        scale_rewards="group",
        num_iterations=1,
        learning_rate=1e-6,
        lr_scheduler_type="linear",
        warmup_steps=10,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": torch.float32},
    )
    rows = [row for _, row in common.read_json(folder / "data.jsonl", "")]
    trainer = trl.GRPOTrainer(
        model=str(folder / "start"),
        processing_class=common.load_tokenizer(folder / "start"),
        args=config,
        callbacks=[Clock()],
        train_dataset=Dataset.from_list(rows),
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
    )
    trainer.train()
    log = [m for m in trainer.state.log_history if "completions/mean_length" in m][1:]
    assert all(m["frac_reward_zero_std"] < 1 and m["grad_norm"] > 0 for m in log)
    world = common.World(0, 1, torch.device(args.device), None)
    return {
        "seconds": [b - a for a, b in itertools.pairwise(ends)],
        "length": [m["completions/mean_length"] for m in log],
        "peak, GiB": common.memory_used(world) / 2**30,
        "TRL": trl.__version__,
    }


# -- learn -----------------------------------------------------------------------------------------


def learn(args, size, _, folder):
    """The five scripts with no flags but a seed and a dtype: the held-out score before and at the
    last step, sampled greedily (exact match), or of pairs (accuracy). All run at once on the one
    card, so the seconds, with the start, are those of a shared card."""
    runs = [("grpo.py", seed, "bfloat16") for seed in size.seeds]
    runs += [("grpo.py", seed, "float32") for seed in size.seeds]
    others = ("reinforce.py", "ppo.py", "dpo.py", "reward_model.py")
    runs += [(script, size.seeds[0], "bfloat16") for script in others]
    if args.device == "cpu":  # two cores: one of each script
        runs = [run for run in runs if run[1] == size.seeds[0]]
    runs = [run for run in runs if is_wanted(run[0], args)]

    def one(run):
        script, seed, dtype = run
        out = folder / f"{script}-{seed}-{dtype}"
        flags = ["--seed", seed, "--dtype", dtype, *size.flags]
        log, seconds = run_script(args, script, out, flags)
        name = "eval/accuracy" if script == "reward_model.py" else "eval/exact"
        scores = [m[name] for m in log if name in m]
        got = {"before": scores[0], "at the end": scores[-1]}
        got |= {"step": log[-1]["step"], "seconds": seconds}
        with one_at_a_time:
            record(args, "learn", {"script": script, "computes in": dtype, "seed": seed}, got)

    one_at_a_time = threading.Lock()
    with ThreadPoolExecutor(len(runs) if args.device == "cuda" else 1) as pool:
        list(pool.map(one, runs))


PIECES = {f.__name__: f for f in (decode, token, train, step, learn)}


def show(value):
    if isinstance(value, list):
        return ", ".join(map(show, value))
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def tables(rows):
    blocks = []
    for piece, of_piece in itertools.groupby(rows, lambda r: r["piece"]):
        blocks.append(f"### {piece}")
        blocks.append(" ".join(PIECES[piece].__doc__.split()))
        stamp = lambda r: (r["device"], r["date"], r["torch"], r["transformers"])  # noqa: E731
        for made, same in itertools.groupby(of_piece, stamp):
            blocks.append("{}, {}, torch {}, transformers {}:".format(*made))
            cells = [r["case"] | r["got"] for r in same]
            blocks += [c["note"] for c in cells if "note" in c]
            cells = [c for c in cells if "note" not in c]
            names = dict.fromkeys(name for c in cells for name in c)
            lines = [names, ["---"] * len(names)]
            lines += [[show(c.get(name, "")) for name in names] for c in cells]
            if cells:
                blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(blocks) + "\n"


def main(args):
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    if not on_gpu and not args.tiny:
        common.fail("no GPU to measure; --device cpu --tiny --out FOLDER tries this script")
    if args.tiny and Path(args.out).resolve() == HERE:
        common.fail("--tiny gives no results: name another folder by --out")
    size = SMALL if args.tiny else Size()
    largest = size.train_shapes[-1]
    train_jobs = [*size.train_shapes, f"{largest} checkpointing", f"{largest} adapters"]
    jobs = {
        "decode": size.decode_shapes,
        "token": size.decode_shapes,
        "train": train_jobs,
        "step": ["grpo.py", "TRL"],
        "learn": ["all"],
    }
    Path(args.out).mkdir(parents=True, exist_ok=True)
    args = replace(args, device="cuda" if on_gpu else "cpu")
    failed = []
    for piece in args.only:
        for job in jobs[piece]:
            if piece in ("train", "step") and not is_wanted(job, args):
                continue
            with tempfile.TemporaryDirectory() as folder:
                # a process of its own: the next one finds all memory free
                process = multiprocessing.get_context("spawn").Process(
                    target=PIECES[piece], args=(args, size, job, Path(folder))
                )
                process.start()
                process.join()
            if process.exitcode:
                failed.append(f"{piece} {job}")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
