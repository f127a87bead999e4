"""A reward model: what people prefer, learnt from pairs as one number a text; and best-of-N, the policy it makes at once.

Nobody can say what a summary is worth, but of two, most people can say which is better. Bradley and Terry's model gives every
text a score r, and the chance that y wins against z a logistic curve in the difference:

    (1)  P(y > z | x) = sigmoid(r(x, y) - r(x, z))
    (2)  loss = mean over pairs of  -log sigmoid(r(x, chosen) - r(x, rejected) - margin)                   -> `pair_loss`

That is classification of pairs: log 2 where the model cannot tell, falling as the difference grows. Only differences are
learnt; r + f(x) fits as well for any f, and how far apart scores get depends on how consistent the labels are. So at the end
the scores are divided by their spread over texts of the training pairs, folded into the head: a policy trained on it sees
rewards of about unit scale. (Their mean stays, where the head has no bias; --center keeps it near 0.)

The score is a linear head on the last real token's state, which has seen the whole text; a critic (ppo.py) reads every token.

Best-of-N draws N completions of a prompt and keeps the one of the highest score. It needs no training of the policy, and
every RL method has to beat it. One set of M samples estimates all N <= M without bias, from all M samples and not only the
first N:

    (3)  E[value of the best of N] = sum_i v_(i) C(i - 1, N - 1) / C(M, N),    v_(i) with the i-th smallest score -> `best_of`
    (4)  KL(best-of-N || policy) <= log N - (N - 1) / N

The measure that matters is not the model's own score, which rises with N by construction, but the true reward beside it.

    python reward_model.py                            # pairs of the embedded task, then best-of-N of the embedded model
    python reward_model.py --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl --eval_data held_out_pairs.jsonl
    python reward_model.py --model runs/reward_model/model --steps 0 --policy MODEL --eval_prompts prompts.jsonl

Left out: ensembles, several scores at once, rewards for the steps of an answer. The result is an ordinary sequence classifier
(AutoModelForSequenceClassification with one label), for `--reward FOLDER` here and for other trainers.

Bradley and Terry 1952; Christiano et al. 2017; Stiennon et al. 2020 (reward models and best-of-N for language models);
Touvron et al. 2023 (the margin); Eisenstein et al. 2023 (centering); Beirami et al. 2024 (the bound on the KL)."""

import dataclasses
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
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForSequenceClassification

import common
from common import fail

TINY = Path(__file__).resolve().parent / "tests" / "tiny"  # the embedded model and its task


