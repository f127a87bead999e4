"""GRPO, Group Relative Policy Optimization: PPO without a critic.

The policy pi draws n completions y_1 .. y_n of a prompt x, and each gets a reward r_i. A completion
is good if its reward is above the mean of its group. That mean takes the place of the value
function that PPO has to learn.

    (1)  A     = (r_i - mean(r_1 .. r_n)) / (std(r_1 .. r_n) + 1e-4)          `group_advantages`
    (2)  rho_t = pi(a_t | x, a_<t) / pi_old(a_t | x, a_<t)                    `update_loss`
    (3)  l_t   = -min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A)    `clipped_loss`
    (4)  k_t   = rho_t (exp(-d) - 1 + d),  d = log pi(a_t | ..) - log ref(a_t | ..)   `k3` x rho_t
    (5)  loss  = sum over tokens of w_t (l_t + beta k_t)         `update_loss`, `token_weights`

A is that of y_i, and a_t a token of it. w_t is 1 over a divisor that
--aggregate chooses, and 0 where --mask_truncated leaves a completion out.
pi_old is the policy that drew the completions, ref the policy before training,
or --reference. If beta is above 0 (the default is 0), the KL term keeps pi near
ref. The ratio (2) allows several updates with one rollout. The clip (3) sets
the gradient of l_t to zero once the ratio has gone too far in the direction
that A pushes. With one update per rollout, the default, every ratio is 1, and
the gradient is that of REINFORCE with (1) as the weight. The value of the loss
is then a weighted sum of -A (and the KL term), which says nothing about
learning. Watch the reward.

Variants are flags. DAPO changes the clip and GSPO the ratio. Both need --minibatches or --epochs:
with one update per rollout every ratio is 1, and the clip does nothing.

    GRPO as published   --aggregate sequence --beta 0.04 --kl k3
                        (mean over tokens, then completions)
    DAPO                --drop_equal_groups --mask_truncated --clip_high 0.28 --minibatches 4
                        and --aggregate token, the default
                        (DAPO also has a penalty on length, makes 16 updates a rollout, and
                        draws until the batch is full; here twice the prompts are drawn, not more)
    Dr. GRPO            --scale none --aggregate constant   no divisor depends on the samples
    GSPO                --ratio sequence --minibatches 4    one ratio for a whole completion

    python grpo.py                       # a tiny model learns to sort digits; needs no download
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --reward number \
        --data gsm8k_train.jsonl --eval_data gsm8k_test.jsonl
    torchrun --nproc_per_node 8 grpo.py --model ... --data ... --reward my_reward.py:score

Shapes: B completions of this process in a rollout (n for each prompt), b of those in one forward.
[B, C] is as wide as the longest completion of the rollout, [b, C] as the longest of the forward.

What is biased:
  * With rewards of 0 and 1 the division by the std multiplies a prompt's gradient by
    about 1 / sqrt(p (1 - p)), where p is the prompt's share of right answers. Very
    easy and very hard prompts count more, and those with one right or one wrong
    answer of n the most: their std (which divides by n - 1) is the smallest,
    1 / sqrt(n).
  * The group's mean contains the sample itself. With --scale none, that multiplies
    the expected gradient by 1 - 1/n.
  * The divisors of --aggregate token and sequence depend on the samples' lengths
    (`token_weights`).
  * The KL term is each token's KL given the text before it. A token also
    changes the text before later tokens, and so their KL. That gets no gradient.
    (reinforce.py counts that: there log pi - log ref is in the reward.)
    The term's gradient is
      - with --kl k3_ratio, the default, that of KL(pi || ref), for any
        pi_old; with --ratio sequence, where rho_t is not the token's
        ratio, that of neither KL;
      - with --kl k3, which is (4) without rho_t, that of KL(ref || pi),
        and only while pi is pi_old.
  * --keep_max, --mask_truncated and --drop_equal_groups select samples by what came out.
  * With several updates, the clip. Also, the ratio (2) corrects for the token only: the
    text before it is still one that pi_old drew.
  * log pi_old is computed as in training. The sampler, which drew the tokens, gave slightly
    different values, by rounding (`kl/sample`: their mean distance). Nothing corrects for that
    (`old` and `sampled` in `update_loss`).

Left out: a critic and per-token credit (ppo.py), rewards for steps of reasoning, asynchronous
sampling.

Papers: Shao et al. 2024 (GRPO), Schulman et al. 2017 (the clip), Liu et al. 2025 (Dr. GRPO), Yu et
al. 2025 (DAPO), Zheng et al. 2025 (GSPO), DeepSeek-AI 2025 (V3.2: the ratio in (4)),
Chen et al. 2021 (pass@k).
"""

import collections
import dataclasses
import functools
import math
import random
import re
import time
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint

import common
from common import fail

TINY = Path(__file__).resolve().parent / "tests" / "tiny"  # the bundled model and its task
OVERSAMPLING = 2  # --drop_equal_groups draws this many times --prompts_per_step


