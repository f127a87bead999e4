"""A reward model: scores for texts, learnt from preference pairs. And best-of-N with it.

It is hard to say what a summary is worth, but easier to say which of two is better. Bradley and
Terry give each text a score r. The chance that completion y is preferred to z is

    (1)  P(y > z | x) = sigmoid(r(x, y) - r(x, z))
    (2)  loss = mean over pairs of
                -log sigmoid(r(x, chosen) - r(x, rejected) - margin)            `pair_loss`
                + center (r(x, chosen) + r(x, rejected))^2

By default margin and center are 0. Then the loss is log 2 where the model cannot
tell, and falls as the difference grows. The score is a linear head on the state at
the text's last token, which has seen the whole text.

Best-of-N draws N completions of a prompt and keeps the one with the highest score. RL is worth its
price only if it beats that. M samples give an unbiased estimate of the best of N for every N <= M:

    (3)  mean value of the best of N = sum over i of v_i choose(i - 1, N - 1) / choose(M, N)
                                                                                `best_of`
    (4)  KL(best-of-N || policy) <= log N - (N - 1) / N

v_i is the value of the sample with the i-th smallest score. This sample is the best of a random
choice of N if the other N - 1 are among the i - 1 below it. The value is the true reward, or
the score itself. With the score, (3) rises with N even for a useless model. So watch the true
reward beside it.

    python reward_model.py               # the bundled model and pairs; needs no download
    python reward_model.py --model Qwen/Qwen2.5-0.5B-Instruct \
        --data pairs.jsonl --eval_data held_out_pairs.jsonl
    python reward_model.py --model runs/reward_model/model --steps 0 \
        --policy MODEL --eval_prompts prompts.jsonl

The result is an ordinary sequence classifier (AutoModelForSequenceClassification with one label),
for `--reward FOLDER` here and for other trainers.

Shapes: b pairs in one forward, 2b texts; C tokens in the longest side; M samples of each prompt.

What is biased:
  * Only differences are learnt: r + f(x) has the same loss for any f. --center keeps the level
    near 0.
  * The scale of the scores depends on how consistent the labels are. At the end those of model/
    (not of best/) are divided by their spread on training pairs (`fold_scale`). That spread is over
    all prompts; the scores of one prompt differ less. To get (1) from a model so saved, multiply
    the difference by the spread. --steps 0 does not multiply: for such a model its eval/accuracy
    is right, its eval/loss and eval/calibration are not.
  * Labels may favour long answers. A model that has learnt only that has a low
    eval/accuracy_shorter: the accuracy on pairs whose chosen side is the shorter one.

Left out: ensembles, several scores for a text, rewards for the steps of an answer.

Papers: Bradley and Terry 1952, Christiano et al. 2017, Stiennon et al. 2020 (reward models and
best-of-N for language models), Touvron et al. 2023 (the margin), Eisenstein et al. 2023
(centering), Beirami et al. 2024 (the bound on the KL).
"""

import dataclasses
import functools
import math
import re
import time
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForSequenceClassification

import common
from common import fail

TINY = Path(__file__).resolve().parent / "tests" / "tiny"  # the bundled model and its task


