"""DPO, Direct Preference Optimization: preferences without a reward model and without sampling.

RLHF has two steps. First it fits a reward r(x, y) to preferences, by assuming (4):
the chance that a completion y of the prompt x is preferred to another, z. Then it
trains a policy pi on this reward and holds it near a reference ref, by (1), where pi
draws y. This second step has a known optimum, pi*. DPO inserts it into the first.

    (1)  max over pi of  E[r(x, y)] - beta KL(pi || ref)             the goal of ppo.py
    (2)  pi*(y|x) = ref(y|x) exp(r(x, y) / beta) / Z(x)              its optimum
    (3)  r(x, y) = beta log(pi*(y|x) / ref(y|x)) + beta log Z(x)     `implicit_reward`, without Z
    (4)  P(y > z | x) = sigmoid(r(x, y) - r(x, z))                   Bradley-Terry
    (5)  h = beta (log(pi(y|x) / ref(y|x)) - log(pi(z|x) / ref(z|x)))
    (6)  loss = mean over pairs of  -log sigmoid(h)                  `preference_loss`

Z(x) makes the probabilities of pi* sum to 1. (2) is the optimum, because (1) equals
-beta KL(pi || pi*) + beta E[log Z(x)], and pi cannot change the second term. (3) is
(2), solved for r. Put any policy in the place of pi*: it is the optimum of (1) for
the reward that (3) then gives, with any log Z(x), for instance 0. So instead of
fitting r and then pi, one may fit pi: insert (3) into (4) for a chosen completion y
and a rejected z, and write pi, the policy in training, for pi*. Z cancels, and P =
sigmoid(h).

So the policy itself is the reward model, and training is a classification of pairs. The gradient
pulls log pi(y) up and pushes log pi(z) down, both with weight beta sigmoid(-h). Pairs that h
orders wrongly count most.

Losses (`--loss`). n_y and n_z are the lengths in tokens, end tokens included, and
d = log(pi(y) / ref(y)) / n_y - log(pi(z) / ref(z)) / n_z.

    sigmoid  (6), the default. With --label_smoothing e, the share of labels thought to be wrong:
             -(1 - e) log sigmoid(h) - e log sigmoid(-h)
    ipo      (d - 1 / (2 beta))^2: d is pulled to a target, 0.5 nats a token at beta 1 (the default
             for ipo). Log-ratios are means over tokens, as IPO's authors advised later.
    hinge    max(0, 1 - h): it has no gradient once h is 1 or more
    simpo    -log sigmoid(beta (log pi(y) / n_y - log pi(z) / n_z) - simpo_margin): no reference

--sft_coef c adds -c log pi(y) / n_y to each of them.

    python dpo.py                        # the bundled model and pairs; needs no download
    python dpo.py --model Qwen/Qwen2.5-0.5B-Instruct \
        --data pairs.jsonl --eval_data held_out_pairs.jsonl
    torchrun --nproc_per_node 8 dpo.py --model ... --data ... \
        --eval_prompts prompts.jsonl --reward number

The reference is the policy before its first step, or --reference. Before that step it scores all
pairs that the run will use. It is not in memory while the policy learns. Dropout
is off in all models.

Shapes: b pairs in one forward, 2b rows. A side is a chosen or a rejected completion; C tokens in
the longest side.

Limits:
  * DPO is offline. All completions were drawn once, before training. It never trains on what the
    policy says today, and nothing in (6) restrains pi on completions that are not in the data.
  * (6) sees only the difference. Both log-probabilities may fall while it grows: one network gives
    both, so what lowers z often lowers y. The probability goes to completions that nobody has
    ranked. --sft_coef keeps the chosen ones likely.

Left out: new rounds of pairs from the policy (sample, rank, start again from runs/.../model);
several rejected completions for one chosen.

Papers: Rafailov et al. 2023 (DPO), Mitchell 2023 (label noise), Azar et al. 2024 (IPO), Zhao et al.
2023 and Liu et al. 2024 (hinge), Meng et al. 2024 (SimPO), Pang et al. 2024 (SFT term).
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
    """folder or hub name of the model to stay near (empty: --model before its first step)"""
    data: str | None = None
    """training pairs: JSON lines with "prompt" (or "question"), "chosen", "rejected"; sides may be
    lists of messages (None: the bundled pairs, if --model is the bundled one and neither
    --eval_data nor --eval_prompts names a file)"""
    eval_data: str | None = None
    """held-out pairs, as --data (None: those of the bundled task, or none with other data)"""
    eval_prompts: str | None = None
    """held-out prompts to sample for: JSON lines with "prompt" (or "question"), and "answer" if the
    reward needs one (None: those of the bundled task, or none with other data)"""
    reward: str = "exact"
    """what scores the samples of --eval_prompts:
    exact | number | a reward model's folder or hub name |
    FILE.py:function(completion, row) -> a number, or a dict with "reward" and more to be logged"""
    chat: bool = True
    """put a text prompt through the chat template, if there is one (--no_chat: raw text)"""
    template_args: str = ""
    """arguments of the chat template, a JSON object: '{"enable_thinking": false}'"""
    system: str = ""
    """system message before every prompt that has none of its own"""
    max_tokens: int = 1024
    """pairs whose prompt and longer side together have more tokens are left out, and counted; they
    are never cut"""
    max_prompt_tokens: int = 512
    """longer prompts of --eval_prompts are left out, and counted"""
    max_new_tokens: int = 512
    """samples for --eval_prompts are cut here, or where the model's context ends"""

    # --- algorithm ---
    loss: Literal["sigmoid", "ipo", "hinge", "simpo"] = "sigmoid"
    """sigmoid is DPO's own"""
    beta: float | None = None
    """the scale of the implicit reward: how strongly the reference holds, if there is one (None:
    2 with --loss simpo, 1 with ipo, else 0.5 for the bundled model and 0.1 for others)"""
    label_smoothing: float = 0.0
    """share of pairs whose labels are thought to be wrong (with --loss sigmoid)"""
    simpo_margin: float = 1.0
    """how far beta x mean log-probability of chosen should be above that of rejected
    (with --loss simpo)"""
    sft_coef: float = 0.0
    """weight of -log pi(chosen) / length, which keeps the chosen completions likely"""

    # --- optimisation ---
    lora_rank: int = 0
    """rank of the adapters that learn while the model itself is frozen (0: all weights learn)"""
    lora_alpha: float = 32.0
    """what the adapters add is multiplied by this / --lora_rank"""
    steps: int = 300
    """optimizer updates in all; 0 evaluates only"""
    pairs_per_step: int = 64
    """pairs in an update, of all processes together"""
    learning_rate: float | None = None
    """peak of AdamW's learning rate (None: 5e-7, or 3e-4 for the bundled model; adapters: x 10)"""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """what the learning rate does after the warm-up"""
    warmup: int = 10
    """steps over which the learning rate rises"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
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
    """decides the order of pairs, and how adapters start"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """compute type (auto: bfloat16 on a GPU, float32 on a CPU); trained weights stay float32.
    On a CPU bfloat16 saves memory. It is faster, too, if /proc/cpuinfo lists avx512_bf16 or amx"""
    eval_every: int = 50
    """steps between scores on --eval_data and --eval_prompts; 0: never"""
    eval_rows: int = 0
    """score only so many held-out rows, always the same ones; 0: all"""
    save_every: int = 50
    """steps between checkpoints"""
    keep: int = 1
    """checkpoints that stay on the disk, the newest ones"""
    keep_best: bool = True
    """keep the model with the best held-out score as best/
    in the run's folder (by eval/reward, else eval/accuracy),
    if it is better than before training"""


def resolve(args):
    """Fills in defaults that depend on other flags, and rejects contradictory flags."""
    is_tiny_model = Path(args.model).resolve() == TINY / "model"
    # "" is not None: an empty --eval_data or --eval_prompts switches off that score only, an empty
    # --data switches off all bundled files.
    has_files = args.data is not None or args.eval_data or args.eval_prompts
    is_tiny_data = is_tiny_model and not has_files
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    usual_beta = 0.5 if is_tiny_model else 0.1
    faster = 10 if args.lora_rank else 1  # adapters want about ten times the learning rate
    defaults = {
        "data": str(TINY / "pairs_train.jsonl") if is_tiny_data else "",
        "eval_data": "",
        "eval_prompts": str(TINY / "sort_test.jsonl") if is_tiny_data else "",
        "beta": {"simpo": 2.0, "ipo": 1.0}.get(args.loss, usual_beta),
        "learning_rate": faster * (3e-4 if is_tiny_model else 5e-7),
        "tokens_per_micro_batch": 2048 if on_cpu else 8192,
    }
    # Without training and without --reference, the policy is the reference, and all implicit
    # rewards are 0. simpo has no reference, so its rewards say something.
    can_compare = args.steps or args.reference or args.loss == "simpo"
    if is_tiny_data and can_compare:
        defaults["eval_data"] = str(TINY / "pairs_test.jsonl")
    unset = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    args = dataclasses.replace(args, **unset)
    common.check_flags(args)
    smoothing = args.label_smoothing
    if not 0 < args.beta < math.inf:
        fail(f"--beta {args.beta}: must be above 0 and finite")
    if not 0 <= smoothing < 0.5:
        fail(f"--label_smoothing {smoothing}: must be from 0 to below 0.5")
    if smoothing and args.loss != "sigmoid":
        fail(f"--label_smoothing acts with --loss sigmoid only, and --loss is {args.loss}")
    if args.reference and args.loss == "simpo":
        fail("--reference: --loss simpo uses no reference")
    if not math.isfinite(args.simpo_margin):
        fail(f"--simpo_margin {args.simpo_margin}: must be finite")
    if args.eval_data and not can_compare:
        fail("--steps 0 compares --model with itself; name the --reference that it started from")
    return args


# -- The math: from log-probabilities to a loss ------------------------------------------------


def preference_loss(chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected, args):
    """Equations (5) and (6), or another loss of the header -> a loss for each pair, [b].

    All [b]: log-probabilities of chosen and rejected, sums over their tokens, by the policy and by
    the reference; lengths in tokens.
    """
    logratio_chosen = chosen - ref_chosen
    logratio_rejected = rejected - ref_rejected
    h = args.beta * (logratio_chosen - logratio_rejected)
    if args.loss == "sigmoid":
        e = args.label_smoothing
        loss = -(1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h)
    elif args.loss == "ipo":
        d = logratio_chosen / n_chosen - logratio_rejected / n_rejected
        loss = (d - 1 / (2 * args.beta)) ** 2
    elif args.loss == "hinge":
        loss = F.relu(1 - h)
    else:
        difference = chosen / n_chosen - rejected / n_rejected
        loss = -F.logsigmoid(args.beta * difference - args.simpo_margin)
    return loss - args.sft_coef * chosen / n_chosen


def implicit_reward(logprobs, ref_logprobs, length, args):
    """Equation (3) without Z, which cancels in a pair. Arguments and result are [b, 2]. For ipo and
    simpo it is divided by the length, as in their losses. (simpo has no reference: its ref_logprobs
    are 0.)"""
    reward = args.beta * (logprobs - ref_logprobs)
    if args.loss in ("ipo", "simpo"):
        reward = reward / length
    return reward


def share_won(chosen, rejected):
    """1 where chosen is scored higher, 1/2 on a tie, else 0, [b]."""
    return (chosen > rejected) + 0.5 * (chosen == rejected)


# -- Log-probabilities: one forward over both sides of the pairs -------------------------------


def pair_logprobs(model, tokenizer, pairs, share_prompts, world):
    """log pi(y|x), summed over all tokens, the end token too -> [b, 2], chosen and rejected.
    Rows 2i and 2i + 1 of the forward are the sides of pair i. With share_prompts their prompt is
    computed only once."""
    prompts = []
    sides = []
    for prompt, chosen, rejected in pairs:
        prompts += [prompt, prompt]
        sides += [chosen, rejected]
    rows_per_prompt = 2 if share_prompts else 1  # consecutive rows whose prompt is computed once
    # a `common.Samples`: a rollout in the other scripts, here completions from the data
    samples = common.as_samples(prompts, sides, tokenizer, world, rows_per_prompt)
    logprobs = side_logprobs(model, samples)  # [2b, C]
    return logprobs.sum(1).view(-1, 2)


def side_logprobs(model, samples, chunk=1024):
    """log pi(y_t | x, y_<t) at each token of the sides y -> [2b, C], 0 on padding.

    Logits of `chunk` tokens at a time, computed again in backward: those of all tokens would be
    gigabytes with a vocabulary of 150,000.
    """
    all_rows = list(range(len(samples.ids)))
    # [2b, C, width]; states[:, t] predicts the token ids[:, t], so it is of the place before
    states, ids, mask = common.completion_states(model, samples, all_rows)

    def head(states, tokens):
        logprobs = common.logits_of(model, states).log_softmax(-1)  # [chunk, vocabulary], float32
        return logprobs.gather(-1, tokens[:, None])[:, 0]

    logprobs = []
    # only tokens on the mask: no work for padding
    for part, tokens in zip(states[mask].split(chunk), ids[mask].split(chunk)):
        logprobs.append(
            checkpoint(head, part, tokens, use_reentrant=False, preserve_rng_state=False)
        )
    zeros = torch.zeros(mask.shape, device=mask.device)
    return zeros.masked_scatter(mask, torch.cat(logprobs))


# -- The loop ----------------------------------------------------------------------------------


def update_loss(policy, tokenizer, pairs, ref, share_prompts, args, world, meter):
    """(5) and (6), or another loss, for one micro-batch of pairs -> its share of the update's loss.
    ref [b, 2]: the reference's log-probabilities of chosen and rejected."""
    logprobs = pair_logprobs(policy, tokenizer, pairs, share_prompts, world)  # [b, 2]
    ref = ref.to(world.device)
    length = side_lengths(pairs).to(world.device)
    # each .T gives two tensors [b]: of chosen and of rejected
    losses = preference_loss(*logprobs.T, *ref.T, *length.T, args)  # [b]
    # divided by the pairs of all micro-batches and processes: gradients are summed over both
    # (common.py makes FSDP sum, not average)
    loss = losses.sum() / args.pairs_per_step

    with torch.no_grad():  # the rest is for the log
        chosen, rejected = implicit_reward(logprobs, ref, length, args).T  # rewards, [b] each
        meter.mean("accuracy", share_won(chosen, rejected))
        meter.mean("margin", chosen - rejected)  # simpo: --simpo_margin is not subtracted
        meter.mean("chosen", chosen)
        meter.mean("rejected", rejected)
        meter.mean("logprobs/chosen", logprobs[:, 0])
        meter.mean("logprobs/rejected", logprobs[:, 1])
        lost = (ref - logprobs) / length  # the fall below the reference, in nats a token
        meter.mean("lost", lost[:, 0])  # of chosen
    return loss


