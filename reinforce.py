"""REINFORCE for language models: make likely what scored well.

A policy pi(y | x) completes a prompt x with y = (a_1, ..., a_T) and is paid r(x, y) for the whole of it. We want

    (1)  max over pi of  J = E[ r(x, y) ] - beta KL(pi || ref),        KL = E[ log pi(y|x) - log ref(y|x) ]

that is, more reward without leaving the model that we started from, `ref`, further than beta allows: rewards can be
gamed, and a policy that has collapsed onto one answer is of little use. y is drawn, so r(x, y) has no gradient in the
weights; its *probability* has. The log-derivative trick, grad pi = pi grad log pi, turns the gradient of an
expectation into the expectation of a gradient, which samples can estimate:

    (2)  grad E[r] = sum_y grad pi(y|x) r(x, y) = E[ r(x, y) grad log pi(y|x) ]
    (3)  log pi(y|x) = sum_t log pi(a_t | x, a_1 .. a_{t-1})

So: draw n completions, weigh the log-probability of each by its reward, sum over tokens, average over completions.
That is the estimator. It is right on average and very noisy, and the rest of this file is about the noise:

    (4)  a token cannot have caused rewards before it: weigh it by the reward to come, G_t = sum_{s >= t} gamma^(s-t) r_s.
         The KL is paid token by token, r_t = -beta (log pi(a_t) - log ref(a_t)), the score with the last token. With
         gamma 1 and beta 0, G_t is the score for every t, and (4) is (2).    -> `token_rewards`, `rewards_to_go`
    (5)  E[b grad log pi] = 0 for every b that does not depend on y, so a baseline may be subtracted, A_t = G_t - b, and
         what remains is how much better than usual it went. Where all rewards are near 100, every
         sample used to say "more of this"; now half of them say "less".                   -> `baselines`
    (6)  loss = -1/N sum_i sum_t w_t A_t log pi(a_t), whose gradient is -(2); w_t is 1 for fresh samples, and
         pi(a_t) / pi_old(a_t) when a rollout is used more than once ("almost PPO").        -> `policy_loss`

With rewards 0 and 1 and no baseline, (6) is the log-likelihood of the right completions: rejection fine-tuning. With
completions out of a file (`--demos`), each paid 1, it is supervised fine-tuning. REINFORCE is that, with a sign.

    python reinforce.py                                             # the embedded model learns to sort; no download
    python reinforce.py --model Qwen/Qwen2.5-0.5B-Instruct --data gsm8k_train.jsonl --eval_data gsm8k_test.jsonl --reward number
    torchrun --nproc_per_node 8 reinforce.py --model ... --data ... --reward my_reward.py:score

Left out: the clip of the ratio, without which more than one or two updates per rollout are unsafe, and a learned critic (both:
ppo.py); the division by the group's standard deviation as a rule (grpo.py). Sums, not means, over tokens: a mean would
divide each completion's gradient by its own length, which is the gradient of another objective, E[r / length].

Williams 1992 (REINFORCE); Sutton et al. 1999 (policy gradient theorem); Kool et al. 2019 and Ahmadian et al. 2024
(leave-one-out baseline, and its use for language models).
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
    demos: str = ""
    """learn from the answers in this file instead of from samples: supervised fine-tuning (takes the place of --data)"""
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
    samples_per_prompt: int | None = None
    """completions drawn for each prompt (None: 8, and 1 with --demos)"""
    max_new_tokens: int = 256
    """a completion is cut here; at most what the model's context has room for"""
    temperature: float = 1.0
    """of sampling, and of every log-probability: the policy is softmax(logits / temperature)"""
    baseline: Literal["none", "batch", "prompt", "loo"] | None = None
    """subtracted from the reward: nothing, the batch's mean, the prompt's, or that of the prompt's other samples.
    None: loo, leave one out; none with --demos"""
    normalize: bool = False
    """divide by the standard deviation (plus 1e-4) of the prompt's scores (--baseline prompt, loo)
    or of the batch's (none, batch); by 1 where they are all equal"""
    keep_max: bool = False
    """learn from each prompt's best samples only (all that tie)"""
    gamma: float = 1.0
    """discount of a reward per token; 1: it counts the same however late it comes"""
    beta: float | None = None
    """weight of the KL penalty, k1 in the reward (None: 0.05, and 0 with --demos); at 0 no reference model is loaded"""

    # --- optimisation ---
    steps: int = 250
    """rollouts in all; 0 evaluates only"""
    learning_rate: float | None = None
    """AdamW's step size (None: 1e-6, and 3e-4 for the embedded model, which is small and wants more)"""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """what becomes of the learning rate after the warm-up"""
    warmup: int = 10
    """steps over which the learning rate rises"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    epochs: int = 1
    """passes over a rollout"""
    minibatches: int = 1
    """optimizer updates in a pass; more than one update in all weighs samples by pi / pi_old"""
    tokens_per_micro_batch: int | None = None
    """tokens, padding included, in one forward and backward (None: 8192 on a GPU, 2048 on a CPU).
    Lower it when memory runs out; up to rounding, results do not change"""
    gradient_checkpointing: bool = False
    """keep less for the backward pass and compute it twice: less memory, more time (prompts are then not shared)"""

    # --- run ---
    out: str = ""
    """the run's folder (empty: runs/reinforce, then runs/reinforce-2, ...)"""
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
    if args.demos:
        demanded = dict(baseline="none", samples_per_prompt=1, beta=0.0, normalize=False, gamma=1.0, temperature=1.0)
        for name, only in demanded.items():
            if getattr(args, name) not in (None, only):
                fail(f"--demos: a demonstration is one sample of weight 1, so --{name} can only be {only}")
    tiny_model, tiny_data = Path(args.model).resolve() == TINY / "model", Path(args.demos or args.data).resolve().parent == TINY
    defaults = {
        "baseline": "none" if args.demos else "loo",
        "samples_per_prompt": 1 if args.demos else 8,
        "beta": 0.0 if args.demos else 0.05,
        "learning_rate": 3e-4 if tiny_model else 1e-6,
        "tokens_per_micro_batch": 2048 if args.device == "cpu" or not torch.cuda.is_available() else 8192,
        "eval_data": str(TINY / "sort_test.jsonl") if tiny_data else "",
    }
    args = dataclasses.replace(args, **{k: v for k, v in defaults.items() if getattr(args, k) is None})
    common.check_flags(args)
    if args.samples_per_prompt < 2 and args.baseline in ("loo", "prompt"):
        fail(f"--baseline {args.baseline} compares the samples of a prompt, so --samples_per_prompt must be 2 or more")
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