@dataclass
class Args:
    # --- task ---
    model: str = str(TINY / "model")
    """folder or hub name of a causal language model to start from, or of a reward model to train
    further"""
    data: str | None = None
    """training pairs: JSON lines with "prompt" (or "question"), "chosen", "rejected", and perhaps
    "margin" (None: the bundled pairs, if --model is the bundled one and no other file is named)"""
    eval_data: str | None = None
    """held-out pairs, as --data (None: those of the bundled task, or none with other data)"""
    chat: bool = True
    """put texts through the chat template, if there is one (--no_chat: raw text, and the saved
    model has no template)"""
    template_args: str = ""
    """arguments of the chat template, a JSON object: '{"enable_thinking": false}'"""
    system: str = ""
    """system message that --policy, not the reward model, reads before prompts that have none"""
    max_tokens: int = 1024
    """pairs with a longer side, prompt included, are left out, and counted; they are never cut"""

    # --- algorithm ---
    use_margin: bool = False
    """the score of chosen should exceed that of rejected by the "margin" of the pair"""
    center: float = 0.0
    """weight of the mean squared sum of a pair's scores, which keeps them near 0 (usual: 0.01)"""
    unit_scale: bool = True
    """at the end, divide the head by the spread of the scores on training pairs"""

    # --- best of N ---
    best_of: tuple[int, ...] = (1, 2, 4, 8, 16)
    """each N of best-of-N; the largest is the number of completions drawn for a prompt"""
    policy: str | None = None
    """the model that draws them (None: the bundled model for the bundled pairs, or none)"""
    eval_prompts: str | None = None
    """prompts for best-of-N: JSON lines with "prompt" and, for the true reward, "answer" (None: the
    bundled ones for the bundled pairs, or none)"""
    reward: str = "exact"
    """the true reward beside the model's score:
    exact | number | a reward model's folder or hub name |
    FILE.py:function(completion, row) -> a number, or a dict with "reward" and more to be logged"""
    max_prompt_tokens: int = 512
    """longer prompts are left out, and counted"""
    max_new_tokens: int = 512
    """a completion is cut here; at most what the model's context has room for"""
    temperature: float = 1.0
    """of sampling"""
    sample_rows: int = 512
    """completions drawn at once (never fewer than the largest N); lower it when memory runs out"""

    # --- optimisation ---
    lora_rank: int = 0
    """rank of the adapters that learn while the model itself is frozen (0: all weights learn)"""
    lora_alpha: float = 32.0
    """what the adapters add is multiplied by this / --lora_rank"""
    steps: int = 375
    """optimizer updates in all; 0 evaluates only"""
    pairs_per_step: int = 64
    """pairs in an update"""
    learning_rate: float | None = None
    """peak of AdamW's learning rate (None: 1e-5, adapters 1e-4; bundled model 1e-3 and 3e-3)"""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """what the learning rate does after the warm-up"""
    warmup: int = 10
    """steps over which the learning rate rises"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    tokens_per_micro_batch: int | None = None
    """tokens, padding included, in one forward and backward (None: 8192 on a GPU, 1024 on a CPU).
    Lower it when memory runs out; up to rounding, results do not change"""
    gradient_checkpointing: bool = False
    """compute activations twice instead of keeping them: less memory, more time"""

    # --- run ---
    out: str = ""
    """the run's folder (empty: runs/SCRIPT, then runs/SCRIPT-2, ...)"""
    resume: bool = False
    """go on with the run in --out; flags that are not given are those of the run"""
    seed: int = 1
    """decides the new head, how adapters start, the order of pairs and what is drawn"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """compute type (auto: bfloat16 on a GPU, float32 on a CPU); trained weights stay float32.
    On a CPU bfloat16 saves memory. It is faster, too, if /proc/cpuinfo lists avx512_bf16 or amx"""
    eval_every: int = 75
    """steps between scores on --eval_data; 0: never"""
    eval_rows: int = 0
    """score only so many held-out rows, always the same ones; 0: all"""
    save_every: int = 75
    """steps between checkpoints"""
    keep: int = 1
    """checkpoints that stay on the disk, the newest ones"""
    keep_best: bool = True
    """keep the model with the best eval/accuracy as best/ in
    the run's folder, if it is better than before training"""


def resolve(args):
    """Fills in defaults that depend on other flags, and rejects contradictory flags."""
    is_tiny_model = Path(args.model).resolve() == TINY / "model"
    has_files = args.data is not None or args.eval_data or args.policy or args.eval_prompts
    is_tiny_data = is_tiny_model and not has_files
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    defaults = {
        "data": str(TINY / "pairs_train.jsonl") if is_tiny_data else "",
        "eval_data": str(TINY / "pairs_test.jsonl") if is_tiny_data else "",
        "policy": str(TINY / "model") if is_tiny_data else "",
        "eval_prompts": str(TINY / "sort_test.jsonl") if is_tiny_data else "",
        "learning_rate": 1e-3 if is_tiny_model else 1e-5,
        "tokens_per_micro_batch": 1024 if on_cpu else 8192,
    }
    if args.lora_rank:  # about ten times; that is too much for the bundled model's high rate
        defaults["learning_rate"] *= 3 if is_tiny_model else 10
    unset = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    args = dataclasses.replace(args, **unset)
    common.check_flags(args)
    if args.policy and (not args.best_of or min(args.best_of) < 1):
        fail("--best_of: name one N or more, each 1 or more")
    if bool(args.policy) != bool(args.eval_prompts):
        fail("--policy draws completions of --eval_prompts: both are needed for best-of-N")
    return args


# -- The math ----------------------------------------------------------------------------------