def train(args):
    args = resolve(args)
    world = common.start(args.device, args.dtype, args.seed)
    # pairs to train on; held-out pairs and held-out prompts, which are only scored
    args, tokenizer, reward, pairs, held_out, prompts = load_task(args, world)

    out = common.open_run(args, Path(__file__).stem, world)
    stop_asked = common.catch_signals(args.steps)
    saved = common.take_up(out, args, world)  # the last checkpoint of a resumed run, or None
    done_steps = saved["step"] if saved else 0
    # the first text of the run, which `begin_log` shows: prompt and chosen side of a pair, or else
    # a prompt
    texts = pairs + held_out + [(ids, []) for ids, _ in prompts]
    first_prompt, first_side = texts[0][:2]
    first_text = first_prompt + first_side
    # For the memory that `begin_log` prints: how many models learn, and the paths of the
    # frozen ones held beside them. With --steps 0 the policy is frozen, and --reference is
    # beside it if there are pairs to score. With training, the reference is gone before the
    # policy has gradients.
    learning = int(args.steps > 0)
    frozen = []
    if reward is not None and reward.is_model:
        frozen.append(args.reward)
    if not args.steps:
        frozen += [args.model, args.reference if held_out else ""]  # "": none
    writer, bar = common.begin_log(
        out, args, world, tokenizer, first_text, done_steps, learning, frozen
    )
    common.say_passes(args.steps * args.pairs_per_step, len(pairs), "pairs")

    with common.short_errors(out, args, bar):
        policy = common.load_policy(args.model, world, args.gradient_checkpointing, args)
        # Whether a forward may compute a prompt once for both sides. `prompts_can_be_shared` says
        # no on a GPU, where that is slower; on a CPU yes, if a trial gives the same numbers.
        # Without training the trial is not worth its time.
        share_prompts = args.steps > 0 and common.prompts_can_be_shared(
            policy, world, args.gradient_checkpointing
        )
        # The reference's log-probabilities, [pairs, 2]. Before `load_checkpoint`: without
        # --reference, the reference is the policy, which is still untrained here.
        ref, held_out_ref = reference_scores(
            policy, tokenizer, pairs, held_out, share_prompts, args, out, world, stop_asked
        )
        optimizer = common.make_optimizer(policy, args.learning_rate)  # AdamW, no weight decay
        if saved:
            common.load_checkpoint(saved, {"policy": policy}, {"policy": optimizer})
            del saved

        def held_out_scores():
            scores = evaluate(policy, tokenizer, prompts, reward, args, world, stop_asked)
            return scores | evaluate_pairs(
                policy, tokenizer, held_out, held_out_ref, share_prompts, args, world, stop_asked
            )

        if done_steps == 0:
            common.log(out, writer, 0, common.scores_if_due(0, args, held_out_scores))

        warned = set()  # `warn_if_unlikely` adds to it, so that it warns once
        for step in range(done_steps + 1, args.steps + 1):
            step_began = time.perf_counter()
            meter = common.Meter()

            # 1. The next pairs, in micro-batches (a forward each). Each pass over the data has an
            #    order of its own.
            indices = common.rows_of_step(len(pairs), step, args.pairs_per_step, world, args.seed)
            batch = [pairs[i] for i in indices]
            batch_ref = ref[indices]
            meter.sum("tokens", count_tokens(batch))
            parts = micro_batches_of_pairs(batch, share_prompts, args.tokens_per_micro_batch, world)

            # 2. Update.
            rate = common.learning_rate_at(
                step, args.steps, args.learning_rate, args.schedule, args.warmup
            )
            optimizer.param_groups[0]["lr"] = rate
            for part in parts:
                few = [batch[i] for i in part]
                loss = update_loss(
                    policy, tokenizer, few, batch_ref[part], share_prompts, args, world, meter
                )
                loss.backward()
                meter.sum("loss", loss.detach())
            norm = common.clip_gradients(policy, args.max_grad_norm)
            if not math.isfinite(norm):
                raise common.Stop(f"step {step}: the gradient is {norm}; update not made")
            optimizer.step()
            optimizer.zero_grad()

            # 3. Log.
            metrics = meter.result(world)
            tokens = metrics.pop("tokens")
            seconds = time.perf_counter() - step_began
            warn_if_unlikely(metrics.pop("lost"), args, warned)
            metrics |= {
                "grad_norm": norm,
                "learning_rate": rate,
                "time/train": seconds,
                "tokens_per_second": tokens / seconds,
                "memory_gib": common.memory_used(world) / 2**30,
            }
            metrics |= common.scores_if_due(step, args, held_out_scores)
            common.log(out, writer, step, metrics)
            common.save_best(out, args, world, step, metrics, policy, tokenizer)

            # 4. Save if it is due. After a signal (Ctrl-C, SIGTERM), save and end the run.
            common.save_if_due(
                out, args, world, step, {"policy": policy}, {"policy": optimizer}, stop_asked
            )

        if args.steps:
            common.save_model(policy, tokenizer, out / "model", world)
    # The run ends by printing a line of Python that tries the model, on the first prompt or, for a
    # chat model, on a placeholder.
    prompt = "" if tokenizer.chat_template else tokenizer.decode(first_prompt)
    common.conclude(out, args, writer, bar, common.line_to_try(out, tokenizer, prompt, args))


