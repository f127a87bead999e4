"""What one GPU does with these scripts, in four pieces, each meant to take less than 8 minutes.

    python tests/bench/gpu.py --only decode train step learn             # or some of them; step wants trl and datasets, too
    python tests/bench/gpu.py --device cpu --tiny --out /tmp/gpu_tiny    # no results: only whether this script works

The large models have the shapes of Qwen2.5-0.5B and 1.5B and random weights: speed does not depend on what tokens mean. Each
row is in gpu.json as soon as it is measured, and replaces an older one of the same case and device. gpu.md is written from it.
"""

import itertools
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import transformers
import tyro

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import common
import grpo

synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
SHAPES = {  # words, width, inner width, layers, heads; all have two heads of keys and values, and a tied head
    "0.5B": (151936, 896, 4864, 24, 14),
    "1.5B": (151936, 1536, 8960, 28, 12),
    "tiny": (512, 64, 128, 2, 4),
}
FULL = {
    "shapes": ("0.5B", "1.5B"), "group": 8, "prompt": 256, "copy": 2**32, "square": 8192, "rows": (64, 256, 1024), "new": 128,
    "lengths": (1024, 2048, 4096), "tokens": 8192, "prompts": 64, "step_new": 512, "part": 16, "seeds": (1, 2, 3), "flags": (),
}  # fmt: skip
TINY = {
    "shapes": ("tiny",), "group": 4, "prompt": 16, "copy": 2**20, "square": 128, "rows": (8, 16), "new": 8,
    "lengths": (32, 64), "tokens": 128, "prompts": 4, "step_new": 8, "part": 8, "seeds": (1, 2), "flags": ("--steps", "2"),
}  # fmt: skip


@dataclass
class Args:
    only: tuple[Literal["decode", "train", "step", "learn"], ...] = (
        "decode",
        "train",
        "step",
        "learn",
    )
    out: str = str(HERE)
    """folder of gpu.json and gpu.md"""
    device: Literal["auto", "cpu"] = "auto"
    tiny: bool = False
    """a few tokens of a model of two layers"""


def build(shape, device, folder):
    """A folder with a model that knows nothing and a tokenizer for it: the bundled model's, one character a token, with a
    word for every further id, so that the texts of random ids differ."""
    words, width, inner, layers, heads = SHAPES[shape]
    config = transformers.Qwen2Config(
        vocab_size=words, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32768, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with torch.device(device):
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
            folder
        )
    core, settings = (
        json.loads((grpo.TINY / "model" / f"tokenizer{x}.json").read_text())
        for x in ("", "_config")
    )
    core["model"]["vocab"] |= {f"w{i}": i for i in range(len(core["model"]["vocab"]), words)}
    (folder / "tokenizer.json").write_text(json.dumps(core))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"model_max_length": 32768})
    )


def fastest(run, *given, rounds=2, times=1):
    """The seconds of one call. The shortest time counts, because whatever else happens only adds to it."""
    took = []
    for _ in range(rounds):
        synchronize()
        began = time.perf_counter()
        for _ in range(times):
            run(*given)
        synchronize()
        took.append(time.perf_counter() - began)
    return min(took) / times


def record(args, piece, case, got):
    """Puts a row into gpu.json, in the place of an older one of the same case and device, and writes gpu.md."""
    path = Path(args.out) / "gpu.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    device = (
        torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    ) + ", with the sizes of --tiny" * args.tiny
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    rows = [r for r in rows if (r["piece"], r["case"], r["device"]) != (piece, case, device)]
    rows.append(
        {
            "piece": piece,
            "case": case,
            "device": device,
            "date": time.strftime("%Y-%m-%d"),
            **versions,
            "got": got,
        }
    )
    rows.sort(key=lambda r: list(PIECES).index(r["piece"]))
    path.write_text(json.dumps(rows, indent=1) + "\n")
    path.with_suffix(".md").write_text(tables(rows))
    print(piece, json.dumps(case | got), flush=True)