def pair_loss(chosen, rejected, margin, pairs, center):
    """Equation (2). All [b]; `pairs` is the number of pairs in the update, over all micro-batches
    and processes, so it does not matter how the update is cut into micro-batches.
    """
    loss = -F.logsigmoid(chosen - rejected - margin) + center * (chosen + rejected) ** 2
    return loss.sum() / pairs


def best_of(scores, values, n):
    """Equation (3): scores, values [prompts, M] -> the expected value of the completion with the
    highest score among n of the M, [prompts].

    Equal scores share the chances of their places, which are `below` to `below` + `equal` - 1.
    Without ties `share` is chance[below].
    """
    M = scores.shape[1]
    # chance[i]: that the best of n is the sample with i scores below it, the one at i + 1 in (3)
    chance = [math.comb(i, n - 1) / math.comb(M, n) for i in range(M)]
    # up_to[i]: the chance that it is one of the lowest i samples, [M + 1]
    up_to = torch.tensor([0.0, *chance], dtype=torch.float64).cumsum(0)
    below = (scores[:, None, :] < scores[:, :, None]).sum(2)  # [prompts, M]
    equal = (scores[:, None, :] == scores[:, :, None]).sum(2)  # counts the score itself too
    share = (up_to[below + equal] - up_to[below]) / equal
    return (share * values).sum(1)


def share_won(chosen, rejected):
    """1 where chosen is scored higher, 1/2 on a tie, else 0, [b]."""
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def pair_metrics(chosen, rejected, longer_by):
    """Metrics of held-out scores [pairs] -> dict. longer_by: how much longer chosen is, in tokens.

    Calibration: pairs come into ten bins by the predicted chance that the side with the higher
    score wins. In each bin that chance is compared with the share that does win; the distances are
    averaged, weighted by pairs. eval/margin is chosen - rejected; the margin of equation (2) and
    --center are in none of these numbers.
    """
    gap = chosen - rejected
    won = share_won(chosen, rejected).double()
    metrics = {
        "eval/accuracy": common.mean_of(won),
        "eval/margin": common.mean_of(gap),
        "eval/loss": common.mean_of(-F.logsigmoid(gap)),
        "held_out/pairs": len(gap),
    }
    if (longer_by < 0).any():
        metrics["eval/accuracy_shorter"] = common.mean_of(won[longer_by < 0])
    if (longer_by > 0).any():
        metrics["eval/accuracy_longer"] = common.mean_of(won[longer_by > 0])
    predicted = gap.abs().sigmoid()  # from 0.5 to 1
    bins = (predicted * 20 - 10).long().clamp(0, 9)
    error = 0.0
    for b in bins.unique():
        inside = bins == b
        distance = (predicted[inside].mean() - won[inside].mean()).abs()
        error += (distance * inside.double().mean()).item()
    metrics["eval/calibration"] = error
    return metrics


# -- Scores: one forward over both sides of the pairs ------------------------------------------


def pair_scores(model, tokenizer, pairs, share_prompts, world):
    """The scores of both sides -> [b, 2], chosen and rejected. What both sides begin with is
    computed once if share_prompts.

    The last token is found by length. transformers takes the last one that is not the pad id, which
    is wrong for a text that ends in that id. (For those who use transformers, `load_task` gives the
    tokenizer a pad id that ends no text.)
    """
    b = len(pairs)
    # rows: first the chosen sides of all pairs, then the rejected ones
    starts = [start for start, _, _ in pairs] * 2
    sides = [chosen for _, chosen, _ in pairs] + [rejected for _, _, rejected in pairs]
    if share_prompts:
        samples = common.as_samples(starts, sides, tokenizer, world)
        start_ids = samples.prompt_ids[:b]
        _, cache = common.prompt_states(model, start_ids, samples.prompt_mask[:b])
        # [b] -> [2b]: the cache of pair i, once for its chosen and once for its rejected side
        cache.reorder_cache(torch.arange(b, device=world.device).repeat(2))
        mask = torch.cat([samples.prompt_mask, samples.mask], 1)
        states = common.hidden_states(model, samples.ids, mask, cache)  # [2b, C, width]
    else:
        texts = [start + side for start, side in zip(starts, sides)]
        samples = common.as_samples([[]] * (2 * b), texts, tokenizer, world)
        states = common.hidden_states(model, samples.ids, samples.mask)
    last = samples.mask.sum(1) - 1
    last_states = states[torch.arange(2 * b, device=world.device), last].float()
    # in float32: bfloat16 has steps of 0.01 between scores of 1 and 2
    head = common.scalar_head(model)
    bias = None if head.bias is None else head.bias.float()
    scores = F.linear(last_states, head.weight.float(), bias)  # [2b, 1]
    return scores.view(2, b).T