@dataclass
class Args:
    # --- task ---
    model: str = str(TINY / "model")
    """folder or hub name of the model to start from: a causal language model, or a reward model to go on with"""
    data: str | None = None
    """pairs to learn from: JSON lines with "prompt", "chosen", "rejected", and perhaps "margin"
    (None: the embedded task's)"""
    eval_data: str | None = None
    """held-out pairs, as --data; None: the embedded task has its own, other data none"""
    chat: bool = True
    """texts are rendered by the chat template, if the tokenizer has one
    (--no_chat: raw text, and the result has no template)"""
    template_args: str = ""
    """arguments of the chat template, a JSON object: '{"enable_thinking": false}'"""
    system: str = ""
    """system message before every prompt of --eval_prompts that has none of its own"""
    max_tokens: int = 1024
    """pairs with a longer side, prompt included, are left out, and counted; they are never cut"""

    # --- algorithm ---
    use_margin: bool = False
    """the score of chosen should exceed that of rejected by the row's "margin" """
    center: float = 0.0
    """weight of the mean squared sum of a pair's scores, which keeps them near 0 (0.01 is usual)"""
    unit_scale: bool = True
    """at the end, fold the spread of the scores on the training pairs into the head"""

    # --- best of N ---
    best_of: tuple[int, ...] = (1, 2, 4, 8, 16)
    """the N of best-of-N; as many completions as the largest are drawn for each prompt"""
    policy: str | None = None
    """the model that draws them (None: for the embedded pairs the embedded model, otherwise nobody)"""
    eval_prompts: str | None = None
    """prompts for best-of-N: JSON lines with "prompt" and, for the true reward, "answer" """
    reward: str = "exact"
    """the true reward beside the model's: exact | number | FILE.py:function(completion, row) | another reward model"""
    max_prompt_tokens: int = 512
    """prompts that are longer are left out, and counted"""
    max_new_tokens: int = 256
    """a completion is cut here"""
    temperature: float = 1.0
    """of sampling"""
    sample_rows: int = 512
    """completions drawn at once: lower it when memory runs out"""

    # --- optimisation ---
    steps: int = 375
    """optimizer updates in all; 0 evaluates only"""
    pairs_per_step: int = 64
    """pairs in an update"""
    learning_rate: float | None = None
    """AdamW's step size (None: 1e-5, and 1e-3 for the embedded model, which is small and wants more)"""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """what becomes of the learning rate after the warm-up"""
    warmup: int = 10
    """steps over which the learning rate rises"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    tokens_per_micro_batch: int | None = None
    """tokens, padding included, in one forward and backward (None: 8192 on a GPU, 1024 on a CPU).
    Lower it when memory runs out; up to rounding, results do not change"""
    gradient_checkpointing: bool = False
    """keep less for the backward pass and compute it twice: less memory, more time (starts are then not shared)"""

    # --- run ---
    out: str = ""
    """the run's folder (empty: runs/reward_model, then runs/reward_model-2, ...)"""
    resume: bool = False
    """go on with the run in --out; give it the flags it was started with"""
    seed: int = 1
    """of the new head, of the order of pairs and of sampling"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """what computes (auto: bfloat16 on a GPU, float32 on a CPU); weights that learn stay float32.
    bfloat16 on a CPU needs less memory. With avx512_bf16 or amx in /proc/cpuinfo it is faster too:
    a GRPO step of a 135M model took 0.62 of the time (tests/bench/vs_trl.py)"""
    eval_every: int = 75
    """steps between scores on --eval_data"""
    save_every: int = 75
    """steps between checkpoints"""
    keep: int = 1
    """checkpoints that stay on the disk, the newest ones"""


def resolve(args):
    """Fills in the defaults that depend on other flags, and refuses flags that contradict each other."""
    tiny_data = args.data is None and not args.eval_data and not args.policy and not args.eval_prompts
    defaults = {
        "data": str(TINY / "pairs_train.jsonl") if tiny_data else "",
        "learning_rate": 1e-3 if Path(args.model).resolve() == TINY / "model" else 1e-5,
        "tokens_per_micro_batch": 1024 if args.device == "cpu" or not torch.cuda.is_available() else 8192,
        "eval_data": str(TINY / "pairs_test.jsonl") if tiny_data else "",
        "policy": str(TINY / "model") if tiny_data else "",
        "eval_prompts": str(TINY / "sort_test.jsonl") if tiny_data else "",
    }
    args = dataclasses.replace(args, **{k: v for k, v in defaults.items() if getattr(args, k) is None})
    common.check_flags(args)
    if args.steps and not args.data:
        fail("--data: name a file of pairs, or give --steps 0 to evaluate only")
    if not (args.steps or args.eval_data or args.policy):
        fail("--steps 0 evaluates; name pairs with --eval_data, or --policy and --eval_prompts")
    if args.policy and (not args.best_of or min(args.best_of) < 1):
        fail("--best_of: name one N or more, each 1 or more")
    if bool(args.policy) != bool(args.eval_prompts):
        fail("--policy draws completions of --eval_prompts: both are needed for best-of-N")
    return args


# -- The task: pairs, prompts and true rewards ---------------------------------------------------------------------


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


def encode_pairs(rows, tokenizer, args, flag):
    """[(chosen's ids, rejected's ids, row), ...] of whole conversations, without pairs of equal sides, which say nothing, and
    without those too long: cut, a pair may lose the very place where its sides differ. Says how many those were."""
    pairs = [
        (*(common.encode_answer(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")), row) for row in rows
    ]
    differ = [p for p in pairs if p[0] != p[1]]
    kept = [p for p in differ if max(len(p[0]), len(p[1])) <= args.max_tokens]
    if len(kept) < len(pairs):
        long = len(differ) - len(kept)
        common.say(
            f"{flag}: of {len(pairs)} pairs {len(pairs) - len(differ)} left out as equal, {long} as over --max_tokens {args.max_tokens}"
        )
    if args.use_margin and flag == "--data":
        for _, _, row in kept:
            if not isinstance(row.get("margin"), (int, float)) or not math.isfinite(row["margin"]):
                fail(f'{flag}: --use_margin needs a "margin", a number; the pair with prompt {row["prompt"]!r:.100} has none')
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


def pair_loss(chosen, rejected, margin, pairs, center):
    """Equation (2): chosen, rejected, margin [b]; `pairs` is the number of pairs of the whole update, over all of its
    micro-batches and processes. `center` adds the mean of (chosen + rejected)^2: differences leave the level free, and this
    holds it near 0."""
    loss = -F.logsigmoid(chosen - rejected - margin) + center * (chosen + rejected) ** 2
    return loss.sum() / pairs


def best_of(scores, values, n):
    """Equation (3): scores, values [prompts, M] -> [prompts], the expected value of the completion with the highest score
    among n drawn out of M. The i-th in order is the best of the n if it is one of them and the other n - 1 are below it. Equal
    scores share what their places get."""
    M = scores.shape[1]
    chance = [math.comb(i, n - 1) / math.comb(M, n) for i in range(M)]  # of place i, from the lowest score
    chance = torch.tensor(chance, dtype=torch.float64).cumsum(0)
    below = (scores[:, None, :] < scores[:, :, None]).sum(2)  # [prompts, M] how many score less than this one
    equal = (scores[:, None, :] == scores[:, :, None]).sum(2)  # as many as this one, itself counted
    upto = torch.cat([torch.zeros(1, dtype=torch.float64), chance])
    return ((upto[below + equal] - upto[below]) / equal * values).sum(1)


def pair_metrics(chosen, rejected, difference):
    """What held-out scores say, [pairs] each; difference is how much longer chosen is, in tokens. -> dict. `accuracy`
    counts a tie as half. Split by length it shows a model that just likes long answers: high where chosen is longer, low
    where it is shorter. `calibration` is the mean distance, over pairs in ten bins of confidence, of the predicted chance
    that the side with the higher score wins from the share of those that do."""
    margin = chosen - rejected
    won = (margin > 0).double() + 0.5 * (margin == 0).double()
    out = {"eval/accuracy": won.mean().item(), "eval/margin": margin.mean().item()}
    out["eval/loss"] = -F.logsigmoid(margin).mean().item()
    for name, which in (("shorter", difference < 0), ("longer", difference > 0)):
        if which.any():
            out[f"eval/accuracy_{name}"] = won[which].mean().item()
    sure, off = margin.abs().sigmoid(), 0.0  # sure: the predicted chance of the side with the higher score
    bins = (sure * 20 - 10).long().clamp(0, 9)
    for b in bins.unique():
        off += (sure[bins == b].mean() - won[bins == b].mean()).abs().item() * (bins == b).double().mean().item()
    return out | {"eval/calibration": off}


# -- Scores: one forward for both sides ----------------------------------------------------------------------------


def split_pairs(pairs, shared):
    """[(what both sides begin with, rest of chosen, rest of rejected), ...] as ids. The prompt, and sometimes more, is
    computed once for both sides; each keeps one token at least. Without `shared` nothing is common."""
    out = []
    for chosen, rejected, _ in pairs:
        same = 0
        while shared and same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
            same += 1
        out.append((chosen[:same], chosen[same:], rejected[same:]))
    return out


def micro_batches_of_pairs(pairs, shared, tokens, world):
    """Cuts pairs into parts of at most `tokens` tokens (or one pair) with padding, pairs of like length together -> [pair
    numbers]. Both sides stay in one part, because the loss is of their difference. Every process gets the same number of
    parts, some perhaps empty: sharded weights are gathered by all or by none."""
    sizes = [(len(p), max(len(c), len(r))) for p, c, r in split_pairs(pairs, shared)]
    parts = [[]]
    for i in sorted(range(len(pairs)), key=lambda i: (-sizes[i][1], -sizes[i][0])):
        prompt, answer = (max(sizes[j][k] for j in (*parts[-1], i)) for k in (0, 1))
        if parts[-1] and (len(parts[-1]) + 1) * (prompt + 2 * answer) > tokens:
            parts.append([])
        parts[-1].append(i)
    most = int(common.all_gather(world, torch.tensor([len(parts)], device=world.device)).max())
    return parts + [[]] * (most - len(parts))


def pair_scores(model, tokenizer, pairs, shared, world):
    """The scores (chosen [b], rejected [b]) of pairs, read at the last real token; the head computes in float32, because
    bfloat16 has steps of 0.01 between scores of 1 and 2. By length, not by looking for the pad id from the right as the
    model's own pooling does: that finds another place where a text ends in that id."""
    starts, chosen, rejected = zip(*split_pairs(pairs, shared))
    s, b = common.as_samples(starts * 2, chosen + rejected, tokenizer, world), len(pairs)  # rows: all chosen, then all rejected
    if shared:
        _, cache = common.prompt_states(model, s.prompt_ids[:b], s.prompt_mask[:b])
        cache.reorder_cache(torch.arange(b, device=s.ids.device).repeat(2))  # each start for both of its sides
        states = common.hidden_states(model, s.ids, torch.cat([s.prompt_mask, s.mask], 1), cache)
    else:
        states = common.hidden_states(model, s.ids, s.mask)
    last = states[torch.arange(2 * b, device=s.ids.device), s.mask.sum(1) - 1].float()  # [2b, width]
    head = common.scalar_head(model)
    scores = F.linear(last, head.weight.float(), None if head.bias is None else head.bias.float())[:, 0]
    return scores.chunk(2)


