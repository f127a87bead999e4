"""REINFORCE for language models: make likely what scored well.

A policy pi(y | x) completes a prompt x with the tokens y = a_1 .. a_T and gets a
score r(x, y). We want a high score from a policy near `ref`, the model that
training starts from (or --reference).

    (1)  maximise  J = E[r(x, y)] - beta KL(pi || ref)

The score of a drawn y has no gradient in the weights, but pi(y | x) has one.
Because grad pi = pi grad log pi, the gradient of a mean is again a mean, which
samples can estimate:

    (2)  grad E[r] = sum over y of r(x, y) grad pi(y | x) = E[r(x, y) grad log pi(y | x)]
         log pi(y | x) = sum over t of log pi(a_t | x, a_<t)

So: draw completions, multiply the log-probability of each by its score, and take
the mean: its gradient is (2), on average, but very noisy. The rest adds the KL and
removes noise.

    (3)  r_t  = -beta d_t, plus r(x, y) at the last token                     `token_rewards`
         d_t  = log pi_old(a_t | ..) - log ref(a_t | ..)
    (4)  G_t  = sum over s >= t of gamma^(s-t) r_s                            `rewards_to_go`
    (5)  A_t  = G_t - baseline                                                `baselines`
    (6)  loss = -1/N sum over completions and tokens of w_t A_t log pi(a_t)   `policy_loss`
    (7)  logged only: exp(-e) - 1 + e,  e = log pi_old(a_t) - log pi(a_t)     `k3`

pi_old is pi before the rollout's first update: it drew the samples.

(3) KL(pi || ref) is the mean of d_1 + .. + d_T (the estimate called k1). So J is
    the mean of r(x, y) - beta (d_1 + .. + d_T), a score like any other, and (2)
    gives its gradient. The KL of J has log pi where d_t has log pi_old, and log pi
    has a gradient, but that adds only -beta E[grad log pi] = 0, because the sum of
    grad pi over all tokens is grad 1 = 0. So d_t is a constant, computed before the
    update. For the same reason the KL must be in the reward: as a term of the loss,
    log pi - log ref has a gradient whose mean is 0.
(4) A token did not cause the rewards before it, so in its weight they would only be
    noise. With gamma 1 and beta 0, every G_t is the score. That is (2).
(5) E[baseline grad log pi] = 0 if the baseline does not depend on y, so it may be
    subtracted. If all scores are near 100, every sample says "more of this". With
    the mean subtracted, those below it say "less". Baselines are means of G_1 over
    samples, one for all tokens of a completion. (Token t of another sample follows
    another text, so a mean of G_t would mix different situations.)
(6) N is the completions of an optimizer update. w_t has no gradient. It is 1 for
    fresh samples and for --demos; if a rollout serves several updates, it is
    pi(a_t) / pi_old(a_t).
(7) k3. Its sum over a completion estimates KL(pi_old || pi), logged as kl/old. k3
    has the mean of e, since E[exp(-e)] = 1, mostly has less noise than e, and is never
    negative. (kl/ref is the sum of the d_t, and may be negative.)

With scores 0 and 1, no baseline, beta 0, gamma 1 and one update per rollout,
(6) is the negative log-likelihood of the right completions, over N: rejection
fine-tuning. On completions from a file (--demos), each with score 1, it is
supervised fine-tuning.

With score 0 (--reward none) and a teacher as ref (--reference),
(6) distils the teacher into pi, on pi's own completions.
On average (6) then has, at beta 1, the gradient of

    gamma 0   the sum over t of
              KL(pi(. | x, a_<t) || ref(. | x, a_<t)),
              with the text a_<t fixed.
    gamma 1   KL(pi(y | x) || ref(y | x)):
              a token is also judged by those after it.

With gamma 0 the default is no baseline, because G_1 is then the reward of the first
token alone. The teacher needs the same tokenizer. Watch kl/ref fall; reward stays
0, and no best/ is kept.

    python reinforce.py --model ... --data ... --reward none --reference TEACHER --beta 1 --gamma 0

    python reinforce.py                  # a tiny model learns to sort digits; needs no download
    python reinforce.py --model Qwen/Qwen2.5-0.5B-Instruct --reward number \
        --data gsm8k_train.jsonl --eval_data gsm8k_test.jsonl
    torchrun --nproc_per_node 8 reinforce.py --model ... --data ... --reward my_reward.py:score

Shapes: B completions of this process in a rollout, n of each prompt, b of them in one forward; C
tokens in the longest completion.

What is biased:
  * --baseline prompt and batch shrink the gradient (see `baselines`).
    --normalize, whose divisor depends on the samples, --keep_max and a --gamma below 1
    follow another direction than grad J.
  * w_t corrects the chance of token t alone. The text before it, and the text after it that G_t
    comes from, are still distributed as under pi_old, and d_t is that of pi_old. (With one
    update per rollout, pi is pi_old.)
  * pi_old comes from the trainer's forward. The sampler's log-probabilities
    differ from it by rounding (`kl/sample`).

Left out: the clip (ppo.py, grpo.py), without which more than one or two updates per rollout are
unsafe; a critic (ppo.py); dividing each completion's loss by its length, which would maximise
E[A / length].

Papers: Williams 1992 (REINFORCE), Sutton et al. 1999 (policy gradients), Kool et al. 2019 (leave
one out), Ahmadian et al. 2024 (the same for language models),
Gu et al. 2024, Agarwal et al. 2024 (distillation).
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
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import common
from common import fail

TINY = Path(__file__).resolve().parent / "tests" / "tiny"  # the bundled model and its task


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
    """held-out prompts, as --data (None: the bundled ones, if the
    file trained on, --demos or --data, is of the bundled task)"""
    reward: str = "exact"
    """exact | number | none (the KL penalty alone) | a reward model's folder or hub name |
    FILE.py:function(completion, row) -> a number, or a dict with "reward" and more to be logged"""
    demos: str = ""
    """supervised fine-tuning: learn from this file's answers; --data and samples are not used"""
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
    samples_per_prompt: int | None = None
    """completions drawn for each prompt (None: 8, and 1 with --demos)"""
    max_new_tokens: int = 512
    """most tokens of a completion; lowered to what the model's context has room for. Longer
    demonstrations are left out, and counted"""
    temperature: float = 1.0
    """of sampling, and of every log-probability: the policy is softmax(logits / temperature)"""
    baseline: Literal["none", "batch", "prompt", "loo"] | None = None
    """subtracted from G_t: nothing, the mean G_1 of the batch, of the prompt, or (loo, leave one
    out) of the prompt's other samples (None: loo, and none with --demos or --gamma 0)"""
    normalize: bool = False
    """divide advantages by the std (plus 1e-4) of the prompt's scores (--baseline prompt, loo) or
    of the batch's (none, batch); by 1 if they are all equal"""
    keep_max: bool = False
    """learn only from the best completion of each prompt, and those that tie with it"""
    gamma: float = 1.0
    """discount of a reward per token; 1: it counts the same however late it comes"""
    beta: float | None = None
    """weight of the KL penalty, k1 in the reward (None: 0.05, and 0 with --demos); at 0 no
    reference model is loaded"""

    # --- optimisation ---
    lora_rank: int = 0
    """rank of the adapters that learn while the model itself is frozen (0: all weights learn)"""
    lora_alpha: float = 32.0
    """what the adapters add is multiplied by this / --lora_rank"""
    steps: int = 250
    """rollouts in all; 0 evaluates only"""
    learning_rate: float | None = None
    """peak of AdamW's learning rate (None: 1e-6, or 3e-4 for the bundled model; adapters: x 10)"""
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
    if args.demos:
        required = {"baseline": "none", "samples_per_prompt": 1, "beta": 0.0}
        required |= {"normalize": False, "keep_max": False, "gamma": 1.0, "temperature": 1.0}
        for name, only in required.items():
            if getattr(args, name) not in (None, only):
                fail(f"--demos: each is one sample of weight 1, so --{name} can only be {only}")
    is_tiny_model = Path(args.model).resolve() == TINY / "model"
    if args.data is None and is_tiny_model and not args.demos:
        args = dataclasses.replace(args, data=str(TINY / "sort_train.jsonl"))
    is_tiny_data = Path(args.demos or args.data or "").resolve().parent == TINY
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    faster = 10 if args.lora_rank else 1  # adapters want about ten times the learning rate
    defaults = {
        "baseline": "none" if args.demos or args.gamma == 0 else "loo",
        "samples_per_prompt": 1 if args.demos else 8,
        "beta": 0.0 if args.demos else 0.05,
        "learning_rate": faster * (3e-4 if is_tiny_model else 1e-6),
        "tokens_per_micro_batch": 2048 if on_cpu else 8192,
        "eval_data": str(TINY / "sort_test.jsonl") if is_tiny_data else "",
    }
    unset = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    args = dataclasses.replace(args, **unset)
    common.check_flags(args)
    if args.samples_per_prompt < 2 and args.baseline in ("loo", "prompt"):
        why = "compares the samples of a prompt"
        fail(f"--baseline {args.baseline} {why}, so --samples_per_prompt must be 2 or more")
    return args