# -- The loop ----------------------------------------------------------------------------------


def update_loss(model, tokenizer, pairs, margin, share_prompts, args, world, meter):
    """Equation (2) for one micro-batch of pairs -> its share of the update's loss. margin [b]: what
    the data asks for (--use_margin), not the difference that is logged as "margin"."""
    scores = pair_scores(model, tokenizer, pairs, share_prompts, world)  # [b, 2]
    chosen, rejected = scores.T
    margin = margin.to(world.device)
    loss = pair_loss(chosen, rejected, margin, args.pairs_per_step, args.center)

    with torch.no_grad():  # the rest is for the log
        meter.mean("accuracy", share_won(chosen, rejected))
        meter.mean("margin", chosen - rejected)
        meter.mean("chosen", chosen)
        meter.mean("rejected", rejected)
    return loss


def train(args):
    args = resolve(args)
    world = common.start(args.device, args.dtype, args.seed)
    args, tokenizer, pairs, margins, held_out = load_task(args, world)
    args, policy_tokenizer, prompts, reward = load_best_of(args, tokenizer, world)

    out = common.open_run(args, Path(__file__).stem, world)
    stop_asked = common.catch_signals(args.steps)
    saved = common.take_up(out, args, world)  # the last checkpoint of a resumed run, or None
    done_steps = saved["step"] if saved else 0
    if pairs or held_out:
        start, chosen, _ = (pairs or held_out)[0]
        first_text = start + chosen
        reader = tokenizer
    else:
        first_text = prompts[0][0]
        reader = policy_tokenizer
    # how many models learn, and the paths of those that are only read
    learning = int(args.steps > 0)
    frozen = [args.policy, "" if learning else args.model]
    if reward is not None and reward.is_model:
        frozen.append(args.reward)
    # says what the run is, with its first text
    writer, bar = common.begin_log(
        out, args, world, reader, first_text, done_steps, learning, frozen
    )
    head_std = new_head_std(args)
    common.say_passes(args.steps * args.pairs_per_step, len(pairs), "pairs")
    if args.steps:
        common.say(f"the head is {'new' if head_std else 'the one in the folder'}")

    with common.short_errors(out, args, bar):
        model = common.load_scalar(
            args.model,
            world,
            tokenizer,
            head_std,
            args.gradient_checkpointing,
            frozen=not args.steps,
            args=args,
        )
        # Whether a forward may compute once what both sides begin with. `prompts_can_be_shared`
        # says no on a GPU, where that is slower; on a CPU yes, if a trial gives the same numbers.
        # And the sides of every pair must begin with one token at least that is the same.
        share_prompts = args.steps > 0 and common.prompts_can_be_shared(
            model, world, args.gradient_checkpointing
        )
        share_prompts = share_prompts and all(start for start, _, _ in pairs + held_out)
        if args.steps:
            optimizer = common.make_optimizer(model, args.learning_rate)
        if saved:
            common.load_checkpoint(saved, {"model": model}, {"model": optimizer})
            del saved
        held_out_scores = functools.partial(
            evaluate, model, tokenizer, held_out, share_prompts, args, world, stop_asked
        )
        if done_steps == 0:
            common.log(out, writer, 0, common.scores_if_due(0, args, held_out_scores))

        for step in range(done_steps + 1, args.steps + 1):
            step_began = time.perf_counter()
            meter = common.Meter()

            # 1. The next pairs, in micro-batches (a forward each).
            indices = common.rows_of_step(len(pairs), step, args.pairs_per_step, world, args.seed)
            batch = [pairs[i] for i in indices]
            batch_margins = margins[indices]
            meter.sum("tokens", count_tokens(batch))
            parts = micro_batches_of_pairs(batch, share_prompts, args.tokens_per_micro_batch, world)

            # 2. Update. Each loss is divided by the pairs of the update, and gradients are summed
            #    over micro-batches and processes (common.py makes FSDP sum, not average).
            rate = common.learning_rate_at(
                step, args.steps, args.learning_rate, args.schedule, args.warmup
            )
            optimizer.param_groups[0]["lr"] = rate
            for part in parts:
                few = [batch[i] for i in part]
                loss = update_loss(
                    model, tokenizer, few, batch_margins[part], share_prompts, args, world, meter
                )
                loss.backward()
                meter.sum("loss", loss.detach())
            norm = common.clip_gradients(model, args.max_grad_norm)
            if not math.isfinite(norm):
                raise common.Stop(f"step {step}: the gradient is {norm}; update not made")
            optimizer.step()
            optimizer.zero_grad()

            # 3. Log.
            metrics = meter.result(world)
            tokens = metrics.pop("tokens")
            seconds = time.perf_counter() - step_began
            metrics |= {
                "grad_norm": norm,
                "learning_rate": rate,
                "time/train": seconds,
                "tokens_per_second": tokens / seconds,
                "memory_gib": common.memory_used(world) / 2**30,
            }
            metrics |= common.scores_if_due(step, args, held_out_scores)
            common.log(out, writer, step, metrics)
            common.save_best(out, args, world, step, metrics, model, tokenizer)

            # 4. Save if it is due. After a signal (Ctrl-C, SIGTERM), save and end the run.
            common.save_if_due(
                out, args, world, step, {"model": model}, {"model": optimizer}, stop_asked
            )

        # 5. The end: unit scale, and best-of-N. Only model/ is scaled, not best/, and not the
        #    checkpoint, from which training may go on.
        metrics = {}
        if args.steps:
            del optimizer
            common.save_model(model, tokenizer, out / "model", world)
            if args.unit_scale:  # after a save, because it takes a while
                metrics |= fold_scale(model, tokenizer, pairs, share_prompts, args, world)
                common.save_model(model, tokenizer, out / "model", world)
        if args.policy:
            metrics |= report_best_of(
                model.eval(), tokenizer, policy_tokenizer, prompts, reward, args, world, stop_asked
            )
        if metrics:
            common.log(out, writer, args.steps, metrics)
    common.conclude(out, args, writer, bar, line_to_try(out, reader, first_text))