# -- A first reading may end here. Below: batches, the reference, held-out scores, pairs, rewards


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
def score_pairs(model, tokenizer, pairs, share_prompts, args, world, stop_asked=None):
    """`pair_logprobs` of many pairs -> [pairs, 2] on the CPU. Each process computes its share."""
    mine = share_of_process(pairs, world)
    logprobs = torch.zeros(len(mine), 2)
    parts = micro_batches_of_pairs(mine, share_prompts, args.tokens_per_micro_batch, world)
    for part in common.until_stopped(parts, world, stop_asked):
        few = [mine[i] for i in part]
        logprobs[part] = pair_logprobs(model, tokenizer, few, share_prompts, world).cpu()
    common.forget_forwards(model)  # FSDP expects a backward after a forward; none follows
    return in_order(logprobs, len(pairs), world)


def reference_scores(
    policy, tokenizer, pairs, held_out, share_prompts, args, out, world, stop_asked
):
    """The reference's log-probabilities -> [training pairs, 2] (NaN for those that no step will
    use) and [held-out pairs, 2] (None if there are none). For simpo both are zeros. The policy must
    still be as it was at the start.

    The log-probabilities of training pairs are kept in a file of the run's folder. A resumed run
    computes only what is missing. The reference's micro-batches are not those of training, so sums
    round differently: in bfloat16 the log-ratios of step 1 are near 0, not 0.
    """
    if args.loss == "simpo":
        return torch.zeros(len(pairs), 2), torch.zeros(len(held_out), 2)
    path = out / "reference.pt"
    digest = hashlib.sha256(repr(args.reference or args.model).encode())
    for pair in pairs:  # one by one: the text of all pairs would take much memory
        digest.update(repr(pair).encode())
    mark = f"{world.dtype} {digest.hexdigest()}"
    scores = read_scores(path, mark, args)
    if scores is None:
        scores = torch.full((len(pairs), 2), math.nan)
    known = int((~scores[:, 0].isnan()).sum())
    # ends the run if some processes see no such file, on machines without a common disk
    common.agree(out, world, known, "the number of pairs that the reference has scored is")
    count = args.steps * args.pairs_per_step
    # the pairs that training will draw, as `rows_of_step` does
    visited = {common.nth_row(len(pairs), i, args.seed) for i in range(count)}
    missing = [i for i in sorted(visited) if scores[i].isnan().any()]

    reference = policy
    if args.reference and (missing or held_out):
        reference = common.load_reference(args.reference, world)
        common.check_head(reference)  # stops if `logits_of` differs from its own forward
        share_prompts = False  # `prompts_can_be_shared` has tried the policy only
    for start in range(0, len(missing), 1024):
        part = missing[start : start + 1024]
        few = [pairs[i] for i in part]
        # no stop_asked: after a signal these pairs are still completed, and then written
        scores[part] = score_pairs(reference, tokenizer, few, share_prompts, args, world)
        if world.rank == 0:
            common.write(path, {"mark": mark, "scores": scores})
        done = len(visited) - len(missing) + start + len(part)
        common.say(f"the reference has scored {done} of {len(visited)} pairs")
        if common.all_sum(world, stop_asked())[0]:  # a signal has come, in one process at least
            why = "stopped by a signal while the reference scored pairs"
            raise common.Ended(f"{why}; what it has scored is kept")
    held_out_ref = None
    if held_out:
        held_out_ref = score_pairs(
            reference, tokenizer, held_out, share_prompts, args, world, stop_asked
        )
    del reference  # it must not be in memory while the policy learns
    gc.collect()  # FSDP2's modules and their hooks refer to each other
    return scores, held_out_ref