@dataclass
class Args:
    # --- task ---
    model: str = str(TINY / "model")
    """folder or hub name of the causal language model to train"""
    reference: str = ""
    """folder or hub name of `ref`, near which --beta keeps the policy
    (empty: --model before its first step)"""
    data: str | None = None
    """training prompts: JSON lines with "prompt" (or "question") and usually "answer" (None: the
    bundled task, if --model is the bundled model)"""
    eval_data: str | None = None
    """held-out prompts, as --data (None: the bundled ones
    if --data is the bundled task, else none)"""
    eval_samples: int = 0
    """completions of each held-out prompt, drawn all at once, for eval/pass@K: the chance that at
    least one of K is right (judged by `number` with --reward number, else by `exact`)"""
    reward: str = "exact"
    """exact | number | none (the KL penalty alone) | a reward model's folder or hub name |
    FILE.py:function(completion, row) -> a number, or a dict with "reward" and more to be logged"""
    chat: bool = True
    """put a text prompt through the chat template, if there is one (--no_chat: raw text)"""
    template_args: str = ""
    """arguments of the chat template, a JSON object: '{"enable_thinking": false}'"""
    system: str = ""
    """system message before every prompt that has none of its own"""
    max_prompt_tokens: int = 512
    """longer prompts are left out, and counted"""

    # --- algorithm ---
    prompts_per_step: int = 32
    """prompts in a rollout; a step is one rollout with all its updates"""
    samples_per_prompt: int = 8
    """completions drawn for each prompt: the group"""
    max_new_tokens: int = 512
    """most tokens of a completion; lowered to what the model's context has room for"""
    temperature: float = 1.0
    """of sampling, and of every log-probability: the policy is softmax(logits / temperature)"""
    scale: Literal["group", "batch", "none"] = "group"
    """divide advantages by the std of the group's rewards, of the rollout's, or do not divide"""
    keep_max: bool = False
    """only the best completion of each prompt, and those that tie with it, have an advantage"""
    drop_equal_groups: bool = False
    """draw twice the prompts and keep half (each process half of its own), first those
    whose completions have unequal rewards"""
    mask_truncated: bool = False
    """give truncated completions no loss (their rewards still count in the group's mean)"""
    ratio: Literal["token", "sequence"] = "token"
    """importance ratio: one for each token, or their geometric mean over the completion"""
    clip_low: float | None = None
    """the clip begins below a ratio of 1 - this (None: 0.2, and 3e-4 with --ratio sequence)"""
    clip_high: float | None = None
    """the clip begins above a ratio of 1 + this (None: 0.2, and 4e-4 with --ratio sequence)"""
    aggregate: Literal["sequence", "token", "constant"] | None = None
    """divisor of a token's loss.
    sequence: its completion's length x the number of completions;
    token: the number of tokens;
    constant: the number of completions x --max_new_tokens.
    Of these, only constant counts the completions that
    --mask_truncated leaves out.
    (None: token; with --ratio sequence: sequence)"""
    beta: float = 0.0
    """weight of the KL penalty in the loss; at 0 no reference model is loaded"""
    kl: Literal["k3_ratio", "k3"] = "k3_ratio"
    """k3_ratio: k3 times the ratio; with --ratio token,
    its gradient is that of KL(policy || reference).
    k3: as published, without the ratio; in the first update,
    its gradient is that of KL(reference || policy)"""
    ref_update_every: int = 0
    """copy the policy into the reference every N steps; 0: never"""

    # --- optimisation ---
    lora_rank: int = 0
    """rank of the adapters that learn while the model itself is frozen (0: all weights learn)"""
    lora_alpha: float = 32.0
    """what the adapters add is multiplied by this / --lora_rank"""
    steps: int = 400
    """rollouts in all; 0 evaluates only"""
    learning_rate: float | None = None
    """peak of AdamW's learning rate (None: 1e-6, or 2e-4 for the bundled model; adapters: x 10)"""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """what the learning rate does after the warm-up"""
    warmup: int = 10
    """steps over which the learning rate rises"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    epochs: int = 1
    """passes over a rollout"""
    minibatches: int = 1
    """optimizer updates in a pass"""
    sample_rows: int | None = None
    """completions that a process draws at once, at least those of one prompt (None: all of its
    share). Lower it when sampling runs out of memory; up to rounding, results do not change"""
    tokens_per_micro_batch: int | None = None
    """tokens, padding included, in one forward and backward (None: 8192 on a GPU, 2048 on a CPU).
    Lower it when memory runs out; up to rounding, results do not change"""
    gradient_checkpointing: bool = False
    """compute activations twice instead of keeping them: less memory, more time"""

    # --- run ---
    out: str = ""
    """the run's folder (empty: runs/SCRIPT, then runs/SCRIPT-2, ...)"""
    resume: bool = False
    """go on with the run in --out; flags that are not given are those of the run"""
    seed: int = 1
    """decides every random choice, except that of --eval_rows"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """compute type (auto: bfloat16 on a GPU, float32 on a
    CPU); trained weights stay float32. On a CPU bfloat16 saves
    memory. It is faster, too, if /proc/cpuinfo lists
    avx512_bf16 or amx"""
    eval_every: int = 50
    """steps between scores on --eval_data; 0: never"""
    eval_rows: int = 0
    """score only so many held-out rows, always the same ones; 0: all"""
    save_every: int = 50
    """steps between checkpoints"""
    keep: int = 1
    """checkpoints that stay on the disk, the newest ones"""
    keep_best: bool = True
    """keep the model with the best eval/reward as best/ in
    the run's folder, if it is better than before training"""