def demonstration(tokenizer, row, args):
    """A row's answer as ids, ended as its prompt's format ends an answer."""
    chat = args.chat or isinstance(row["prompt"], list)
    return common.encode_completion(tokenizer, str(row["answer"]), chat, row["prompt"], args.system)


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


# -- The math: from rewards to a loss ------------------------------------------------------------------------------


def token_rewards(scores, kl, mask, beta):
    """scores [B], kl [B, C] (k1, log pi_old - log ref) -> what each token is paid, [B, C]: minus beta times its KL, and the score
    with the last token that the policy chose, the EOS where there is one; a place later nobody would be paid for it. KL in the
    *reward* has the gradient of beta KL(pi || ref); k3 in the *loss* (grpo.py, as published) has not."""
    last = mask & ~F.pad(mask[:, 1:], (0, 1))  # true on the last token of a row
    return (-beta * kl + scores[:, None] * last) * mask


def rewards_to_go(rewards, gamma):
    """Equation (4), [B, C] -> [B, C]. A completion that was cut ends there all the same; nothing is guessed about how it might
    have gone on."""
    to_go, ahead = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        to_go[:, t] = ahead = rewards[:, t] + gamma * ahead
    return to_go


def baselines(totals, scores, all_totals, all_scores, n, baseline, normalize, keep_max):
    """Equation (5). totals [B] are the samples' whole rewards, the KL paid, n to a prompt. scores [B]
    are those before the KL. all_totals, all_scores [all B] are the same of all processes.
    -> (b, scale, keep), each [B]: a token's weight is (G_t - b) * keep / scale.

        none    b = 0                                          unbiased
        loo     b = mean of the prompt's other n - 1 samples   unbiased: those do not depend on this sample
        prompt  b = mean of the prompt's n samples             contains the sample itself: gradient * (1 - 1/n)
        batch   b = mean of all N samples                      the same with 1 - 1/N, and blind to a prompt's difficulty

    A shrunken gradient points the right way, and Adam hardly notices; it is the variance that differs. `normalize` and
    `keep_max` change what is maximised: the first makes rare successes weigh more, the second forgets all but the best.
    Both look at the scores, because no two samples have the same KL. Divided by the spread of the
    totals, a prompt whose scores are all equal would get advantages of size 1 out of its KL alone."""
    groups = totals.view(-1, n)  # [prompts, n]
    of_groups = scores.view(-1, n)  # [prompts, n]
    b = torch.zeros_like(groups)
    if baseline == "batch":
        # the mean of equal floats need not be equal to them, and Adam makes a step of any noise
        equal = all_totals.amax() == all_totals.amin()
        b = groups if equal else b + all_totals.mean()
    elif baseline != "none":
        mean = groups.mean(1, keepdim=True)
        b = mean if baseline == "prompt" else (n * mean - groups) / (n - 1)
        # the mean of eight rewards of 0.1 is not 0.1 in floating point, and Adam makes a step of any noise it is given
        b = torch.where(groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True), groups, b)
    scale = torch.ones_like(groups)
    if normalize:
        # whose spread it is: [1, all B] or [prompts, n]
        peers = all_scores[None] if baseline in ("none", "batch") else of_groups
        equal = peers.amax(1, keepdim=True) == peers.amin(1, keepdim=True)
        scale = torch.where(equal, 1.0, peers.std(1, keepdim=True) + 1e-4).expand_as(groups)
    keep = torch.ones_like(groups)
    if keep_max:
        keep = (of_groups == of_groups.amax(1, keepdim=True)).float()
    return b.expand_as(groups).flatten(), scale.flatten(), keep.flatten()