def read_scores(path, mark, args):
    """What an interrupted run has kept, or None. `mark` says for which pairs, reference
    and precision it was."""
    if not (args.resume and path.is_file()):
        return None
    try:
        kept = torch.load(path, weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        fail(f"--resume: {path} cannot be read ({reason}); delete it to compute the scores again")
    if kept["mark"] == mark:
        return kept["scores"]
    if common.checkpoints(path.parent):
        fail(f"--resume: {path} has scores of other pairs, or of another model or precision")
    return None  # no checkpoint has used the old scores: they are computed anew


def evaluate_pairs(policy, tokenizer, held_out, ref, share_prompts, args, world, stop_asked=None):
    """Scores of held-out pairs: eval/accuracy, eval/margin and eval/loss. ref [pairs, 2]."""
    if not held_out:
        return {}
    logprobs = score_pairs(policy, tokenizer, held_out, share_prompts, args, world, stop_asked)
    length = side_lengths(held_out)  # [pairs, 2], as logprobs and ref
    losses = preference_loss(*logprobs.T, *ref.T, *length.T, args)
    chosen, rejected = implicit_reward(logprobs, ref, length, args).T
    return {
        "eval/accuracy": common.mean_of(share_won(chosen, rejected)),
        "eval/margin": common.mean_of(chosen - rejected),
        "eval/loss": common.mean_of(losses),
        "held_out/pairs": len(held_out),
    }


def evaluate(policy, tokenizer, prompts, reward, args, world, stop_asked=None):
    """Scores of greedy completions of held-out prompts: eval/reward, by
    --reward, and the share of right answers. If --reward is a rule (exact,
    number), it judges that share, which is logged as eval/exact. With another
    reward there is an eval/NAME for each rule that accepts every row's own
    answer. Each process takes its share of the prompts."""
    mine = prompts[world.rank :: world.size]
    longest = max((len(ids) for ids, _ in prompts), default=0) + args.max_new_tokens
    # Completions at once: as many as fill 4 micro-batches (keys and values take less memory than
    # training) or 8192 tokens, the larger; at most 256, and equal in all processes.
    wanted_rows = 4 * args.tokens_per_micro_batch // longest
    at_once = common.rows_at_once(prompts, args.max_new_tokens, wanted_rows)
    # {name in the log: rule}
    rules = common.rules_that_fit(reward, prompts) if prompts else {}
    meter = common.Meter()
    starts = range(0, math.ceil(len(prompts) / world.size), at_once)
    for start in common.until_stopped(starts, world, stop_asked):
        # FSDP: a process with no prompts left must still sample; its results do not count
        is_counted = start < len(mine)
        part = mine[start : start + at_once] or prompts[:1]
        ids = [ids for ids, _ in part]
        records = [record for _, record in part]
        samples = common.sample(
            policy, tokenizer, ids, max_new_tokens=args.max_new_tokens, temperature=0
        )
        scores = reward.score(samples, records)
        counted = torch.tensor([is_counted] * len(records))
        answered = torch.tensor([is_counted and common.has_answer(record) for record in records])
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


def warn_if_unlikely(lost, args, warned):
    """Warns once if chosen completions are much less likely than under the reference: the loss does
    not show it. lost: the fall, in nats a token."""
    if lost > 1 and args.loss != "simpo" and "lost" not in warned:
        warned.add("lost")
        how = "lower --learning_rate, or raise --beta or --sft_coef"
        what = f"even chosen answers are {lost:.1f} nats a token below the reference"
        common.say(f"warning: {what}: {how}")


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


def encode_preferences(records, tokenizer, args, flag):
    """[(token ids of the prompt, of chosen, of rejected), ...]; both sides have their end token.

    Pairs with equal sides say no preference. They are left out, and counted, and so are empty
    prompts, and pairs that are too long: a cut might remove the place where the sides differ.
    """
    kept = []
    useless = 0
    for record in records:
        prompt = record["prompt"]
        is_chat = args.chat or isinstance(prompt, list)  # messages take the template in any case
        ids = common.encode_prompt(tokenizer, prompt, args.system, args.chat)
        chosen, rejected = [
            common.encode_completion(tokenizer, record[side], is_chat, prompt, args.system)
            for side in ("chosen", "rejected")
        ]
        if chosen == rejected or not ids:
            useless += 1
        elif len(ids) + max(len(chosen), len(rejected)) <= args.max_tokens:
            kept.append((ids, chosen, rejected))
    if len(kept) < len(records):
        too_long = f"{len(records) - len(kept) - useless} as over --max_tokens {args.max_tokens}"
        reasons = f"{useless} left out as equal or empty, {too_long}"
        common.say(f"{flag}: of {len(records)} pairs {reasons}")
    if not kept:
        fail(f"{flag}: no pair is left")
    return kept


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
    """Checks the user's input before a policy is loaded or a file is written
    -> (args with its limits lowered to what fits, tokenizer, reward, pairs, held-out pairs,
    held-out prompts)."""
    if args.pairs_per_step % world.size:
        below = max(args.pairs_per_step // world.size, 1) * world.size
        multiple = f"a multiple of the {world.size} processes: {below} or {below + world.size}"
        fail(f"--pairs_per_step {args.pairs_per_step} must be {multiple}")
    config = common.policy_config(args.model)
    tokenizer = common.load_tokenizer(args.model, args.template_args)
    context = common.context_of(config, common.reference_config(args, tokenizer))
    if args.max_tokens > context:
        common.say(f"--max_tokens {args.max_tokens} is lowered to {context}, the smallest context")
        args = dataclasses.replace(args, max_tokens=context)

    pairs = []
    held_out = []
    prompts = []
    reward = None
    if args.steps:
        pairs = encode_preferences(read_pairs(args.data, "--data"), tokenizer, args, "--data")
    if args.eval_data:
        records = read_pairs(args.eval_data, "--eval_data")
        held_out = encode_preferences(records, tokenizer, args, "--eval_data")
        held_out = common.some_rows(held_out, args.eval_rows)
    if args.eval_prompts:
        reward = common.load_reward(args.reward, RULES, world)
        prompts = common.load_prompts(
            args.eval_prompts, "--eval_prompts", tokenizer, args, reward.answer_flag
        )
        common.check_answers(reward, prompts)
        args = common.limit_to_context(args, max(len(ids) for ids, _ in prompts), config)
        if reward.is_model:
            args = common.limit_to_reward_model(args, tokenizer, prompts)
    return args, tokenizer, reward, pairs, held_out, prompts


if __name__ == "__main__":
    train(common.read_flags(Args, __doc__))
