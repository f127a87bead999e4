"""PPO, Proximal Policy Optimization: a critic for each token's credit, a clip for small steps.

REINFORCE gives every token all the reward that comes after it. PPO also trains
a critic V, which predicts that reward. A token after which V rises gets credit:
delta in (2).

    (1)  r_t = -beta (log pi_old(a_t | s_t) - log ref(a_t | s_t)) + score_t   `token_rewards`
         score_t is 0 but for the last token: there it is the reward of the
         whole completion (less --missing_eos_penalty if it has no end token)
         s_t = (x, a_<t), x the prompt;  ref is pi before training, or --reference
    (2)  A_t = sum over j of (gamma lam)^j delta_{t+j}                        `gae`
         delta_t = r_t + gamma V_old(s_{t+1}) - V_old(s_t);  V_old after the end is 0
         R_t = A_t + V_old(s_t);  A_t is then whitened, R_t is not            `whiten`
         V_old and pi_old are V and pi before the rollout's first update
    (3)  l_t = -min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t)  `clipped_loss`
         rho_t = pi(a_t | s_t) / pi_old(a_t | s_t)
    (4)  k_t = rho_t - 1 - log rho_t                                          `k3`
         its sum over a completion estimates KL(pi_old || pi), for --kl_stop
    (5)  v_t = max((V - R_t)^2, (V_clip - R_t)^2) / 2                         `value_loss`
         V_clip = V_old + clip(V - V_old, -value_clip, value_clip);  --value_clip 0: no max
    (6)  loss = mean of (l_t + value_coef v_t) over the tokens of an update   `add_gradients`

GAE (2) is the average, with weights (1 - lam) lam^(k-1), of the k-step advantages
    r_t + .. + gamma^(k-1) r_{t+k-1} + gamma^k V(s_{t+k}) - V(s_t),   k = 1, 2, ..
Each has k rewards as they came, then V for the rest. The largest k, which
reaches the end, gets the weight that is left. lam 0 keeps only k = 1 (the
actor-critic of textbooks): little variance, but the critic's errors enter
in full. lam 1 keeps only the largest k (Monte Carlo): the critic is just a
baseline, like the mean score of a prompt's completions in GRPO.

Take gamma 1, lam 1, no whitening, beta 0, a separate critic and one update
per rollout. Then A is the score minus V. The policy's gradient is that of
grpo.py --scale none if V is the mean score of the prompt's completions, and
that of REINFORCE without a baseline if V is 0 (up to a factor: reinforce.py
divides by completions, (6) by tokens). Both are tested.

TRPO bounded KL(pi_old || pi) in every update, at the cost of many extra
forwards and backwards. PPO's clip only removes the gain from leaving the
range. It does not bound the ratio: an update can go too far, and gradients of
other tokens still move it. `--kl_stop` ends a rollout's updates when the KL
is too large.

    python ppo.py                        # a tiny model learns to sort digits; needs no download
    python ppo.py --model Qwen/Qwen2.5-0.5B-Instruct --reward number \
        --data gsm8k_train.jsonl --eval_data gsm8k_test.jsonl
    torchrun --nproc_per_node 8 ppo.py --model ... --data ... --reward runs/reward_model/model

Shapes: B completions of this process in a rollout, b of those in one
forward. [B, C] is as wide as the longest completion of the rollout, [b,
C] as the longest of the forward. mask is true on a completion's tokens.
s_t is a text; the `states` of the code are what the transformer makes of
it, its last hidden states.

What biases the gradient of the expected reward:
  * lam < 1: the critic's errors are in A. gamma < 1: late rewards count for less.
  * Whitening, and the mean over tokens: the mean and std of the first, and the number of
    tokens, depend on the very samples to which they are applied.
  * The clip. Also, the ratio corrects for a_t only: from a rollout's second update
    on, the text before it, s_t, is still one that pi_old drew.
  * With --critic shared, the value loss: it trains the policy's transformer, too.
  * With a beta above 0, from a rollout's second update on: the KL in r_t is that
    of pi_old, not of the policy in training.
  * log pi_old is computed as in training. The sampler, which drew the tokens, gave
    slightly different values, by rounding (`kl/sample`: their mean distance).
    Nothing corrects for that.
The baseline V(s_t) does not bias it, because it does not see a_t. And in the
first update, where log pi_old is log pi, it is right to treat r_t as a
constant: its gradient would only add -beta E[grad log pi], which is 0.

Left out: bootstrapping where a completion was cut, adaptive beta, an entropy
bonus, replay of earlier rollouts.

Papers: Schulman et al. 2015 (TRPO), 2016 (GAE), 2017 (PPO); Ziegler et al.
2019, Ouyang et al. 2022 (language models); Huang et al. 2024 (which details
matter).
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
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

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
    """held-out prompts, as --data (None: the bundled ones
    if --data is the bundled task, else none)"""
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
    prompts_per_step: int = 128
    """prompts in a rollout; a step is one rollout with all its updates"""
    samples_per_prompt: int = 1
    """completions drawn for each prompt"""
    max_new_tokens: int = 512
    """most tokens of a completion; lowered to what the model's context has room for"""
    temperature: float = 1.0
    """of sampling, and of every log-probability: the policy is softmax(logits / temperature)"""
    beta: float = 0.05
    """weight of the KL penalty in the reward; at 0 no reference model is loaded"""
    missing_eos_penalty: float = 0.0
    """subtracted from the score of a completion that was cut at --max_new_tokens"""
    critic: Literal["separate", "shared"] = "separate"
    """separate: a second model, started from the reward model
    if its tokenizer and context fit the policy, else from the
    policy; with --lora_rank, a second set of adapters on the
    policy's frozen model.
    shared: a linear layer on the policy's last hidden states"""
    critic_learning_rate: float | None = None
    """of the critic (None: 1e-5, or 5e-4 for the bundled model; x 10 if shared or with adapters)"""
    critic_warmup: int = 0
    """first steps, in which only the critic learns (of a
    shared one, only its layer); the policy's --warmup
    follows them"""
    gamma: float = 1.0
    """discount of a reward per token; 1: late rewards count like early ones"""
    lam: float = 0.95
    """GAE's lambda, from 0 (trust the critic) to 1 (only the rewards that came)"""
    whiten: bool = True
    """give the advantages of a rollout mean 0 and standard deviation 1"""
    clip_low: float = 0.2
    """the clip begins below a ratio of 1 - this"""
    clip_high: float = 0.2
    """the clip begins above a ratio of 1 + this"""
    value_clip: float = 0.2
    """within a rollout, a value that has moved this far (in
    units of the reward) towards its return gets no gradient
    (with an exception, see `value_loss`; 0: no limit). If
    scores reach 5, the critic follows only slowly with 0.2"""
    value_coef: float = 0.5
    """weight of the value loss. AdamW does not depend on the
    scale of a gradient, so for a separate critic it matters
    only where --max_grad_norm cuts"""
    kl_stop: float = 0.0
    """once KL(pi_old || pi) of a mini-batch, in nats per completion, is above this, that update and
    the rollout's remaining ones are skipped; 0: never"""

    # --- optimisation ---
    lora_rank: int = 0
    """rank of the adapters that learn while the model itself is frozen (0: all weights learn)"""
    lora_alpha: float = 32.0
    """what the adapters add is multiplied by this / --lora_rank"""
    steps: int = 150
    """rollouts in all; 0 evaluates only"""
    learning_rate: float | None = None
    """peak of AdamW's learning rate (None: 1e-6, or 3e-4 for the bundled model; adapters: x 10)"""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """what the learning rate does after the warm-up"""
    warmup: int = 10
    """steps over which the learning rate rises"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm, the policy's and the critic's each by itself"""
    epochs: int = 2
    """passes over a rollout"""
    minibatches: int = 2
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
    is_tiny_model = Path(args.model).resolve() == TINY / "model"
    if args.data is None and is_tiny_model:
        args = dataclasses.replace(args, data=str(TINY / "sort_train.jsonl"))
    is_tiny_data = Path(args.data or "").resolve().parent == TINY
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    faster = 10 if args.lora_rank else 1  # adapters want about ten times the learning rate
    critic_rate = 5e-4 if is_tiny_model else 1e-5
    if args.critic == "shared" or args.lora_rank:
        critic_rate *= 10  # a new layer alone, or adapters, may learn faster than a whole model
    defaults = {
        "learning_rate": faster * (3e-4 if is_tiny_model else 1e-6),
        "critic_learning_rate": critic_rate,
        "tokens_per_micro_batch": 2048 if on_cpu else 8192,
        "eval_data": str(TINY / "sort_test.jsonl") if is_tiny_data else "",
    }
    unset = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    args = dataclasses.replace(args, **unset)
    common.check_flags(args)
    for name in ("gamma", "lam", "clip_low"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name} {getattr(args, name)}: must be from 0 to 1")
    if not args.value_coef:
        fail("--value_coef must be above 0: at 0 the critic never learns")
    return args