def resolve(args):
    """Fills in defaults that depend on other flags, and rejects contradictory flags."""
    by_sequence = args.ratio == "sequence"
    is_tiny_model = Path(args.model).resolve() == TINY / "model"
    if args.data is None and is_tiny_model:
        args = dataclasses.replace(args, data=str(TINY / "sort_train.jsonl"))
    is_tiny_data = Path(args.data or "").resolve().parent == TINY
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    faster = 10 if args.lora_rank else 1  # adapters want about ten times the learning rate
    defaults = {
        "clip_low": 3e-4 if by_sequence else 0.2,
        "clip_high": 4e-4 if by_sequence else 0.2,
        "aggregate": "sequence" if by_sequence else "token",
        "learning_rate": faster * (2e-4 if is_tiny_model else 1e-6),
        "tokens_per_micro_batch": 2048 if on_cpu else 8192,
        "eval_data": str(TINY / "sort_test.jsonl") if is_tiny_data else "",
    }
    unset = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    args = dataclasses.replace(args, **unset)
    common.check_flags(args)
    if args.samples_per_prompt < 2:
        fail("--samples_per_prompt must be 2 or more: a sample is compared with its group")
    if by_sequence and args.aggregate != "sequence":
        why = "its loss is a mean over completions"
        fail(f"--ratio sequence does not go with --aggregate {args.aggregate}: {why}")
    if not 0 <= args.clip_low <= 1 or args.clip_high < 0:
        fail("--clip_low must be from 0 to 1, and --clip_high 0 or more")
    if args.ref_update_every and not args.beta:
        fail("--ref_update_every needs a --beta above 0: without it there is no reference")
    if args.ref_update_every and args.lora_rank:
        fail("--ref_update_every: with --lora_rank the reference is the model without adapters")
    if args.ref_update_every and args.reference:
        fail("--ref_update_every would replace the --reference")
    return args


# -- The math: from rewards to a loss ----------------------------------------------------------


def group_advantages(rewards, all_rewards, n, scale, keep_max):
    """Equation (1): rewards [B], n for each prompt -> advantages [B].

    all_rewards are those of all processes, for --scale batch. The std divides by n - 1, as torch's.
    Groups with equal rewards have advantages of exactly 0: otherwise r - mean could be a
    rounding error, which Adam may scale up.
    """
    groups = rewards.view(-1, n)
    A = groups - groups.mean(1, keepdim=True)
    if scale == "group":
        A = A / (groups.std(1, keepdim=True) + 1e-4)
    if scale == "batch":
        A = A / (all_rewards.std() + 1e-4)
    A = A.masked_fill(equal_groups(rewards, n)[:, None], 0.0)
    if keep_max:
        A = A * (groups == groups.amax(1, keepdim=True))
    return A.flatten()


def equal_groups(rewards, n):
    """Which groups have equal rewards, [B / n]."""
    groups = rewards.view(-1, n)
    return groups.amax(1) == groups.amin(1)


def sequence_logratio(logratio, mask):
    """GSPO: each token gets the mean log-ratio of its completion, [b, C]. The exp of that is the
    geometric mean of the tokens' ratios."""
    length = mask.sum(1, keepdim=True).clamp(min=1)
    mean = (logratio * mask).sum(1, keepdim=True) / length
    return mean.expand_as(logratio)


def clipped_loss(ratio, advantages, weights, clip_low, clip_high):
    """Equation (3), summed with weights: ratio [b, C] with gradient, advantages [b, C] or [b, 1].

    The minimum takes the clipped, constant term only where the ratio has already gone too far in
    the direction that A pushes. The minimum's gradient is that of ratio * A times this factor:

                 ratio < 1 - low    between    ratio > 1 + high
        A > 0           1              1              0          (0: a good token, already likelier)
        A < 0           0              1              1          (0: a bad one, already less likely)

    Without the minimum all four corners would be 0. A good token that an earlier update made
    less likely could then not be brought back.
    """
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    return -(gain * weights).sum()


def is_clipped(ratio, advantages, clip_low, clip_high):
    """Where the clip takes the gradient of (3) away: below the range and above it, two tensors
    [b, C]. If you change the loss (3), change this, too."""
    low = (advantages < 0) & (ratio < 1 - clip_low)
    high = (advantages > 0) & (ratio > 1 + clip_high)
    return low, high


def k3(logprobs, other_logprobs):
    """Schulman's third estimate of KL(p || other), never negative, [b, C]. logprobs: those of p,
    which should have drawn the tokens.

    It is logged, and --kl_stop of ppo.py looks at it. In grpo.py it is part of the loss,
    too; which KL's gradient that gives is said in `update_loss` of grpo.py.
    """
    d = (logprobs - other_logprobs).clamp(-20, 20)
    # expm1: for small d the result, about d^2 / 2, is below the rounding error of exp(-d)
    return torch.expm1(-d) + d


