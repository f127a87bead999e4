"""PPO, Proximal Policy Optimization: an actor that asks a critic, and takes steps that stay close.

REINFORCE pays every token with all that came after it, whoever earned it. A critic V, a second network, says at each token how much
reward is still to come; where its opinion rises after a token, that token was good.

    (1)  r_t = -beta (log pi_old(a_t) - log ref(a_t)),  and the score with the last token              -> `token_rewards`
    (2)  delta_t = r_t + gamma V(s_{t+1}) - V(s_t)              s_t = (x, a_<t); V after the end is 0
    (3)  A_t = sum_l (gamma lam)^l delta_{t+l},     R_t = A_t + V(s_t)                                  -> `gae`
    (4)  rho_t = pi(a_t | s_t) / pi_old(a_t | s_t)              pi_old drew the samples
    (5)  l_t = -min( rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t )                          -> `clipped_loss`
    (6)  v_t = max( (V - R_t)^2, (V_old + clip(V - V_old, -value_clip, value_clip) - R_t)^2 ) / 2       -> `value_loss`
    (7)  loss = mean of l_t + value_coef v_t over all tokens of an optimizer update

GAE (3) averages the k-step advantages, k rewards as they came and then the critic's guess of the rest:
A^(k)_t = r_t + ... + gamma^(k-1) r_{t+k-1} + gamma^k V(s_{t+k}) - V(s_t) = sum_{l<k} gamma^l delta_{t+l}. The weights are
(1 - lam) lam^(k-1); the last k, which reaches the end, gets all the weight that is left. lam 0: only k = 1 (temporal difference:
little variance, all of the critic's errors). lam 1: only the last (Monte Carlo: R_t is what came; the critic is just a baseline).

The road here, by what each adds:

    REINFORCE     A_t = what came after - baseline, a number for each prompt        the policy (and a reference, for the KL)
    actor-critic  A_t = delta_t: a learnt baseline, for each state, and a guess     + a critic that learns
                  of the rest instead of waiting for it
    PPO           GAE between the two; ratio and clip, so that a rollout serves     the same
                  several updates
    GRPO          the critic is the mean score of the prompt's samples              - the critic (grpo.py)

They are one family. With gamma 1, lam 1, a critic of 0, no whitening, beta 0 and one update a rollout the policy's gradient is
REINFORCE's without baseline (times samples / tokens: a mean over tokens here, over samples there); with the groups' means for a
critic it is GRPO's with --scale none. Both are tested. tests/bench/held.py counts what each holds in memory.

TRPO, before PPO, went as far as a trust region lets it, KL(pi_old || pi) <= delta: a natural-gradient step, by conjugate gradients
through products with the Fisher matrix, then a line search, each of them more passes through the whole model. (5) is what
first-order steps can have of it: nothing is gained by going further, but nothing holds a token's ratio back either, and
other tokens' gradients move it on. `--kl_stop` adds the region as what it can cheaply be, a reason to end a rollout's updates.

    python ppo.py                                                   # the embedded model learns to sort; no download
    python ppo.py --model Qwen/Qwen2.5-0.5B-Instruct --data gsm8k_train.jsonl --eval_data gsm8k_test.jsonl --reward number
    torchrun --nproc_per_node 8 ppo.py --model ... --data ... --reward runs/reward_model/model --critic shared

What is biased here: (3) with lam < 1, by the critic's errors; gamma < 1; whitening and the mean over tokens, which divide by (and
whitening subtracts) numbers computed from the same samples; the clip; and, from the second update of a rollout on, (4): it
corrects the probability of the token, not that of the text before it. With gamma 1 and lam 1 k1 in the
reward (1) has the KL's own gradient. V sees the prompt and the tokens before, never the token it judges: otherwise it would
be no baseline.

Left out: bootstrapping where a completion was cut (a cut ends the episode), adaptive beta, the entropy bonus, replay across rollouts.

Schulman et al. 2015 (TRPO), 2016 (GAE), 2017 (PPO); Ziegler et al. 2019 and Ouyang et al. 2022 (PPO for language models); Huang et al.
2024 (which of its details matter).
"""

import collections
import dataclasses
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
import tyro
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

import common
from common import fail

TINY = Path(__file__).resolve().parent / "tests" / "tiny"  # the embedded model and its task


