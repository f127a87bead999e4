"""The same samples, advantages and weights through grpo.py's loss and through TRL's: prints how far loss and gradient are apart.

pip install -r requirements.txt trl==1.16.0 datasets     # in an environment of its own
python tests/bench/agree_trl.py                          # seconds; writes agree_trl.json, fails above 1e-5
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import common
import grpo

CASES = [  # TRL's loss_type and importance_sampling_level; our --aggregate and --ratio
    ("grpo", "token", "sequence", "token"),
    ("dapo", "token", "token", "token"),
    ("dr_grpo", "token", "constant", "token"),
    ("grpo", "sequence", "sequence", "sequence"),
]


def main():
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    world = common.start("cpu", seed=0)
    path = str(grpo.TINY / "model")
    tokenizer = common.load_tokenizer(path)
    rows = common.load_prompts(
        grpo.TINY / "sort_train.jsonl", "--data", tokenizer, grpo.Args(), ""
    )[:4]
    policy = common.load_policy(path, world)
    s = common.sample(policy, tokenizer, [ids for ids, _ in rows], n=4, max_new_tokens=16, seed=1)
    g = torch.Generator().manual_seed(0)
    advantages = torch.randn(16, generator=g)
    with torch.no_grad():
        now, _ = grpo.token_logprobs(policy, s, list(range(16)), 1.0)
    apart = 0.3 * torch.randn(now.shape, generator=g) + 0.3 * torch.randn(16, 1, generator=g)
    old = (now + apart) * s.mask  # ratios on both sides of the clip, of tokens and of completions
    ref = (now + 0.3 * torch.randn(now.shape, generator=g)) * s.mask

    results = []
    for loss_type, level, aggregate, ratio in CASES:
        for beta in (0.0, 0.1):
            policy.zero_grad()
            weights = grpo.token_weights(s.mask, aggregate, 16, world)
            logprobs, _ = grpo.token_logprobs(policy, s, list(range(16)), 1.0)
            logratio = logprobs - old
            if ratio == "sequence":
                logratio = grpo.sequence_logratio(logratio, s.mask)
            ratio_of_tokens = logratio.clamp(-20, 20).exp()
            clip = (0.2, 0.28)
            loss = grpo.clipped_loss(ratio_of_tokens, advantages[:, None], weights, *clip)
            low, high = grpo.is_clipped(ratio_of_tokens, advantages[:, None], *clip)
            loss = loss + beta * (grpo.k3(logprobs, ref) * weights).sum()
            loss.backward()
            mine = torch.cat([p.grad.flatten() for p in policy.parameters()])

            with tempfile.TemporaryDirectory() as out:
                config = GRPOConfig(
                    output_dir=out, loss_type=loss_type, importance_sampling_level=level, beta=beta, use_bias_correction_kl=False, epsilon=0.2, epsilon_high=0.28,
                    per_device_train_batch_size=16, num_generations=4, max_completion_length=16, gradient_checkpointing=False,
                    use_cpu=True, bf16=False, report_to="none", model_init_kwargs={"dtype": torch.float32},
                )  # fmt: skip
                data = Dataset.from_list([{"prompt": r["prompt"]} for _, r in rows])
                trainer = GRPOTrainer(
                    model=path,
                    reward_funcs=lambda completions, **_: [0.0] * len(completions),
                    args=config,
                    train_dataset=data,
                    processing_class=tokenizer,
                )
            trainer.model.train()
            trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
            inputs = {
                "prompt_ids": s.prompt_ids, "prompt_mask": s.prompt_mask.long(), "completion_ids": s.ids, "completion_mask": s.mask.long(),
                "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": s.mask.sum(),
            }  # fmt: skip
            theirs = trainer._compute_loss(trainer.model, inputs)
            theirs.backward()
            other = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
            row = {
                "loss_type": loss_type, "importance_sampling_level": level, "beta": beta, "loss": loss.item(),
                "loss_apart": abs(loss.item() - theirs.item()), "gradient_apart": ((mine - other).norm() / other.norm()).item(),
                "clipped": round(((low | high) & s.mask).sum().item() / s.mask.sum().item(), 3),
            }  # fmt: skip
            print(row, flush=True)
            results.append(row)
    (HERE / "agree_trl.json").write_text(json.dumps(results, indent=1) + "\n")
    worst = max(max(r["loss_apart"], r["gradient_apart"]) for r in results)
    print(f"largest difference: {worst:.1e}")
    sys.exit(worst > 1e-5)


if __name__ == "__main__":
    main()