# -- The math: from scores to a loss -----------------------------------------------------------


def token_rewards(scores, kl, mask, beta):
    """scores [B], kl [B, C] (log pi_old - log ref, 0 off the mask) -> rewards r_t [B, C].

    The score goes to the last token that the policy chose: the stop token, if there is one.
    """
    follows = F.pad(mask[:, 1:], (0, 1))  # true where another token follows
    is_last = mask & ~follows
    return (scores[:, None] * is_last - beta * kl) * mask


def rewards_to_go(rewards, gamma):
    """Equation (4): rewards r_t [B, C] -> G_t [B, C], from the end: G_t = r_t + gamma G_{t+1}.

    With gamma 1, (-0.1, 0.2, 1) gives (1.1, 1.2, 1). A completion that was cut counts as ended.
    """
    to_go = torch.zeros_like(rewards)
    later = torch.zeros_like(rewards[:, 0])  # [B]
    for t in reversed(range(rewards.shape[1])):
        later = rewards[:, t] + gamma * later
        to_go[:, t] = later
    return to_go


def baselines(totals, all_totals, n, baseline):
    """The baseline of equation (5), [B]. totals [B] are the G_1, n for each prompt; all_totals are
    those of all processes.

        none    0                                         unbiased
        loo     mean of the prompt's other n - 1 samples  unbiased: does not depend on this sample
        prompt  mean of the prompt's n samples            contains this sample: gradient * (1 - 1/n)
        batch   mean of all samples of the step           gradient * (1 - 1 / samples), and
                                                          blind to how hard a prompt is

    A shrunk gradient keeps its direction (with gamma 1: the sample's own G_1, in its baseline,
    is G_t plus earlier rewards, and these do not depend on a_t). Where all totals are equal,
    each is its own baseline, and A_1 exactly 0. Without this rule, rounding (the mean of eight
    0.1 is not exactly 0.1) would leave a tiny gradient, and Adam would scale it up to a full
    step.
    """
    if baseline == "none":
        return torch.zeros_like(totals)
    if baseline == "batch":
        all_equal = all_totals.amax() == all_totals.amin()
        return torch.where(all_equal, totals, all_totals.mean())
    groups = totals.view(-1, n)
    mean = groups.mean(1, keepdim=True)  # [B / n, 1]
    if baseline == "loo":
        mean = (n * mean - groups) / (n - 1)  # [B / n, n]
    return torch.where(equal_groups(totals, n)[:, None], groups, mean).flatten()