def token_weights(mask, aggregate, limit, world):
    """w_t of equation (5), for all rows of an optimizer update: mask and result [rows, C]. The mask
    has no token of completions that --mask_truncated leaves out.

        sequence   1 / (K |y|)      K: completions with a token on the mask, also those with A = 0.
                                    Each counts the same (as published).
        token      1 / sum of |y|   Each token counts the same (DAPO).
        constant   1 / (N limit)    N: all completions, limit: --max_new_tokens. With --scale none
                                    (Dr. GRPO) unbiased, up to a constant factor.

    `sequence` favours short answers where A > 0 and long ones where A < 0: wrong answers may grow
    longer for this reason alone. The counts are of all processes and of the whole update, so
    the gradient does not depend on how the update is cut into micro-batches.
    """
    length = mask.sum(1, keepdim=True)
    K, tokens, N = common.all_sum(world, (length > 0).sum(), length.sum(), len(mask))
    if aggregate == "sequence":
        return mask / (max(K, 1.0) * length.clamp(min=1))
    if aggregate == "token":
        return mask / max(tokens, 1.0)
    return mask / (N * limit)


def has_gradient(weights, advantages, other_term):
    """Which rows have a gradient: weights [rows, C], advantages [rows] -> [rows].

    Rows with advantage 0 have none, unless the loss has another term than (3): here the KL.
    (If you add an entropy bonus, other_term must be true.) Rows without a gradient need no
    forward. Leaving them out does not change the gradient, because `token_weights` has
    counted them.
    """
    factors = weights if other_term else weights * advantages[:, None]
    return (factors != 0).any(1)


# -- Log-probabilities: one forward over prompts and their completions -------------------------


def token_logprobs(model, samples, rows, temperature):
    """log pi(a_t | x, a_<t) and the model's entropy (0 under no_grad)
    at each token of these rows -> two tensors [b, C]."""
    states, ids, mask = common.completion_states(model, samples, rows)
    return logprobs_of(model, states, ids, mask, temperature)


def logprobs_of(model, states, ids, mask, temperature, chunk=1024):
    """states [b, C, width], which predict the tokens ids [b, C] -> log-probabilities, entropies.

    Logits of `chunk` tokens at a time, computed again in backward: those of all tokens never exist.
    8192 tokens x a vocabulary of 150,000 in float32 would be 5 GB.
    """

    def head(states, tokens):
        logits = common.logits_of(model, states)  # [chunk, vocabulary], float32
        if temperature != 1:
            logits = logits / temperature  # as in sampling: the policy trained is the one that drew
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
        entropy = torch.zeros_like(chosen)
        if torch.is_grad_enabled():
            # Only logged, so left out under no_grad. No gradient goes through it. It comes last,
            # because backward computes `head` again only as far as a gradient needs a value.
            # For an entropy bonus, drop the detach, and train all rows (grpo.py and reinforce.py
            # leave out those with advantage 0: `has_gradient`, `rows_to_train`).
            constant = logprobs.detach()
            entropy = -torch.linalg.vecdot(constant.exp(), constant)
        return chosen, entropy

    logprobs = []
    entropies = []
    # only tokens on the mask: no work for padding
    for part, tokens in zip(states[mask].split(chunk), ids[mask].split(chunk)):
        result = checkpoint(head, part, tokens, use_reentrant=False, preserve_rng_state=False)
        logprobs.append(result[0])
        entropies.append(result[1])
    zeros = torch.zeros(mask.shape, device=mask.device)
    logprobs = zeros.masked_scatter(mask, torch.cat(logprobs))
    return logprobs, zeros.masked_scatter(mask, torch.cat(entropies))


@torch.no_grad()
def rollout_logprobs(model, samples, minibatches, temperature):
    """A model's log-probabilities [B, C] of the rows in minibatches, 0 elsewhere.

    A mini-batch is a list of micro-batches, and these are lists of row numbers.
    The micro-batches are those of the update: in bfloat16 log-probabilities
    depend on a micro-batch's shape. With other micro-batches, rounding alone
    would move a rollout's first ratio from 1, and the KL to the reference from 0
    in step 1. (Dropout would, too: common.py turns it off.)
    """
    out = torch.zeros_like(samples.mask, dtype=torch.float32)
    for parts in minibatches:
        for rows in parts:
            logprobs, _ = token_logprobs(model, samples, rows, temperature)
            out[rows, : logprobs.shape[1]] = logprobs
    common.forget_forwards(model)  # FSDP expects a backward after a forward; none follows
    return out


# -- The loop ----------------------------------------------------------------------------------


@dataclass
class Batch:
    """What the updates of a step need of its rollout."""

    samples: common.Samples
    advantages: torch.Tensor  # [B], equation (1)
    weights: torch.Tensor  # [B, C], w_t of equation (5), 0 in rows without gradient
    old_logprobs: torch.Tensor | None = None  # [B, C]; not needed with one update
    ref_logprobs: torch.Tensor | None = None  # [B, C]; not needed without a KL penalty