# -- A first reading may end here: batches, held-out scores, unit scale, best-of-N, pairs, rewards


def micro_batches_of_pairs(pairs, share_prompts, tokens, world):
    """Cuts pairs into parts, one forward each -> lists of pair numbers.

    A pair is (prompt, chosen, rejected), as token ids; in reward_model.py, prompt is what both
    texts begin with. A part has at most `tokens` tokens (padding included, a shared prompt counted
    once) or one pair. Pairs of like length come together, to save padding.

    FSDP needs equally many parts in all processes. A process that has fewer takes a pair from its
    fullest part and makes it a part of its own. (That part has two pairs or more: another
    process has cut the same number of pairs into more parts.)
    """
    # what a pair takes in a forward
    copies = 1 if share_prompts else 2
    prompt_tokens = [copies * len(prompt) for prompt, _, _ in pairs]
    sides_tokens = [2 * max(len(chosen), len(rejected)) for _, chosen, rejected in pairs]

    def fits(part):
        # an upper bound: dpo.py's forward does not read the last token of a side
        longest_prompt = max(prompt_tokens[i] for i in part)
        longest_sides = max(sides_tokens[i] for i in part)
        return len(part) * (longest_prompt + longest_sides) <= tokens

    def size(i):
        return prompt_tokens[i] + sides_tokens[i]

    parts = []
    for i in sorted(range(len(pairs)), key=size, reverse=True):
        if not parts or not fits([*parts[-1], i]):
            parts.append([])
        parts[-1].append(i)

    count = torch.tensor([len(parts)], device=world.device)
    wanted = int(common.all_gather(world, count).max())
    while len(parts) < wanted:
        parts.append([max(parts, key=len).pop()])
    return parts


def share_of_process(pairs, world):
    """Every world.size-th pair. So that all processes get equally many, some of the first pairs are
    repeated at the end, and `in_order` drops the repetitions."""
    count = math.ceil(len(pairs) / world.size)
    return [pairs[(world.rank + i * world.size) % len(pairs)] for i in range(count)]


def in_order(results, count, world):
    """results [.., 2] for the pairs that `share_of_process` gave each process -> those of all
    `count` pairs in their order, [count, 2] on the CPU, in every process."""
    everyone = common.all_gather(world, results.to(world.device)).cpu()
    by_process = everyone.view(world.size, -1, 2)  # [rank, i]: pair i * world.size + rank
    return by_process.transpose(0, 1).reshape(-1, 2)[:count]


def side_lengths(pairs):
    """Tokens of chosen and rejected, without the prompt, [pairs, 2]."""
    return torch.tensor([[len(chosen), len(rejected)] for _, chosen, rejected in pairs])


