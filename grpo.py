"""GRPO, Group Relative Policy Optimization: PPO whose critic is the group.

A policy pi draws G completions y_1 .. y_G of a prompt x, and each is paid r_i. What is good is what is better than its
siblings: the group's mean is the baseline that PPO learns a second network for.

    (1)  A_i = (r_i - mean(r_1 .. r_G)) / (std(r_1 .. r_G) + 1e-4)           the same for every token -> `group_advantages`
    (2)  rho_t = pi(a_t | x, a_<t) / pi_old(a_t | x, a_<t)                   pi_old drew the samples
    (3)  l_t = -min( rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A ) + beta k3_t        -> `clipped_loss`
    (4)  k3_t = exp(-d) - 1 + d,    d = log pi(a_t | ...) - log ref(a_t | ...)                -> `k3`
    (5)  loss = sum over tokens of w_t l_t                                     w_t: `--aggregate` -> `token_weights`

The ratio lets a rollout serve several updates; the clip ends a token's say once the update has moved it far enough. With
one update per rollout, the default, the ratio is 1, nothing is ever clipped, and the gradient is REINFORCE's with (1) for a
weight. The loss is then -sum_i A_i |y_i| / sum_i |y_i|, how much longer bad answers are than good ones: it says nothing
about learning, and is exactly 0 where all have one length. Watch the reward.

Later variants, as flags (those that change the ratio or the clip act only with several updates per rollout):

    GRPO as published (DeepSeekMath)  --aggregate sequence --beta 0.04    a mean over each completion, then over completions
    DAPO                              --drop_equal_groups --mask_truncated --clip_high 0.28 --minibatches 4
    Dr. GRPO                          --scale none --aggregate constant   nothing is divided by what was sampled
    GSPO                              --ratio sequence --minibatches 4    one ratio for a completion, and a mean over its tokens

    python grpo.py                                                  # the embedded model learns to sort; no download
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data gsm8k_train.jsonl --eval_data gsm8k_test.jsonl --reward number
    torchrun --nproc_per_node 8 grpo.py --model ... --data ... --reward my_reward.py:score

What is biased here, and by whom: dividing by the group's std multiplies a prompt's gradient by 1 / sqrt(p (1 - p)), p its
share of right answers, so very easy and very hard prompts weigh more than they do in E[r] (Dr. GRPO leaves the division
out). The mean contains the sample itself, which by itself only shrinks the gradient, by 1 - 1/G. k3 in the loss
has the KL as its mean but not the KL's gradient; it is kept as published, and the unbiased way, k1 in the reward, is in
reinforce.py. pi_old in (2) is what the trainer's own forward says of the weights that drew the samples; the sampler's
numbers differ from it by rounding (`kl/sample`, for 135M parameters: 8e-6 in float32, 0.04 in bfloat16).

Left out: a critic and per-token credit (ppo.py); rewards for the steps of an answer, or for shorter ones; sampling that
runs ahead of the update.

Shao et al. 2024 (GRPO); Schulman et al. 2017 (the clip); Liu et al. 2025 (Dr. GRPO); Yu et al. 2025 (DAPO); Zheng et al. 2025
(GSPO); Chen et al. 2021 (pass@k).
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

import common
from common import fail

TINY = Path(__file__).resolve().parent / "tests" / "tiny"  # the embedded model and its task
REDRAWS = 3  # how often --drop_equal_groups draws new prompts in one step, at most


@dataclass
class Args:
    # --- task ---
    model: str = str(TINY / "model")
    """folder or hub name of the causal language model to train"""
    data: str = str(TINY / "sort_train.jsonl")
    """prompts to learn from: JSON lines with "prompt" (or "question") and, for most rewards, "answer" """
    eval_data: str | None = None
    """held-out prompts, as --data; None: the embedded task has its own, other data none"""
    eval_samples: int = 0
    """also draw this many completions of each held-out prompt and log eval/pass@K, the chance that one of K is right
    (by the rule of --reward number where that is the reward, else of exact)"""
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
    prompts_per_step: int = 32
    """prompts in a rollout, drawn from --data again and again; a step is one rollout with all its updates"""
    samples_per_prompt: int = 8
    """completions drawn for each prompt: the group"""
    max_new_tokens: int = 256
    """a completion is cut here; at most what the model's context has room for"""
    temperature: float = 1.0
    """of sampling, and of every log-probability: the policy is softmax(logits / temperature)"""
    scale: Literal["group", "batch", "none"] = "group"
    """divide advantages by the standard deviation of the group's rewards, of the batch's, or not at all"""
    keep_max: bool = False
    """learn from each group's best samples only (all that tie)"""
    drop_equal_groups: bool = False
    """draw new prompts in place of groups whose rewards are all equal, which teach nothing (at most 3 times a step)"""
    mask_truncated: bool = False
    """leave completions that were cut at --max_new_tokens out of the loss; the group's mean still counts their rewards"""
    ratio: Literal["token", "sequence"] = "token"
    """importance ratio of each token, or their geometric mean over the completion"""
    clip_low: float | None = None
    """the ratio is clipped below 1 minus this (None: 0.2, and 3e-4 with --ratio sequence)"""
    clip_high: float | None = None
    """the ratio is clipped above 1 plus this (None: 0.2, and 4e-4 with --ratio sequence)"""
    aggregate: Literal["sequence", "token", "constant"] | None = None
    """what a token's loss is divided by.
    sequence: its completion's length, and the number of completions (as published; None means this with --ratio sequence);
    token: the number of all tokens of the optimizer update (DAPO; None means this otherwise);
    constant: completions x --max_new_tokens (Dr. GRPO)"""
    beta: float = 0.0
    """weight of the KL penalty, k3 in the loss; at 0 no reference model is loaded"""
    ref_update_every: int = 0
    """steps after which the reference becomes the policy of that moment; 0: it stays the first"""

    # --- optimisation ---
    steps: int = 400
    """rollouts in all; 0 evaluates only"""
    learning_rate: float | None = None
    """AdamW's step size (None: 1e-6, and 2e-4 for the embedded model, which is small and wants more)"""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """what becomes of the learning rate after the warm-up"""
    warmup: int = 10
    """steps over which the learning rate rises"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    epochs: int = 1
    """passes over a rollout"""
    minibatches: int = 1
    """optimizer updates in a pass"""
    tokens_per_micro_batch: int | None = None
    """tokens, padding included, in one forward and backward (None: 8192 on a GPU, 2048 on a CPU).
    Lower it when memory runs out; up to rounding, results do not change"""
    gradient_checkpointing: bool = False
    """keep less for the backward pass and compute it twice: less memory, more time (prompts are then not shared)"""

    # --- run ---
    out: str = ""
    """the run's folder (empty: runs/grpo, then runs/grpo-2, ...)"""
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
    gspo = args.ratio == "sequence"
    tiny_model, tiny_data = Path(args.model).resolve() == TINY / "model", Path(args.data).resolve().parent == TINY
    defaults = {
        "clip_low": 3e-4 if gspo else 0.2,
        "clip_high": 4e-4 if gspo else 0.2,
        "aggregate": "sequence" if gspo else "token",
        "learning_rate": 2e-4 if tiny_model else 1e-6,
        "tokens_per_micro_batch": 2048 if args.device == "cpu" or not torch.cuda.is_available() else 8192,
        "eval_data": str(TINY / "sort_test.jsonl") if tiny_data else "",
    }
    args = dataclasses.replace(args, **{k: v for k, v in defaults.items() if getattr(args, k) is None})
    common.check_flags(args)
    if args.samples_per_prompt < 2:
        fail("--samples_per_prompt must be 2 or more: a sample is compared with the others of its prompt")
    if gspo and args.aggregate != "sequence":
        fail(f"--ratio sequence is one ratio a completion, so long ones would count for more with --aggregate {args.aggregate}")
    if not 0 <= args.clip_low <= 1 or args.clip_high < 0:
        fail("--clip_low must be from 0 to 1, and --clip_high 0 or more")
    if args.ref_update_every and not args.beta:
        fail("--ref_update_every moves the reference, which there is only with a --beta above 0")
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
        return common.together(common.load_scorer(spec, world, date), world)
    rules = {"exact": exact, "number": number}
    return common.together(common.checked(rules.get(spec) or common.load_function(spec, "--reward")), world)