def update_loss(policy, batch, rows, args, meter, is_first):
    """Equations (2) to (5) for one micro-batch, some `rows` of the rollout -> its loss."""
    # [b, C]; for the entropy's gradient see `logprobs_of`
    logprobs, entropy = token_logprobs(policy, batch.samples, rows, args.temperature)
    C = logprobs.shape[1]  # the longest completion of these rows
    w = batch.weights[rows, :C]  # of every term of the loss
    # w is above 0 on every token of a trained completion, and nowhere else. So the mask
    # has whole completions, as `sequence_logratio` wants them.
    mask = w > 0
    A = batch.advantages[rows, None]  # [b, 1]
    if batch.old_logprobs is None:  # one update per rollout: pi is still pi_old, and (2) is 1
        old = logprobs.detach()
    else:
        old = batch.old_logprobs[rows, :C]
    sampled = batch.samples.logprobs[rows, :C]  # of the same tokens, by the sampler

    logratio = logprobs - old
    if args.ratio == "sequence":
        logratio = sequence_logratio(logratio, mask)
    ratio = logratio.clamp(-20, 20).exp()  # equation (2), with gradient; the clamp avoids inf
    loss = clipped_loss(ratio, A, w, args.clip_low, args.clip_high)
    if args.beta:
        ref = batch.ref_logprobs[rows, :C]
        kl = k3(logprobs, ref)
        if args.kl == "k3_ratio":
            # With --ratio token and d = log pi - log ref, the gradient of rho * k3 is
            #   rho * (k3 + 1 - exp(-d)) * grad log pi = rho * d * grad log pi,
            # and its mean over tokens from pi_old is the gradient of KL(pi || ref).
            # Without rho, and while pi is pi_old, the mean is
            #   E_pi[(1 - exp(-d)) * grad log pi] = -E_ref[grad log pi],
            # because E_pi[grad log pi] is 0 and exp(-d) is ref / pi. That is the
            # gradient of KL(ref || pi).
            kl = kl * ratio  # not detached: its gradient counts even where it is 1
        loss = loss + args.beta * (kl * w).sum()
        # KL(pi_old || ref), because pi_old drew the tokens; in nats per completion. It is estimated
        # by the plain log-ratio, as in ppo.py and reinforce.py, not by k3 as in the penalty, so it
        # can be below 0.
        meter.mean("kl/ref", ((old - ref) * mask).sum(1), mask=mask.any(1))

    with torch.no_grad():  # the rest is for the log
        low, high = is_clipped(ratio, A, args.clip_low, args.clip_high)
        meter.mean("kl/old", (k3(old, logprobs) * mask).sum(1), mask.any(1))  # KL(pi_old || pi)
        # not a KL: how far the sampler's log-probabilities are from the trainer's, by rounding
        meter.mean("kl/sample", (old - sampled).abs(), mask)
        meter.mean("ratio/mean", ratio, mask)
        meter.mean("clip/low", low, mask)
        meter.mean("clip/high", high, mask)
        meter.mean("entropy", entropy, mask)
        if is_first and batch.old_logprobs is not None:  # should be 0: pi is still pi_old
            meter.max("ratio/first", (ratio - 1).abs() * mask)
    return loss