def has_gradient(factors):
    """factors [b, C], what the gradient of each token's log-probability is multiplied by -> [b], on the CPU: false for a row whose
    factors are all exactly 0. Its forward and backward would be time lost, so it is left out of the micro-batches; what a loss
    is divided by counts it all the same."""
    return (factors != 0).any(1).cpu()


def policy_loss(logprobs, old_logprobs, advantages, mask, samples):
    """Equation (6): logprobs [b, C] with gradient, the rest without; `samples` is N of the whole update, over all of
    its micro-batches and processes -> (loss, ratio [b, C]).

    ratio = pi / pi_old corrects each token for the policy that drew it, and not for the text before it: the product of those
    ratios has too much variance. It is a constant here: ratio * grad log pi is already the gradient of pi / pi_old, whose
    denominator is constant. With pi_old in the graph too, that quotient would be 1 with gradient 0, and nothing would be
    learnt. The clamp keeps exp finite."""
    ratio = (logprobs - old_logprobs).detach().clamp(-20, 20).exp()
    return -(ratio * advantages * logprobs * mask).sum() / samples, ratio


def moved_by(logprobs, old_logprobs):
    """KL(pi_old || pi), estimated on tokens of pi_old: ratio - 1 - log ratio, never negative, and its mean over them is the KL.
    expm1, because in float32 exp(d) - 1 of a small d is mostly rounding."""
    d = (logprobs - old_logprobs).clamp(-20, 20)
    return torch.expm1(d) - d


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
    flag = "--demos" if args.demos else "--data"
    config, date = common.policy_config(args.model), common.run_date(args, world)
    tokenizer = common.load_tokenizer(args.model, args.template_args, date)
    needs = f"--reward {args.reward}" if args.reward in ("exact", "number") else ""
    prompts = load_prompts(args.demos or args.data, flag, tokenizer, args, "a demonstration" if args.demos else needs)
    held_out = load_prompts(args.eval_data, "--eval_data", tokenizer, args, needs)
    longest = max(len(ids) for ids, _ in prompts + held_out)
    args = common.fit_context(args, longest, config)
    if args.demos:
        short = [p for p in prompts if len(demonstration(tokenizer, p[1], args)) <= args.max_new_tokens]
        common.say(
            f"--demos: {len(prompts) - len(short)} of {len(prompts)} left out (answers over --max_new_tokens {args.max_new_tokens})"
        )
        prompts = short or fail(f"--demos: every answer is longer than --max_new_tokens {args.max_new_tokens}")
    reward = load_reward(args.reward, world, date)
    scored = held_out if args.demos else prompts + held_out
    if is_a_model(args.reward) and scored:
        args = common.fit_reward_model(args, tokenizer, scored)
    out = common.open_run(args, "reinforce", world)
    stop_asked = common.catch_signals(args.steps)

    row, frozen = longest + args.max_new_tokens, (args.beta > 0) + is_a_model(args.reward)
    state = common.take_up(out, args, world)
    first, said = state["step"] if state else 0, set()
    writer, bar = common.introduce(out, args, world, tokenizer, prompts[0][0], first, frozen=frozen)

    with common.guarded(out, args, bar):
        policy = common.load_policy(args.model, world, args.gradient_checkpointing)
        # samples that share the computation of their prompt
        shared = n > 1 and args.steps and common.prompts_can_be_shared(policy, world, args.gradient_checkpointing)
        together = n if shared else 1
        reference = common.load_reference(args.model, world) if args.beta and args.steps else None
        optimizer = common.make_optimizer(policy, args.learning_rate)
        if state:
            common.load_checkpoint(state, {"policy": policy}, {"policy": optimizer})
            del state

        def held_out_scores():
            return evaluate(policy, tokenizer, held_out, reward, args, world) if held_out else {}

        if first == 0:
            common.log(out, writer, 0, held_out_scores())

        for step in range(first + 1, args.steps + 1):
            began = time.perf_counter()

            # 1. Rollout and scores. A demonstration is paid 1: its weight in the loss is 1, and the loss is that of fine-tuning.
            asked, rows = zip(*(prompts[i] for i in common.rows_of_step(len(prompts), step, args.prompts_per_step, world, args.seed)))
            if args.demos:
                answers = [demonstration(tokenizer, row, args) for row in rows]
                samples = common.as_samples(asked, answers, tokenizer, world)
                rewards = torch.ones(mine, device=world.device)  # [B]
            else:
                samples = common.sample(
                    policy, tokenizer, asked, n=n, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                    seed=common.fold(args.seed, step, world.rank, common.DRAW),
                )  # fmt: skip
                scores = reward(samples.texts, [row for row in rows for _ in range(n)])
                rewards = torch.tensor(scores, device=world.device)  # [B]
            mask, sampled = samples.mask, time.perf_counter()

            # 2. Mini-batches (one optimizer update each) and their micro-batches (one forward each), cut once per rollout:
            #    old, new and reference log-probabilities of a row are computed in the same micro-batch, because in
            #    bfloat16 they depend on it. A KL penalty needs every row's; without one, micro-batches wait for the advantages.
            cut = torch.Generator().manual_seed(common.fold(args.seed, step, world.rank, common.CUT))
            shares = torch.randperm(mine, generator=cut).view(args.minibatches, -1)  # prompts of each mini-batch
            indices = [(groups[:, None] * n + torch.arange(n)).flatten() for groups in shares]  # their rows
            budget = args.tokens_per_micro_batch

            # 3. Log-probabilities before the update. With one update and no KL nobody asks for them: those of the
            #    update itself, taken as constants, are the same numbers and cost nothing.
            old, kl = None, torch.zeros_like(samples.logprobs)
            if reference:
                minibatches = [micro_batches(i.tolist(), samples.prompt_mask, mask, together, budget, world) for i in indices]
                every_part = [part for parts in minibatches for part in parts]
                old = rollout_logprobs(policy, samples, every_part, together, args.temperature)  # [B, C]
                kl = (old - rollout_logprobs(reference, samples, every_part, together, args.temperature)) * mask  # k1 [B, C]

            # 4. Advantages: penalise, subtract the baseline, normalize, keep the best. Rows whose advantages are all 0 have no
            #    gradient and, without a KL penalty, are in no micro-batch.
            to_go = rewards_to_go(token_rewards(rewards, kl, mask, args.beta), args.gamma)  # [B, C]
            totals = to_go[:, 0]  # [B] what a sample was paid in all
            everyone = [common.all_gather(world, x) for x in (totals, rewards)]
            b, scale, keep = baselines(totals, rewards, *everyone, n, args.baseline, args.normalize, args.keep_max)
            advantages = (to_go - b[:, None]) * (keep / scale)[:, None] * mask  # [B, C]
            if not reference:
                trained = [index[has_gradient(advantages[index])].tolist() for index in indices]
                minibatches = [micro_batches(r, samples.prompt_mask, mask, together, budget, world) for r in trained]
            if not reference and args.epochs * args.minibatches > 1 and not args.demos:  # those have no policy that drew them
                every_part = [part for parts in minibatches for part in parts]
                old = rollout_logprobs(policy, samples, every_part, together, args.temperature)  # [B, C]
            shuffles = [random.Random(common.fold(args.seed, step, epoch, common.PASS)) for epoch in range(args.epochs)]
            updates = [parts for s in shuffles for parts in s.sample(minibatches, args.minibatches)]

            # 5. Update. The loss is divided by the samples of the whole optimizer update, over all micro-batches and
            #    processes, before the first backward: however the update is cut, the gradients add up to the same.
            #    Without a row that has a gradient, on any process, there is no update.
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
                    before = logprobs.detach() if old is None else old[part, :C]
                    loss, ratio = policy_loss(logprobs, before, advantages[part, :C], part_mask, N / args.minibatches)
                    loss.backward()
                    with torch.no_grad():
                        if not norms:
                            first_ratio = torch.maximum(first_ratio, ((ratio - 1).abs() * part_mask).max())
                        sums["loss"] += loss.double()
                        sums["rows"] += len(part) * real
                        seen = {
                            "tokens": torch.ones_like(ratio), "entropy": entropy, "ratio/mean": ratio, "kl/old": moved_by(logprobs, before),
                            "kl/sample": (before - samples.logprobs[part, :C]).abs(),
                        }  # fmt: skip
                        for name, x in seen.items():
                            sums[name] += (x * part_mask).sum().double()
                norms.append(common.clip_gradients(policy, args.max_grad_norm))
                if not math.isfinite(norms[-1]):
                    raise common.Stop(f"step {step}: the gradient is {norms[-1]}, so no step was taken with it")
                optimizer.step()
                optimizer.zero_grad()

            # 6. Log: sums over all processes first, then means. What the update's forward says (kl/old, kl/sample, ratio,
            #    entropy) is of the rows that were trained, if there were any.
            now, groups = time.perf_counter(), rewards.view(-1, n)
            sums |= {"reward": rewards.sum(), "kl/ref": kl.sum(), "length": mask.sum(), "cut": (~samples.finished).sum()}
            sums["equal"] = (groups.amax(1) == groups.amin(1)).sum() * (n > 1)
            s = dict(zip(sums, common.all_sum(world, *sums.values())))
            metrics = {
                "reward": s["reward"] / N, "loss": s["loss"] / len(updates), "kl/ref": s["kl/ref"] / N if reference else None,
                "ratio/first": common.all_gather(world, first_ratio).max().item() if old is not None and s["rows"] else None,
                "grad_norm": sum(norms) / len(updates), "learning_rate": rate, "length": s["length"] / N, "truncated": s["cut"] / N,
                "equal_groups": s["equal"] / args.prompts_per_step, "time/sample": sampled - began, "time/train": now - sampled,
                "tokens_per_second": s["length"] / (now - began), "memory_gib": common.memory_used(world) / 2**30,
            }  # fmt: skip
            if s["rows"]:
                metrics["kl/old"] = s["kl/old"] / s["rows"]
                names = ("ratio/mean", "entropy") if args.demos else ("kl/sample", "ratio/mean", "entropy")
                metrics |= {k: s[k] / s["tokens"] for k in names}
            metrics = {name: value for name, value in metrics.items() if value is not None}  # None: nothing was compared
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
                common.save_checkpoint(out, world, step, {"policy": policy}, {"policy": optimizer}, args.keep)
            if ending and step < args.steps:
                raise common.Ended(f"stopped by a signal after step {step} of {args.steps}, which is saved")

        if args.steps:
            common.save_model(policy, tokenizer, out / "model", world)
    use = common.usage(out, tokenizer, prompts[0][1]["prompt"], args)
    common.conclude(out, args, writer, bar, use)


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__.partition("\n")[0], use_underscores=True))