# -- The math: from rewards to losses ----------------------------------------------------------


def token_rewards(scores, kl, mask, beta):
    """scores [B], kl [B, C] (log pi_old - log ref, 0 off the mask) -> rewards r_t [B, C].

    The score goes to the last token that the policy chose: the stop token, if there is one.
    """
    follows = F.pad(mask[:, 1:], (0, 1))  # true where another token follows
    is_last = mask & ~follows
    return (scores[:, None] * is_last - beta * kl) * mask


def gae(rewards, values, mask, gamma, lam):
    """Equation (2): rewards, values [B, C] -> advantages, returns [B, C], 0 off the mask.

    Backwards, A_t = delta_t + gamma lam A_{t+1}. V after the end is 0, also after a cut.
    """
    values = values * mask
    next_values = F.pad(values[:, 1:], (0, 1))
    delta = rewards + gamma * next_values - values
    advantages = torch.zeros_like(delta)
    later = 0.0
    for t in reversed(range(delta.shape[1])):
        later = delta[:, t] + gamma * lam * later
        advantages[:, t] = later
    return advantages, advantages + values


def mean_and_variance(x, mask, world):
    """Of x [B, C] over the tokens of all processes."""
    x = x[mask].double()
    total, squares, count = common.all_sum(world, x.sum(), x.square().sum(), len(x))
    mean = total / count
    return mean, max(squares / count - mean**2, 0.0)


