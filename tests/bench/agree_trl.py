"""The same completions and rewards through grpo.py and through TRL's GRPOTrainer: how far their
losses and gradients are apart. With flags, and with the patches of tests/changes that TRL has, too.

    pip install -r requirements.txt trl==1.16.0 datasets pytest   # an environment of its own
    OMP_NUM_THREADS=1 python tests/bench/agree_trl.py     # two minutes; fails above 1e-5

Both compute everything themselves: advantages from the rewards, the log-probabilities of the old
policy, the policy and the reference, weights, ratios, the loss and its gradient. TRL takes the
completions from a `rollout_func`, with the sampler's log-probabilities. These are made to differ
from the trainer's, as those of another engine would. With `epochs` 2 the policy is moved between
the old log-probabilities and the loss, so that ratios are on all sides of the clip. Writes
agree_trl.json.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
from changes_helpers import load, patches_of
from tiny.sort import adjacent, position

import common
import grpo

LIMIT = 10  # --max_new_tokens
PROMPTS = 8
FAR = 0.5  # noise on weights, in standard deviations: ratios on all sides of all bounds
ROWS = list(range(PROMPTS * 8))
TWICE = ({"num_iterations": 2}, {"epochs": 2})  # TRL's settings, our flags
PER_SEQUENCE = ({"loss_type": "grpo"}, {"aggregate": "sequence"})
GSPO = (
    {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    {"ratio": "sequence"},
)
HIGHER = ({"epsilon_high": 0.28}, {"clip_high": 0.28})
TRUNCATED = {
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_max": 2.0,
}

LOSSES = {
    "dapo": (HIGHER,),
    "grpo": (HIGHER, PER_SEQUENCE),
    "dr_grpo": (HIGHER, ({"loss_type": "dr_grpo"}, {"aggregate": "constant"})),
    "sequence ratio": (PER_SEQUENCE, GSPO),
}
KLS = {
    "": ({"beta": 0.0}, {"beta": 0.0}),
    ", k3_ratio": ({"beta": 0.1}, {"beta": 0.1}),  # the default of both
    ", k3": ({"beta": 0.1, "use_bias_correction_kl": False}, {"beta": 0.1, "kl": "k3"}),
}
SETTINGS = {
    "scale_rewards batch": ({"scale_rewards": "batch"}, {"scale": "batch"}),
    "scale_rewards none": ({"scale_rewards": "none"}, {"scale": "none"}),
    "mask_truncated": ({"mask_truncated_completions": True}, {"mask_truncated": True}),
    "temperature 0.7": ({"temperature": 0.7}, {"temperature": 0.7}),
}
PATCHES = {
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.5}, {"clip_high": 0.5}),
    "sapo": ({"loss_type": "sapo"}, {"aggregate": "sequence"}),
    "dual_clip": ({"delta": 3.0}, {}),
    "entropy_bonus": ({"entropy_coef": 0.01}, {}),
    "truncated_importance_sampling": (TRUNCATED, {}),
    "masked_importance_sampling": ({}, {}),  # the mode sequence_mask is TRL's default
    "gdpo": ({"multi_objective_aggregation": "normalize_then_sum"}, {}),
    "soft_overlong_punishment": ({}, {}),  # in TRL a reward, which `step_of_trl` adds
}
# TRL multiplies by pi_old / q only where another engine, vLLM, draws
OF_AN_ENGINE = ("truncated_importance_sampling", "masked_importance_sampling")
NOT_IN_TRL = ("maxrl", "reinforce_plus_plus_baseline")  # no setting of its GRPOTrainer


def cases():
    """(name, patch or None, TRL's settings, our flags)"""
    yield "defaults", None, {}, {}
    yield "defaults, two updates", None, *merged(TWICE)
    for kl in (", k3_ratio", ", k3"):
        yield "defaults" + kl, None, *KLS[kl]
        yield "defaults, two updates" + kl, None, *merged(TWICE, KLS[kl])
    for name, pairs in LOSSES.items():
        for kl in KLS:
            yield name + kl, None, *merged(TWICE, *pairs, KLS[kl])
    for name, pair in SETTINGS.items():
        yield name, None, *merged(TWICE, pair)
    for name, pair in PATCHES.items():
        for kl in KLS:
            yield name + kl, name, *merged(TWICE, pair, KLS[kl])


def merged(*pairs):
    """Pairs of (TRL's settings, our flags) as one pair."""
    settings = {}
    flags = {}
    for their_part, our_part in pairs:
        settings |= their_part
        flags |= our_part
    return settings, flags


def moved(model, scale, seed):
    """Adds noise to the weights: what an update does to the policy, or a reference far from it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * p.std() * torch.randn(p.shape, generator=generator))
    return model


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def step_of_grpo(script, flags, prompts, tokenizer, world):
    """The parts of a step of `train` without its optimizer -> loss, gradient, log, samples."""
    settings = {"prompts_per_step": PROMPTS, "max_new_tokens": LIMIT, "device": "cpu"}
    args = script.resolve(script.Args(**settings, **flags))
    policy = common.load_policy(args.model, world)

    def both(completion, row):
        parts = {"position": position(completion, row), "adjacent": adjacent(completion, row)}
        return {"reward": sum(parts.values()), **parts}  # gdpo takes the parts

    reward = common.Reward(common.checked(both, "both", world), position, {})
    meter = common.Meter()
    samples, rewards, _ = script.rollout(
        policy, tokenizer, prompts, reward, False, args, world, 1, meter
    )
    noise = torch.randn(samples.mask.shape, generator=torch.Generator().manual_seed(2))
    samples.logprobs += 0.3 * noise * samples.mask  # the sampler's differ from the trainer's
    n = args.samples_per_prompt
    advantages = script.group_advantages(rewards, rewards, n, args.scale, args.keep_max)
    counted = samples.mask
    if args.mask_truncated:
        counted = counted & samples.finished[:, None]
    weights = script.token_weights(counted, args.aggregate, args.max_new_tokens, world)
    batch = script.Batch(samples, advantages, weights)
    if args.beta:
        reference = moved(common.load_policy(args.model, world), FAR, seed=3)
        batch.ref_logprobs = script.rollout_logprobs(reference, samples, [[ROWS]], args.temperature)
    if args.epochs > 1:
        batch.old_logprobs = script.rollout_logprobs(policy, samples, [[ROWS]], args.temperature)
        moved(policy, FAR, seed=4)
    loss = script.update_loss(policy, batch, ROWS, args, meter, False)
    loss.backward()
    return loss.item(), gradient(policy), meter.result(world), samples


def step_of_trl(settings, patch, samples, records, tokenizer, folder):
    """Loss and gradient of TRL for the same completions."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.rewards import get_soft_overlong_punishment

    def rollout_func(prompts, trainer):
        lists = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        for row, mask in enumerate(samples.mask):
            lists["prompt_ids"].append(samples.prompt_ids[row][samples.prompt_mask[row]].tolist())
            lists["completion_ids"].append(samples.ids[row][mask].tolist())
            lists["logprobs"].append(samples.logprobs[row][mask].tolist())
        return lists

    def in_place(completions, answer, **_):
        return [position(text, {"answer": right}) for text, right in zip(completions, answer)]

    def in_order(completions, answer, **_):
        return [adjacent(text, {"answer": right}) for text, right in zip(completions, answer)]

    rewards = [in_place, in_order]
    if patch == "soft_overlong_punishment":
        rewards.append(get_soft_overlong_punishment(LIMIT, LIMIT // 5))
    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=len(ROWS),
        max_completion_length=LIMIT,
        use_cpu=True,
        bf16=False,
        report_to="none",
        model_init_kwargs={"dtype": torch.float32},
        **settings,
    )
    rows = [record for record in records for _ in range(config.num_generations)]
    trainer = GRPOTrainer(
        model=str(grpo.TINY / "model"),
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        rollout_func=rollout_func,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    if patch in OF_AN_ENGINE:
        trainer.use_vllm = True  # for its corrections; the completions come from `rollout_func`
        trainer._last_loaded_step = trainer.state.global_step  # no weights to send
    if trainer.ref_model is not None:
        moved(trainer.ref_model, FAR, seed=3)
    inputs = trainer._generate_and_score_completions(rows)
    if config.num_iterations > 1:
        moved(trainer.model, FAR, seed=4)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), gradient(trainer.model)


def main():
    import trl

    world = common.start("cpu", seed=0)
    tokenizer = common.load_tokenizer(str(grpo.TINY / "model"))
    data = grpo.TINY / "sort_train.jsonl"
    prompts = common.load_prompts(data, "--data", tokenizer, grpo.Args(), "")[:PROMPTS]
    order = common.rows_of_step(PROMPTS, 1, PROMPTS, world, grpo.Args().seed)
    records = [prompts[i][1] for i in order]
    assert set(PATCHES) | set(NOT_IN_TRL) == set(patches_of("grpo"))

    results = []
    for name, patch, settings, flags in cases():
        script = load(patch) if patch else grpo
        loss, ours, logged, samples = step_of_grpo(script, flags, prompts, tokenizer, world)
        with tempfile.TemporaryDirectory() as folder:
            their_loss, theirs = step_of_trl(settings, patch, samples, records, tokenizer, folder)
        row = {
            "case": name,
            "patch": patch,
            "TRL": settings,
            "grpo.py": flags,
            "loss": loss,
            "loss_apart": abs(loss - their_loss),
            "gradient_apart": ((ours - theirs).norm() / theirs.norm()).item(),
            "clipped": round(logged["clip/low"] + logged["clip/high"], 3),
        }
        # without the patch, or without the flags: would the comparison notice?
        fewer = flags
        if not patch:
            fewer = {key: flags[key] for key in ("epochs", "beta") if key in flags}
        if patch or fewer != flags:
            _, plain, *_ = step_of_grpo(grpo, fewer, prompts, tokenizer, world)
            row["gradient_apart_without"] = ((plain - theirs).norm() / theirs.norm()).item()
        print(row, flush=True)
        results.append(row)
    largest = max(max(row["loss_apart"], row["gradient_apart"]) for row in results)
    report = {"trl": trl.__version__, "largest": largest, "not in TRL": NOT_IN_TRL}
    report["cases"] = results
    (HERE / "agree_trl.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{len(results)} cases, largest difference: {largest:.1e}")
    print(f"patches of grpo.py that TRL has no setting for: {', '.join(NOT_IN_TRL)}")
    sys.exit(largest > 1e-5)


if __name__ == "__main__":
    main()