def train(args):
    args = resolve(args)
    world = common.start(args.device, args.dtype, args.seed)
    # prompts, held_out: lists of (token ids of a prompt, its row: a dict with "prompt")
    args, tokenizer, reward, prompts, held_out = load_task(args, world)
    n = args.samples_per_prompt

    out = common.open_run(args, Path(__file__).stem, world)
    stop_asked = common.catch_signals(args.steps)
    saved = common.take_up(out, args, world)  # the last checkpoint of a resumed run, or None
    done_steps = saved["step"] if saved else 0
    ref_path = (args.reference or args.model) if args.beta and args.steps else ""
    frozen = [args.reward] if reward.is_model else []  # for the memory shown
    writer, bar = common.begin_log(
        out, args, world, tokenizer, prompts[0][0], done_steps, frozen=frozen, reference=ref_path
    )

    with common.short_errors(out, args, bar):
        policy = common.load_policy(args.model, world, args.gradient_checkpointing, args)
        # Whether training computes a prompt once for its n completions: on a CPU, if a trial
        # gives the same numbers. (On a GPU that is slower.)
        share_prompts = common.can_share_prompts([policy], args, world)
        reference = None
        if ref_path:
            reference = common.load_reference(ref_path, world, policy)
        optimizer = common.make_optimizer(policy, args.learning_rate)
        models = {"policy": policy}  # what a checkpoint holds
        if args.ref_update_every and args.steps:
            models["reference"] = reference
        if saved:
            common.load_checkpoint(saved, models, {"policy": optimizer})
            del saved
        held_out_scores = functools.partial(
            evaluate, policy, tokenizer, held_out, reward, args, world, stop_asked
        )
        if done_steps == 0:
            common.log(out, writer, 0, common.scores_if_due(0, args, held_out_scores))

        for step in range(done_steps + 1, args.steps + 1):
            step_began = time.perf_counter()
            meter = common.Meter()

            # 1. Rollout.
            samples, rewards, shown = rollout(
                policy, tokenizer, prompts, reward, share_prompts, args, world, step, meter
            )
            sampling_ended = time.perf_counter()

            # 2. Advantages, equation (1): one number for each completion, [B].
            all_rewards = common.all_gather(world, rewards)
            advantages = group_advantages(rewards, all_rewards, n, args.scale, args.keep_max)

            # 3. Mini-batches (an optimizer update each) of micro-batches (a forward each). Cut once
            #    for all epochs, so that a row's old and new log-probabilities come from forwards of
            #    the same shape.
            counted = samples.mask  # true on a completion's tokens, its stop token included
            if args.mask_truncated:
                counted = counted & samples.finished[:, None]  # finished: ended by a stop token
            weights = torch.zeros_like(counted, dtype=torch.float32)  # [B, C]
            minibatches = []
            for batch_rows in shuffled_groups(args, world, step):
                w = token_weights(counted[batch_rows], args.aggregate, args.max_new_tokens, world)
                trained = has_gradient(w, advantages[batch_rows], args.beta > 0)  # [batch_rows]
                weights[batch_rows] = w * trained[:, None]
                parts = micro_batches(
                    batch_rows, trained, samples, args.tokens_per_micro_batch, world
                )
                minibatches.append(parts)  # minibatches[u][m]: rows of forward m of update u
            updates = shuffled_epochs(minibatches, args, step)  # those of all epochs

            # 4. Log-probabilities before the update, of the old policy and of the reference.
            batch = Batch(samples, advantages, weights)
            if len(updates) > 1:
                old = rollout_logprobs(policy, samples, minibatches, args.temperature)
                batch.old_logprobs = old
            if reference is not None:
                ref = rollout_logprobs(reference, samples, minibatches, args.temperature)
                batch.ref_logprobs = ref

            # 5. Update. The weights contain every divisor: losses and gradients are sums, over
            #    micro-batches and processes (FSDP is told to sum, where it would average).
            rate = common.learning_rate_at(
                step, args.steps, args.learning_rate, args.schedule, args.warmup
            )
            optimizer.param_groups[0]["lr"] = rate
            grad_norms = []
            meter.sum("loss", torch.zeros(()))  # logged even if no row has a gradient
            for parts in updates:
                if not parts:
                    continue  # no row has a gradient, in any process
                for rows in parts:
                    is_first = not grad_norms  # no update with this rollout yet
                    loss = update_loss(policy, batch, rows, args, meter, is_first)
                    loss.backward()
                    # for the log: a mean over the updates; one that is skipped counts as 0
                    meter.sum("loss", loss.detach() / len(updates))
                norm = common.clip_gradients(policy, args.max_grad_norm)
                if not math.isfinite(norm):
                    raise common.Stop(f"step {step}: the gradient is {norm}; update not made")
                grad_norms.append(norm)
                optimizer.step()
                optimizer.zero_grad()
            if args.ref_update_every and step % args.ref_update_every == 0:
                common.copy_weights(policy, reference)

            # 6. Log. Rewards are those of all rows drawn, lengths those of the rows that
            #    --drop_equal_groups kept, metrics of `update_loss` those of the trained rows.
            step_ended = time.perf_counter()
            metrics = meter.result(world)
            tokens = metrics.pop("tokens")  # those that `rollout` has drawn
            metrics |= {
                "grad_norm": sum(grad_norms) / len(updates),
                "learning_rate": rate,
                "time/sample": sampling_ended - step_began,
                "time/train": step_ended - sampling_ended,
                "tokens_per_second": tokens / (step_ended - step_began),
                "memory_gib": common.memory_used(world) / 2**30,
            }
            metrics |= common.scores_if_due(step, args, held_out_scores)
            common.log(out, writer, step, metrics, shown)
            common.save_best(out, args, world, step, metrics, policy, tokenizer)

            # 7. Save if it is due. After a signal (Ctrl-C, SIGTERM), save and end the run.
            common.save_if_due(out, args, world, step, models, {"policy": optimizer}, stop_asked)

        if args.steps:
            common.save_model(policy, tokenizer, out / "model", world)
    example = common.line_to_try(out, tokenizer, prompts[0][1]["prompt"], args)
    common.conclude(out, args, writer, bar, example)


# -- The rollout -------------------------------------------------------------------------------