def whiten(x, mask, world):
    """x [B, C] with mean 0 and std 1. If all x are equal, x - mean is a rounding error: the
    1e-4 keeps the division from making it large."""
    mean, variance = mean_and_variance(x, mask, world)
    return (x - mean) / (math.sqrt(variance) + 1e-4) * mask


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


def value_loss(values, old_values, returns, weights, clip):
    """Equation (5), summed with weights; all [b, C], values with gradient.

    The larger error counts. A value that has moved by more than `clip` towards
    its return has no gradient, unless it has overshot the return so far that
    V_clip is nearer. One that has moved away always has a gradient. Like the
    ratio's clip, this is no bound.
    """
    error = (values - returns) ** 2
    if clip:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return 0.5 * (error * weights).sum()


def explained_variance(values, monte_carlo, mask, world):
    """1 - Var(G - V) / Var(G) over tokens, G the Monte Carlo returns: 1 if V
    predicts every G up to a constant, 0 for a constant V, None if Var(G) is near
    0. G is R_t of (2) at lam 1, where V cancels. With lam < 1, R_t contains V,
    and would flatter the critic."""
    _, variance = mean_and_variance(monte_carlo, mask, world)
    _, unexplained = mean_and_variance(monte_carlo - values, mask, world)
    return 1 - unexplained / variance if variance > 1e-6 else None


# -- Log-probabilities and values: one forward over prompts and their completions --------------


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