# -- The math: from rewards to a loss ------------------------------------------------------------------------------


def group_advantages(rewards, everyone, n, scale, keep_max):
    """Equation (1): rewards [B], n to a prompt, everyone [all B] those of all processes -> [B].

    A group of equal rewards has exactly 0: the mean of eight rewards of 1000.1 is not 1000.1 in floating point, and the
    difference over a spread of nearly 0 would be an advantage made of nothing but rounding."""
    groups = rewards.view(-1, n)
    A = groups - groups.mean(1, keepdim=True)
    if scale != "none":
        A = A / ((groups.std(1, keepdim=True) if scale == "group" else everyone.std()) + 1e-4)
    best = groups.amax(1, keepdim=True)
    A = A.masked_fill(best == groups.amin(1, keepdim=True), 0.0)
    if keep_max:
        A = A * (groups == best)
    return A.flatten()


def has_gradient(factors):
    """factors [b, C], what the gradient of each token's log-probability is multiplied by -> [b], on the CPU: false for a row whose
    factors are all exactly 0. Its forward and backward would be time lost, so it is left out of the micro-batches; what a loss
    is divided by counts it all the same."""
    return (factors != 0).any(1).cpu()


def token_weights(mask, aggregate, longest, world):
    """Equation (5)'s w [b, C] for the samples of one optimizer step, mask [b, C]; the counts are over all processes, and taken
    here, before the step is cut into micro-batches, so every cut has the same gradient.

        sequence  1 / (K |y|)       K completions that are not left out; as published: each counts the same, so a token of a
                                    short one counts for more.
                                    Where A > 0 that favours short answers; where A < 0 it favours long ones, whose tokens are
                                    each punished less, and wrong answers grow (lengths rise while nothing is learnt)
        token     1 / (sum of |y|)  every token counts the same (DAPO)
        constant  1 / (N longest)   the same up to a factor that does not depend on the samples (Dr. GRPO): the only one of
                                    the three that is E[A grad log pi] of whole completions, times a number
    """
    length = mask.sum(1, keepdim=True)  # [b, 1]
    K, tokens, N = (max(x, 1.0) for x in common.all_sum(world, (length > 0).sum(), length.sum(), len(mask)))
    return mask / {"sequence": K * length.clamp(min=1), "token": tokens, "constant": N * longest}[aggregate]