@dataclass
class Args:
    # --- task ---
    model: str = str(TINY / "model")
    """folder or hub name of the causal language model to train"""
    data: str = str(TINY / "sort_train.jsonl")
    """prompts to learn from: JSON lines with "prompt" (or "question") and, for most rewards, "answer" """
    eval_data: str | None = None
    """held-out prompts, as --data; None: the embedded task has its own, other data none"""
    reward: str = "exact"
    """exact | number | FILE.py:function(completion, row) -> float | folder or hub name of a reward model"""
    chat: bool = True
    """a prompt that is a string goes through the chat template, if the tokenizer has one (--no_chat: raw text)"""
    template_args: str = ""
    """arguments of the chat template, a JSON object: '{"enable_thinking": false}'"""
    system: str = ""
    """system message before every prompt that has none of its own"""
    max_prompt_tokens: int = 512
    """prompts that are longer are left out, and counted"""

    # --- algorithm ---
    prompts_per_step: int = 128
    """prompts in a rollout, drawn from --data again and again; a step is one rollout with all its updates"""
    samples_per_prompt: int = 1
    """completions drawn for each prompt"""
    max_new_tokens: int = 256
    """a completion is cut here; at most what the model's context has room for"""
    temperature: float = 1.0
    """of sampling, and of every log-probability: the policy is softmax(logits / temperature)"""
    beta: float = 0.05
    """weight of the KL penalty, k1 in the reward; at 0 no reference model is loaded"""
    missing_eos_penalty: float = 0.0
    """subtracted from the score of a completion that was cut at --max_new_tokens"""
    critic: Literal["separate", "shared"] = "separate"
    """a model of its own (from the reward model's trunk if that reads the policy's vocabulary, else from the policy),
    or one linear head on the policy's states: half the memory, and two losses for one trunk"""
    critic_learning_rate: float | None = None
    """of the separate critic (None: 1e-5, and 5e-4 for the embedded model),
    or of the shared one's head, which starts from nothing and may run ahead of its trunk (None: 1e-4, and 5e-3)"""
    critic_warmup: int = 0
    """first steps, in which only the critic learns (a shared one: its head); the policy's own --warmup comes after them"""
    gamma: float = 1.0
    """discount of a reward per token; 1: it counts the same however late it comes"""
    lam: float = 0.95
    """GAE's lambda: 0 trusts the critic (TD), 1 only what came (Monte Carlo)"""
    whiten: bool = True
    """advantages of a rollout get mean 0 and standard deviation 1"""
    clip_low: float = 0.2
    """the ratio is clipped below 1 minus this"""
    clip_high: float = 0.2
    """the ratio is clipped above 1 plus this"""
    value_clip: float = 0.2
    """in one rollout's updates a value gains by moving at most this far, in units of the reward (0: no limit).
    With scores of 5 and more, 0.2 is slow"""
    value_coef: float = 0.5
    """weight of the value loss beside the policy's (it matters where they share a trunk, and for the gradient's norm)"""
    kl_stop: float = 0.0
    """a rollout's updates, the critic's too, end when KL(pi_old || pi), in nats a completion, has passed this; 0: never"""

    # --- optimisation ---
    steps: int = 150
    """rollouts in all; 0 evaluates only"""
    learning_rate: float | None = None
    """AdamW's step size (None: 1e-6, and 3e-4 for the embedded model, which is small and wants more)"""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """what becomes of the learning rate after the warm-up"""
    warmup: int = 10
    """steps over which the learning rate rises"""
    max_grad_norm: float = 1.0
    """the policy's gradient, and a critic's of its own parameters, is scaled down to this norm"""
    epochs: int = 2
    """passes over a rollout"""
    minibatches: int = 2
    """optimizer updates in a pass"""
    tokens_per_micro_batch: int | None = None
    """tokens, padding included, in one forward and backward (None: 8192 on a GPU, 2048 on a CPU).
    Lower it when memory runs out; up to rounding, results do not change"""
    gradient_checkpointing: bool = False
    """keep less for the backward pass and compute it twice: less memory, more time (prompts are then not shared)"""

    # --- run ---
    out: str = ""
    """the run's folder (empty: runs/ppo, then runs/ppo-2, ...)"""
    resume: bool = False
    """go on with the run in --out; give it the flags it was started with"""
    seed: int = 1
    """of the order of prompts and of sampling"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """what computes (auto: bfloat16 on a GPU, float32 on a CPU); weights that learn stay float32.
    bfloat16 on a CPU needs less memory. With avx512_bf16 or amx in /proc/cpuinfo it is faster too:
    a GRPO step of a 135M model took 0.62 of the time (tests/bench/vs_trl.py)"""
    eval_every: int = 50
    """steps between scores on --eval_data"""
    save_every: int = 50
    """steps between checkpoints"""
    keep: int = 1
    """checkpoints that stay on the disk, the newest ones"""


def resolve(args):
    """Fills in the defaults that depend on other flags, and refuses flags that contradict each other."""
    tiny_model = Path(args.model).resolve() == TINY / "model"
    defaults = {
        "learning_rate": 3e-4 if tiny_model else 1e-6,
        "critic_learning_rate": (5e-4 if tiny_model else 1e-5) * (10 if args.critic == "shared" else 1),
        "tokens_per_micro_batch": 2048 if args.device == "cpu" or not torch.cuda.is_available() else 8192,
        "eval_data": str(TINY / "sort_test.jsonl") if Path(args.data).resolve().parent == TINY else "",
    }
    args = dataclasses.replace(args, **{k: v for k, v in defaults.items() if getattr(args, k) is None})
    common.check_flags(args)
    for name in ("gamma", "lam", "clip_low"):
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name} {getattr(args, name)}: must be from 0 to 1")
    if not args.value_coef:
        fail("--value_coef must be above 0: at 0 the critic never learns")
    return args


# -- The task: prompts and rewards ---------------------------------------------------------------------------------


def is_prompt(value):
    """A text, or a list of chat messages."""
    messages = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("content"), (str, list)) and "role" in m for m in value
    )
    return bool(value) and (isinstance(value, str) or messages)


def load_prompts(path, flag, tokenizer, args, needs=""):
    """[(prompt's token ids, row), ...] of a JSON-lines file, each row with its `prompt`, without prompts that are too long; says
    how many those were. `needs` is what wants an answer of every row, if anything does."""
    kept, count = [], 0
    for number, row in common.read_json(path, flag) if path else ():
        where, row = f"{flag} {path}, line {number}", row if isinstance(row, dict) else {}
        row = {**row, "prompt": row.get("prompt", row.get("question"))}
        if not is_prompt(row["prompt"]):
            fail(f'{where}: needs a "prompt" (or "question") that is a text or a list of messages')
        ids, count = common.encode_prompt(tokenizer, row["prompt"], args.system, args.chat), count + 1
        if not 0 < len(ids) <= args.max_prompt_tokens:
            continue
        if needs and not isinstance(row.get("answer"), (str, int, float)):
            fail(f'{where}: {needs} needs an "answer", a text or a number; the row with prompt {row["prompt"]!r:.100} has none')
        kept.append((ids, row))
    if len(kept) < count:
        limit = f"--max_prompt_tokens {args.max_prompt_tokens}"
        common.say(f"{flag}: {count - len(kept)} of {count} prompts left out ({limit})")
        kept = kept or fail(f"{flag}: every prompt is longer than {limit}")
    return kept


def exact(completion, row):
    """1 if the completion is the answer, else 0."""
    return float(completion.strip() == str(row["answer"]).strip())


def number(completion, row):
    """1 if the last number of the completion equals the last of the answer. Commas, $, a final dot and trailing zeros
    do not matter; compared as decimals, not as floats, which cannot tell long numbers apart."""

    def last(text):
        whole = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"  # "1,234" is one number, "1,2,3" are three
        found = re.findall(rf"(?:(?<![\w.])-)?(?:{whole}\.?\d*|\.\d+)", str(text).replace("$", ""))
        return Decimal(found[-1].replace(",", "").rstrip(".")) if found else None

    wanted = last(row["answer"])
    return float(wanted is not None and last(completion) == wanted)


def is_a_model(spec):
    """Whether --reward names a reward model, and not a rule or a function in a file."""
    return spec not in ("exact", "number") and not spec.partition(":")[0].endswith(".py")


def load_reward(spec, world, date=None):
    """--reward as a function from completions and their rows to scores. Mistakes are found before a policy is loaded."""
    if is_a_model(spec):
        if "/" not in spec and not Path(spec).exists():
            fail(f"--reward {spec}: choose exact, number, FILE.py:function, or the folder of a reward model")
        return common.stop_together(common.load_scorer(spec, world, date), world)
    rules = {"exact": exact, "number": number}
    return common.stop_together(common.checked(rules.get(spec) or common.load_function(spec, "--reward")), world)


# -- The math: from rewards to losses ------------------------------------------------------------------------------


def token_rewards(scores, kl, mask, beta):
    """scores [B], kl [B, C] (k1, log pi_old - log ref) -> what each token is paid, [B, C]: minus beta times its KL, and the score
    with the last token that the policy chose, the EOS where there is one; a place later nobody would be paid for it. KL in the
    *reward* has the gradient of beta KL(pi || ref); k3 in the *loss* (grpo.py, as published) has not."""
    last = mask & ~F.pad(mask[:, 1:], (0, 1))  # true on the last token of a row
    return (-beta * kl + scores[:, None] * last) * mask


def gae(rewards, values, mask, gamma, lam):
    """Equations (2) and (3): rewards, values [B, C] -> (advantages [B, C], returns [B, C]), 0 off the mask. From the end
    backwards, A_t = delta_t + gamma lam A_{t+1}. A completion that was cut ends there all the same: V after it is 0."""
    values = values * mask
    delta = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values  # [B, C]
    advantages, later = torch.zeros_like(delta), 0.0
    for t in reversed(range(delta.shape[1])):
        advantages[:, t] = later = delta[:, t] + gamma * lam * later
    return advantages, (advantages + values) * mask


def whiten(x, mask, world):
    """x [B, C] with mean 0 and standard deviation 1 over the tokens of all processes. Not by 1 / std alone: where all are
    equal but for rounding, that would blow the rounding up."""
    total, squares, count = common.all_sum(world, (x * mask).double().sum(), (x * mask).double().square().sum(), mask.sum())
    mean = total / count
    return (x - mean) / (math.sqrt(max(squares / count - mean**2, 0.0)) + 1e-4) * mask


def clipped_loss(logratio, advantages, mask, weights, clip_low, clip_high):
    """-sum of weights * min(ratio A, clip(ratio) A): logratio = log pi - log pi_old [b, C] with gradient, the rest without,
    advantages [b, C] or [b, 1] -> (loss, ratio, low, high), the last two true where the clip has stopped the gradient.

    The minimum is pessimistic: it takes the clip where going on would look better, and never where the ratio should come back.
    So the gradient is that of ratio * A times this mask:

                 ratio < 1 - low      between      ratio > 1 + high
        A > 0           1                1                0            0: good, and made likely enough
        A < 0           0                1                1            0: bad, and made unlikely enough

    A plain clip, without the minimum, would have 0 in the corners as well: a good token that an earlier update of this
    rollout made unlikely could not be brought back."""
    ratio = logratio.clamp(-20, 20).exp()  # exp of what is not clamped may be inf
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    low, high = (advantages < 0) & (ratio < 1 - clip_low), (advantages > 0) & (ratio > 1 + clip_high)
    return -(gain * weights).sum(), ratio.detach(), low & mask, high & mask


def value_loss(values, old_values, returns, weights, clip):
    """Equations (6), (7), all [b, C], values with gradient. The larger error counts, so a value that has moved by `clip` towards
    its return has no more gradient from this rollout, and one that has moved away always has: the critic's trust region, which
    keeps a few great returns from throwing it about."""
    error = (values - returns) ** 2
    if clip:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns) ** 2)
    return 0.5 * (error * weights).sum()


def explained(values, came, mask, world):
    """1 - Var(G - V) / Var(G) over tokens, G what really came: 1 for a critic that knows it, 0 for a constant, below 0 for one worse
    than that; None where all is the same, and there is nothing to know. Not of equation (3)'s R, which contains V and would
    agree with any critic."""
    x = torch.stack([came - values, came])[:, mask].double()  # [2, tokens]
    *sums, count = common.all_sum(world, *x.sum(1), *x.square().sum(1), x.shape[1])
    left, all_of_it = (sums[2 + i] / count - (sums[i] / count) ** 2 for i in (0, 1))
    return 1 - left / all_of_it if all_of_it > 1e-6 else None


def moved_by(logprobs, old_logprobs):
    """KL(pi_old || pi), estimated on tokens of pi_old: ratio - 1 - log ratio, never negative, and its mean over them is the KL.
    expm1, because in float32 exp(d) - 1 of a small d is mostly rounding."""
    d = (logprobs - old_logprobs).clamp(-20, 20)
    return torch.expm1(d) - d


# -- Log-probabilities and values: one forward with the completion given -------------------------------------------


def micro_batches(rows, prompt_mask, mask, n, tokens, world):
    """Cuts `rows`, row numbers of a rollout, into parts of whole groups of n (or slices of one, if a group alone is too much) of
    at most `tokens` tokens (or one row) with padding, a group's prompt counted once, groups of like length together ->
    [row numbers]. With n = 1 each row brings its own prompt. Every process gets the same number of parts, some perhaps empty:
    sharded weights are gathered by all or by none. Where no process has a row, there are no parts."""
    prompt, completion = prompt_mask.sum(1).tolist(), mask.sum(1).tolist()

    def fits(rows):
        prompts = len({r // n for r in rows})
        return prompts * max(prompt[r] for r in rows) + len(rows) * max(completion[r] for r in rows) <= tokens

    groups = collections.defaultdict(list)
    for row in rows:
        groups[row // n].append(row)
    parts = []
    for group in sorted(groups.values(), key=lambda rows: -max(prompt[r] + completion[r] for r in rows)):
        if not parts or not fits(parts[-1] + group):
            parts.append([])
        for row in group:
            if parts[-1] and not fits([*parts[-1], row]):
                parts.append([])
            parts[-1].append(row)
    most = int(common.all_gather(world, torch.tensor([len(parts)], device=world.device)).max())
    return parts + [[]] * (most - len(parts))


def trim(samples, rows, n=1):
    """The rows of a micro-batch without the columns in which none of them has a token: (prompt_ids [p, P], prompt_mask [p, P],
    owner [b], ids [b, C], mask [b, C]). Rows of a group of n > 1 share a prompt, owner[i] is its number in prompt_ids;
    with n = 1 every row has its own, and owner is None."""
    prompts, owner = torch.tensor(rows, device=samples.ids.device).div(n, rounding_mode="floor").unique(return_inverse=True)
    P = int(samples.prompt_mask[rows].sum(1).max())
    C = int(samples.mask[rows].sum(1).max())
    first = rows if n == 1 else prompts * n
    prompt_ids, prompt_mask = samples.prompt_ids[first, -P:], samples.prompt_mask[first, -P:]
    return prompt_ids, prompt_mask, None if n == 1 else owner, samples.ids[rows, :C], samples.mask[rows, :C]


def completion_states(model, prompt_ids, prompt_mask, owner, ids, mask):
    """The states from which the tokens of given completions are predicted: ids, mask [b, C], and prompts as `trim` gives them
    -> [b, C, width]. The state at a position predicts the token after it: those at the last prompt token and at all completion
    tokens but the last are wanted.

    A prompt is computed once for all its samples: its keys and values, with their gradient, are repeated as the sampler
    repeats them, and the completions go on from there. With a prompt of 100 tokens and 8 samples of 64 that halves the work."""
    if owner is None:
        inputs = torch.cat([prompt_ids, ids[:, :-1]], 1), torch.cat([prompt_mask, mask[:, :-1]], 1)
        return common.hidden_states(model, *inputs)[:, prompt_ids.shape[1] - 1 :]
    start, cache = common.prompt_states(model, prompt_ids, prompt_mask)  # [p, 1, width]
    cache.reorder_cache(owner)
    # also where all completions have one token, and nothing is left to compute: another process may have longer
    # ones, and sharded weights are gathered in as many forwards by all
    given = ids[:, : max(ids.shape[1] - 1, 1)]
    seen = torch.cat([prompt_mask[owner], mask[:, : given.shape[1]]], 1)
    states = common.hidden_states(model, given, seen, cache)
    return torch.cat([start[owner], states], 1)[:, : ids.shape[1]]


def logprobs_of(model, states, ids, mask, temperature, chunk=1024):
    """log pi(a_t | x, a_<t) of the tokens that `completion_states` leads to and, where a gradient is wanted, the policy's
    entropy at each of them (in nats, exact, itself without gradient) -> two times [b, C].

    The head turns states into logits a chunk at a time and is computed again in backward, so that [b, C, V] never
    exists; with 150,000 words it would be larger than the model."""
    states, targets = states[mask], ids[mask]  # [tokens, width], [tokens]: no work for padding

    def head(states, tokens):
        logits = common.logits_of(model, states)
        if temperature != 1:
            logits = logits / temperature  # as the sampler did; without it the ratio is not 1
        logprobs = logits.log_softmax(-1)
        chosen, entropy = logprobs.gather(-1, tokens[:, None])[:, 0], torch.zeros_like(logprobs[:, 0])
        if torch.is_grad_enabled():  # last: what backward computes again ends with what it needs
            entropy = -torch.linalg.vecdot(logprobs.detach().exp(), logprobs.detach())
        return chosen, entropy

    parts = [
        checkpoint(head, s, t, use_reentrant=False, preserve_rng_state=False)
        for s, t in zip(states.split(chunk), targets.split(chunk))
    ]
    logprobs, entropy = (torch.cat(x) for x in zip(*parts))
    empty = torch.zeros(mask.shape, device=mask.device)
    return empty.masked_scatter(mask, logprobs), empty.masked_scatter(mask, entropy)


def token_logprobs(model, prompt_ids, prompt_mask, owner, ids, mask, temperature, chunk=1024):
    """Both in one: log-probabilities and entropy of given completions, [b, C] each."""
    states = completion_states(model, prompt_ids, prompt_mask, owner, ids, mask)
    return logprobs_of(model, states, ids, mask, temperature, chunk)


@torch.no_grad()
def rollout_logprobs(model, samples, parts, n, temperature):
    """The log-probabilities [B, C] of a rollout without gradient, in the same micro-batches as the update will use:
    in bfloat16 they depend on a batch's shape, and the first ratio would be off by percents."""
    out = torch.zeros_like(samples.logprobs)
    for rows in parts:
        part = trim(samples, rows or [0], n)
        logprobs, _ = token_logprobs(model, *part, temperature)
        if rows:
            out[rows, : logprobs.shape[1]] = logprobs
    common.forget_forwards(model)
    return out


def values_of(head, states):
    """V of states [b, C, width] -> [b, C], in float32: bfloat16 has steps of 0.01 near 1."""
    return F.linear(states.float(), head.weight.float(), None if head.bias is None else head.bias.float())[..., 0]


@torch.no_grad()
def before_update(policy, trunk, head, samples, parts, n, temperature):
    """The rollout's log-probabilities and values, [B, C] each, without gradient. A shared critic's trunk is the policy, and one
    forward serves both."""
    old, values = torch.zeros_like(samples.logprobs), torch.zeros_like(samples.logprobs)
    for rows in parts:
        part = trim(samples, rows or [0], n)
        states = completion_states(policy, *part)
        logprobs, _ = logprobs_of(policy, states, *part[-2:], temperature)
        if trunk is not policy:
            states = completion_states(trunk, *part)
        if rows:
            C = logprobs.shape[1]
            old[rows, :C], values[rows, :C] = logprobs, values_of(head, states) * part[-1]
    return old, values


# -- Evaluation and logging ----------------------------------------------------------------------------------------


def evaluate(model, tokenizer, held_out, reward, args, world):
    """Greedy completions of held-out prompts -> {"eval/reward", "eval/exact"}; each process takes its share."""
    right = number if args.reward == "number" else exact
    mine, sums = held_out[world.rank :: world.size], [0.0] * 4  # sums: rewards, rows, right answers, rows with an answer
    drawn = args.prompts_per_step // world.size * args.samples_per_prompt  # completions of a rollout
    size = common.rows_at_once(held_out, args.max_new_tokens, drawn)
    for i in range(0, -(-len(held_out) // world.size), size):  # the same number of rounds on every process
        part = mine[i : i + size]
        ids, rows = zip(*(part or held_out[:1]))
        texts = common.sample(model, tokenizer, list(ids), max_new_tokens=args.max_new_tokens, temperature=0).texts
        values = reward(texts, rows)
        if part:
            known = [right(t, r) for t, r in zip(texts, rows) if isinstance(r.get("answer"), (str, int, float))]
            sums = [a + b for a, b in zip(sums, (sum(values), len(rows), sum(known), len(known)))]
    rewards, count, answered, known = common.all_sum(world, *sums)
    return {"eval/reward": rewards / count, **({"eval/exact": answered / known} if known else {})}


def advise(metrics, args, said):
    """What a person watching would want to be told, once each, with the flag that helps."""
    advice = {
        "truncated": (metrics["truncated"] > 0.5, "most completions are cut off: raise --max_new_tokens (or lower --max_prompt_tokens, where prompts fill the context), or ask for shorter answers with --system"),
        "reward": (metrics["reward"] == 0 and args.reward == "exact", "no completion was right: `exact` wants the answer and nothing else; --reward number takes a text's last number"),
        "ratio/first": (metrics.get("ratio/first", 0.0) > 1e-3, "the first ratio is not 1: the same weights gave a sample two probabilities; the model's forward is not deterministic"),
        "entropy": (metrics.get("entropy", 1.0) < 0.01, "entropy is near 0, the policy has settled: lower --learning_rate or raise --beta to keep it trying"),
        "kl/ref": (abs(metrics.get("kl/ref", 0.0)) > 100, "KL to the reference runs away: raise --beta or lower --learning_rate"),
        "value/explained": (metrics.get("value/explained", 0.0) < -1, "the critic is worse than a constant: lower --critic_learning_rate, or let it learn alone first with --critic_warmup"),
    }  # fmt: skip
    for name, (sounds, words) in advice.items():
        if sounds and name not in said:
            said.add(name)
            tqdm.write(f"warning: {words} ({name} {metrics[name]:.3g})")


# -- The loop ------------------------------------------------------------------------------------------------------


def train(args):
    args = resolve(args)
    world = common.start(args.device, args.dtype, args.seed)
    n, mine = args.samples_per_prompt, args.prompts_per_step // world.size  # mine: prompts of this process
    N = args.prompts_per_step * n  # samples of a step, over all processes
    if mine % args.minibatches or args.prompts_per_step % world.size:
        fail(f"--prompts_per_step {args.prompts_per_step} must be a multiple of --minibatches times the number of processes")

    # everything that can be wrong with the user's input is found here, before the policy is loaded or a file written
    config, date = common.policy_config(args.model), common.run_date(args, world)
    tokenizer = common.load_tokenizer(args.model, args.template_args, date)
    needs = f"--reward {args.reward}" if args.reward in ("exact", "number") else ""
    prompts = load_prompts(args.data, "--data", tokenizer, args, needs)
    held_out = load_prompts(args.eval_data, "--eval_data", tokenizer, args, needs)
    longest = max(len(ids) for ids, _ in prompts + held_out)
    args = common.fit_context(args, longest, config)
    separate, critic_path = args.critic == "separate" and args.steps > 0, args.model
    if separate and type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        fail(
            f"--critic separate: transformers has no sequence classifier for the family {config.model_type!r}; use --critic shared"
        )
    reward = load_reward(args.reward, world, date)
    if is_a_model(args.reward):
        args = common.fit_reward_model(args, tokenizer, prompts + held_out)
    if separate and is_a_model(args.reward):
        words = common.load_tokenizer(args.reward).get_vocab()
        room = common.context_of(common.read_config(args.reward))
        if tokenizer.get_vocab().items() <= words.items() and room >= longest + args.max_new_tokens:
            critic_path = args.reward  # it can read what the policy reads and writes, by its ids
    out = common.open_run(args, "ppo", world)
    stop_asked = common.catch_signals(args.steps)

    row, frozen = longest + args.max_new_tokens, (args.beta > 0) + is_a_model(args.reward)  # sized as the policy
    state = common.take_up(out, args, world)
    first, said = state["step"] if state else 0, set()
    writer, bar = common.introduce(out, args, world, tokenizer, prompts[0][0], first, learning=1 + separate, frozen=frozen)

    common.say(f"critic: {args.critic}" + f", from {critic_path}" * separate)
    with common.guarded(out, args, bar):
        policy = common.load_policy(args.model, world, args.gradient_checkpointing)
        reference = common.load_reference(args.model, world) if args.beta and args.steps else None
        if separate:
            # the head starts at 0: a reward model's head scores finished texts, and would be far off earlier in them
            critic = common.load_scalar(critic_path, world, tokenizer, 0.0, args.gradient_checkpointing)
            trunk, head = critic, common.scalar_head(critic)
        else:
            critic = torch.nn.Linear(policy.get_output_embeddings().weight.shape[1], 1, device=world.device)
            torch.nn.init.zeros_(critic.weight), torch.nn.init.zeros_(critic.bias)
            trunk, head = policy, critic
        # samples that share the computation of their prompt, in every model that learns
        learning = (policy, critic) if separate else (policy,)
        shared = n > 1 and args.steps and type(trunk.config) is type(policy.config)
        shared = shared and all(common.prompts_can_be_shared(m, world, args.gradient_checkpointing) for m in learning)
        together = n if shared else 1
        optimizer = common.make_optimizer(policy, args.learning_rate)
        critic_optimizer = common.make_optimizer(critic, args.critic_learning_rate)
        models, optimizers = {"policy": policy, "critic": critic}, {"policy": optimizer, "critic": critic_optimizer}
        if state:
            common.load_checkpoint(state, models, optimizers)
            del state

        def held_out_scores():
            return evaluate(policy, tokenizer, held_out, reward, args, world) if held_out else {}

        if first == 0:
            common.log(out, writer, 0, held_out_scores())

        for step in range(first + 1, args.steps + 1):
            began, warming = time.perf_counter(), step <= args.critic_warmup

            # 1. Rollout and scores.
            asked, rows = zip(*(prompts[i] for i in common.rows_of_step(len(prompts), step, args.prompts_per_step, world, args.seed)))
            samples = common.sample(
                policy, tokenizer, asked, n=n, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                seed=common.fold(args.seed, step, world.rank, common.DRAW),
            )  # fmt: skip
            scores = reward(samples.texts, [row for row in rows for _ in range(n)])
            rewards = torch.tensor(scores, device=world.device)  # [B]
            mask, sampled = samples.mask, time.perf_counter()

            # 2. Mini-batches (one optimizer update each) and their micro-batches (one forward each), cut once per rollout:
            #    old, new and reference log-probabilities of a row are computed in the same micro-batch, because in
            #    bfloat16 they depend on it.
            cut = torch.Generator().manual_seed(common.fold(args.seed, step, world.rank, common.CUT))
            minibatches, weights = [], torch.zeros_like(samples.logprobs)  # [B, C]
            for groups in torch.randperm(mine, generator=cut).view(args.minibatches, -1):
                index = (groups[:, None] * n + torch.arange(n)).flatten()  # the rows of these groups
                rows = index.tolist()
                parts = micro_batches(rows, samples.prompt_mask, mask, together, args.tokens_per_micro_batch, world)
                minibatches.append(parts)
                # equation (7)'s mean: divided by the tokens of the whole update, over its micro-batches and processes
                weights[index] = mask[index] / common.all_sum(world, mask[index].sum())[0]
            every_part = [part for parts in minibatches for part in parts]
            shuffles = [random.Random(common.fold(args.seed, step, epoch, common.PASS)) for epoch in range(args.epochs)]
            updates = [parts for s in shuffles for parts in s.sample(minibatches, args.minibatches)]

            # 3. What the rollout's policy, the critic and the reference say before any update.
            old, values = before_update(policy, trunk, head, samples, every_part, together, args.temperature)  # [B, C]
            kl = torch.zeros_like(old)
            if reference:
                kl = (old - rollout_logprobs(reference, samples, every_part, together, args.temperature)) * mask  # k1

            # 4. Advantages and returns, equations (1) to (3). Returns first: the critic learns rewards, not whitened numbers.
            scores = rewards - args.missing_eos_penalty * ~samples.finished  # [B]
            paid = token_rewards(scores, kl, mask, args.beta)  # [B, C]
            advantages, returns = gae(paid, values, mask, args.gamma, args.lam)
            knows = explained(values, gae(paid, values, mask, args.gamma, 1.0)[1], mask, world)  # lam 1: what really came
            if args.whiten:
                advantages = whiten(advantages, mask, world)

            # 5. Update, equations (4) to (7). The policy's schedule begins when the critic's warm-up is over.
            rate, critic_rate = (
                common.learning_rate_at(step - waited, args.steps - waited, peak, args.schedule, args.warmup)
                for peak, waited in ((args.learning_rate, args.critic_warmup), (args.critic_learning_rate, 0))
            )
            optimizer.param_groups[0]["lr"], critic_optimizer.param_groups[0]["lr"] = rate, critic_rate
            norms, critic_norms, passes = [], [], 0
            first_ratio, sums = torch.zeros(1, device=world.device), collections.defaultdict(float)
            for parts in updates:
                moved_before = sums["kl/old"] + 0.0  # a copy
                for part in parts:
                    real, part = bool(part), part or [0]  # no rows are left here, but elsewhere: row 0 with weight 0
                    inputs = trim(samples, part, together)
                    with torch.set_grad_enabled(not warming):
                        states = completion_states(policy, *inputs)  # [b, C, width]
                        logprobs, entropy = logprobs_of(policy, states, *inputs[-2:], args.temperature)  # [b, C]
                    C, part_mask = logprobs.shape[1], inputs[-1] * real
                    w, before = weights[part, :C] * real, old[part, :C]
                    loss, ratio, low, high = clipped_loss(
                        logprobs - before, advantages[part, :C], part_mask, w, args.clip_low, args.clip_high
                    )
                    if separate:  # policy first, then critic: never the activations of both
                        if not warming:
                            loss.backward()
                        states = completion_states(trunk, *inputs)
                    v_loss = value_loss(values_of(head, states), values[part, :C], returns[part, :C], w, args.value_clip)
                    (args.value_coef * v_loss + (0.0 if separate else loss)).backward()
                    with torch.no_grad():
                        if not norms:
                            first_ratio = torch.maximum(first_ratio, ((ratio - 1).abs() * part_mask).max())
                        sums["loss"] += loss.double()
                        sums["value/loss"] += v_loss.double()
                        seen = {
                            "tokens": torch.ones_like(ratio), "entropy": entropy, "ratio/mean": ratio, "clip/low": low,
                            "clip/high": high, "kl/old": moved_by(logprobs, before),
                            "kl/sample": (before - samples.logprobs[part, :C]).abs(),
                        }  # fmt: skip
                        for name, x in seen.items():
                            sums[name] += (x * part_mask).sum().double()
                passes += 1
                if args.kl_stop and norms:
                    moved = common.all_sum(world, sums["kl/old"] - moved_before)[0] / (N / args.minibatches)
                    if moved > args.kl_stop:
                        policy.zero_grad(), critic.zero_grad()
                        break
                norms.append(common.clip_gradients(policy, args.max_grad_norm))
                if not separate and world.size > 1:
                    for p in critic.parameters():  # this head is not sharded, so nobody else adds its gradients up
                        torch.distributed.all_reduce(p.grad)
                critic_norms.append(common.clip_gradients(critic, args.max_grad_norm))
                if not math.isfinite(norms[-1] + critic_norms[-1]):
                    both = f"policy {norms[-1]}, critic {critic_norms[-1]}"
                    raise common.Stop(f"step {step}: a gradient is not finite ({both}), so no step was taken with it")
                if not warming:
                    optimizer.step()
                critic_optimizer.step()
                policy.zero_grad(), critic.zero_grad()

            # 6. Log: sums over all processes first, then means.
            now = time.perf_counter()
            sums |= {"reward": rewards.sum(), "kl/ref": kl.sum(), "length": mask.sum(), "cut": (~samples.finished).sum()}
            sums["returns"] = returns.sum()
            s = dict(zip(sums, common.all_sum(world, *sums.values())))
            metrics = {
                "reward": s["reward"] / N, "kl/penalty": args.beta * s["kl/ref"] / N if reference else None,
                "loss": s["loss"] / passes, "value/loss": s["value/loss"] / passes, "value/explained": knows,
                "returns": s["returns"] / s["length"], "kl/ref": s["kl/ref"] / N if reference else None,
                "kl/old": s["kl/old"] / passes / (N / args.minibatches), "kl/sample": s["kl/sample"] / s["tokens"],
                "ratio/first": common.all_gather(world, first_ratio).max().item(), "ratio/mean": s["ratio/mean"] / s["tokens"],
                "clip/low": s["clip/low"] / s["tokens"], "clip/high": s["clip/high"] / s["tokens"],
                "entropy": None if warming else s["entropy"] / s["tokens"], "updates": len(norms),
                "grad_norm": sum(norms) / len(norms), "value/grad_norm": sum(critic_norms) / len(norms),
                "learning_rate": rate, "value/learning_rate": critic_rate, "length": s["length"] / N, "truncated": s["cut"] / N,
                "time/sample": sampled - began, "time/train": now - sampled, "tokens_per_second": s["length"] / (now - began),
                "memory_gib": common.memory_used(world) / 2**30,
            }  # fmt: skip
            metrics = {name: value for name, value in metrics.items() if value is not None}  # None: not measured
            if step % args.eval_every == 0 or step == args.steps:
                metrics |= held_out_scores()
            text = tokenizer.decode(asked[0])
            of_the_first = zip(samples.texts[:n], rewards[:n].tolist())
            shown = [{"prompt": text, "completion": t, "reward": r} for t, r in of_the_first]
            common.log(out, writer, step, metrics, shown)
            if bar:
                advise(metrics, args, said)
                told = f", kl {metrics['kl/ref']:.2f}" if reference else ""
                bar.set_postfix_str(f"reward {metrics['reward']:.3f}{told}, {metrics['tokens_per_second']:,.0f} tokens/s")
                bar.update()

            # 7. Save. A signal to end (Ctrl-C, a cluster that wants its machine back) waits for this place.
            ending = common.all_sum(world, stop_asked())[0] > 0
            if step % args.save_every == 0 or step == args.steps or ending:
                common.save_checkpoint(out, world, step, models, optimizers, args.keep)
            if ending and step < args.steps:
                raise common.Ended(f"stopped by a signal after step {step} of {args.steps}, which is saved")

        if args.steps:
            common.save_model(policy, tokenizer, out / "model", world)
    use = common.usage(out, tokenizer, prompts[0][1]["prompt"], args)
    common.conclude(out, args, writer, bar, use)


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__.partition("\n")[0], use_underscores=True))