def make_critic(policy, critic_path, tokenizer, args, world):
    """-> (critic, trunk, head). V = head(trunk(text)), and `critic` is the part of these that the
    critic's optimizer trains. The state that predicts a_t gives V(s_t). critic_path is the folder
    that a separate critic starts from, and "" for a shared one (and with --steps 0).

                              critic               trunk                          head
        separate              a second model       that model                     its scalar layer
          with --lora_rank    adapters and head    policy with other adapters     a new linear layer
        shared                head                 the policy                     a new linear layer

    The head starts at 0. A reward model's head would be far off: it has only seen finished texts.
    """
    if critic_path and not args.lora_rank:
        common.say(f"critic: separate, from {critic_path}")
        checkpointing = args.gradient_checkpointing
        critic = common.load_scalar(
            critic_path, world, tokenizer, head_std=0.0, gradient_checkpointing=checkpointing
        )
        return critic, critic, common.scalar_head(critic)
    width = policy.get_output_embeddings().weight.shape[1]
    head = torch.nn.Linear(width, 1, device=world.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    if critic_path:  # separate, with --lora_rank (the folder itself is not used)
        # These adapters hang on the policy's layers, but are no parameters of
        # it. So only the critic's optimizer has them, and FSDP does not know them.
        critic, trunk = common.add_critic_adapters(policy, head)
        return critic, trunk, head
    return head, policy, head


def values_of(head, states):
    """V of states [b, C, width] -> [b, C], in float32: bfloat16 has steps of 0.01 near 1."""
    bias = None if head.bias is None else head.bias.float()
    return F.linear(states.float(), head.weight.float(), bias)[..., 0]


@torch.no_grad()
def before_update(policy, trunk, head, samples, minibatches, temperature):
    """log pi_old and V_old: the policy's log-probabilities, and values -> two tensors [B, C].

    In the micro-batches of the update, as in `rollout_logprobs`. A shared critic's values need no
    forward of their own.
    """
    old = torch.zeros_like(samples.mask, dtype=torch.float32)
    values = torch.zeros_like(old)
    for parts in minibatches:
        for rows in parts:
            states, ids, mask = common.completion_states(policy, samples, rows)
            C = ids.shape[1]
            old[rows, :C], _ = logprobs_of(policy, states, ids, mask, temperature)
            if trunk is not policy:
                states, _, _ = common.completion_states(trunk, samples, rows)
            values[rows, :C] = values_of(head, states) * mask
    common.forget_forwards(policy)  # FSDP expects a backward after a forward; none follows
    if trunk is not policy:
        common.forget_forwards(trunk)
    return old, values


# -- The loop ----------------------------------------------------------------------------------


@dataclass
class Batch:
    """What the updates of a step need of its rollout."""

    samples: common.Samples
    # all of them [B, C]
    weights: torch.Tensor  # 1 / tokens of the update, 0 off the mask
    old_logprobs: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


def add_gradients(policy, trunk, head, batch, rows, args, meter, policy_learns, is_first):
    """Equations (3) to (6) for one micro-batch, some `rows` of the rollout: adds its gradients
    -> its share of the update's KL(pi_old || pi), in nats per completion."""
    # In --critic_warmup no backward of the policy follows, and FSDP keeps what it has gathered
    # for one. The next `common.sample` frees that (so no `forget_forwards` here).
    with torch.set_grad_enabled(policy_learns):
        states, ids, mask = common.completion_states(policy, batch.samples, rows)
        logprobs, entropy = logprobs_of(policy, states, ids, mask, args.temperature)  # [b, C]
    C = logprobs.shape[1]  # the longest completion of these rows
    w = batch.weights[rows, :C]
    A = batch.advantages[rows, :C]
    old = batch.old_logprobs[rows, :C]
    ratio = (logprobs - old).clamp(-20, 20).exp()  # with gradient; the clamp avoids inf
    policy_loss = clipped_loss(ratio, A, w, args.clip_low, args.clip_high)
    if trunk is not policy:
        if policy_learns:
            policy_loss.backward()  # now, so that the activations of both are never held at once
            policy_loss = policy_loss.detach()
        states, _, _ = common.completion_states(trunk, batch.samples, rows)
    values = values_of(head, states)
    v_loss = value_loss(
        values, batch.old_values[rows, :C], batch.returns[rows, :C], w, args.value_clip
    )
    # Equation (6). With a separate critic the policy's loss is a constant here, and in
    # --critic_warmup, too. Otherwise one backward trains the transformer of policy and
    # critic for both.
    loss = policy_loss + args.value_coef * v_loss
    loss.backward()

    # the rest is for the log and --kl_stop
    with torch.no_grad():
        kl_old = (k3(old, logprobs) * mask).sum(1).double()  # equation (4), [b]
        low, high = is_clipped(ratio, A, args.clip_low, args.clip_high)
        sampled = batch.samples.logprobs[rows, :C]
        meter.sum("loss", policy_loss)  # the l_t of (6) alone
        meter.sum("value/loss", v_loss)
        meter.mean("kl/old", kl_old)
        # not a KL: how far the sampler's log-probabilities are from the trainer's, by rounding
        meter.mean("kl/sample", (old - sampled).abs(), mask)
        meter.mean("ratio/mean", ratio, mask)
        meter.mean("clip/low", low, mask)
        meter.mean("clip/high", high, mask)
        if policy_learns:
            meter.mean("entropy", entropy, mask)
        if is_first:  # should be 0: pi is still pi_old
            meter.max("ratio/first", (ratio - 1).abs() * mask)
    # all completions of this update: --prompts_per_step counts the prompts of all processes
    completions = args.prompts_per_step * args.samples_per_prompt / args.minibatches
    return kl_old.sum() / completions


def take_step(models, optimizers, args, world, step):
    """Clips the gradients of policy and critic, each by itself, and makes a step of both -> their
    norms before clipping."""
    policy = models["policy"]
    critic = models["critic"]
    if (args.critic == "shared" or args.lora_rank) and world.size > 1:
        # FSDP does not know such a critic (a head, or adapters): its gradients are summed here.
        common.sum_gradients(critic)
    norm = common.clip_gradients(policy, args.max_grad_norm)
    critic_norm = common.clip_gradients(critic, args.max_grad_norm)
    if not math.isfinite(norm + critic_norm):
        gradients = f"the policy's gradient is {norm}, the critic's {critic_norm}"
        raise common.Stop(f"step {step}: {gradients}; update not made")
    optimizers["policy"].step()  # does nothing in --critic_warmup, where it has no gradients
    optimizers["critic"].step()
    policy.zero_grad()
    critic.zero_grad()
    return norm, critic_norm


def train(args):
    args = resolve(args)
    world = common.start(args.device, args.dtype, args.seed)
    # prompts, held_out: lists of (token ids of a prompt, its row: a dict with "prompt")
    args, tokenizer, reward, prompts, held_out, critic_path = load_task(args, world)

    out = common.open_run(args, Path(__file__).stem, world)
    stop_asked = common.catch_signals(args.steps)
    saved = common.take_up(out, args, world)  # the last checkpoint of a resumed run, or None
    done_steps = saved["step"] if saved else 0
    ref_path = (args.reference or args.model) if args.beta and args.steps else ""
    learning = 2 if critic_path else 1  # learning models; `begin_log` counts their memory
    frozen = [args.reward] if reward.is_model else []
    writer, bar = common.begin_log(
        out, args, world, tokenizer, prompts[0][0], done_steps, learning, frozen, ref_path
    )

    with common.short_errors(out, args, bar):
        policy = common.load_policy(args.model, world, args.gradient_checkpointing, args)
        critic, trunk, head = make_critic(policy, critic_path, tokenizer, args, world)
        # whether to compute a prompt once for its completions (see grpo.py)
        share_prompts = common.can_share_prompts([policy, trunk], args, world)
        reference = common.load_reference(ref_path, world, policy) if ref_path else None
        models = {"policy": policy, "critic": critic}
        optimizers = {
            "policy": common.make_optimizer(policy, args.learning_rate),
            "critic": common.make_optimizer(critic, args.critic_learning_rate),
        }
        if saved:
            common.load_checkpoint(saved, models, optimizers)
            del saved
        held_out_scores = functools.partial(
            evaluate, policy, tokenizer, held_out, reward, args, world, stop_asked
        )
        if done_steps == 0:
            common.log(out, writer, 0, common.scores_if_due(0, args, held_out_scores))

        for step in range(done_steps + 1, args.steps + 1):
            step_began = time.perf_counter()
            meter = common.Meter()
            policy_learns = step > args.critic_warmup

            # 1. Rollout.
            samples, scores, shown = rollout(
                policy, tokenizer, prompts, reward, share_prompts, args, world, step, meter
            )
            sampling_ended = time.perf_counter()

            # 2. Mini-batches (an optimizer update each) of micro-batches (a forward each). Cut
            #    once: so a row's old and new log-probabilities come from forwards of one shape.
            mask = samples.mask
            weights = torch.zeros_like(mask, dtype=torch.float32)  # [B, C]
            minibatches = []
            for batch_rows in shuffled_groups(args, world, step):
                # The mean (6) is over all micro-batches and processes. Their
                # gradients are summed (common.py makes FSDP sum, not average).
                count = common.all_sum(world, mask[batch_rows].sum())[0]
                weights[batch_rows] = mask[batch_rows] / count
                every = torch.ones(len(batch_rows), dtype=torch.bool)  # every row is trained
                size = args.tokens_per_micro_batch
                minibatches.append(micro_batches(batch_rows, every, samples, size, world))

            # 3. What policy, critic and reference say of the rollout before any update, [B, C].
            old, values = before_update(policy, trunk, head, samples, minibatches, args.temperature)
            kl = torch.zeros_like(old)
            if reference is not None:
                ref = rollout_logprobs(reference, samples, minibatches, args.temperature)
                kl = (old - ref) * mask  # its sum over a completion estimates the KL
                meter.mean("kl/ref", kl.sum(1))  # in nats per completion
                meter.mean("kl/penalty", args.beta * kl.sum(1))

            # 4. Advantages and returns, equations (1) and (2).
            penalized = scores - args.missing_eos_penalty * ~samples.finished  # [B]
            rewards_of_tokens = token_rewards(penalized, kl, mask, args.beta)  # [B, C]
            advantages, returns = gae(rewards_of_tokens, values, mask, args.gamma, args.lam)
            if args.whiten:
                advantages = whiten(advantages, mask, world)
            meter.mean("returns", returns, mask)
            _, monte_carlo = gae(rewards_of_tokens, values, mask, args.gamma, lam=1.0)  # V cancels
            explained = explained_variance(values, monte_carlo, mask, world)

            # 5. Update, equations (3) to (6). --kl_stop may end it early.
            batch = Batch(samples, weights, old, values, advantages, returns)
            rate, critic_rate = set_learning_rates(optimizers, args, step)
            norms = []  # (the policy's gradient norm, the critic's) of each update
            tried_updates = 0
            for parts in shuffled_epochs(minibatches, args, step):
                is_first = not norms  # pi is still pi_old: --kl_stop has nothing to stop
                moved = 0.0  # becomes KL(pi_old || pi) on this mini-batch, before its update
                for rows in parts:
                    moved += add_gradients(
                        policy, trunk, head, batch, rows, args, meter, policy_learns, is_first
                    )
                tried_updates += 1
                if args.kl_stop and not is_first and common.all_sum(world, moved)[0] > args.kl_stop:
                    policy.zero_grad()
                    critic.zero_grad()
                    break
                norms.append(take_step(models, optimizers, args, world, step))

            # 6. Log. The update that --kl_stop gave up is in all means except gradient norms.
            step_ended = time.perf_counter()
            metrics = meter.result(world)
            tokens = metrics.pop("tokens")  # those that `rollout` has drawn
            metrics |= {
                "loss": metrics["loss"] / tried_updates,
                "value/loss": metrics["value/loss"] / tried_updates,
                "updates": len(norms),
                "grad_norm": sum(norm for norm, _ in norms) / len(norms),
                "value/grad_norm": sum(norm for _, norm in norms) / len(norms),
                "learning_rate": rate,
                "value/learning_rate": critic_rate,
                "time/sample": sampling_ended - step_began,
                "time/train": step_ended - sampling_ended,
                "tokens_per_second": tokens / (step_ended - step_began),
                "memory_gib": common.memory_used(world) / 2**30,
            }
            if explained is not None:
                metrics["value/explained"] = explained
            metrics |= common.scores_if_due(step, args, held_out_scores)
            common.log(out, writer, step, metrics, shown)
            common.save_best(out, args, world, step, metrics, policy, tokenizer)

            # 7. Save if it is due. After a signal (Ctrl-C, SIGTERM), save and end the run.
            common.save_if_due(out, args, world, step, models, optimizers, stop_asked)

        if args.steps:
            common.save_model(policy, tokenizer, out / "model", world)
    example = common.line_to_try(out, tokenizer, prompts[0][1]["prompt"], args)
    common.conclude(out, args, writer, bar, example)


# -- The rollout -------------------------------------------------------------------------------


def rollout(policy, tokenizer, prompts, reward, share_prompts, args, world, step, meter):
    """Draws completions of this step's prompts and scores them -> (samples, scores [B], some
    completions to be read)."""
    n = args.samples_per_prompt
    indices = common.rows_of_step(len(prompts), step, args.prompts_per_step, world, args.seed)
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
    scores = reward.score(samples, records)  # {"reward": the score, and its parts, if any}
    for name, values in scores.items():
        meter.mean(name, torch.tensor(values))
    meter.mean("length", samples.mask.sum(1))
    meter.mean("truncated", ~samples.finished)
    meter.sum("tokens", samples.mask.sum())
    if share_prompts:
        samples.rows_per_prompt = n  # in training, the n rows of a prompt share one forward of it
    meter.max("time/reward", torch.tensor(reward.seconds))
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


def set_learning_rates(optimizers, args, step):
    """The policy's schedule begins after --critic_warmup, the critic's at step 1."""
    start = args.critic_warmup
    schedule = (args.schedule, args.warmup)
    # 0 during --critic_warmup
    rate = common.learning_rate_at(step - start, args.steps - start, args.learning_rate, *schedule)
    critic_rate = common.learning_rate_at(step, args.steps, args.critic_learning_rate, *schedule)
    optimizers["policy"].param_groups[0]["lr"] = rate
    optimizers["critic"].param_groups[0]["lr"] = critic_rate
    return rate, critic_rate


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
    """Checks the user's input before a policy is loaded or a file is written. The last value that
    it returns is the folder that a separate critic starts from, or ""."""
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
    held_out = common.load_prompts(args.eval_data, "--eval_data", tokenizer, args, answer_flag)
    common.check_answers(reward, prompts + held_out)
    longest = max(len(ids) for ids, _ in prompts + held_out)
    args = common.limit_to_context(args, longest, config, reference_config)
    if reward.is_model:
        args = common.limit_to_reward_model(args, tokenizer, prompts + held_out)
    critic_path = ""
    if args.critic == "separate" and args.steps:
        critic_path = critic_folder(args, config, tokenizer, longest, reward.is_model)
    drawn = args.steps * args.prompts_per_step
    common.say_passes(drawn, len(prompts), "prompts")
    # with --steps 0 and no --data, `train` shows one of the held-out prompts
    return args, tokenizer, reward, prompts or held_out, held_out, critic_path


def critic_folder(args, config, tokenizer, longest, reward_is_model):
    """The folder that a separate critic starts from: that of the reward model, if it has every
    token of the policy under the same id and a context for the longest prompt and completion,
    else (and with --lora_rank) that of the policy."""
    if reward_is_model and not args.lora_rank:
        vocabulary = common.load_tokenizer(args.reward).get_vocab()
        has_tokens = tokenizer.get_vocab().items() <= vocabulary.items()
        context = common.context_of(common.read_config(args.reward))
        if has_tokens and context >= longest + args.max_new_tokens:
            return args.reward
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not args.lora_rank:
        why = f"transformers has no sequence classifier for the family {config.model_type!r}"
        fail(f"--critic separate: {why}; use --critic shared")
    return args.model


if __name__ == "__main__":
    train(common.read_flags(Args, __doc__))