def sequence_logratio(logratio, mask):
    """GSPO: the mean of a completion's log-ratios for each of its tokens, [b, C]. Its exp is their geometric mean."""
    return ((logratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(logratio)


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


def k3(logprobs, ref_logprobs):
    """Equation (4), [b, C]: never negative, and at each prefix its mean over the policy's own tokens is KL(pi || ref). But
    the mean of its gradient is that of the KL the other way round, KL(ref || pi); near the reference the two are alike.
    (Multiplied by the ratio, its gradient included, it would be that of KL(pi || ref) itself: DeepSeek-V3.2, and TRL unless
    told otherwise.)"""
    d = (logprobs - ref_logprobs).clamp(-20, 20)
    return (-d).exp() - 1 + d


def moved_by(logprobs, old_logprobs):
    """KL(pi_old || pi), estimated on tokens of pi_old: ratio - 1 - log ratio, never negative, and its mean over them is the KL.
    expm1, because in float32 exp(d) - 1 of a small d is mostly rounding."""
    d = (logprobs - old_logprobs).clamp(-20, 20)
    return torch.expm1(d) - d


def equal_groups(rewards, n):
    """Whose rewards are all the same, [prompts]."""
    return rewards.view(-1, n).amax(1) == rewards.view(-1, n).amin(1)


def fill_in(samples, rewards, more, scores, n):
    """Puts groups of `more` that have something to teach in the place of those of `samples` that have not."""
    index = torch.arange(len(rewards), device=rewards.device).view(-1, n)
    fresh = len(rewards) + torch.arange(len(scores), device=rewards.device).view(-1, n)[~equal_groups(scores, n)]
    places = equal_groups(rewards, n).nonzero()[: len(fresh), 0]
    index[places] = fresh[: len(places)]
    index = index.flatten()

    def join(name):
        a, b = getattr(samples, name), getattr(more, name)
        if name == "texts":
            both = a + b
            return [both[i] for i in index.tolist()]  # of a tensor, each i would wait for the GPU
        if a.ndim == 2:  # prompts are padded on the left; which id pads does not matter, masks come from lengths
            width, left = max(a.shape[1], b.shape[1]), name.startswith("prompt")
            a, b = (F.pad(x, (width - x.shape[1], 0) if left else (0, width - x.shape[1])) for x in (a, b))
        return torch.cat([a, b])[index]

    return dataclasses.replace(samples, **{name: join(name) for name in vars(samples) if name != "group"}), torch.cat([rewards, scores])[index]


def pass_at_k(n, right, k):
    """The chance that at least one of k completions is right, of n of which `right` were: 1 - C(n - right, k) / C(n, k). To
    look at the first k only would be unbiased too, and noisier; 1 - (1 - right/n)^k is biased."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


# -- Log-probabilities: one forward with the completion given ------------------------------------------------------


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


# -- Evaluation and logging ----------------------------------------------------------------------------------------


def evaluate(model, tokenizer, held_out, reward, args, world):
    """Greedy completions of held-out prompts -> {"eval/reward", "eval/exact"}, and with --eval_samples "eval/pass@K"; each
    process takes its share."""
    right, n = number if args.reward == "number" else exact, args.eval_samples
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, n) if 0 < k <= n})
    mine, sums = held_out[world.rank :: world.size], [0.0] * (4 + len(ks))
    drawn = args.prompts_per_step // world.size * args.samples_per_prompt  # completions of a rollout
    size = max(common.rows_at_once(held_out, args.max_new_tokens, drawn) // max(n, 1), 1)
    for i in range(0, -(-len(held_out) // world.size), size):  # the same number of rounds on every process
        part = mine[i : i + size]
        ids, rows = zip(*(part or held_out[:1]))
        texts = common.sample(model, tokenizer, list(ids), max_new_tokens=args.max_new_tokens, temperature=0).texts
        values, known = reward(texts, rows), [isinstance(r.get("answer"), (str, int, float)) for r in rows]
        seen = [sum(values), len(rows), sum(right(t, r) for t, r, k in zip(texts, rows, known) if k), sum(known)]
        if n:
            seed = common.fold(args.seed, i, world.rank, common.EVAL)  # of the place alone: before and after draw alike
            texts = common.sample(model, tokenizer, list(ids), n=n, max_new_tokens=args.max_new_tokens,
                                  temperature=args.temperature, seed=seed).texts  # fmt: skip
            hits = [sum(right(t, r) for t in texts[j * n : j * n + n]) for j, r in enumerate(rows) if known[j]]
            seen += [sum(pass_at_k(n, int(c), k) for c in hits) for k in ks]
        if part:
            sums = [a + b for a, b in zip(sums, seen)]
    rewards, count, answered, known, *passed = common.all_sum(world, *sums)
    scores = {"eval/reward": rewards / count}
    if known:
        scores |= {"eval/exact": answered / known} | {f"eval/pass@{k}": p / known for k, p in zip(ks, passed)}
    return scores


def advise(metrics, args, said):
    """What a person watching would want to be told, once each, with the flag that helps."""
    advice = {
        "truncated": (metrics["truncated"] > 0.5, "most completions are cut off: raise --max_new_tokens (or lower --max_prompt_tokens, where prompts fill the context), or ask for shorter answers with --system"),
        "reward": (metrics["reward"] == 0 and args.reward == "exact", "no completion was right: `exact` wants the answer and nothing else; --reward number takes a text's last number"),
        "equal_groups": (metrics["equal_groups"] > 0.8, "most prompts' samples all score the same, so little is learnt: use prompts of middling difficulty, or raise --samples_per_prompt"),
        "ratio/first": (metrics.get("ratio/first", 0.0) > 1e-3, "the first ratio is not 1: the same weights gave a sample two probabilities; the model's forward is not deterministic"),
        "entropy": (metrics.get("entropy", 1.0) < 0.01, "entropy is near 0, the policy has settled: lower --learning_rate or raise --beta to keep it trying"),
        "kl/ref": (abs(metrics.get("kl/ref", 0.0)) > 100, "KL to the reference runs away: raise --beta or lower --learning_rate"),
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
    config, date = common.policy_config(args.model), common.began(args, world)
    tokenizer = common.load_tokenizer(args.model, args.template_args, date)
    needs = f"--reward {args.reward}" if args.reward in ("exact", "number") else ""
    prompts = load_prompts(args.data, "--data", tokenizer, args, needs)
    held_out = load_prompts(args.eval_data, "--eval_data", tokenizer, args, needs or "--eval_samples" * bool(args.eval_samples))
    longest = max(len(ids) for ids, _ in prompts + held_out)
    args = common.fit_context(args, longest, config)
    reward = load_reward(args.reward, world, date)
    if is_a_model(args.reward):
        args = common.fit_reward_model(args, tokenizer, prompts + held_out)
    out = common.open_run(args, "grpo", world)
    stop_asked = common.catch_signals(args.steps)

    row, frozen = longest + args.max_new_tokens, (args.beta > 0) + is_a_model(args.reward)
    state = common.take_up(out, args, world)
    first, said = state["step"] if state else 0, set()
    writer, bar = common.introduce(out, args, world, tokenizer, prompts[0][0], first, frozen=frozen)

    if args.steps and args.ratio == "sequence" and args.epochs * args.minibatches == 1:
        common.say("note: with one update a rollout every ratio is 1 (this is --aggregate sequence); for GSPO, --minibatches 4")

    with common.guarded(out, args, bar):
        policy = common.load_policy(args.model, world, args.gradient_checkpointing)
        # samples that share the computation of their prompt
        shared = n > 1 and args.steps and common.prompts_can_be_shared(policy, world, args.gradient_checkpointing)
        together = n if shared else 1
        reference = common.load_reference(args.model, world) if args.beta and args.steps else None
        optimizer = common.make_optimizer(policy, args.learning_rate)
        kept = {"policy": policy}  # what a checkpoint holds
        if reference and args.ref_update_every:
            kept["reference"] = reference
        if state:
            common.load_checkpoint(state, kept, {"policy": optimizer})
            del state

        def held_out_scores():
            return evaluate(policy, tokenizer, held_out, reward, args, world) if held_out else {}

        def draw(picked, *stream):
            """n completions of each of these prompts, and their scores."""
            samples = common.sample(
                policy, tokenizer, [prompts[i][0] for i in picked], n=n, max_new_tokens=args.max_new_tokens,
                temperature=args.temperature, seed=common.fold(args.seed, *stream, world.rank, common.DRAW),
            )  # fmt: skip
            scores = reward(samples.texts, [prompts[i][1] for i in picked for _ in range(n)])
            return samples, torch.tensor(scores, device=world.device)

        if first == 0:
            common.log(out, writer, 0, held_out_scores())

        for step in range(first + 1, args.steps + 1):
            began = time.perf_counter()

            # 1. Rollout and scores.
            picked = common.rows_of_step(len(prompts), step, args.prompts_per_step, world, args.seed)
            samples, rewards = draw(picked, step)  # rewards [B]
            drawn, tokens_drawn = [rewards], samples.mask.sum()

            # 1b. DAPO: groups that would teach nothing make room for those of other prompts, from a sequence of their own.
            for again in range(1, REDRAWS + 1) if args.drop_equal_groups else ():
                equal = equal_groups(rewards, n)  # [prompts]
                if not common.all_sum(world, equal.sum())[0]:
                    break
                seed, number = common.fold(args.seed, common.AGAIN), step * REDRAWS + again + 1
                others = common.rows_of_step(len(prompts), number, args.prompts_per_step, world, seed)
                count = max(int(equal.sum()), 1)  # at least one, so that all processes sample together
                more, scores = draw(others[:count], step, again)
                drawn, tokens_drawn = [*drawn, scores], tokens_drawn + more.mask.sum()
                samples, rewards = fill_in(samples, rewards, more, scores, n)
            mask, sampled = samples.mask, time.perf_counter()

            # 2. Advantages, equation (1): a number for each completion.
            advantages = group_advantages(rewards, common.all_gather(world, rewards), n, args.scale, args.keep_max)  # [B]

            # 3. Mini-batches (one optimizer update each) and their micro-batches (one forward each), cut once per rollout:
            #    old, new and reference log-probabilities of a row are computed in the same micro-batch, because in
            #    bfloat16 they depend on it. Rows that have no gradient are in no micro-batch: those of weight 0 and, without a
            #    KL penalty, those of advantage 0.
            cut = torch.Generator().manual_seed(common.fold(args.seed, step, world.rank, common.CUT))
            trained = mask & samples.finished[:, None] if args.mask_truncated else mask
            minibatches, weights = [], torch.zeros_like(samples.logprobs)  # [B, C]
            for groups in torch.randperm(mine, generator=cut).view(args.minibatches, -1):
                index = (groups[:, None] * n + torch.arange(n)).flatten()  # the rows of these groups
                weights[index] = token_weights(trained[index], args.aggregate, args.max_new_tokens, world)
                factors = weights[index] if reference else weights[index] * advantages[index, None]
                rows = index[has_gradient(factors)].tolist()
                parts = micro_batches(rows, samples.prompt_mask, mask, together, args.tokens_per_micro_batch, world)
                minibatches.append(parts)
            every_part = [part for parts in minibatches for part in parts]
            shuffles = [random.Random(common.fold(args.seed, step, epoch, common.PASS)) for epoch in range(args.epochs)]
            updates = [parts for s in shuffles for parts in s.sample(minibatches, args.minibatches)]

            # 4. Log-probabilities before the update. With one update nobody asks for the old ones: those of the update
            #    itself, taken as constants, are the same numbers and cost nothing.
            many = len(updates) > 1
            old = rollout_logprobs(policy, samples, every_part, together, args.temperature) if many else None  # [B, C]
            ref = rollout_logprobs(reference, samples, every_part, together, args.temperature) if reference else None

            # 5. Update, equations (2) to (5). `weights` hold the division by the counts of the whole optimizer update.
            #    Without a row that has a gradient, on any process, there is none.
            rate = common.learning_rate_at(step, args.steps, args.learning_rate, args.schedule, args.warmup)
            optimizer.param_groups[0]["lr"] = rate
            norms, first_ratio, sums = [], torch.zeros(1, device=world.device), collections.defaultdict(float)
            sums["loss"] = sums["tokens"] = sums["rows"] = 0.0
            for parts in filter(None, updates):
                for part in parts:
                    real, part = bool(part), part or [0]  # no rows are left here, but elsewhere: row 0 with weight 0
                    inputs = trim(samples, part, together)
                    logprobs, entropy = token_logprobs(policy, *inputs, args.temperature)  # [b, C]
                    C, part_mask = logprobs.shape[1], inputs[-1] * real
                    w, before = weights[part, :C] * real, logprobs.detach() if old is None else old[part, :C]
                    logratio, A = logprobs - before, advantages[part, None]  # [b, C], [b, 1]
                    if args.ratio == "sequence":
                        logratio = sequence_logratio(logratio, part_mask)
                    loss, ratio, low, high = clipped_loss(logratio, A, part_mask, w, args.clip_low, args.clip_high)
                    kl = torch.zeros_like(before)
                    if reference:
                        loss = loss + args.beta * (k3(logprobs, ref[part, :C]) * w).sum()
                        kl = before - ref[part, :C]  # k1, of the policy that drew the samples
                    loss.backward()
                    with torch.no_grad():
                        if not norms:
                            first_ratio = torch.maximum(first_ratio, ((ratio - 1).abs() * part_mask).max())
                        sums["loss"] += loss.double()
                        sums["rows"] += len(part) * real
                        seen = {
                            "tokens": torch.ones_like(ratio), "entropy": entropy, "ratio/mean": ratio, "kl/old": moved_by(logprobs, before),
                            "kl/sample": (before - samples.logprobs[part, :C]).abs(), "kl/ref": kl,
                            "clip/low": low, "clip/high": high,
                        }  # fmt: skip
                        for name, x in seen.items():
                            sums[name] += (x * part_mask).sum().double()
                norms.append(common.clip_gradients(policy, args.max_grad_norm))
                if not math.isfinite(norms[-1]):
                    raise common.Stop(f"step {step}: the gradient is {norms[-1]}, so no step was taken with it")
                optimizer.step()
                optimizer.zero_grad()
            if args.ref_update_every and step % args.ref_update_every == 0:
                common.copy_weights(policy, reference)

            # 6. Log: sums over all processes first, then means. Rewards are those of everything drawn, dropped groups too;
            #    what the update's forward says (kl, ratio, clip, entropy) is of the rows that were trained, if there were any.
            now, scores = time.perf_counter(), torch.cat(drawn)
            sums |= {"reward": scores.sum(), "drawn": len(scores), "equal": equal_groups(scores, n).sum() * n}
            sums |= {"length": mask.sum(), "cut": (~samples.finished).sum(), "tokens_drawn": tokens_drawn}
            s = dict(zip(sums, common.all_sum(world, *sums.values())))
            metrics = {
                "reward": s["reward"] / s["drawn"], "loss": s["loss"] / len(updates),
                "ratio/first": common.all_gather(world, first_ratio).max().item() if many and s["rows"] else None,
                "grad_norm": sum(norms) / len(updates), "learning_rate": rate, "length": s["length"] / N, "truncated": s["cut"] / N,
                "equal_groups": s["equal"] / s["drawn"], "time/sample": sampled - began, "time/train": now - sampled,
                "tokens_per_second": s["tokens_drawn"] / (now - began), "memory_gib": common.memory_used(world) / 2**30,
            }  # fmt: skip
            if s["rows"]:
                metrics |= {k: s[k] / s["rows"] for k in ("kl/ref", "kl/old") if k != "kl/ref" or reference}
                metrics |= {k: s[k] / s["tokens"] for k in ("kl/sample", "ratio/mean", "clip/low", "clip/high", "entropy")}
            metrics = {name: value for name, value in metrics.items() if value is not None}  # None: nothing was compared
            if step % args.eval_every == 0 or step == args.steps:
                metrics |= held_out_scores()
            text = tokenizer.decode(samples.prompt_ids[0][samples.prompt_mask[0]])
            of_the_first = zip(samples.texts[:n], rewards[:n].tolist())
            shown = [{"prompt": text, "completion": t, "reward": r} for t, r in of_the_first]
            common.log(out, writer, step, metrics, shown)
            if bar:
                advise(metrics, args, said)
                told = f", kl {metrics['kl/ref']:.2f}" if "kl/ref" in metrics else ""
                bar.set_postfix_str(f"reward {metrics['reward']:.3f}{told}, {metrics['tokens_per_second']:,.0f} tokens/s")
                bar.update()

            # 7. Save. A signal to end (Ctrl-C, a cluster that wants its machine back) waits for this place.
            ending = common.all_sum(world, stop_asked())[0] > 0
            if step % args.save_every == 0 or step == args.steps or ending:
                common.save_checkpoint(out, world, step, kept, {"policy": optimizer}, args.keep)
            if ending and step < args.steps:
                raise common.Ended(f"stopped by a signal after step {step} of {args.steps}, which is saved")

        if args.steps:
            common.save_model(policy, tokenizer, out / "model", world)
    use = common.usage(out, tokenizer, prompts[0][1]["prompt"], args)
    common.conclude(out, args, writer, bar, use)


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__.partition("\n")[0], use_underscores=True))