def evaluate(model, tokenizer, held_out, shared, args, world):
    """-> pair_metrics of held-out pairs; each process takes its share."""
    mine = held_out[world.rank :: world.size] or held_out[:1]
    found = score_all(model, tokenizer, mine, shared, args, world)
    longer = torch.tensor([len(c) - len(r) for c, r, _ in mine], dtype=torch.float64)
    table = torch.stack([*found, longer], 1)  # [pairs, 3]
    if world.size > 1:
        most = -(-len(held_out) // world.size)
        table = F.pad(table, (0, 0, 0, most - len(table)), value=math.nan).to(world.device)
        table = common.all_gather(world, table).cpu()
        table = table[~table[:, 0].isnan()][: len(held_out)]
    return pair_metrics(*table.T)


@torch.no_grad()
def score_all(model, tokenizer, pairs, shared, args, world):
    """The scores of many pairs, chosen and rejected, [pairs] each, in float64 on the CPU. A model that is only evaluated is read
    as --reward and transformers' pipeline read it, whoever made it."""
    if not args.steps:
        sides = list(zip(*pairs))[:2]
        return [torch.tensor(common.score_ids(model, tokenizer, ids, world), dtype=torch.float64) for ids in sides]
    chosen, rejected = torch.zeros(2, len(pairs), dtype=torch.float64)
    for part in micro_batches_of_pairs(pairs, shared, args.tokens_per_micro_batch, world):
        scores = pair_scores(model, tokenizer, [pairs[i] for i in part or [0]], shared, world)
        if part:
            chosen[part], rejected[part] = (x.double().cpu() for x in scores)
    if common.all_sum(world, not (chosen + rejected).isfinite().all())[0]:  # asked of all, so that all stop
        raise common.Stop("the model gave a score that is not finite")
    return chosen, rejected


@torch.no_grad()
def fold_scale(model, tokenizer, pairs, shared, args, world):
    """Divides the head by the spread of the scores of (at most 2048) training pairs, and takes their mean from its bias, if
    it has one (decoders' heads have none): accuracy stays what it was, and the scores get unit scale. A difference of
    scores times the spread is then what equation (1) has inside."""
    sample = [pairs[common.nth_row(len(pairs), i, args.seed)] for i in range(min(len(pairs), 2048))]
    scores = torch.cat(score_all(model, tokenizer, sample[world.rank :: world.size] or sample[:1], shared, args, world))
    total, squares, count = common.all_sum(world, scores.sum(), (scores**2).sum(), len(scores))
    mean, spread = total / count, math.sqrt(max(squares / count - (total / count) ** 2, 1e-12))
    if spread < 1e-3:
        common.say(f"warning: all scores are nearly the same (spread {spread:.1g}): nothing was learnt, and nothing is scaled")
        return {}
    head = common.scalar_head(common.at_rest(model))
    for p in head.parameters():
        if p.ndim == 1:
            p.sub_(mean)
        p.div_(spread)
    common.say(f"scores on training pairs: mean {mean:.3f}, spread {spread:.3f}; the head is divided by the spread")
    common.say("(the margin, loss and calibration above are from before this division; accuracy does not change)")
    return {"scale/mean": mean, "scale/spread": spread}


# -- Best of N -----------------------------------------------------------------------------------------------------


def report_best_of(model, tokenizer, policy_tokenizer, prompts, reward, args, world, stop_asked):
    """Draws max(N) completions of each prompt from the policy and says what the best of N of them is worth: by the model's
    score, by the true reward where there is one, and for how much KL at most. N = 1, a random choice, is the policy itself."""
    policy, M = common.load_reference(args.policy, world), max(args.best_of)
    mine, sums = prompts[world.rank :: world.size], [0.0] * (1 + 2 * len(args.best_of))
    size = max(1, args.sample_rows // M)
    for i in range(0, -(-len(prompts) // world.size), size):  # the same number of rounds on every process
        if common.all_sum(world, stop_asked())[0]:
            raise common.Ended("stopped by a signal in best-of-N; the model is saved")
        part = mine[i : i + size]
        ids, rows = zip(*(part or prompts[:1]))
        seed = common.fold(args.seed, i, world.rank, common.DRAW)
        texts = common.sample(
            policy, policy_tokenizer, ids, n=M, max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=seed
        ).texts
        rows = [row for row in rows for _ in range(M)]
        scores = torch.tensor(common.score_texts(model, tokenizer, texts, rows, world), dtype=torch.float64).view(-1, M)
        values = torch.tensor(reward(texts, rows), dtype=torch.float64).view(-1, M) if reward else torch.zeros_like(scores)
        if part:
            means = [best_of(scores, x, n).sum().item() for n in args.best_of for x in (scores, values)]
            sums = [a + b for a, b in zip(sums, (len(part), *means))]
    count, *sums = common.all_sum(world, *sums)
    metrics = {}
    if world.rank == 0:
        print("\nbest of N   score" + "   true reward" * bool(reward) + "   KL at most")
    for n, score, value in zip(args.best_of, sums[::2], sums[1::2]):
        metrics[f"best_of/score@{n}"] = score / count
        if reward:
            metrics[f"best_of/true@{n}"] = value / count
        metrics[f"best_of/kl@{n}"] = math.log(n) - (n - 1) / n
        if world.rank == 0:
            row = (f"{n:9d}", f"{score / count:8.3f}", *([f"{value / count:14.3f}"] if reward else []))
            print(*row, f"{metrics[f'best_of/kl@{n}']:13.3f}")
    return metrics


# -- The loop ------------------------------------------------------------------------------------------------------


def train(args):
    args = resolve(args)
    world = common.start(args.device, args.dtype, args.seed)
    if args.pairs_per_step % world.size:
        fail(f"--pairs_per_step {args.pairs_per_step} must be a multiple of the number of processes")

    # everything that can be wrong with the user's input is found here, before the model is loaded or a file written
    config, date = common.scalar_config(args.model), common.run_date(args, world)
    tokenizer = common.load_tokenizer(args.model, args.template_args, date)
    with torch.device("meta"):  # no weights yet: what kind of head would it be?
        empty = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    head = getattr(empty, "score", None)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not isinstance(head, torch.nn.Linear):
        fail(f"--model {args.model}: the family {config.model_type!r} has no score that is read at a text's last token")
    finished = any("SequenceClassification" in name for name in config.architectures or ())
    if not finished and not args.steps:
        fail(f"--steps 0: {args.model} is no reward model yet, so there is nothing to evaluate")
    if args.steps:
        common.own_pad(tokenizer)
    if not args.chat:
        tokenizer.chat_template = None  # in model/ too, so that others score texts as they were learnt
    context = common.context_of(config)
    if args.max_tokens > context:
        common.say(f"--max_tokens {args.max_tokens} is lowered to {context}, the model's context")
        args = dataclasses.replace(args, max_tokens=context)
    pairs = encode_pairs(read_pairs(args.data, "--data"), tokenizer, args, "--data") if args.steps else []
    held_out = encode_pairs(read_pairs(args.eval_data, "--eval_data"), tokenizer, args, "--eval_data") if args.eval_data else []
    prompts, reward, policy_tokenizer = [], None, None
    if args.policy:
        policy_config = common.policy_config(args.policy)
        policy_tokenizer = common.load_tokenizer(args.policy, date=date)
        policy_tokenizer.template_args = tokenizer.template_args
        prompts = load_prompts(args.eval_prompts, "--eval_prompts", policy_tokenizer, args)
        read = [len(common.encode_answer(tokenizer, row["prompt"], "")) - 1 for _, row in prompts]  # without its end
        args = common.fit_context(args, max(*read, *(len(ids) for ids, _ in prompts)), config, policy_config)
        lacking = [row["prompt"] for _, row in prompts if not isinstance(row.get("answer"), (str, int, float))]
        if args.reward not in ("exact", "number") or not lacking:
            reward = load_reward(args.reward, world, date)
            if is_a_model(args.reward):
                args = common.fit_reward_model(args, policy_tokenizer, prompts)
        elif len(lacking) < len(prompts):
            fail(f'--eval_prompts: some rows have an "answer", but not the one with prompt {lacking[0]!r:.100}')
        else:
            common.say('--eval_prompts: no row has an "answer", so there is no true reward to report beside the model\'s score')
    out = common.open_run(args, "reward_model", world)
    stop_asked = common.catch_signals(args.steps)

    state = common.take_up(out, args, world)
    first = state["step"] if state else 0
    shown, reader = (pairs or held_out or prompts)[0][0], tokenizer if pairs or held_out else policy_tokenizer
    writer, bar = common.introduce(out, args, world, reader, shown, first, learning=bool(args.steps), frozen=bool(args.policy) + (not args.steps))
    if args.steps:
        drawn = args.steps * args.pairs_per_step
        head = "the folder's" if finished else "new"
        common.say(f"{drawn} pairs will be drawn from {len(pairs)}, {drawn / len(pairs):.1f} passes; the head is {head}")

    with common.guarded(out, args, bar):
        width = config.get_text_config().hidden_size
        head_std = None if finished else 1 / math.sqrt(width + 1)
        model = common.load_scalar(args.model, world, tokenizer, head_std, args.gradient_checkpointing, frozen=not args.steps)
        optimizer = common.make_optimizer(model, args.learning_rate) if args.steps else None
        # what both sides of a pair begin with is computed once
        shared = args.steps > 0 and common.prompts_can_be_shared(model, world, args.gradient_checkpointing)
        shared = shared and all(start for start, _, _ in split_pairs(pairs + held_out, True))
        if state:
            common.load_checkpoint(state, {"model": model}, {"model": optimizer})
            del state

        def held_out_scores():
            return evaluate(model, tokenizer, held_out, shared, args, world) if held_out else {}

        if first == 0:
            common.log(out, writer, 0, held_out_scores())

        for step in range(first + 1, args.steps + 1):
            began = time.perf_counter()

            # 1. The next pairs.
            batch = [pairs[i] for i in common.rows_of_step(len(pairs), step, args.pairs_per_step, world, args.seed)]

            # 2. One forward for both sides of a pair; the loss is divided by the pairs of the whole step, before the
            #    first backward: however the step is cut, the gradients add up to the same.
            rate = common.learning_rate_at(step, args.steps, args.learning_rate, args.schedule, args.warmup)
            optimizer.param_groups[0]["lr"] = rate
            sums = torch.zeros(4, dtype=torch.float64, device=world.device)
            for part in micro_batches_of_pairs(batch, shared, args.tokens_per_micro_batch, world):
                real, part = bool(part), part or [0]  # no pair is left here, but elsewhere
                chosen, rejected = pair_scores(model, tokenizer, [batch[i] for i in part], shared, world)
                wanted = torch.tensor([batch[i][2]["margin"] if args.use_margin else 0.0 for i in part], device=world.device)
                loss = pair_loss(chosen, rejected, wanted, args.pairs_per_step, args.center) * real
                loss.backward()
                with torch.no_grad():
                    won = (chosen > rejected).sum() + 0.5 * (chosen == rejected).sum()
                    sums += torch.stack([loss.detach(), *(x * real for x in (won, chosen.sum(), rejected.sum()))])
            norm = common.clip_gradients(model, args.max_grad_norm)
            if not math.isfinite(norm):
                raise common.Stop(f"step {step}: the gradient is {norm}, so no step was taken with it")
            optimizer.step()
            optimizer.zero_grad()

            # 3. Log: sums over all processes first, then means.
            tokens = sum(len(c) + len(r) for c, r, _ in batch)
            loss, won, chosen, rejected, tokens = common.all_sum(world, *sums, tokens)
            N, seconds = args.pairs_per_step, time.perf_counter() - began
            metrics = {
                "loss": loss, "accuracy": won / N, "margin": (chosen - rejected) / N, "chosen": chosen / N, "rejected": rejected / N,
                "grad_norm": norm, "learning_rate": rate, "time/train": seconds, "tokens_per_second": tokens / seconds,
                "memory_gib": common.memory_used(world) / 2**30,
            }  # fmt: skip
            if step % args.eval_every == 0 or step == args.steps:
                metrics |= held_out_scores()
            common.log(out, writer, step, metrics)
            if bar:
                bar.set_postfix_str(f"loss {metrics['loss']:.3f}, accuracy {metrics['accuracy']:.3f}")
                bar.update()

            # 4. Save. A signal to end (Ctrl-C, a cluster that wants its machine back) waits for this place.
            ending = common.all_sum(world, stop_asked())[0] > 0
            if step % args.save_every == 0 or step == args.steps or ending:
                common.save_checkpoint(out, world, step, {"model": model}, {"model": optimizer}, args.keep)
            if ending and step < args.steps:
                raise common.Ended(f"stopped by a signal after step {step} of {args.steps}, which is saved")

        # 5. The end: unit scale (in model/, not in the checkpoint, from which training may go on), and best-of-N.
        found = {}
        if args.steps:
            if args.unit_scale:
                found |= fold_scale(model, tokenizer, pairs, shared, args, world)
            common.save_model(model, tokenizer, out / "model", world)
        del optimizer
        if args.policy:
            found |= report_best_of(model.eval(), tokenizer, policy_tokenizer, prompts, reward, args, world, stop_asked)
        if found:
            common.log(out, writer, args.steps, found)
    text = tokenizer.decode(shown) if len(shown) < 100 else "prompt and answer as the first text above"
    use = f'print(pipeline("text-classification", "{out / "model"}")({text!r}, add_special_tokens=False))'
    common.conclude(out, args, writer, bar, use)


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__.partition("\n")[0], use_underscores=True))