def decode(args, size, shape, folder):
    """`sample` of common.py beside transformers' `generate`: prompts of 256 tokens, 8 samples of each, 128 new tokens in every
    row. ms: of a step, the time for all new tokens less that for one, by 127; tokens/s: with the prompts' time. floor: as long
    as a large copy takes for the bytes that a step must read, weights and every row's keys and values; share: floor / ms.
    grpo.py's model is in float32 under FSDP2 and computes in bfloat16, its logits in float32; the others are bfloat16 alone. padding: tokens by which
    one prompt is shorter than the rest; with none, attention needs no mask."""
    world, P, n, new = common.start(args.device), size["prompt"], size["group"], size["new"]
    build(shape, args.device, folder)
    policy, tokenizer = common.load_policy(folder, world), common.load_tokenizer(folder)
    plain = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=world.dtype)
        .to(world.device)
        .eval()
    )
    tokenizer.add_special_tokens(
        {"eos_token": "<never>"}
    )  # the model has no such word, so no row ends; all look for it
    policy.generation_config.eos_token_id = plain.generation_config.eos_token_id = (
        tokenizer.eos_token_id
    )
    tokenizer.decode = lambda *_, **__: ""  # no time for text, which `generate` does not make
    plain.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    copied = torch.zeros(2, size["copy"], dtype=torch.uint8, device=world.device)
    bandwidth = 2 * size["copy"] / fastest(torch.Tensor.copy_, *copied, rounds=5, times=20)
    weights = sum(p.nbytes for p in plain.parameters())
    token = (
        sum(2 * layer.self_attn.k_proj.out_features for layer in plain.model.layers)
        * world.dtype.itemsize
    )  # its cache
    del copied

    def sample(model, prompts, new):
        s = common.sample(model, tokenizer, prompts, n=n, max_new_tokens=new, seed=0)
        assert s.mask.shape == (len(prompts) * n, new) and s.mask.all()

    def generate(model, prompts, new):
        s = common.as_samples(
            prompts, [[0]] * len(prompts), tokenizer, world
        )  # for its padding on the left
        ids = model.generate(
            s.prompt_ids,
            attention_mask=s.prompt_mask.long(),
            max_new_tokens=new,
            num_return_sequences=n,
        )
        assert ids.shape == (len(prompts) * n, P + new)

    ways = (
        ("sample, grpo.py's model", sample, policy),
        ("sample", sample, plain),
        ("generate", generate, plain),
    )
    for rows, padding in itertools.product(size["rows"], (0, 1)):
        prompts = torch.randint(2, plain.config.vocab_size, (rows // n, P)).tolist()
        prompts[0] = prompts[0][padding:]
        floor = (weights + rows * token * (P + new / 2)) / bandwidth * 1e3
        got = {"copy, GB/s": bandwidth / 1e9, "floor, ms": floor}
        for name, run, model in ways:
            torch.cuda.empty_cache()
            run(model, prompts, 8)  # warms up
            first, whole = (fastest(run, model, prompts, count) for count in (1, new))
            ms = (
                (whole - first) / (new - 1) * 1e3
            )  # the prompts, and the token that they lead to, are in both
            got |= {
                f"{name}: ms": ms,
                f"{name}: share": floor / ms,
                f"{name}: tokens/s": rows * new / whole,
            }
        record(args, "decode", {"model": shape, "rows": rows, "padding": padding}, got)


def train(args, size, job, folder):
    """grpo.py's forward, backward and optimizer step on given tokens: four micro-batches of 8,192 tokens in sequences of one
    length, the first 16 a prompt. model TFLOP/s: tokens/s x (6 x parameters + 12 x layers x width x length / 2), without what
    checkpointing computes again; share: of a large matmul's. Peak memory: with weights, gradients and Adam's moments. padding:
    tokens that are padding in the first sequence; with none, attention needs no mask."""
    shape, checkpointing = job.split()[0], job.endswith("checkpointing")
    world = common.start(args.device)
    build(shape, args.device, folder)
    square = torch.randn(2, size["square"], size["square"], dtype=world.dtype, device=world.device)
    reached = 2 * size["square"] ** 3 / fastest(torch.mm, *square, rounds=5, times=20)
    del square
    policy = common.load_policy(folder, world, checkpointing)
    optimizer, config = common.make_optimizer(policy, 1e-6), policy.config
    parameters, P, parts = sum(p.numel() for p in policy.parameters()), 16, 4

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

    for T, padding in itertools.product(size["lengths"], (0, 1)):
        ids = torch.randint(2, config.vocab_size, (size["tokens"] // T, T), device=world.device)
        mask = torch.arange(ids.numel(), device=world.device).view_as(ids) >= padding
        advantages = torch.randn(len(ids), device=world.device)
        samples = common.Samples(ids[:, :P], mask[:, :P], ids[:, P:], mask[:, P:], None, None, None)
        given = advantages, samples
        update(*given)  # warms up, and makes Adam's moments
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        speed = parts * ids.numel() / fastest(update, *given)
        work = (6 * parameters + 12 * config.num_hidden_layers * config.hidden_size * T / 2) * speed
        case = {
            "model": shape,
            "checkpointing": "yes" if checkpointing else "no",
            "length": T,
            "padding": padding,
        }
        got = {
            "tokens/s": speed,
            "peak memory, GiB": common.memory_used(world) / 2**30,
            "model TFLOP/s": work / 1e12,
        }
        record(
            args, "train", case, got | {"matmul TFLOP/s": reached / 1e12, "share": work / reached}
        )


def step(args, size, who, folder):
    """Whole steps of grpo.py beside those of TRL's GRPOTrainer, which samples with transformers' `generate` (no vLLM): 64
    prompts of 256 tokens (every second one of 255), 8 samples of each, at most 512 new tokens, 16 completions in a
    micro-batch, one update, no gradient checkpointing; steps 2 and 3 of a run. Both keep float32 weights and compute in
    bfloat16, grpo.py by FSDP2, TRL by autocast. grpo.py's seconds are its own time/sample + time/train, without logging."""
    build(size["shapes"][0], args.device, folder / "start")
    prompts = [f"{i:=>{size['prompt'] - i % 2}}" for i in range(4 * size["prompts"])]
    (folder / "data.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    (folder / "reward.py").write_text(
        "def score(completion, row):\n    return float(len(completion))\n"
    )
    try:
        got = {"grpo.py": step_of_ours, "TRL": step_of_trl}[who](args, size, folder)
    except ImportError as error:
        got = {"note": f"{who} is left out: {error}."}
    record(args, "step", {"model": size["shapes"][0], "who": who}, got)


def grpo_py(args, out, flags):
    command = [
        sys.executable,
        str(HERE.parents[1] / "grpo.py"),
        "--device",
        args.device,
        "--out",
        str(out),
        *map(str, flags),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def step_of_ours(args, size, folder):
    n, part, new = size["group"], size["part"], size["step_new"]
    flags = f"--model {folder}/start --data {folder}/data.jsonl --reward {folder}/reward.py:score --steps 3"
    flags += (
        f" --prompts_per_step {size['prompts']} --samples_per_prompt {n} --max_new_tokens {new}"
    )
    flags += f" --tokens_per_micro_batch {part // n * size['prompt'] + part * new}"  # whole groups, as many rows as TRL has
    log = grpo_py(args, folder / "run", flags.split())[2:]  # the start; a warm-up
    assert all(m["equal_groups"] < 1 and m["grad_norm"] > 0 for m in log)
    return {
        "seconds": [m["time/sample"] + m["time/train"] for m in log], "of them sampling": [m["time/sample"] for m in log],
        "length": [m["length"] for m in log], "peak memory, GiB": log[-1]["memory_gib"],
    }  # fmt: skip


def step_of_trl(args, size, folder):
    import trl
    from datasets import Dataset

    gpu, ends = args.device == "cuda", []
    note = type(
        "Clock",
        (transformers.TrainerCallback,),
        {"on_step_end": lambda *_, **__: ends.append(time.perf_counter())},
    )
    config = trl.GRPOConfig(
        output_dir=str(folder / "run"), seed=1, max_steps=3, per_device_train_batch_size=size["part"], use_vllm=False, bf16=gpu,
        gradient_accumulation_steps=size["prompts"] * size["group"] // size["part"], num_generations=size["group"],
        max_completion_length=size["step_new"], temperature=1.0, top_p=1.0, top_k=0, beta=0.0, loss_type="dapo", epsilon=0.2,
        scale_rewards="group", num_iterations=1, learning_rate=1e-6, lr_scheduler_type="linear", warmup_steps=10, use_cpu=not gpu,
        adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0, gradient_checkpointing=False, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, model_init_kwargs={"dtype": torch.float32},
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=str(folder / "start"), processing_class=common.load_tokenizer(folder / "start"), args=config, callbacks=[note()],
        train_dataset=Dataset.from_list([row for _, row in common.read_json(folder / "data.jsonl", "")]),
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
    )  # fmt: skip
    trainer.train()
    log = [m for m in trainer.state.log_history if "completions/mean_length" in m][1:]
    assert all(m["frac_reward_zero_std"] < 1 and m["grad_norm"] > 0 for m in log)
    return {
        "seconds": [b - a for a, b in itertools.pairwise(ends)], "length": [m["completions/mean_length"] for m in log],
        "peak memory, GiB": common.memory_used(common.World(0, 1, torch.device(args.device), None)) / 2**30, "TRL": trl.__version__,
    }  # fmt: skip


def learn(args, size, dtype, folder):
    """`python grpo.py`, the bundled model, with seeds 1, 2, 3: held-out exact match, greedy."""
    with ThreadPoolExecutor(3) as pool:  # at once: no times are taken from them
        flags = ["--dtype", dtype, *size["flags"]]
        logs = list(
            pool.map(lambda s: grpo_py(args, folder / f"{s}", ["--seed", s, *flags]), size["seeds"])
        )
    got = {
        "before": logs[0][0]["eval/exact"],
        "at the end": [log[-1]["eval/exact"] for log in logs],
    }
    record(args, "learn", {"computes in": dtype, "steps": logs[0][-1]["step"]}, got)


PIECES = {f.__name__: f for f in (decode, train, step, learn)}


def show(value):
    if isinstance(value, list):
        return ", ".join(map(show, value))
    return (
        str(value)
        if not isinstance(value, float)
        else f"{value:,.0f}"
        if value >= 100
        else f"{value:.3g}"
    )


def tables(rows):
    blocks = []
    for piece, mine in itertools.groupby(rows, lambda r: r["piece"]):
        blocks.append(" ".join(PIECES[piece].__doc__.split()))
        for stamp, same in itertools.groupby(
            mine, lambda r: (r["device"], r["date"], r["torch"], r["transformers"])
        ):
            blocks.append("{}, {}, torch {}, transformers {}:".format(*stamp))
            cells = [r["case"] | r["got"] for r in same]
            notes, cells = (
                [c["note"] for c in cells if "note" in c],
                [c for c in cells if "note" not in c],
            )
            names = list(dict.fromkeys(k for c in cells for k in c))
            lines = [names, ["---"] * len(names)] + [
                [show(c.get(k, "")) for k in names] for c in cells
            ]
            blocks += ["\n".join(f"| {' | '.join(line)} |" for line in lines)] * bool(cells) + notes
    return "\n\n".join(blocks) + "\n"


def main(args):
    gpu = torch.cuda.is_available() and args.device != "cpu"
    if not gpu and not args.tiny:
        common.fail(
            "there is no GPU to measure; --device cpu --tiny --out FOLDER tries this script on a CPU"
        )
    if args.tiny and Path(args.out).resolve() == HERE:
        common.fail("--tiny gives no results: name another folder by --out")
    size = TINY if args.tiny else FULL
    jobs = {
        "decode": size["shapes"], "train": [shape + more for shape in size["shapes"] for more in ("", " checkpointing")],
        "step": ["grpo.py", "TRL"], "learn": ["bfloat16", "float32"] if gpu else ["float32"],  # a CPU has no other
    }  # fmt: skip
    Path(args.out).mkdir(parents=True, exist_ok=True)
    args, failed = replace(args, device="cuda" if gpu else "cpu"), []
    for piece, job in ((p, j) for p in args.only for j in jobs[p]):
        with tempfile.TemporaryDirectory() as folder:
            process = multiprocessing.get_context("spawn").Process(
                target=PIECES[piece], args=(args, size, job, Path(folder))
            )
            process.start()
            process.join()
            failed += [f"{piece} {job}"] * (process.exitcode != 0)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
