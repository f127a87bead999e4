"""DPO, Direct Preference Optimization: preferences without a reward model and without rollouts.

RLHF fits a reward r to preferences and then a policy pi to the reward, held near a reference ref. DPO sees that the second
step has its solution pi* on paper, and puts it into the first; Z(x) makes its probabilities sum to 1:

    (1)  max over pi of  E[r(x, y)] - beta KL(pi || ref)           the objective of reinforce.py and ppo.py
    (2)  pi*(y|x) = ref(y|x) exp(r(x, y) / beta) / Z(x)            its optimum, (1) being -beta KL(pi || pi*) + const
    (3)  r(x, y) = beta log(pi*(y|x) / ref(y|x)) + beta log Z(x)   so every policy is the optimum of some reward
    (4)  P(y > z | x) = sigmoid(r(x, y) - r(x, z))                 Bradley and Terry, as in reward_model.py
    (5)  h = beta ( log pi(y)/ref(y) - log pi(z)/ref(z) )          Z is the same for both, and falls out
    (6)  loss = mean over pairs of -log sigmoid(h)                 y chosen, z rejected -> `preference_loss`

The reward model is the policy, r = beta log pi / ref its implicit reward; what is left is a classification of pairs.
The gradient raises log pi(y) and lowers log pi(z), each by beta sigmoid(-h): pairs that are ranked wrong count most.

It is offline RL: the completions are somebody else's, drawn once. Nothing new is tried, nothing that the policy says
today is ever scored, and (6) holds pi only where there are data. Both log-probabilities may fall while the margin grows,
and the mass goes to completions nobody has ranked; `--sft_coef` keeps the chosen ones likely. On-policy methods pay
for rollouts to see that.

Its relatives (`--loss`), n the length of a completion in tokens, its end included, d = log-ratio / n of chosen, less that
of rejected:

    sigmoid  -log sigmoid(h); with --label_smoothing e, the share of labels that are wrong,
             -(1 - e) log sigmoid(h) - e log sigmoid(-h)
    ipo      (d - 1 / (2 beta))^2: a margin to reach, not to push for ever. In means over tokens, as its authors later
             advised, so beta 1, its default here, asks for half a nat a token
    hinge    max(0, 1 - h): nothing once h is 1
    simpo    -log sigmoid( beta log pi(y) / n_y - beta log pi(z) / n_z - simpo_margin ): no reference, and the mean over
             tokens, because that is what decoding goes by

    python dpo.py                                              # the embedded model and pairs; no download
    python dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl --eval_data held_out_pairs.jsonl
    torchrun --nproc_per_node 8 dpo.py --model ... --data ... --eval_prompts prompts.jsonl --reward number

The reference is the policy before its first step (or `--reference`). It scores the pairs that the run will visit once,
before training; its numbers are kept in the run's folder, and while the policy learns no second model is held.

Left out: rounds of new pairs from the policy itself (sample, rank, and start again from runs/.../model); several
rejected to one chosen.

Rafailov et al. 2023 (DPO); Mitchell 2023 (label noise, cDPO); Azar et al. 2024 (IPO); Zhao et al. 2023 and Liu et al.
2024 (the hinge: SLiC, RSO); Meng et al. 2024 (SimPO); Pang et al. 2024 (with an SFT term).
"""