def count_tokens(pairs):
    """Tokens of both sides of the pairs, each with its prompt."""
    prompts = sum(len(prompt) for prompt, _, _ in pairs)
    return side_lengths(pairs).sum() + 2 * prompts


@torch.no_grad()
def score_all(model, tokenizer, pairs, share_prompts, args, world, stop_asked=None):
    """The scores of many pairs -> [pairs, 2] in float64, in every process. Each scores its share.

    With --steps 0 the model may be from elsewhere. It then scores by its own forward, as --reward
    and transformers' pipeline do: at the last token that is no pad token.
    """
    mine = share_of_process(pairs, world)
    scores = torch.zeros(len(mine), 2, dtype=torch.float64)
    if args.steps:
        parts = micro_batches_of_pairs(mine, share_prompts, args.tokens_per_micro_batch, world)
        for part in common.until_stopped(parts, world, stop_asked):
            few = [mine[i] for i in part]
            scores[part] = pair_scores(model, tokenizer, few, share_prompts, world).double().cpu()
        common.forget_forwards(model)  # FSDP expects a backward after a forward
    else:
        for column in (0, 1):
            texts = [pair[0] + pair[1 + column] for pair in mine]
            found = common.score_ids(model, tokenizer, texts, world)
            scores[:, column] = torch.tensor(found, dtype=torch.float64)
    scores = in_order(scores, len(pairs), world)
    if not scores.isfinite().all():
        raise common.Stop("the model gave a score that is not finite")
    return scores


def evaluate(model, tokenizer, held_out, share_prompts, args, world, stop_asked=None):
    """Scores of held-out pairs, see `pair_metrics`."""
    if not held_out:
        return {}
    scores = score_all(model, tokenizer, held_out, share_prompts, args, world, stop_asked)
    length = side_lengths(held_out)
    return pair_metrics(scores[:, 0], scores[:, 1], length[:, 0] - length[:, 1])


@torch.no_grad()
def fold_scale(model, tokenizer, pairs, share_prompts, args, world):
    """Divides the head by the spread of its scores on at most 2048 of the training pairs that the
    run has drawn. A bias, which the heads of decoders do not have, first loses the mean score."""
    count = min(len(pairs), 2048, args.steps * args.pairs_per_step)
    sample = [pairs[common.nth_row(len(pairs), i, args.seed)] for i in range(count)]
    scores = score_all(model, tokenizer, sample, share_prompts, args, world)
    mean = scores.mean().item()
    spread = scores.std(correction=0).item()
    if spread < 1e-3:
        what = f"all scores are nearly the same (spread {spread:.1g})"
        common.say(f"warning: {what}: nothing was learnt, and nothing is scaled")
        return {}
    head = common.scalar_head(common.at_rest(model))  # at rest: FSDP holds no copy of the weights
    for p in head.parameters():
        if p.ndim == 1:
            p.sub_(mean)
        p.div_(spread)
    common.say(f"scores on training pairs: mean {mean:.3f}, spread {spread:.3f}")
    common.say("Margin, loss and calibration above are from before the division by the spread.")
    return {"scale/mean": mean, "scale/spread": spread}