def rollout(policy, tokenizer, prompts, reward, share_prompts, args, world, step, meter):
    """Draws completions of this step's prompts and scores them -> (samples, rewards [B], some
    completions to be read)."""
    n = args.samples_per_prompt
    prompts_drawn = args.prompts_per_step
    if args.drop_equal_groups:
        prompts_drawn *= OVERSAMPLING
    # this process's share; over the steps, every prompt comes once in each pass
    indices = common.rows_of_step(len(prompts), step, prompts_drawn, world, args.seed)
    samples = common.sample(
        policy,
        tokenizer,
        [prompts[i][0] for i in indices],
        n=n,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=common.seed_from(args.seed, step, world.rank, common.DRAW),
        max_rows=args.sample_rows,
    )
    records = [prompts[indices[i // n]][1] for i in range(len(samples.texts))]
    scores = reward.score(samples, records)  # {"reward": ..., and its parts, if any}
    for name, values in scores.items():
        meter.mean(name, torch.tensor(values))
    rewards = torch.tensor(scores["reward"], device=world.device)
    equal = equal_groups(rewards, n)
    meter.mean("equal_groups", equal)
    meter.sum("tokens", samples.mask.sum())
    meter.max("time/reward", torch.tensor(reward.seconds))

    # shown: the completions of one prompt, for samples.jsonl
    if args.drop_equal_groups:
        # Keeps groups with unequal rewards; if they are too few, equal ones fill the batch.
        groups = equal.int().argsort(stable=True)[: len(equal) // OVERSAMPLING]
        kept = (groups[:, None] * n + torch.arange(n, device=world.device)).flatten()
        shown = common.examples(samples, scores, records, kept[:n].tolist(), tokenizer)
        samples = samples.take(kept)
        rewards = rewards[kept]
    else:
        shown = common.examples(samples, scores, records, range(n), tokenizer)
    meter.mean("length", samples.mask.sum(1))
    meter.mean("truncated", ~samples.finished)
    if share_prompts:
        samples.rows_per_prompt = n  # in training, the n rows of a prompt share one forward of it
    return samples, rewards, shown


# -- A first reading may end here: batches, held-out scores, rewards, prompts ------------------


def shuffled_groups(args, world, step):
    """The rows of each mini-batch: whole groups (the completions of a prompt) in random order."""
    n = args.samples_per_prompt
    generator = torch.Generator().manual_seed(
        common.seed_from(args.seed, step, world.rank, common.CUT)
    )
    groups = torch.randperm(args.prompts_per_step // world.size, generator=generator)
    for chosen in groups.view(args.minibatches, -1):
        yield (chosen[:, None] * n + torch.arange(n)).flatten().tolist()


def shuffled_epochs(minibatches, args, step):
    """The mini-batches of all epochs, each epoch in an order of its own."""
    updates = []
    for epoch in range(args.epochs):
        # No rank in the seed: the k-th mini-batch was cut and weighted by all processes together,
        # so all must take it at the same time.
        shuffle = random.Random(common.seed_from(args.seed, step, epoch, common.PASS))
        updates += shuffle.sample(minibatches, len(minibatches))
    return updates


def micro_batches(rows, trained, samples, tokens, world):
    """Cuts the rows of a mini-batch into parts, one forward each -> lists of row numbers.

    trained [rows] says which rows are taken (ppo.py takes all). A part has at
    most `tokens` tokens (padding included, a shared prompt counted once); a row
    that is longer is a part of its own. A bundle is the rows that share one
    forward of their prompt; without sharing, a single row. Bundles stay whole
    where they fit, and those of like length come together.

    FSDP needs equally many parts in all processes. A process that has fewer adds
    parts of one row: a row that is not trained (it has no weight in the loss), or
    else one moved from its fullest part.
    """
    prompt_length = samples.prompt_mask.sum(1).tolist()
    length = samples.mask.sum(1).tolist()

    def fits(part):
        prompts = len({row // samples.rows_per_prompt for row in part})
        longest_prompt = max(prompt_length[row] for row in part)
        longest = max(length[row] for row in part)
        return prompts * longest_prompt + len(part) * longest <= tokens

    def size(bundle):
        return max(prompt_length[row] + length[row] for row in bundle)

    spare = []
    bundles = collections.defaultdict(list)
    for row, is_trained in zip(rows, trained.tolist()):
        if is_trained:
            bundles[row // samples.rows_per_prompt].append(row)
        else:
            spare.append(row)
    parts = []
    for bundle in sorted(bundles.values(), key=size, reverse=True):
        # a new part if the bundle does not fit into the last one
        if not parts or not fits(parts[-1] + bundle):
            parts.append([])
        for row in bundle:
            # true only inside a bundle that is too large for any part
            if parts[-1] and not fits([*parts[-1], row]):
                parts.append([])
            parts[-1].append(row)

    count = torch.tensor([len(parts)], device=world.device)
    wanted = int(common.all_gather(world, count).max())
    while len(parts) < wanted:
        if spare:
            parts.append([spare.pop()])
        else:
            # All rows are in parts by now. Another process has as many
            # rows and more parts, so some part here has two rows or more.
            parts.append([max(parts, key=len).pop()])
    return parts


def evaluate(policy, tokenizer, held_out, reward, args, world, stop_asked=None):
    """Scores of greedy completions of held-out prompts: eval/reward, by --reward, and
    the share of right answers. If --reward is a rule (exact, number), it judges that
    share, which is logged as eval/exact. With another reward there is an eval/NAME for
    each rule that accepts every row's own answer. With --eval_samples eval/pass@K, too."""
    n = args.eval_samples
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, n) if k <= n})
    mine = held_out[world.rank :: world.size]
    # Completions at once: as many as in a rollout, or as many as make 8192 tokens if that
    # is more; at most 256.
    rollout_rows = args.prompts_per_step // world.size * args.samples_per_prompt
    at_once = common.rows_at_once(held_out, args.max_new_tokens, rollout_rows)
    prompts_at_once = max(at_once // max(n, 1), 1)  # each with n completions
    rules = common.rules_that_fit(reward, held_out)  # {name in the log: rule}
    meter = common.Meter()
    starts = range(0, math.ceil(len(held_out) / world.size), prompts_at_once)
    for start in common.until_stopped(starts, world, stop_asked):
        # FSDP: a process with no prompts left must still sample; its results do not count
        is_counted = start < len(mine)
        part = mine[start : start + prompts_at_once] or held_out[:1]
        ids = [ids for ids, _ in part]
        records = [record for _, record in part]
        counted = torch.tensor([is_counted] * len(records))
        answered = torch.tensor([is_counted and common.has_answer(record) for record in records])

        samples = common.sample(
            policy,
            tokenizer,
            ids,
            max_new_tokens=args.max_new_tokens,
            temperature=0,
            max_rows=args.sample_rows,
        )
        scores = reward.score(samples, records)
        for name, values in scores.items():
            meter.mean(f"eval/{name}", torch.tensor(values), mask=counted)
        for name, rule in rules.items():
            right = count_right(samples.texts, records, rule)
            meter.mean(f"eval/{name}", right, mask=answered)
        meter.sum("held_out/prompts", counted.sum())
        if is_counted:
            meter.completions += common.examples(samples, scores, records, range(len(part)))
        if not n:
            continue
        texts = common.sample(
            policy,
            tokenizer,
            ids,
            n=n,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            # the same seed in every step
            seed=common.seed_from(args.seed, start, world.rank, common.EVAL),
            max_rows=args.sample_rows,
        ).texts
        right = count_right(texts, records, reward.rule)
        for k in ks:
            chances = [pass_at_k(n, int(count), k) for count in right]
            meter.mean(f"eval/pass@{k}", torch.tensor(chances), mask=answered)
    return meter.result(world)


def count_right(texts, records, rule):
    """How many texts of each record are right by `rule`; 0 for records without
    an answer. The texts come record by record, one for each or (grpo.py's
    --eval_samples) several."""
    n = len(texts) // len(records)
    right = torch.zeros(len(records))
    for i, text in enumerate(texts):
        record = records[i // n]
        if common.has_answer(record):
            right[i // n] += rule(text, record)
    return right


def pass_at_k(n, right, k):
    """The chance that at least one of k completions is right, if `right` of n drawn ones are:
    1 - C(n - right, k) / C(n, k). Unbiased; 1 - (1 - right / n)^k is not."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def exact(completion, row):
    """1 if the completion is the answer, else 0."""
    return float(completion.strip() == str(row["answer"]).strip())


def number(completion, row):
    """1 if the last number of the completion equals the last number of the answer, else 0."""
    wanted = last_number(row["answer"])
    return float(wanted is not None and last_number(completion) == wanted)


def last_number(text):
    """The last number of a text, or None. A Decimal, because floats cannot tell long numbers apart.
    Dollar signs, a final dot and commas between thousands do not matter: "1,234" is one number,
    "1,2,3" are three. Zeros that end a decimal do not matter: 1.50 equals 1.5."""
    sign = r"(?:(?<![\w.])-)?"  # after a letter, a digit or a dot it is none: "5-3" ends in 3
    whole = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"  # 1,234 or 1234
    exponent = r"(?:[eE][+-]?\d{1,3}(?!\d))?"  # 1e-5 is one number
    pattern = rf"{sign}(?:{whole}\.?\d*|\.\d+){exponent}"
    found = re.findall(pattern, str(text).replace("$", ""))
    if not found:
        return None
    return Decimal(found[-1].replace(",", "").rstrip("."))


RULES = {"exact": exact, "number": number}  # the rules that --reward knows by name


def load_task(args, world):
    """Checks the user's input before a policy is loaded or a file is written -> (args, tokenizer,
    reward, prompts, held-out prompts). Lowers args.max_new_tokens to what fits."""
    unit = args.minibatches * world.size
    if args.prompts_per_step % unit:
        below = max(args.prompts_per_step // unit, 1) * unit
        multiple = f"a multiple of --minibatches {args.minibatches} x {world.size} processes"
        near = f"{below} or {below + unit}"
        fail(f"--prompts_per_step {args.prompts_per_step} must be {multiple}: {near}")
    config = common.policy_config(args.model)
    tokenizer = common.load_tokenizer(args.model, args.template_args)
    reference_config = common.reference_config(args, tokenizer)
    reward = common.load_reward(args.reward, RULES, world)
    # the flag that an error names if a row has no "answer"; "": no row needs one
    answer_flag = reward.answer_flag
    prompts = common.load_prompts(args.data, "--data", tokenizer, args, answer_flag)
    if args.eval_samples and not answer_flag:
        answer_flag = "--eval_samples"
    held_out = common.load_prompts(args.eval_data, "--eval_data", tokenizer, args, answer_flag)
    common.check_answers(reward, prompts + held_out)
    longest = max(len(ids) for ids, _ in prompts + held_out)
    args = common.limit_to_context(args, longest, config, reference_config)
    if reward.is_model:
        args = common.limit_to_reward_model(args, tokenizer, prompts + held_out)
    drawn = args.steps * args.prompts_per_step
    if args.drop_equal_groups:
        drawn *= OVERSAMPLING
    common.say_passes(drawn, len(prompts), "prompts")
    # with --steps 0 and no --data, `train` shows one of the held-out prompts
    return args, tokenizer, reward, prompts or held_out, held_out


if __name__ == "__main__":
    train(common.read_flags(Args, __doc__))