def equal_groups(rewards, n):
    """Which groups have equal rewards, [B / n]."""
    groups = rewards.view(-1, n)
    return groups.amax(1) == groups.amin(1)


def spread(scores, all_scores, n, baseline):
    """What --normalize divides by, [B]: the std of the scores of the prompt (--baseline prompt,
    loo) or of the batch, or 1 if they are equal. Rare successes, and rare failures, count more.

    It is the std of scores alone. With the KL in it, the std of equal scores would be that of their
    KLs, and the division would scale these up to size 1. The KL that is in A_t is divided, too:
    beta acts as beta / std.
    """
    peers = scores.view(-1, n)  # [B / n, n]
    if baseline in ("none", "batch"):
        peers = all_scores[None]  # [1, samples of the step]
    equal = equal_groups(peers, peers.shape[1])
    std = torch.where(equal, 1.0, peers.std(1) + 1e-4)
    return std.repeat_interleave(len(scores) // len(std))


def token_advantages(scores, kl, mask, args, world):
    """Equations (3) to (5): scores [B], kl [B, C], mask [B, C] -> A_t [B, C]."""
    n = args.samples_per_prompt
    to_go = rewards_to_go(token_rewards(scores, kl, mask, args.beta), args.gamma)
    totals = to_go[:, 0]
    all_totals = common.all_gather(world, totals)
    all_scores = common.all_gather(world, scores)
    A = to_go - baselines(totals, all_totals, n, args.baseline)[:, None]
    if args.normalize:
        A = A / spread(scores, all_scores, n, args.baseline)[:, None]
    if args.keep_max:  # the best by score: with the KL there would be no ties
        groups = scores.view(-1, n)
        is_best = groups == groups.amax(1, keepdim=True)
        A = A * is_best.view(-1, 1)
    return A * mask


def rows_to_train(scores, mask, args, world):
    """Which rows need a forward, [B]. With a KL penalty all do, since only a forward gives their
    KL. Without one, rows whose advantages are all 0 have no gradient; N of (6) counts them too."""
    if args.beta:
        return torch.ones_like(scores, dtype=torch.bool)
    no_kl = torch.zeros_like(mask, dtype=scores.dtype)
    return (token_advantages(scores, no_kl, mask, args, world) != 0).any(1)


def policy_loss(logprobs, old_logprobs, advantages, mask, N):
    """Equation (6): logprobs [b, C] with gradient, the rest without -> (loss, ratio [b, C]).

    N counts the completions of all micro-batches and processes, whose gradients are summed.

    The ratio is w_t, of this token alone: the product of all ratios up to it has too much variance.
    It is a constant, because ratio * grad log pi is already the gradient of pi / pi_old.
    """
    ratio = (logprobs - old_logprobs).detach().clamp(-20, 20).exp()  # the clamp avoids inf
    return -(ratio * advantages * logprobs * mask).sum() / N, ratio


def k3(logprobs, other_logprobs):
    """Schulman's third estimate of KL(p || other), never negative, [b, C]. logprobs: those of p,
    which should have drawn the tokens.

    It is logged, and --kl_stop of ppo.py looks at it. In grpo.py it is part of the loss,
    too; which KL's gradient that gives is said in `update_loss` of grpo.py.
    """
    d = (logprobs - other_logprobs).clamp(-20, 20)
    # expm1: for small d the result, about d^2 / 2, is below the rounding error of exp(-d)
    return torch.expm1(-d) + d


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
    advantages: torch.Tensor  # [B, C], equation (5)
    mask: torch.Tensor  # [B, C], true on the tokens that are trained
    old_logprobs: torch.Tensor | None = None  # [B, C]; None: every w_t is 1


def update_loss(policy, batch, rows, args, meter, is_first):
    """Equation (6) for one micro-batch, some `rows` of the rollout -> its loss."""
    logprobs, entropy = token_logprobs(policy, batch.samples, rows, args.temperature)  # [b, C]
    C = logprobs.shape[1]  # the longest completion of these rows
    mask = batch.mask[rows, :C]
    A = batch.advantages[rows, :C]
    if batch.old_logprobs is None:
        old = logprobs.detach()
    else:
        old = batch.old_logprobs[rows, :C]
    # completions of an update, in all processes; `load_task` checks that it divides
    N = args.prompts_per_step // args.minibatches * args.samples_per_prompt
    loss, ratio = policy_loss(logprobs, old, A, mask, N)

    with torch.no_grad():  # the rest is for the log
        meter.mean("entropy", entropy, mask)
        if not args.demos:  # no policy drew the demonstrations
            kl_old = (k3(old, logprobs) * mask).sum(1)  # equation (7)
            meter.mean("kl/old", kl_old, mask=mask.any(1))
            meter.mean("ratio/mean", ratio, mask)
            sampled = batch.samples.logprobs[rows, :C]
            # not a KL: how far the sampler's log-probabilities are from the trainer's, by rounding
            meter.mean("kl/sample", (old - sampled).abs(), mask)
        if is_first and batch.old_logprobs is not None:
            meter.max("ratio/first", (ratio - 1).abs() * mask)  # 0: pi is still pi_old
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
            # with adapters perhaps the policy itself, with the adapters off
            reference = common.load_reference(ref_path, world, policy)
        optimizer = common.make_optimizer(policy, args.learning_rate)
        models = {"policy": policy}  # what a checkpoint holds
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

            # 1. Rollout: completions of this step's prompts, and their scores r(x, y), [B].
            samples, scores, shown = rollout(
                policy, tokenizer, prompts, reward, share_prompts, args, world, step, meter
            )
            sampling_ended = time.perf_counter()

            # 2. Mini-batches (an optimizer update each) of micro-batches (a forward each). Cut
            #    once: so a row's old and new log-probabilities come from forwards of one shape.
            trained = rows_to_train(scores, samples.mask, args, world)  # [B]
            size = args.tokens_per_micro_batch
            minibatches = []
            for batch_rows in shuffled_groups(args, world, step):
                parts = micro_batches(batch_rows, trained[batch_rows], samples, size, world)
                minibatches.append(parts)  # minibatches[u][m]: rows of forward m of update u
            updates = shuffled_epochs(minibatches, args, step)  # those of all epochs

            # 3. Log-probabilities before the update, and the KL of each token, d_t. Without a KL
            #    penalty neither is needed if all w_t are 1: with one update, or with --demos.
            old = None
            kl = torch.zeros_like(samples.logprobs)  # [B, C]
            if reference is not None or (len(updates) > 1 and not args.demos):
                old = rollout_logprobs(policy, samples, minibatches, args.temperature)
            if reference is not None:
                ref = rollout_logprobs(reference, samples, minibatches, args.temperature)
                kl = (old - ref) * samples.mask

            # 4. Advantages, equations (3) to (5): one number for each token, [B, C].
            advantages = token_advantages(scores, kl, samples.mask, args, world)
            batch = Batch(samples, advantages, samples.mask & trained[:, None], old)

            # 5. Update. Each loss is divided by N of equation (6), so losses and gradients add up.
            rate = common.learning_rate_at(
                step, args.steps, args.learning_rate, args.schedule, args.warmup
            )
            optimizer.param_groups[0]["lr"] = rate
            grad_norms = []
            meter.sum("loss", torch.zeros(()))  # logged even if no row has a gradient
            for parts in updates:
                if not parts:
                    continue  # no row of this mini-batch has a gradient, on any process
                for rows in parts:
                    loss = update_loss(policy, batch, rows, args, meter, is_first=not grad_norms)
                    loss.backward()
                    meter.sum("loss", loss.detach() / len(updates))
                norm = common.clip_gradients(policy, args.max_grad_norm)
                if not math.isfinite(norm):
                    raise common.Stop(f"step {step}: the gradient is {norm}; update not made")
                grad_norms.append(norm)
                optimizer.step()
                optimizer.zero_grad()

            # 6. Log. Metrics of `update_loss` are those of the trained rows, the others those of
            #    all rows. Loss and gradient norm are means over the updates; one without a row
            #    counts as 0.
            step_ended = time.perf_counter()
            # with gamma 1 and these baselines, a group of equal scores learns only from the KL
            if args.baseline in ("prompt", "loo"):
                meter.mean("equal_groups", equal_groups(scores, n))
            meter.mean("length", samples.mask.sum(1))
            meter.mean("truncated", ~samples.finished)
            meter.sum("tokens", samples.mask.sum())
            if reference is not None:
                meter.mean("kl/ref", kl.sum(1))  # nats per completion
            metrics = meter.result(world)
            tokens = metrics.pop("tokens")
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
    """Draws completions of this step's prompts and scores them -> (samples, scores [B], some
    completions to be read). With --demos they are the answers in the file, each with score 1."""
    n = args.samples_per_prompt
    indices = common.rows_of_step(len(prompts), step, args.prompts_per_step, world, args.seed)
    ids = [prompts[i][0] for i in indices]
    records = [prompts[i][1] for i in indices for _ in range(n)]
    if args.demos:
        answers = [record["answer_ids"] for record in records]
        samples = common.as_samples(ids, answers, tokenizer, world)
        scores = {"reward": [1.0] * len(ids)}
    else:
        samples = common.sample(
            policy,
            tokenizer,
            ids,
            n=n,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=common.seed_from(args.seed, step, world.rank, common.DRAW),
            max_rows=args.sample_rows,
        )
        if share_prompts:
            # in training, the n rows of a prompt share one forward of it
            samples.rows_per_prompt = n
        scores = reward.score(samples, records)  # the reward, and the parts of one that has parts
        meter.max("time/reward", torch.tensor(reward.seconds))
    for name, values in scores.items():
        meter.mean(name, torch.tensor(values))
    shown = common.examples(samples, scores, records, range(n), tokenizer)
    return samples, torch.tensor(scores["reward"], device=world.device), shown


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
        # No rank in the seed: the k-th mini-batch was cut by all processes together, so all must
        # take it at the same time.
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
    """Scores of greedy completions of held-out prompts: eval/reward, by
    --reward, and the share of right answers. If --reward is a rule (exact,
    number), it judges that share, which is logged as eval/exact. With another
    reward there is an eval/NAME for each rule that accepts every row's own
    answer. Each process takes its share of the prompts."""
    mine = held_out[world.rank :: world.size]
    # Completions at once: as many as in a rollout, or as many as make 8192 tokens if that
    # is more; at most 256.
    rollout_rows = args.prompts_per_step // world.size * args.samples_per_prompt
    at_once = common.rows_at_once(held_out, args.max_new_tokens, rollout_rows)
    rules = common.rules_that_fit(reward, held_out)  # {name in the log: rule}
    meter = common.Meter()
    starts = range(0, math.ceil(len(held_out) / world.size), at_once)
    for start in common.until_stopped(starts, world, stop_asked):
        # FSDP: a process with no prompts left must still sample; its results do not count
        is_counted = start < len(mine)
        part = mine[start : start + at_once] or held_out[:1]
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
    if args.demos:
        prompts = common.load_prompts(args.demos, "--demos", tokenizer, args, "a demonstration")
    else:
        prompts = common.load_prompts(args.data, "--data", tokenizer, args, answer_flag)
    held_out = common.load_prompts(args.eval_data, "--eval_data", tokenizer, args, answer_flag)
    scored = held_out if args.demos else prompts + held_out
    common.check_answers(reward, scored)
    longest = max(len(ids) for ids, _ in prompts + held_out)
    args = common.limit_to_context(args, longest, config, reference_config)
    if reward.is_model and scored:
        args = common.limit_to_reward_model(args, tokenizer, scored)
    # Demonstrations longer than --max_new_tokens are left out, by its value as lowered above:
    # a resumed run starts with that value, and must leave out the same ones.
    if args.demos:
        prompts = encode_answers(prompts, tokenizer, args)
    drawn = args.steps * args.prompts_per_step
    common.say_passes(drawn, len(prompts), "prompts")
    # with --steps 0 and no --data, `train` shows one of the held-out prompts
    return args, tokenizer, reward, prompts or held_out, held_out


def encode_answers(prompts, tokenizer, args):
    """Demonstrations with their `answer_ids`, ended as the prompt's format ends an answer. Answers
    longer than --max_new_tokens are left out, and counted."""
    kept = []
    for ids, record in prompts:
        prompt = record["prompt"]
        chat = args.chat or isinstance(prompt, list)
        answer = str(record["answer"])
        answer_ids = common.encode_completion(tokenizer, answer, chat, prompt, args.system)
        if len(answer_ids) <= args.max_new_tokens:
            kept.append((ids, {**record, "answer_ids": answer_ids}))
    limit = f"--max_new_tokens {args.max_new_tokens}"
    if len(kept) < len(prompts):
        common.say(f"--demos: {len(prompts) - len(kept)} of {len(prompts)} left out ({limit})")
    if not kept:
        fail(f"--demos: every answer is longer than {limit}")
    return kept


if __name__ == "__main__":
    train(common.read_flags(Args, __doc__))