def report_best_of(model, tokenizer, policy_tokenizer, prompts, reward, args, world, stop_asked):
    """Draws max(N) completions of each prompt from the policy. Reports equation (3) with the
    score as the value v_i and, if there is a true reward, with that, and (4). The best is always
    the one with the highest score. N = 1 is the policy itself."""
    policy = common.load_reference(args.policy, world)
    M = max(args.best_of)
    mine = prompts[world.rank :: world.size]
    size = max(1, args.sample_rows // M)
    meter = common.Meter()
    for start in range(0, math.ceil(len(prompts) / world.size), size):
        if common.all_sum(world, stop_asked())[0]:
            raise common.Ended("stopped by a signal in best-of-N; the model is saved")
        # FSDP: a process with no prompts left must still sample; its results do not count
        is_counted = start < len(mine)
        part = mine[start : start + size] or prompts[:1]
        samples = common.sample(
            policy,
            policy_tokenizer,
            [ids for ids, _ in part],
            n=M,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=common.seed_from(args.seed, start, world.rank, common.DRAW),
        )
        records = [part[i // M][1] for i in range(len(samples.texts))]
        scores = common.score_texts(model, tokenizer, samples.texts, records, world)
        scores = torch.tensor(scores, dtype=torch.float64).view(-1, M)
        counted = torch.full((len(part),), is_counted)
        for n in args.best_of:
            meter.mean(f"best_of/score@{n}", best_of(scores, scores, n), counted)
        if reward is None:
            continue
        for name, values in reward.score(samples, records).items():
            name = "true" if name == "reward" else name
            values = torch.tensor(values, dtype=torch.float64).view(-1, M)
            for n in args.best_of:
                meter.mean(f"best_of/{name}@{n}", best_of(scores, values, n), counted)

    metrics = meter.result(world)
    for n in args.best_of:
        metrics[f"best_of/kl@{n}"] = math.log(n) - (n - 1) / n  # equation (4)
    print_best_of(metrics, args, world)
    return metrics


def print_best_of(metrics, args, world):
    if world.rank:
        return
    has_true = f"best_of/true@{args.best_of[0]}" in metrics
    print("\nbest of N   score" + ("   true reward" if has_true else "") + "   KL at most")
    for n in args.best_of:
        cells = [f"{n:9d}", f"{metrics[f'best_of/score@{n}']:8.3f}"]
        if has_true:
            cells.append(f"{metrics[f'best_of/true@{n}']:14.3f}")
        cells.append(f"{metrics[f'best_of/kl@{n}']:13.3f}")
        print(*cells)


def line_to_try(out, tokenizer, first_text):
    """The line of Python that scores a text with the trained model."""
    text = "prompt and answer as the first text above"
    if len(first_text) < 100:
        text = tokenizer.decode(first_text)
    call = f'pipeline("text-classification", "{out / "model"}")'
    return f"print({call}({text!r}, add_special_tokens=False))"


def read_pairs(path, flag):
    """The lines of a file of pairs, as dicts whose "chosen" and "rejected" are texts.

    In the file a side may also be a list of messages. The last one is the answer. Those before it,
    if there are any, are the prompt.
    """
    records = []
    for line, record in common.read_json(path, flag):
        where = f"{flag} {path}, line {line}"
        record = dict(record) if isinstance(record, dict) else {}
        record["prompt"] = record.get("prompt") or record.get("question")
        for side in ("chosen", "rejected"):
            value = record.get(side)
            is_messages = isinstance(value, list) and common.is_prompt(value)
            if is_messages and value[-1]["role"] == "assistant":
                *before, answer = value
                record[side] = answer["content"]
                if not record["prompt"]:  # neither the row nor the other side has given it
                    record["prompt"] = before
                elif before and common.is_prompt(record["prompt"]):
                    if not common.same_talk(common.messages(record["prompt"]), before):
                        fail(f"{where}: the prompt is not what the messages before the answer say")
            if not isinstance(record.get(side), str):
                what = "a text or a list of messages of which the last is the assistant's"
                fail(f'{where}: needs "{side}", {what}; {common.keys_of(record)}')
        if not common.is_prompt(record["prompt"]):
            fail(f'{where}: needs a "prompt" (or "question"), a text or a list of messages')
        records.append(record)
    return records


def encode_pairs(records, tokenizer, args, flag):
    """-> ([(token ids that both sides begin with, rest of chosen, rest of rejected), ...], their
    lines of the file). A text is read to the end of its last turn, or to EOS without a template.
    Each rest has one token at least.

    Pairs with equal sides teach nothing. They are left out, and counted, and so are pairs that are
    too long: a cut might remove the place where the sides differ.
    """
    pairs = []
    kept = []
    equal = 0
    for record in records:
        chosen = common.encode_answer(tokenizer, record["prompt"], record["chosen"])
        rejected = common.encode_answer(tokenizer, record["prompt"], record["rejected"])
        shorter = min(len(chosen), len(rejected))
        if chosen == rejected:
            equal += 1
        elif max(len(chosen), len(rejected)) <= args.max_tokens:
            same = 0
            while same < shorter - 1 and chosen[same] == rejected[same]:
                same += 1
            pairs.append((chosen[:same], chosen[same:], rejected[same:]))
            kept.append(record)
    if len(kept) < len(records):
        too_long = f"{len(records) - len(kept) - equal} as over --max_tokens {args.max_tokens}"
        common.say(f"{flag}: of {len(records)} pairs {equal} left out as equal, {too_long}")
    if not kept:
        fail(f"{flag}: no pair is left")
    return pairs, kept


def read_margins(records, args):
    """The margins of equation (2), [pairs]; 0 without --use_margin."""
    margins = torch.zeros(len(records))
    if args.use_margin:
        for i, record in enumerate(records):
            margin = record.get("margin")
            if not isinstance(margin, (int, float)) or not math.isfinite(margin):
                where = f"the pair with prompt {record['prompt']!r:.100} has none"
                fail(f'--data: --use_margin needs a "margin", a number; {where}')
            margins[i] = margin
    return margins


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


def is_finished(config):
    """Whether this is the config of a reward model, which has a head already."""
    return any("SequenceClassification" in name for name in config.architectures or ())


def new_head_std(args):
    """The standard deviation that a new head is drawn with; None keeps the folder's head."""
    config = common.scalar_config(args.model)
    if is_finished(config):
        return None
    return 1 / math.sqrt(config.get_text_config().hidden_size + 1)  # as Stiennon et al. (2020)


def load_task(args, world):
    """Finds mistakes in the user's input before a model is loaded or a file is written
    -> (args, with --max_tokens lowered to what fits, tokenizer, pairs, margins, held-out pairs)."""
    if args.pairs_per_step % world.size:
        below = max(args.pairs_per_step // world.size, 1) * world.size
        multiple = f"a multiple of the {world.size} processes: {below} or {below + world.size}"
        fail(f"--pairs_per_step {args.pairs_per_step} must be {multiple}")
    config = common.scalar_config(args.model)
    tokenizer = common.load_tokenizer(args.model, args.template_args)
    with torch.device("meta"):  # without weights, to see what kind of head it has
        empty = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    is_decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not (is_decoder and isinstance(getattr(empty, "score", None), torch.nn.Linear)):
        what = "has no score that is read at a text's last token"
        fail(f"--model {args.model}: the family {config.model_type!r} {what}")
    if not args.steps and not is_finished(config):
        fail(f"--steps 0: {args.model} is no reward model yet, so there is nothing to evaluate")
    if args.steps:
        common.own_pad(tokenizer)  # a pad token that ends no text
    if not args.chat:
        # in model/ too, so that others score texts in the form that was learnt
        tokenizer.chat_template = None
    context = common.context_of(config)
    if args.max_tokens > context:
        common.say(f"--max_tokens {args.max_tokens} is lowered to {context}, the model's context")
        args = dataclasses.replace(args, max_tokens=context)

    pairs = []
    margins = None
    held_out = []
    if args.steps:
        records = read_pairs(args.data, "--data")
        pairs, kept = encode_pairs(records, tokenizer, args, "--data")
        margins = read_margins(kept, args)
    if args.eval_data:
        records = read_pairs(args.eval_data, "--eval_data")
        held_out, _ = encode_pairs(records, tokenizer, args, "--eval_data")
        held_out = common.some_rows(held_out, args.eval_rows)
    return args, tokenizer, pairs, margins, held_out


def load_best_of(args, tokenizer, world):
    """What best-of-N needs -> (args, with --max_new_tokens lowered to what fits, the policy's
    tokenizer, prompts, the true reward or None)."""
    if not args.policy:
        return args, None, [], None
    config = common.policy_config(args.policy)
    policy_tokenizer = common.load_tokenizer(args.policy)
    policy_tokenizer.template_args = tokenizer.template_args
    prompts = common.load_prompts(args.eval_prompts, "--eval_prompts", policy_tokenizer, args, "")
    longest = 0
    for ids, record in prompts:
        # The prompt's length as the reward model reads it: that of an empty answer's text, less
        # the end token, for which `limit_to_context` keeps a place.
        read = len(common.encode_answer(tokenizer, record["prompt"], "")) - 1
        longest = max(longest, read, len(ids))
    args = common.limit_to_context(args, longest, common.scalar_config(args.model), config)

    lacking = [record["prompt"] for _, record in prompts if not common.has_answer(record)]
    # rules need an answer in every row; with answers in none, there is no true reward
    reward = None
    if args.reward not in ("exact", "number") or not lacking:
        reward = common.load_reward(args.reward, RULES, world)
        common.check_answers(reward, prompts)
        if reward.is_model:
            args = common.limit_to_reward_model(args, policy_tokenizer, prompts)
    elif len(lacking) < len(prompts):
        without = f"the one with prompt {lacking[0]!r:.100}"
        fail(f'--eval_prompts: some rows have an "answer", but not {without}')
    else:
        common.say('--eval_prompts: no row has an "answer", so there is no true reward to report')
    return args, policy_tokenizer, prompts, reward


if __name__ == "__main__":
    train(common.read_flags(Args, __doc__))