import dataclasses
import gc
import hashlib
import math
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
    """folder or hub name of the causal language model to train; as it starts, it is the reference"""
    reference: str = ""
    """folder or hub name of the model to stay near (empty: --model as it starts)"""
    data: str | None = None
    """pairs to learn from: JSON lines with "prompt", "chosen", "rejected" (None: the embedded task's, where no other
    file is named)"""
    eval_data: str | None = None
    """held-out pairs, as --data; None: the embedded task has its own, other data none"""
    eval_prompts: str | None = None
    """held-out prompts to sample for: JSON lines with "prompt" and, for most rewards, "answer" """
    reward: str = "exact"
    """what scores the samples of --eval_prompts: exact | number | FILE.py:function(completion, row) | a reward model"""
    chat: bool = True
    """a prompt that is a string goes through the chat template, if the tokenizer has one (--no_chat: raw text)"""
    template_args: str = ""
    """arguments of the chat template, a JSON object: '{"enable_thinking": false}'"""
    system: str = ""
    """system message before every prompt that has none of its own"""
    max_tokens: int = 1024
    """pairs with a longer side, prompt included, are left out, and counted; they are never cut"""
    max_prompt_tokens: int = 512
    """of --eval_prompts, those that are longer are left out, and counted"""
    max_new_tokens: int = 256
    """of the samples of --eval_prompts"""

    # --- algorithm ---
    loss: Literal["sigmoid", "ipo", "hinge", "simpo"] = "sigmoid"
    """DPO's own, or one of its relatives"""
    beta: float | None = None
    """how strongly the reference holds, and the scale of the implicit reward (None: 0.1, simpo 2, ipo 1, the embedded model 0.5)"""
    label_smoothing: float = 0.0
    """share of pairs whose labels are thought wrong (with --loss sigmoid)"""
    simpo_margin: float = 1.0
    """by how much chosen should be ahead (with --loss simpo)"""
    sft_coef: float = 0.0
    """weight of -log pi(chosen) / length, which keeps the chosen completions likely"""

    # --- optimisation ---
    steps: int = 300
    """optimizer updates in all; 0 evaluates only"""
    pairs_per_step: int = 64
    """pairs in an update"""
    learning_rate: float | None = None
    """AdamW's step size (None: 5e-7, and 3e-4 for the embedded model, which is small and wants more)"""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """what becomes of the learning rate after the warm-up"""
    warmup: int = 10
    """steps over which the learning rate rises"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    tokens_per_micro_batch: int | None = None
    """tokens, padding included, in one forward and backward (None: 8192 on a GPU, 2048 on a CPU).
    Lower it when memory runs out; up to rounding, results do not change"""
    gradient_checkpointing: bool = False
    """keep less for the backward pass and compute it twice: less memory, more time (prompts are then not shared)"""

    # --- run ---
    out: str = ""
    """the run's folder (empty: runs/dpo, then runs/dpo-2, ...)"""
    resume: bool = False
    """go on with the run in --out; give it the flags it was started with"""
    seed: int = 1
    """of the order of pairs"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """what computes (auto: bfloat16 on a GPU, float32 on a CPU); weights that learn stay float32.
    bfloat16 on a CPU needs less memory. With avx512_bf16 or amx in /proc/cpuinfo it is faster too:
    a GRPO step of a 135M model took 0.62 of the time (tests/bench/vs_trl.py)"""
    eval_every: int = 50
    """steps between scores on --eval_data and --eval_prompts"""
    save_every: int = 50
    """steps between checkpoints"""
    keep: int = 1
    """checkpoints that stay on the disk, the newest ones"""


def resolve(args):
    """Fills in the defaults that depend on other flags, and refuses flags that contradict each other."""
    tiny_model = Path(args.model).resolve() == TINY / "model"
    tiny_data = args.data is None and not args.eval_data and not args.eval_prompts
    defaults = {
        "data": str(TINY / "pairs_train.jsonl") if tiny_data else "",
        "eval_data": str(TINY / "pairs_test.jsonl") if tiny_data and (args.steps or args.reference) else "",
        "eval_prompts": str(TINY / "sort_test.jsonl") if tiny_data else "",
        "beta": {"simpo": 2.0, "ipo": 1.0}.get(args.loss, 0.5 if tiny_model else 0.1),
        "learning_rate": 3e-4 if tiny_model else 5e-7,
        "tokens_per_micro_batch": 2048 if args.device == "cpu" or not torch.cuda.is_available() else 8192,
    }
    args = dataclasses.replace(args, **{k: v for k, v in defaults.items() if getattr(args, k) is None})
    common.check_flags(args)
    if not 0 < args.beta < math.inf:
        fail(f"--beta {args.beta}: must be above 0; at 0 no pair would have a gradient")
    if not 0 <= args.label_smoothing < 0.5:
        fail(f"--label_smoothing {args.label_smoothing}: must be from 0 to below 0.5, where labels say nothing any more")
    if args.label_smoothing and args.loss != "sigmoid":
        fail(f"--label_smoothing acts with --loss sigmoid only, and --loss is {args.loss}")
    if args.reference and args.loss == "simpo":
        fail("--reference: --loss simpo has none")
    if not math.isfinite(args.simpo_margin):
        fail(f"--simpo_margin {args.simpo_margin}: must be a number")
    if args.steps and not args.data:
        fail("--data: name a file of pairs, or give --steps 0 to evaluate only")
    if args.eval_data and not args.steps and not args.reference and args.loss != "simpo":
        fail("--steps 0 compares --model with itself; name the model that it started from by --reference")
    return args


# -- The task: pairs, prompts and rewards --------------------------------------------------------------------------


def read_pairs(path, flag):
    """The pairs of a JSON-lines file. A side is a text, or a list of messages of which the last is the answer; those before
    it, if there are any, are the prompt."""
    rows = []
    for number, row in common.read_json(path, flag):
        where, row = f"{flag} {path}, line {number}", dict(row) if isinstance(row, dict) else {}
        row["prompt"] = row.get("prompt", row.get("question"))
        for side in ("chosen", "rejected"):
            if is_prompt(row.get(side)) and isinstance(row[side], list) and row[side][-1]["role"] == "assistant":
                *asked, answer = row[side]
                row[side] = answer["content"]
                known = [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"]
                if asked and row["prompt"] and known != asked:
                    fail(f"{where}: the prompt, chosen and rejected do not ask the same")
                row["prompt"] = row["prompt"] or asked
            if not isinstance(row.get(side), str):
                fail(f'{where}: needs "{side}", a text or a list of messages of which the last is the assistant\'s')
        if not is_prompt(row["prompt"]):
            fail(f'{where}: needs a "prompt" (or "question") that is a text or a list of messages')
        rows.append(row)
    return rows


def encode_preferences(rows, tokenizer, args, flag):
    """[(prompt's ids, chosen's, rejected's), ...], each side with its end, without pairs of equal sides, which say nothing,
    and without those too long: cut, a pair may lose the very place where its sides differ. Says how many those were."""
    pairs = []
    for row in rows:
        prompt = row["prompt"]
        chat = args.chat or isinstance(prompt, list)
        pairs.append(
            (
                common.encode_prompt(tokenizer, prompt, args.system, args.chat),
                common.encode_completion(tokenizer, row["chosen"], chat, prompt, args.system),
                common.encode_completion(tokenizer, row["rejected"], chat, prompt, args.system),
            )
        )
    differ = [p for p in pairs if p[1] != p[2] and p[0]]
    kept = [p for p in differ if len(p[0]) + max(len(p[1]), len(p[2])) <= args.max_tokens]
    if len(kept) < len(pairs):
        long = len(differ) - len(kept)
        common.say(
            f"{flag}: of {len(pairs)} pairs {len(pairs) - len(differ)} left out as equal or empty, {long} as over --max_tokens {args.max_tokens}"
        )
    return kept or fail(f"{flag}: no pair is left")


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


# -- The math ------------------------------------------------------------------------------------------------------


def preference_loss(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length, args):
    """Equations (5) and (6) and their relatives: summed log-probabilities [b] of completions by the policy, with gradient, and by
    the reference; their lengths in tokens -> a loss for each pair, [b]."""
    up, down = chosen - ref_chosen, rejected - ref_rejected  # log-ratios; times beta they are the implicit rewards
    h = args.beta * (up - down)
    if args.loss == "sigmoid":
        loss = -(1 - args.label_smoothing) * F.logsigmoid(h) - args.label_smoothing * F.logsigmoid(-h)
    elif args.loss == "ipo":
        loss = (up / chosen_length - down / rejected_length - 1 / (2 * args.beta)) ** 2
    elif args.loss == "hinge":
        loss = F.relu(1 - h)
    else:
        loss = -F.logsigmoid(args.beta * (chosen / chosen_length - rejected / rejected_length) - args.simpo_margin)
    return loss - args.sft_coef * chosen / chosen_length


# -- Log-probabilities: one forward for both sides -----------------------------------------------------------------


def cut_pairs(pairs, shared, tokens, world):
    """Cuts pairs into parts of at most `tokens` tokens (or one pair) with padding, pairs of like length together -> [pair
    numbers]. Both sides stay in one part, because the loss is of their difference. Every process gets the same number of
    parts, some perhaps empty: sharded weights are gathered by all or by none."""
    sizes = [(len(p) * (1 if shared else 2), max(len(c), len(r))) for p, c, r in pairs]
    parts = [[]]
    for i in sorted(range(len(pairs)), key=lambda i: -(sizes[i][0] + 2 * sizes[i][1])):
        prompt, answer = (max(sizes[j][k] for j in (*parts[-1], i)) for k in (0, 1))
        if parts[-1] and (len(parts[-1]) + 1) * (prompt + 2 * answer) > tokens:
            parts.append([])
        parts[-1].append(i)
    most = int(common.all_gather(world, torch.tensor([len(parts)], device=world.device)).max())
    return parts + [[]] * (most - len(parts))


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


def pair_logprobs(model, tokenizer, pairs, shared, world):
    """Summed log-probabilities of both sides, their ends included: (chosen [b], rejected [b]). Row 2i of the batch is chosen of
    pair i, row 2i + 1 rejected; both have the same prompt, which is computed once where it can be shared."""
    prompts = [prompt for prompt, _, _ in pairs for _ in range(2)]
    s = common.as_samples(prompts, [side for _, *sides in pairs for side in sides], tokenizer, world)
    start = s.prompt_ids, s.prompt_mask, None
    if shared:
        start = s.prompt_ids[::2], s.prompt_mask[::2], torch.arange(len(pairs), device=world.device).repeat_interleave(2)
    logprobs, _ = token_logprobs(model, *start, s.ids, s.mask, 1.0)
    return logprobs.sum(1).view(-1, 2).unbind(1)


@torch.no_grad()
def score_pairs(model, tokenizer, pairs, shared, args, world):
    """pair_logprobs of many pairs, [pairs, 2] on the CPU; each process its share, then all of them on all."""
    mine = pairs[world.rank :: world.size] or pairs[:1]
    table = torch.zeros(-(-len(pairs) // world.size), 2)
    for part in cut_pairs(mine, shared, args.tokens_per_micro_batch, world):
        sums = torch.stack(pair_logprobs(model, tokenizer, [mine[i] for i in part or [0]], shared, world), 1)
        if part:
            table[part] = sums.cpu()
    common.forget_forwards(model)
    everyone = common.all_gather(world, table.to(world.device)).cpu().view(world.size, -1, 2)
    return everyone.transpose(0, 1).reshape(-1, 2)[: len(pairs)]  # pair i was scored by process i modulo their number


def reference_scores(policy, shared, tokenizer, pairs, held_out, args, out, world, stop_asked):
    """What the reference says of the pairs that the run will visit and of the held-out ones, [pairs, 2] each, NaN where nobody will
    ask. To be called while the policy still is the reference: before it has made a step, or taken up a checkpoint. Kept in the
    run's folder, so a resumed run scores only what it lacks, and only if its pairs, reference and precision are the same. simpo asks nobody.
    The reference scores a pair in another micro-batch than training does; in bfloat16 that moves its log-ratio by hundredths, in
    step 1 too."""
    if args.loss == "simpo":
        return torch.zeros(len(pairs), 2), torch.zeros(len(held_out), 2)
    asked = hashlib.sha256(repr((args.reference or args.model, pairs, held_out)).encode()).hexdigest()
    path, mark = out / "reference.pt", f"{world.dtype} {asked}"
    try:
        known = torch.load(path, weights_only=True) if args.resume and path.is_file() else {"mark": mark}
    except Exception as error:
        fail(f"--resume: {path} cannot be read ({str(error).splitlines()[0]}); without it the reference scores again")
    if known["mark"] != mark:
        if common.checkpoints(out):
            fail(f"--resume: {path} has scores of other pairs, or of another model or precision, than this run's")
        known = {"mark": mark}  # nothing was learnt by the old ones
    tables = [known[name] for name in ("pairs", "held_out") if name in known]
    scored = sum(int((~table[:, 0].isnan()).sum()) for table in tables)
    common.agree(out, world, scored, "the number of pairs that the reference has scored is")
    visited = {common.nth_row(len(pairs), i, args.seed) for i in range(args.steps * args.pairs_per_step)} if pairs else ()
    for name, group, wanted in (("pairs", pairs, visited), ("held_out", held_out, range(len(held_out)))):
        table = known.setdefault(name, torch.full((len(group), 2), math.nan))
        rows = [i for i in sorted(wanted) if table[i].isnan().any()]
        for part in (rows[i : i + 1024] for i in range(0, len(rows), 1024)):
            table[part] = score_pairs(policy, tokenizer, [group[i] for i in part], shared, args, world)
            if world.rank == 0:
                common.write(path, known)
                tqdm.write(f"the reference has scored {(~table[:, 0].isnan()).sum()} of {len(wanted)} {name}")
            if common.all_sum(world, stop_asked())[0]:
                raise common.Ended("stopped by a signal while the reference scored pairs; what it has scored is kept")
    return known["pairs"], known["held_out"]


# -- Evaluation and logging ----------------------------------------------------------------------------------------


def evaluate_pairs(policy, tokenizer, held_out, reference, shared, args, world):
    """The loss, implicit rewards and their order on held-out pairs."""
    now = score_pairs(policy, tokenizer, held_out, shared, args, world)
    n = torch.tensor([[len(c), len(r)] for _, c, r in held_out])
    loss = preference_loss(*now.T, *reference.T, *n.T, args)
    chosen, rejected = implicit_rewards(now, reference, n, args)
    won = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    return {
        "eval/accuracy": won.mean().item(),
        "eval/margin": (chosen - rejected).mean().item(),
        "eval/loss": loss.mean().item(),
    }


def implicit_rewards(logprobs, reference, lengths, args):
    """Equation (3) without Z, which falls out: beta times the log-ratio [2, b]. Those of ipo and simpo are means over tokens,
    that of simpo without a reference."""
    rewards = logprobs - (0.0 if args.loss == "simpo" else reference)
    return (args.beta * (rewards / lengths if args.loss in ("ipo", "simpo") else rewards)).T


def held_out_rows(prompts, args):
    """How many held-out completions are drawn at once: what 4 micro-batches have as tokens, whose keys and values are
    less than what one micro-batch keeps for its backward pass."""
    longest = max((len(ids) for ids, _ in prompts), default=0) + args.max_new_tokens
    return common.rows_at_once(prompts, args.max_new_tokens, 4 * args.tokens_per_micro_batch // longest)


def evaluate(model, tokenizer, held_out, reward, args, world):
    """Greedy completions of held-out prompts -> {"eval/reward", "eval/exact"}, and the first few to be read; each process
    takes its share."""
    right = number if args.reward == "number" else exact
    mine, sums = held_out[world.rank :: world.size], [0.0] * 4  # sums: rewards, rows, right answers, rows with an answer
    shown = []
    size = held_out_rows(held_out, args)
    for i in range(0, -(-len(held_out) // world.size), size):  # the same number of rounds on every process
        part = mine[i : i + size]
        ids, rows = zip(*(part or held_out[:1]))
        texts = common.sample(model, tokenizer, list(ids), max_new_tokens=args.max_new_tokens, temperature=0).texts
        values = reward(texts, rows)
        if part:
            if len(shown) < 8:
                shown += [{"prompt": r["prompt"], "completion": t, "reward": v} for r, t, v in zip(rows[:8], texts, values)]
            known = [right(t, r) for t, r in zip(texts, rows) if isinstance(r.get("answer"), (str, int, float))]
            sums = [a + b for a, b in zip(sums, (sum(values), len(rows), sum(known), len(known)))]
    rewards, count, answered, known = common.all_sum(world, *sums)
    return {"eval/reward": rewards / count, **({"eval/exact": answered / known} if known else {})}, shown[:8]


# -- The loop ------------------------------------------------------------------------------------------------------


def train(args):
    args = resolve(args)
    world = common.start(args.device, args.dtype, args.seed)
    if args.pairs_per_step % world.size:
        fail(f"--pairs_per_step {args.pairs_per_step} must be a multiple of the number of processes")

    # everything that can be wrong with the user's input is found here, before the policy is loaded or a file written
    config, date = common.policy_config(args.model), common.run_date(args, world)
    tokenizer = common.load_tokenizer(args.model, args.template_args, date)
    context = common.context_of(config)
    if args.reference:
        context = common.context_of(config, common.policy_config(args.reference))
        if common.load_tokenizer(args.reference).get_vocab() != tokenizer.get_vocab():
            fail(f"--reference {args.reference}: reads other tokens than --model {args.model}")
    if args.max_tokens > context:
        common.say(f"--max_tokens {args.max_tokens} is lowered to {context}, the model's context")
        args = dataclasses.replace(args, max_tokens=context)
    pairs = encode_preferences(read_pairs(args.data, "--data"), tokenizer, args, "--data") if args.steps else []
    held_out = (
        encode_preferences(read_pairs(args.eval_data, "--eval_data"), tokenizer, args, "--eval_data") if args.eval_data else []
    )
    prompts, reward = [], None
    if args.eval_prompts:
        needs = f"--reward {args.reward}" if args.reward in ("exact", "number") else ""
        prompts = load_prompts(args.eval_prompts, "--eval_prompts", tokenizer, args, needs)
        args = common.fit_context(args, max(len(ids) for ids, _ in prompts), config)
        reward = load_reward(args.reward, world, date)
        if is_a_model(args.reward):
            args = common.fit_reward_model(args, tokenizer, prompts)
    if not (pairs or held_out or prompts):
        fail("--steps 0 evaluates; name pairs with --eval_data, or prompts with --eval_prompts")
    out = common.open_run(args, "dpo", world)
    stop_asked = common.catch_signals(args.steps)

    state = common.take_up(out, args, world)
    first, warned = state["step"] if state else 0, False
    first_pair = (pairs or held_out or [(prompts[0][0], [])])[0]
    writer, bar = common.introduce(out, args, world, tokenizer, first_pair[0] + first_pair[1], first, learning=bool(args.steps), frozen=(bool(prompts) and is_a_model(args.reward)) + (not args.steps))
    if pairs:
        drawn = args.steps * args.pairs_per_step
        common.say(f"{drawn} pairs will be drawn from {len(pairs)}, {drawn / len(pairs):.1f} passes")

    with common.guarded(out, args, bar):
        policy = common.load_policy(args.model, world, args.gradient_checkpointing)
        # a prompt once for both its sides
        shared = args.steps > 0 and common.prompts_can_be_shared(policy, world, args.gradient_checkpointing)
        scorer, scorer_shares = policy, shared
        if args.reference:
            scorer, scorer_shares = common.load_reference(args.reference, world), False  # sharing was tried with the policy
            common.check_head(scorer)
        reference, held_out_reference = reference_scores(
            scorer, scorer_shares, tokenizer, pairs, held_out, args, out, world, stop_asked
        )
        del scorer  # a model of its own is not held while the policy learns
        gc.collect()  # FSDP2's modules and their hooks hold each other

        optimizer = common.make_optimizer(policy, args.learning_rate)
        if state:
            common.load_checkpoint(state, {"policy": policy}, {"policy": optimizer})
            del state

        def held_out_scores():
            scores, shown = evaluate(policy, tokenizer, prompts, reward, args, world) if prompts else ({}, [])
            if held_out:
                scores = evaluate_pairs(policy, tokenizer, held_out, held_out_reference, shared, args, world) | scores
            return scores, shown

        if first == 0:
            common.log(out, writer, 0, *held_out_scores())

        for step in range(first + 1, args.steps + 1):
            began = time.perf_counter()

            # 1. The next pairs.
            batch = common.rows_of_step(len(pairs), step, args.pairs_per_step, world, args.seed)

            # 2. One forward for both sides of a pair; the loss is divided by the pairs of the whole step, before the
            #    first backward: however the step is cut, the gradients add up to the same.
            rate = common.learning_rate_at(step, args.steps, args.learning_rate, args.schedule, args.warmup)
            optimizer.param_groups[0]["lr"] = rate
            sums = torch.zeros(7, dtype=torch.float64, device=world.device)
            for part in cut_pairs([pairs[i] for i in batch], shared, args.tokens_per_micro_batch, world):
                real, part = bool(part), [batch[i] for i in part or [0]]  # no pair is left here, but elsewhere
                chosen, rejected = pair_logprobs(policy, tokenizer, [pairs[i] for i in part], shared, world)
                ref = reference[part].to(world.device)  # [b, 2]
                n = torch.tensor([[len(pairs[i][1]), len(pairs[i][2])] for i in part], device=world.device)
                loss = preference_loss(chosen, rejected, *ref.T, *n.T, args).sum() / args.pairs_per_step * real
                loss.backward()
                with torch.no_grad():
                    now = torch.stack([chosen, rejected], 1)
                    good, bad = implicit_rewards(now, ref, n, args)
                    won = (good > bad).sum() + 0.5 * (good == bad).sum()
                    fell = ((ref - now) / n)[:, 0].sum()  # chosen, by how much a token; simpo has no reference to compare with
                    sums += torch.stack([loss.detach(), *(x * real for x in (won, good.sum(), bad.sum(), *now.sum(0), fell))])
            norm = common.clip_gradients(policy, args.max_grad_norm)
            if not math.isfinite(norm):
                raise common.Stop(f"step {step}: the gradient is {norm}, so no step was taken with it")
            optimizer.step()
            optimizer.zero_grad()

            # 3. Log: sums over all processes first, then means.
            tokens = sum(2 * len(p) + len(c) + len(r) for p, c, r in (pairs[i] for i in batch))  # of whole conversations
            loss, won, good, bad, chosen, rejected, fell, tokens = common.all_sum(world, *sums, tokens)
            N, seconds = args.pairs_per_step, time.perf_counter() - began
            metrics = {
                "loss": loss, "accuracy": won / N, "margin": (good - bad) / N, "chosen": good / N, "rejected": bad / N,
                "logprobs/chosen": chosen / N, "logprobs/rejected": rejected / N, "grad_norm": norm, "learning_rate": rate,
                "time/train": seconds, "tokens_per_second": tokens / seconds, "memory_gib": common.memory_used(world) / 2**30,
            }  # fmt: skip
            shown = []
            if step % args.eval_every == 0 or step == args.steps:
                scores, shown = held_out_scores()
                metrics |= scores
            common.log(out, writer, step, metrics, shown)
            if bar:
                if fell / N > 1 and args.loss != "simpo" and not warned:
                    warned = True
                    tqdm.write(f"warning: even chosen answers have lost {fell / N:.1f} nats a token, to answers nobody has ranked: "
                               "lower --learning_rate, or raise --beta or --sft_coef")  # fmt: skip
                bar.set_postfix_str(f"loss {metrics['loss']:.3f}, accuracy {metrics['accuracy']:.3f}")
                bar.update()

            # 4. Save. A signal to end (Ctrl-C, a cluster that wants its machine back) waits for this place.
            ending = common.all_sum(world, stop_asked())[0] > 0
            if step % args.save_every == 0 or step == args.steps or ending:
                common.save_checkpoint(out, world, step, {"policy": policy}, {"policy": optimizer}, args.keep)
            if ending and step < args.steps:
                raise common.Ended(f"stopped by a signal after step {step} of {args.steps}, which is saved")

        if args.steps:
            common.save_model(policy, tokenizer, out / "model", world)
    use = common.usage(out, tokenizer, "" if tokenizer.chat_template else tokenizer.decode(first_pair[0]), args)
    common.conclude(out, args, writer, bar, use)


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__.partition("\n")[0], use_underscores=True))
