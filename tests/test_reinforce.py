"""REINFORCE: every equation against brute force, on models small enough to enumerate."""

import copy
import functools
import inspect
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
import types

import pytest
import torch
from conftest import FAMILIES, ROOT, family, make_tokenizer

import common
import reinforce
from common import World, as_samples, sample
from reinforce import (
    baselines,
    logprobs_of,
    micro_batches,
    policy_loss,
    rewards_to_go,
    rollout_logprobs,
    spread,
    token_advantages,
    token_logprobs,
    token_rewards,
)

CPU = World(0, 1, torch.device("cpu"), torch.float32)
KINDS = ["none", "batch", "prompt", "loo"]


def enumerable(vocab=5, length=3, seed=0):
    """A model whose completions of one prompt can all be listed, with their exact probabilities: token 1 is EOS."""
    model = family("llama", vocab_size=vocab, num_hidden_layers=1, scale=0.7).double()
    completions = [c for k in range(1, length + 1) for c in itertools.product(range(vocab), repeat=k)
                   if 1 not in c[:-1] and (c[-1] == 1 or k == length)]  # fmt: skip
    s = as_samples(
        [[0, 2]] * len(completions), [list(c) for c in completions], make_tokenizer(), CPU
    )
    return model, s


def exact_logprobs(model, s, temperature=1.0):
    logprobs, _ = token_logprobs(model, s, list(range(len(s.ids))), temperature)
    return logprobs


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def some_rewards(s, seed=1):
    return (
        torch.rand(len(s.ids), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        * 3
        - 1
    )


# --- the policy gradient theorem (lectures: the log-derivative trick) ---


@pytest.mark.parametrize(
    "kind, samples", [("none", 1), ("loo", 2), ("prompt", 2), ("batch", 2), ("loo", 3)]
)
def test_the_expected_gradient_is_that_of_the_expected_reward_up_to_the_baselines_factor(
    kind, samples
):
    """Every possible batch of n independent completions, each weighed with its probability: the mean of the estimator's
    gradient is the exact gradient of E[r], times 1 - 1/n where the mean contains the sample itself."""
    model, s = enumerable(vocab=3, length=2)
    reward = some_rewards(s)
    logprobs = exact_logprobs(model, s)
    p = logprobs.sum(1).exp()
    assert abs(p.sum().item() - 1) < 1e-6
    wanted = gradient(model, -(p * reward).sum())

    p = p.detach()
    logprobs = exact_logprobs(model, s)
    loss = 0.0
    for batch in itertools.product(range(len(p)), repeat=samples):
        rows = list(batch)
        b = baselines(reward[rows], reward[rows], samples, kind)
        to_go = rewards_to_go(
            token_rewards(reward[rows], torch.zeros_like(logprobs[rows]), s.mask[rows], 0.0), 1.0
        )
        advantages = (to_go - b[:, None]) * s.mask[rows]
        one, _ = policy_loss(
            logprobs[rows], logprobs[rows].detach(), advantages, s.mask[rows], samples
        )
        loss = loss + p[rows].prod() * one
    got = gradient(model, loss)
    factor = 1 - 1 / samples if kind in ("prompt", "batch") else 1.0
    assert (got - factor * wanted).norm() < 1e-6 * wanted.norm()


def test_a_token_mean_would_be_the_gradient_of_another_objective():
    """The wrong version: dividing each completion by its length points elsewhere, here with a reward for length."""
    model, s = enumerable()
    reward, logprobs = s.mask.sum(1) - 2.0, exact_logprobs(model, s)
    p = logprobs.sum(1).exp()
    wanted = gradient(model, -(p * reward).sum())
    logprobs = exact_logprobs(model, s)
    p = logprobs.sum(1).exp().detach()
    mean = gradient(model, -(p * reward * logprobs.sum(1) / s.mask.sum(1)).sum())
    assert (
        torch.cosine_similarity(mean, wanted, 0) < 0.998
    )  # off by five degrees; the right one is exact to 1e-5


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_kl_in_the_reward_gives_the_gradient_of_the_kl_penalised_objective(beta):
    """grad of E[r] - beta KL(pi || ref), all by enumeration, through per-token rewards to go."""
    model, s = enumerable()
    ref = family("llama", vocab_size=5, num_hidden_layers=1, scale=0.5).double()
    with torch.no_grad():
        ref_logprobs = exact_logprobs(ref, s)
    reward, logprobs = some_rewards(s), exact_logprobs(model, s)
    p = logprobs.sum(1).exp()
    kl = (p * (logprobs.sum(1) - ref_logprobs.sum(1))).sum()
    wanted = gradient(model, -((p * reward).sum() - beta * kl))
    logprobs = exact_logprobs(model, s)
    old = logprobs.detach()
    to_go = rewards_to_go(token_rewards(reward, (old - ref_logprobs) * s.mask, s.mask, beta), 1.0)
    loss, _ = policy_loss(logprobs, old, to_go * old.sum(1).exp()[:, None], s.mask, 1)
    assert (gradient(model, loss) - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_distillations_mean_gradient_is_that_of_the_kl_at_each_prefix_or_of_whole_completions(
    gamma,
):
    """--reward none. Gamma 0: the exact KL of the next token's distributions, summed over the places
    of each completion, with the completion's probability as a constant. Gamma 1: KL(pi || teacher)."""
    model, s = enumerable()
    teacher = family("llama", vocab_size=5, num_hidden_layers=1, scale=0.5).double()
    ids = torch.cat([s.prompt_ids, s.ids[:, :-1]], 1)
    ours, theirs = ((m(input_ids=ids).logits[:, 1:]).log_softmax(-1) for m in (model, teacher))
    kl_of_places = (ours.exp() * (ours - theirs.detach())).sum(-1) * s.mask
    logprobs, of_teacher = exact_logprobs(model, s), exact_logprobs(teacher, s).detach()
    p = logprobs.sum(1).exp()
    at_each_prefix = gradient(model, (p.detach()[:, None] * kl_of_places).sum())
    logprobs = exact_logprobs(model, s)
    p = logprobs.sum(1).exp()
    of_completions = gradient(model, (p * (logprobs - of_teacher).sum(1)).sum())
    assert (at_each_prefix - of_completions).norm() > 0.1 * of_completions.norm()

    flags = {"reward": "none", "reference": "TEACHER", "beta": 1.0, "gamma": gamma}
    args = reinforce.resolve(reinforce.Args(**flags))
    assert args.baseline == ("none" if gamma == 0 else "loo")
    args.baseline = "none"  # loo does not change the mean: the first test of this file
    logprobs = exact_logprobs(model, s)
    old = logprobs.detach()
    scores = torch.zeros(len(s.ids))  # of --reward none
    A = token_advantages(scores, (old - of_teacher) * s.mask, s.mask, args, CPU)
    loss, _ = policy_loss(logprobs, old, A * p.detach()[:, None], s.mask, 1)
    wanted = at_each_prefix if gamma == 0 else of_completions
    assert (gradient(model, loss) - wanted).norm() < 1e-6 * wanted.norm()


def test_k1_and_k3_have_the_kl_as_mean_and_k2_has_its_gradient():
    """Field notes, test 1. k2's value is another; k3's gradient, taken through the sample's log-ratio, is too."""
    model, s = enumerable()
    ref = family("llama", vocab_size=5, num_hidden_layers=1, scale=0.5).double()
    with torch.no_grad():
        r = exact_logprobs(ref, s).sum(1)
    q = exact_logprobs(model, s).sum(1)
    kl = (q.exp() * (q - r)).sum()
    d, p = (q - r).detach(), q.exp().detach()
    assert abs((p * d).sum() - kl) < 1e-6 and abs((p * ((-d).exp() - 1 + d)).sum() - kl) < 1e-6
    assert abs((p * d * d / 2).sum() - kl) > 5e-3 * kl
    wanted = gradient(model, kl)
    q = exact_logprobs(model, s).sum(1)
    assert (gradient(model, (p * (q - r) ** 2 / 2).sum()) - wanted).norm() < 1e-6 * wanted.norm()
    q = exact_logprobs(model, s).sum(1)
    k3 = gradient(model, (p * ((r - q).exp() - 1 + q - r)).sum())
    assert (k3 - wanted).norm() > 1e-2 * wanted.norm()


# --- rewards to go ---


def test_rewards_to_go_against_brute_force_sums():
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 6])[:, None]
    scores, kl = torch.randn(4, generator=g), torch.randn(4, 7, generator=g) * mask
    for gamma, beta in ((1.0, 0.0), (1.0, 0.5), (0.9, 0.5), (0.0, 0.2)):
        got = rewards_to_go(token_rewards(scores, kl, mask, beta), gamma)
        for i in range(4):
            T = int(mask[i].sum())
            r = [
                -beta * kl[i, t].item() + (scores[i].item() if t == T - 1 else 0.0)
                for t in range(T)
            ]
            for t in range(7):
                wanted = sum(gamma ** (u - t) * r[u] for u in range(t, T)) if t < T else 0.0
                assert abs(got[i, t].item() - wanted) < 1e-5


def test_at_gamma_1_and_beta_0_every_token_has_the_whole_reward():
    """Then reward-to-go is the whole-sequence form of the gradient."""
    mask = torch.arange(5) < torch.tensor([5, 2])[:, None]
    scores = torch.tensor([2.0, -1.0])
    assert torch.equal(
        rewards_to_go(token_rewards(scores, torch.randn(2, 5), mask, 0.0), 1.0),
        scores[:, None] * mask,
    )


# --- baselines and their variance ---


def test_baselines_by_hand():
    r = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])  # two prompts, three samples each
    b = {k: baselines(r, r, 3, k) for k in KINDS}
    assert b["none"].tolist() == [0] * 6
    torch.testing.assert_close(b["batch"], torch.full((6,), 4 / 6))
    torch.testing.assert_close(b["prompt"], torch.tensor([1 / 3] * 3 + [1.0] * 3))
    torch.testing.assert_close(b["loo"], torch.tensor([0.0, 0.5, 0.5, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(
        spread(r, r, 3, "loo"), torch.tensor([3**-0.5 + 1e-4] * 3 + [1.0] * 3)
    )
    everyone = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    assert baselines(r, everyone, 3, "batch")[0] == 0.5, "the batch is that of all processes"


def test_the_best_are_those_by_score_and_ties_are_all_kept():
    """With a KL penalty, different for each sample, there would be no tie."""
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    mask = torch.ones(6, 2, dtype=torch.bool)
    for beta in (0.0, 0.3):
        for kind in ("none", "loo"):
            args = reinforce.Args(samples_per_prompt=3, baseline=kind, beta=beta)
            kl = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
            everything = token_advantages(scores, kl, mask, args, CPU)
            args.keep_max = True
            kept = token_advantages(scores, kl, mask, args, CPU)
            assert (everything[[0, 3, 4, 5]] != 0).all() or beta == 0
            assert torch.equal(kept, everything * torch.tensor([1.0, 0, 0, 1, 1, 1])[:, None])


@pytest.mark.parametrize("value", [0.1, 0.7])
@pytest.mark.parametrize("kind", ["prompt", "loo"])
def test_equal_rewards_leave_exactly_nothing(kind, value):
    """Eight rewards of 0.1 have a mean that is not 0.1 (NeMo-RL 4161)."""
    r = torch.full((8,), value)
    assert ((r - baselines(r, r, 8, kind)) / spread(r, r, 8, kind)).abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_normalize_divides_by_the_spread_of_the_scores_and_makes_nothing_large_out_of_the_kl(kind):
    """Prompts whose samples all score the same, and a KL penalty that differs by 1e-3. Divided by the
    spread of the totals, their advantages were as large as where some answers are right."""
    kl = 1e-3 * torch.tensor([0.0, 1.0, -1.0, 0.5, 0.0, -0.5, 1.0, 0.3])
    scores = torch.full((8,), 0.1)
    totals = scores - kl
    b = baselines(totals, totals, 4, kind)
    scale = spread(scores, scores, 4, kind)
    centre = b if kind != "none" else scores
    assert (scale == 1).all() and ((totals - centre) / scale).abs().max() < 3e-3

    # the second prompt has right and wrong answers: its own spread, or that of all, and no KL in either
    scores = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    scale = spread(scores, scores, 4, kind)
    wanted = [1.0] * 4 + [0.5 + 1e-4] * 4
    if kind in ("none", "batch"):
        wanted = [statistics.stdev(scores.tolist()) + 1e-4] * 8
    assert scale.tolist() == pytest.approx(wanted)
    args = reinforce.Args(samples_per_prompt=4, baseline=kind, beta=9.0, normalize=True)
    mask = torch.ones(8, 1, dtype=torch.bool)
    A = token_advantages(scores, kl[:, None], mask, args, CPU)[:, 0]
    totals = scores - 9 * kl
    torch.testing.assert_close(
        A, (totals - baselines(totals, totals, 4, kind)) / torch.tensor(wanted)
    )


def test_the_batchs_spread_is_that_of_all_processes():
    mine = torch.tensor([1.0, 1.0, 1.0, 1.0])
    everyone = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    for kind in ("none", "batch"):
        scale = spread(mine, everyone, 4, kind)
        assert scale.tolist() == pytest.approx([statistics.stdev(everyone.tolist()) + 1e-4] * 4)


def test_the_batchs_advantages_are_against_the_mean_and_spread_of_all_processes(monkeypatch):
    """Here the other process has drawn completions of score 0 only."""
    monkeypatch.setattr(common, "all_gather", lambda world, mine: torch.cat([mine, 0 * mine]))
    scores, mask = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.ones(4, 1, dtype=torch.bool)
    flags = {"samples_per_prompt": 4, "baseline": "batch", "beta": 0.0}
    A = token_advantages(scores, 0.0 * mask, mask, reinforce.Args(**flags), CPU)
    assert A[:, 0].tolist() == pytest.approx([0.625] * 3 + [-0.375])
    A = token_advantages(scores, 0.0 * mask, mask, reinforce.Args(**flags, normalize=True), CPU)
    std = statistics.stdev([1.0] * 3 + [0.0] * 5) + 1e-4
    assert A[:, 0].tolist() == pytest.approx([0.625 / std] * 3 + [-0.375 / std])


def test_the_lectures_centred_variable():
    """X uniform on (95, 105], Y = +-1: XY and (X - 100)Y have the same mean, 0, and variances E[X^2] = 10008.3 and 8.3."""
    g = torch.Generator().manual_seed(0)
    x = 95 + 10 * torch.rand(200_000, generator=g, dtype=torch.float64)
    y = torch.randint(0, 2, (200_000,), generator=g).double() * 2 - 1
    assert (
        abs((x * y).var() - (100**2 + 100 / 12)) < 50
        and abs(((x - 100) * y).var() - 100 / 12) < 0.1
    )
    assert abs((x * y).mean()) < 1 and abs(((x - 100) * y).mean()) < 0.03


def two_states():
    """Two prompts, two actions each, a policy that tosses a coin: in the first the actions pay 10 and 11, in the second
    0 and 1. Scores of all four cases and the gradient's factor d log pi / d logit = +-1/2."""
    return torch.tensor([10.0, 11.0, 0.0, 1.0], dtype=torch.float64), torch.tensor(
        [-0.5, 0.5, -0.5, 0.5], dtype=torch.float64
    )


def test_the_two_state_example_as_numbers():
    """One sample of a random state. Both states want the second action equally (gradient 1/4 each). Without a baseline
    the first state's bad action is pushed up by 5, ten times what the second state's good one gets; with each state's
    mean taken off, every sample has the right sign and size."""
    r, score = two_states()
    raw = r * score
    assert raw.tolist() == [-5.0, 5.5, 0.0, 0.5]
    per_state = raw.view(2, 2).mean(1)
    assert per_state.tolist() == [0.25, 0.25]
    centred = (r - r.view(2, 2).mean(1).repeat_interleave(2)) * score
    assert centred.tolist() == [0.25, 0.25, 0.25, 0.25]
    batch = (r - r.mean()) * score  # one mean for both states
    variances = [x.var(correction=0).item() for x in (raw, batch, centred)]
    assert variances == [
        (25 + 30.25 + 0 + 0.25) / 4 - 1 / 16,
        (2 * 20.25 / 4 + 2 * 30.25 / 4) / 4 - 1 / 16,
        0.0,
    ]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_the_variance_optimal_baseline_in_closed_form(p):
    """One parameter, one action of probability p = sigmoid(theta): b* = E[g^2 r] / E[g^2], g = d log pi / d theta. No
    other baseline has less variance; the mean reward is near it, and is it at p = 1/2."""
    probability = torch.tensor([p, 1 - p], dtype=torch.float64)
    g, r = (
        torch.tensor([1 - p, -p], dtype=torch.float64),
        torch.tensor([3.0, 1.0], dtype=torch.float64),
    )

    def variance(b):
        x = (r - b) * g
        return ((probability * x * x).sum() - (probability * x).sum() ** 2).item()

    best = ((probability * g * g * r).sum() / (probability * g * g).sum()).item()
    assert (
        abs(best - (3 * (1 - p) + 1 * p)) < 1e-12
    )  # for two actions: the rewards weighed the other way round
    grid = [best + d for d in (-1, -0.1, -0.01, 0.01, 0.1, 1)]
    assert all(variance(best) < variance(b) for b in grid)
    means = [((probability * (r - b) * g).sum()).item() for b in (0.0, best, 7.0)]
    assert max(means) - min(means) < 1e-12, "the mean does not depend on the baseline"
    if p == 0.5:
        assert best == (probability * r).sum()


def test_a_baseline_shrinks_the_variance_of_the_real_estimator():
    """The gradient's variance over many small batches, with rewards far from 0, for the estimators as they are coded."""
    model, s = enumerable(vocab=4, length=2)
    reward = some_rewards(s) + 5
    logprobs = exact_logprobs(model, s)
    p = logprobs.sum(1).exp().detach()
    score = torch.stack(
        [gradient(model, exact_logprobs(model, s)[i].sum()).clone() for i in range(len(p))]
    )  # [rows, weights]
    g, spread = torch.Generator().manual_seed(0), {}
    batches = torch.multinomial(p, 400 * 8, replacement=True, generator=g).view(400, 8)
    for kind in ("none", "batch", "prompt", "loo"):
        grads = []
        for rows in batches:
            b = baselines(reward[rows], reward[rows], 4, kind)
            grads.append(((reward[rows] - b)[:, None] * score[rows]).mean(0))
        spread[kind] = torch.stack(grads).var(0).sum().item()
    assert all(spread[k] < 0.25 * spread["none"] for k in ("batch", "prompt", "loo")), spread


# --- the loss ---


def test_the_gradients_sign_follows_the_advantage():
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    loss, _ = policy_loss(
        logprobs, logprobs.detach(), torch.tensor([[2.0, -3.0]]), torch.ones(1, 2), 1
    )
    loss.backward()
    assert logprobs.grad.tolist() == [
        [-2.0, 3.0]
    ]  # descent makes the first likelier, the second less


def test_old_samples_are_weighed_by_the_ratio_and_only_a_constant_denominator_learns():
    """With the current policy on both sides of the ratio and both in the graph, the ratio is 1 and its gradient 0."""
    old = torch.tensor([[-1.0, -2.0]])
    logprobs = torch.tensor([[-0.5, -2.5]], requires_grad=True)
    A, mask = torch.tensor([[1.0, 2.0]]), torch.ones(1, 2)
    loss, ratio = policy_loss(logprobs, old, A, mask, 1)
    loss.backward()
    torch.testing.assert_close(ratio, (logprobs - old).exp().detach())
    torch.testing.assert_close(logprobs.grad, -ratio * A)
    torch.testing.assert_close(
        torch.autograd.grad(-((logprobs - old).exp() * A).sum(), logprobs)[0], -ratio * A
    )
    wrong = -(
        (logprobs - logprobs).exp() * A
    ).sum()  # what it is with a denominator that is not detached
    assert torch.autograd.grad(wrong, logprobs)[0].abs().max() == 0
    far, _ = policy_loss(torch.tensor([[-1000.0, 0.0]]), torch.tensor([[0.0, -1000.0]]), A, mask, 1)
    assert torch.isfinite(far), "a log-ratio of 1000 must not overflow"


def test_with_0_1_rewards_and_no_baseline_it_is_fine_tuning_on_the_right_samples():
    logprobs = -torch.rand(4, 3)
    r, mask = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.ones(4, 3, dtype=torch.bool)
    to_go = rewards_to_go(token_rewards(r, torch.zeros(4, 3), mask, 0.0), 1.0)
    loss, _ = policy_loss(logprobs, logprobs, to_go, mask, 4)
    torch.testing.assert_close(loss, -logprobs[[0, 2]].sum() / 4)


# --- log-probabilities ---


@pytest.mark.parametrize("name", FAMILIES)
def test_token_logprobs_equal_a_plain_forward_and_the_sampler(name):
    """Left, right and no padding; chunks that do not divide; heads that scale or cap their logits (Granite, Gemma)."""
    model = family(name)
    s = sample(
        model,
        make_tokenizer(),
        [[7, 12, 3], [5, 9, 11, 30, 31, 14], [6]],
        n=2,
        max_new_tokens=9,
        temperature=0.7,
        seed=1,
    )
    s.rows_per_prompt = 1
    states, ids, mask = common.completion_states(model, s, list(range(6)))
    logprobs, entropy = logprobs_of(model, states, ids, mask, 0.7, chunk=7)
    tolerance = 1e-3 if name == "mamba" else 1e-4
    assert ((logprobs - s.logprobs).abs() * s.mask).max() < tolerance
    for row in range(6):
        text = torch.cat([s.prompt_ids[row][s.prompt_mask[row]], s.ids[row][s.mask[row]]])
        with torch.no_grad():
            full = (model(text[None]).logits[0].float() / 0.7).log_softmax(-1)
        C = int(s.mask[row].sum())
        plain = full[len(text) - C - 1 : -1]
        torch.testing.assert_close(
            logprobs[row, :C], plain.gather(1, text[-C:, None])[:, 0], atol=tolerance, rtol=0
        )
        torch.testing.assert_close(
            entropy[row, :C], -(plain.exp() * plain).sum(-1), atol=tolerance, rtol=0
        )
    assert (logprobs[~s.mask] == 0).all() and (entropy[~s.mask] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ratio_is_1_and_kl_is_0_before_the_first_update(temperature, checkpointing, tmp_path):
    """Field notes, test 2: with dropout in the config, with checkpointing, with another temperature. Exactly."""
    family("llama", attention_dropout=0.5).save_pretrained(tmp_path)
    policy, reference = (
        common.load_policy(tmp_path, CPU, checkpointing),
        common.load_reference(tmp_path, CPU),
    )
    s = sample(
        policy,
        make_tokenizer(),
        [[7, 12], [5, 9, 11, 30]],
        n=4,
        max_new_tokens=9,
        temperature=temperature,
        seed=1,
    )
    s.rows_per_prompt = 1 if checkpointing else 4
    parts = micro_batches(range(len(s.mask)), s.mask.any(1), s, 60, CPU)
    old, ref = (rollout_logprobs(m, s, [parts], temperature) for m in (policy, reference))
    assert len(parts) > 1 and torch.equal(old, ref)
    for part in parts:
        logprobs, _ = token_logprobs(policy, s, part, temperature)
        _, ratio = policy_loss(
            logprobs,
            old[part, : logprobs.shape[1]],
            torch.ones_like(logprobs),
            torch.ones_like(logprobs),
            1,
        )
        assert (ratio == 1).all()


def rollout(model, n=4):
    model.generation_config.eos_token_id = [1, 5, 9, 20]
    s = sample(
        model,
        make_tokenizer(),
        [[7, 12, 3], [5, 9, 11, 30, 31, 14], [6], [33, 21]],
        n=n,
        max_new_tokens=12,
        seed=3,
    )
    assert s.rows_per_prompt == 1, "nobody has tried whether this model can share prompts"
    s.rows_per_prompt = n
    return s


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("tokens", [1, 40, 100, 10_000])
def test_the_gradient_is_the_same_however_it_is_cut(tokens, n):
    """Field notes, test 3: the most repeated bug of all (trl 3021, verl 906, ...). With prompts shared, and without."""
    model = family("llama").double()
    s = rollout(model)
    advantages = (
        torch.randn(s.mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        * s.mask
    )
    grads = []
    for group in (1, n):
        model.zero_grad()
        s.rows_per_prompt = group
        parts = (
            micro_batches(range(16), s.mask.any(1), s, tokens, CPU) if grads else [list(range(16))]
        )
        for part in parts:
            logprobs, _ = token_logprobs(model, s, part, 1.0)
            C = logprobs.shape[1]
            policy_loss(logprobs, logprobs.detach(), advantages[part, :C], s.mask[part, :C], 16)[
                0
            ].backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (grads[0] - grads[1]).norm() < 1e-6 * grads[0].norm()


@pytest.mark.parametrize("tokens", [1, 40, 100, 10_000])
def test_micro_batches_hold_every_row_once_and_keep_to_the_budget(tokens):
    s = rollout(family("llama"))
    parts = micro_batches(range(len(s.mask)), s.mask.any(1), s, tokens, CPU)
    assert sorted(r for p in parts for r in p) == list(range(16))
    prompt, completion = s.prompt_mask.sum(1), s.mask.sum(1)
    for part in parts:
        prompts = len({r // 4 for r in part})
        assert (
            len(part) == 1
            or prompts * prompt[part].max() + len(part) * completion[part].max() <= tokens
        )
        whole = {r // 4 for r in part if sum(x // 4 == r // 4 for x in part) == 4}
        assert len(whole) == len({r // 4 for r in part}) or len({r // 4 for r in part}) == 1, (
            "whole groups, or slices of one"
        )


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_eos_carries_gradient_and_nothing_after_it_does(pad):
    """Field notes, test 5: an EOS that is not trained is a model that never learns to stop (trl 1623, 3091)."""
    model = family("llama")
    s = as_samples([[7, 8]], [[5, 1]], make_tokenizer(pad=pad), CPU)
    longer = as_samples([[7, 8], [7, 8]], [[5, 1], [5, 6, 7, 8]], make_tokenizer(pad=pad), CPU)
    logprobs, _ = token_logprobs(model, s, [0], 1.0)
    grads = [gradient(model, logprobs[0, 1]).clone()]
    assert grads[0].norm() > 0 and s.mask.tolist() == [[True, True]]
    logprobs, _ = token_logprobs(model, longer, [0, 1], 1.0)
    assert (logprobs[0, 2:] == 0).all()
    loss, _ = policy_loss(
        logprobs[:1],
        logprobs[:1].detach(),
        torch.tensor([[0.0, -1.0, 9.0, 9.0]]),
        longer.mask[:1],
        1,
    )
    assert (gradient(model, loss) - grads[0]).norm() < 1e-5 * grads[0].norm()


# --- rewards ---


@pytest.mark.parametrize(
    "said, answer, right",
    [
        ("so it is 1,234.", "#### 1234", 1), ("20.0", "20", 1), ("$20", 20, 1), ("20 of 30", "20", 0), ("-5", "5", 0), ("-5", "-5.00", 1),
        ("none", "5", 0), ("5", "none", 0), ("", "5", 0), (".5", "0.50", 1), ("x=3, y=4", "4", 1), ("100000000000000000001", "100000000000000000000", 0),
        ("6.02e23", "602e21", 1), ("it is 0.00001", 1e-05, 1), ("5", 1e-05, 0), ("1e16", 1e16, 1), ("2e", "2", 1), ("3e5000", "5", 0),
        ("the answer is 7,", "7", 1), ("ages 6-12", "12", 1), ("x=-5", "-5", 1), ("1,000,000", "1000000", 1),
    ],
)  # fmt: skip
def test_number_compares_the_last_numbers_as_decimals(said, answer, right):
    assert reinforce.number(said, {"answer": answer}) == right


def test_exact_ignores_white_space_around():
    assert (
        reinforce.exact(" 12\n", {"answer": "12"}) == 1
        and reinforce.exact("1 2", {"answer": "12"}) == 0
    )


def test_commas_are_read_between_groups_of_three_digits_only():
    """A list of numbers is no number: "1,2,3" was read as 123."""
    draw = random.Random(0)
    for _ in range(200):
        n = draw.randrange(10 ** draw.randrange(1, 13))
        sign = draw.choice(["", "-"])
        part = draw.choice(["", ".", ".0", ".25"])
        value = str(float(f"{sign}{n}{part or '.0'}")) if n < 10**9 else f"{sign}{n}{part}"
        for text in (f"{sign}{n:,}{part}", f"{sign}${n:,}{part}", f"so {sign}{n}{part}"):
            assert reinforce.number(text, {"answer": value}), text
        numbers = [draw.randrange(1000) for _ in range(3)] + [draw.randrange(100)]
        assert reinforce.number(",".join(map(str, numbers)), {"answer": numbers[-1]}), numbers
        assert reinforce.number(",".join(map(str, numbers)), {"answer": f"{numbers[-1]}.0"})
    for text, last in (("1,2,3", 3), ("1,2345", 2345), ("1234,567", 567), ("1,234,56", 56)):
        assert reinforce.number(text, {"answer": last}), text
    for text, whole in (
        ("1,234,567.5", "1234567.5"),
        ("$1,000", 1000),
        ("costs $12,000.", "12000"),
    ):
        assert reinforce.number(text, {"answer": whole}) and reinforce.number(
            whole, {"answer": text}
        )


@pytest.mark.parametrize("reward", [0.1, 0.7, -1.3, 100.1])
def test_a_batch_of_equal_rewards_teaches_exactly_nothing(reward):
    """The mean of 24 rewards of 0.1 is not 0.1, and Adam makes a step of any noise that it is
    given."""
    totals = torch.full((24,), reward)
    b = baselines(totals, totals, 8, "batch")
    assert (totals - b).abs().max() == 0
    other = torch.cat([totals, totals + 1])  # another process has other rewards
    b = baselines(totals, other, 8, "batch")
    assert b.tolist() == [pytest.approx(reward + 0.5)] * 24


def judge(tmp_path, places, words=None):
    """A reward model that reads so many tokens; other words are a tokenizer of its own."""
    tokenizer = words or common.load_tokenizer(reinforce.TINY / "model")
    base = reinforce.TINY / "model"
    if words:
        family("llama").save_pretrained(tmp_path / "base")
        words.save_pretrained(tmp_path / "base")
        base = tmp_path / "base"
    model = common.load_scalar(base, CPU, tokenizer, 0.5)
    model.config.max_position_embeddings = places
    common.save_model(model, tokenizer, tmp_path / "judge", CPU)
    return str(tmp_path / "judge")


def test_a_reward_model_with_a_short_context_lowers_the_length_of_answers(tmp_path, capsys):
    """Found before the run: in its middle, --resume would refuse another --max_new_tokens."""
    data = prompts_file(tmp_path, [{"prompt": "54321="}, {"prompt": "1="}])
    flags = {
        "data": data,
        "reward": judge(tmp_path, 12),
        "prompts_per_step": 2,
        "max_new_tokens": 20,
    }
    run(tmp_path, steps=1, samples_per_prompt=2, **flags)
    said = capsys.readouterr().out
    assert (
        "--max_new_tokens 20 is lowered to 5" in said
        and "reads 12 tokens, and the longest prompt has 7" in said
    )
    assert json.loads((tmp_path / "run" / "args.json").read_text())["max_new_tokens"] == 5
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "none", steps=1, **flags | {"reward": judge(tmp_path, 7)})
    assert (
        "a smaller --max_prompt_tokens" in capsys.readouterr().err
        and not (tmp_path / "none").exists()
    )


def test_a_reward_model_with_a_short_context_need_not_read_demonstrations(tmp_path):
    """It scores completions of held-out prompts only."""
    demos = prompts_file(tmp_path, [{"prompt": "987654321=", "answer": "123456789"}])
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "1="}\n')
    files = {"demos": demos, "eval_data": str(held_out), "reward": judge(tmp_path, 13)}
    args = reinforce.resolve(reinforce.Args(**files, max_new_tokens=10, device="cpu"))
    args, _, _, prompts, _ = reinforce.load_task(args, CPU)
    assert args.max_new_tokens == 10 and len(prompts) == 1


def test_a_reward_model_with_other_tokens_reads_the_end_of_what_is_too_long(tmp_path, capsys):
    """How long an answer is in its tokens nobody knows before. The run goes on, and says it once."""
    data = prompts_file(tmp_path, [{"prompt": "5 4 3 2 1 ="}])
    other = judge(tmp_path, 8, make_tokenizer())
    run(
        tmp_path,
        data=data,
        reward=other,
        steps=2,
        prompts_per_step=1,
        samples_per_prompt=2,
        max_new_tokens=20,
    )
    assert "of longer texts it reads the first token and the end" in capsys.readouterr().out
    tokenizer = common.load_tokenizer(other)
    model = common.load_scalar(other, CPU, tokenizer, frozen=True)
    texts = [list(range(3, 3 + n)) for n in (5, 8, 20)]
    scores = common.score_ids(model, tokenizer, texts, CPU)
    assert scores == pytest.approx(
        common.score_ids(model, tokenizer, [texts[0], texts[1], [3, *range(16, 23)]], CPU), abs=1e-6
    )
    assert len(set(scores)) == 3
    common.score_ids(model, tokenizer, texts, CPU)
    assert (
        capsys.readouterr().out.count("reads 8 tokens, of longer texts the first token and the end")
        == 1
    )


def drawn(*texts):
    """Samples with these texts; text i has i + 1 tokens, and those of odd i were cut."""
    count = len(texts)
    mask = torch.ones(count, count).tril().bool()
    finished = torch.arange(count) % 2 == 0
    return common.Samples(None, None, mask, mask, mask, finished, list(texts))


def scored(function, *texts, world=CPU):
    rows = [{"prompt": f"p{i}"} for i in range(len(texts))]
    return common.checked(function, "r.py:f", world)(drawn(*texts), rows)


NO_REWARDS = [math.nan, math.inf, "1.0", None, torch.zeros(2), [1], (1, 0.5), {}, {"form": 1.0}]
NO_REWARDS += [{"reward": 1.0, "form": None}, {"reward": math.nan}, {"reward": 1, "form": "1"}]


@pytest.mark.parametrize("value", NO_REWARDS, ids=str)
def test_a_reward_that_is_no_finite_number_names_row_and_completion(value):
    with pytest.raises(common.Stop) as stopped:
        scored(lambda c, r: value, "the completion")
    assert str(stopped.value) == (
        '--reward r.py:f must return a finite number or a dict of them with "reward" '
        f"(def f(completion, row): ...), returned {value!r}, "
        "for prompt 'p0' and completion 'the completion'"
    )


def test_a_reward_is_a_number_or_has_parts():
    assert scored(lambda c, r: torch.tensor(0.5), "a", "b") == {"reward": [0.5, 0.5]}
    parts = {"z": 2, "reward": True, "form": torch.tensor(0.25)}
    lists = scored(lambda c, r: parts | {"z": len(c)}, "a", "bb")
    assert lists == {"reward": [1.0, 1.0], "reward/form": [0.25, 0.25], "reward/z": [1.0, 2.0]}
    lists = scored(lambda c, r: dict.fromkeys(["f", "b", "reward", "d", "a", "c"], 1.0), "a")
    assert list(lists) == ["reward", *(f"reward/{name}" for name in "abcdf")], "everywhere alike"


def test_all_completions_have_the_same_parts():
    parts = {"reward": 1.0, "form": 0.0}
    with pytest.raises(
        common.Stop, match=r"the same names .*returned \(form, reward\) and \(reward\)"
    ):
        scored(lambda c, r: parts if c == "a" else 1.0, "a", "b")


def test_a_reward_with_a_parameter_info_knows_how_long_a_completion_is_and_whether_it_was_cut():
    def keyword(completion, row, *rest, info):
        assert not rest
        return info.tokens

    def default(completion, row, info=None):
        return {"reward": info.tokens, "finished": info.finished}

    assert scored(keyword, "a", "b") == {"reward": [1, 2]}
    assert scored(default, "a", "b") == {"reward": [1, 2], "reward/finished": [1, 0]}


def test_a_reward_of_completions_gets_all_of_them_at_once():
    calls = []

    def judge(completions, rows, info):
        prompts = [row["prompt"] for row in rows]
        calls.append((list(completions), prompts, [(i.tokens, i.finished) for i in info]))
        completions.clear()  # what is given may be changed
        rows[0].clear()
        return torch.tensor([0.5, 1.0, 0.25])

    samples = drawn("a", "b", "c")
    rows = [{"prompt": f"p{i}"} for i in range(3)]
    scores = common.checked(judge, "r.py:f", CPU)(samples, rows)
    assert scores == {"reward": [0.5, 1.0, 0.25]}
    told = [(1, True), (2, False), (3, True)]
    assert calls == [(["a", "b", "c"], ["p0", "p1", "p2"], told)]
    assert samples.texts == ["a", "b", "c"] and rows[0] == {"prompt": "p0"}
    parts = scored(
        lambda completions, rows: ({"reward": 1, "n": len(c)} for c in completions), "ab", "c"
    )
    assert parts == {"reward": [1.0, 1.0], "reward/n": [2.0, 1.0]}


@pytest.mark.parametrize(
    "value, words",
    [
        ([1.0], "a list of .* returned 1 values, for 2 completions"),
        ([1.0, math.nan], "returned nan, for prompt 'p1' and completion 'b'"),
        (0.5, "an error .*TypeError.* for 2 completions"),
        ({0: 0.5, 1: 1.0}, "a list .* returned 0 values, for 2 completions"),
        ({0.5, 1.0}, "a list .* returned 0 values"),
    ],
    ids=str,
)
def test_a_reward_of_completions_returns_a_value_for_each(value, words):
    with pytest.raises(common.Stop, match=words):
        scored(lambda completions, rows: value, "a", "b")


def test_a_reward_may_return_the_same_object_every_time_and_stops_at_the_first_fault():
    parts = {}
    seen = []

    def reused(completion, row):
        seen.append(completion)
        parts["reward"] = {"a": 1.0, "b": 0.0}.get(completion, math.nan)
        return parts

    assert scored(reused, "a", "b", "a") == {"reward": [1.0, 0.0, 1.0]}
    seen.clear()
    with pytest.raises(common.Stop):
        scored(reused, "a", "bad", "b")
    assert seen == ["a", "bad"]


def test_no_other_parameter_is_filled():
    def several(*values, **others):
        return len(values) + 10 * len(others)

    def weighted(completion, row, weight=3.0):
        return weight

    assert scored(several, "a")["reward"] == [2]
    assert scored(weighted, "a")["reward"] == [3]
    assert scored(functools.partial(several, "first"), "a")["reward"] == [3]


@pytest.mark.parametrize(
    "line, why",
    [
        ("def f(completion):\n    return 1", "too many positional arguments"),
        ("def f(completion, row, weight):\n    return 1", "missing a required argument: 'weight'"),
        ("def f(completion, row, info, /):\n    return 1", "info"),
        ("f = 0.5", "0.5 is not a callable object"),
        ("f = max", "no signature found"),
    ],
)
def test_a_reward_with_other_parameters_is_refused_before_it_is_called(line, why, tmp_path, capsys):
    (tmp_path / "r.py").write_text(line)
    with pytest.raises(SystemExit):
        common.load_reward(f"{tmp_path}/r.py:f", reinforce.RULES, CPU)
    said = capsys.readouterr().err
    forms = "def f(completion, row): ... or def f(completions, rows): ..."
    assert f"r.py:f must be {forms} (" in said and why in said
    assert len(said.splitlines()) == 1


def test_a_reward_whose_library_raises_names_the_line_of_the_reward():
    (line,) = [i for i, text in enumerate(open(__file__), 1) if "json.loads(c" + ")" in text]
    with pytest.raises(common.Stop, match=rf"in test_reinforce.py, line {line} \(JSONDecodeError"):
        scored(lambda c, r: json.loads(c), "no json")


def test_a_reward_that_raises_names_row_and_completion():
    words = r"an error in test_reinforce.py, line \d+ \(ZeroDivisionError.*'p7'.*'c7'"
    with pytest.raises(common.Stop, match=words):
        scored(lambda c, r: 1 / (c != "c7"), *[f"c{i}" for i in range(9)])


# --- whole runs, on the bundled model ---


def run(tmp_path, name="run", **flags):
    reinforce.train(
        reinforce.Args(
            **{"out": str(tmp_path / name), "device": "cpu", "eval_data": "", "seed": 1} | flags
        )
    )
    return [
        json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    ]


def weights(tmp_path, name):
    return common.read_checkpoint(tmp_path / name)["models"]["policy"]


def prompts_file(tmp_path, rows):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(tmp_path / "data.jsonl")


def test_groups_are_not_mixed_up(tmp_path, monkeypatch):
    """Search-R1 88: a reward that is the prompt's own number must give each group its own baseline, so nothing is left
    to learn and no weight moves, in every cut of the step."""
    data = prompts_file(tmp_path, [{"prompt": f"{i}=", "answer": str(i)} for i in range(8)])
    (tmp_path / "r.py").write_text(
        "def reward(completion, row):\n    return float(row['prompt'][:-1])\n"
    )
    for tokens in (30, 8192):
        m = run(
            tmp_path,
            f"t{tokens}",
            data=data,
            reward=f"{tmp_path}/r.py:reward",
            steps=1,
            prompts_per_step=8,
            beta=0.0,
            tokens_per_micro_batch=tokens,
            max_new_tokens=8,
        )
        assert m[1]["grad_norm"] == 0 and m[1]["equal_groups"] == 1 and m[1]["reward"] == 3.5


def test_a_bandits_rewarded_token_becomes_likelier(tmp_path):
    """Field notes, test 9: one prompt, one token, and only `7` pays."""
    data = prompts_file(tmp_path, [{"prompt": "42=", "answer": "7"}])
    m = run(
        tmp_path,
        data=data,
        steps=25,
        prompts_per_step=1,
        samples_per_prompt=64,
        max_new_tokens=1,
        beta=0.0,
        warmup=0,
        learning_rate=1e-3,
    )
    assert m[1]["reward"] < 0.3 and m[-1]["reward"] > 0.9


@pytest.mark.parametrize(
    "flags",
    [{}, {"epochs": 2, "minibatches": 2}, {"beta": 0.0, "baseline": "batch", "normalize": True}],
)
def test_resuming_equals_never_having_stopped(flags, tmp_path):
    """Bit for bit on the CPU: weights, moments and every logged number that is not a time (trl 3179, 3247)."""
    flags |= {"max_new_tokens": 12, "eval_every": 2, "eval_data": None, "prompts_per_step": 4}
    straight = run(tmp_path, "a", steps=4, **flags)
    run(tmp_path, "b", steps=2, **flags)
    resumed = run(tmp_path, "b", steps=4, resume=True, **flags)
    clocks = ("time/sample", "time/reward", "time/train", "tokens_per_second", "memory_gib")
    assert len(straight) == len(resumed) == 5
    for x, y in zip(straight, resumed):
        extra = {"eval/reward", "eval/exact"}
        assert {k: v for k, v in x.items() if k not in clocks} == {
            k: v for k, v in y.items() if k not in clocks
        }, extra
    a, b = weights(tmp_path, "a"), weights(tmp_path, "b")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    """SIGKILL between two checkpoints, with steps logged that no checkpoint holds: they are logged again, once."""
    flags = {"steps": 6, "save_every": 2, "prompts_per_step": 4, "max_new_tokens": 12}
    straight = run(tmp_path, "a", **flags)
    command = [
        sys.executable,
        str(ROOT / "reinforce.py"),
        "--out",
        str(tmp_path / "b"),
        "--device",
        "cpu",
        "--eval_data",
        "",
    ]
    command += [x for k, v in flags.items() for x in (f"--{k}", str(v))]
    # as many threads as here: sums in another order would differ in the last bit
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process, log = (
        subprocess.Popen(command, cwd=tmp_path, env=environment),
        tmp_path / "b" / "metrics.jsonl",
    )
    while not log.exists() or log.read_text().count("\n") < 4:  # step 3 is logged, step 2 was saved
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    resumed = run(tmp_path, "b", **flags, resume=True)
    clocks = ("time/sample", "time/reward", "time/train", "tokens_per_second", "memory_gib")
    assert [{k: v for k, v in m.items() if k not in clocks} for m in resumed] == [
        {k: v for k, v in m.items() if k not in clocks} for m in straight
    ]
    a, b = weights(tmp_path, "a"), weights(tmp_path, "b")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_first_ratio_is_1_and_later_ones_are_not(tmp_path):
    m = run(
        tmp_path,
        steps=1,
        epochs=2,
        minibatches=2,
        prompts_per_step=4,
        learning_rate=1e-3,
        warmup=0,
        max_new_tokens=12,
    )
    assert (
        m[1]["ratio/first"] == 0
        and m[1]["kl/ref"] == 0
        and m[1]["ratio/mean"] != 1
        and m[1]["kl/sample"] < 1e-5
    )


def test_no_reference_is_loaded_at_beta_0(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "load_reference", lambda *a: 1 / 0)
    m = run(tmp_path, steps=1, beta=0.0, prompts_per_step=2, max_new_tokens=4)
    assert "kl/ref" not in m[1]


def test_a_tiny_rate_moves_float32_weights(tmp_path):
    """Field notes, test 10: at 1e-6 nearly every weight moves; in bfloat16 next to none would."""
    run(tmp_path, steps=1, learning_rate=1e-6, warmup=0, prompts_per_step=16, max_new_tokens=12)
    before = common.load_policy(reinforce.TINY / "model", CPU).state_dict()
    after = weights(tmp_path, "run")
    moved = sum((after[k] != before[k]).sum().item() for k in after) / sum(
        v.numel() for v in after.values()
    )
    assert moved > 0.9
    lost = sum((after[k].bfloat16() != before[k].bfloat16()).sum().item() for k in after) / sum(
        v.numel() for v in after.values()
    )
    assert lost < 0.1


def test_demonstrations_are_fine_tuning(tmp_path):
    """The loss of step 1 is the mean over rows of the summed negative log-likelihood, EOS included, by hand."""
    rows = [{"prompt": "52=", "answer": "25"}, {"prompt": "9310=", "answer": "0139"}]
    m = run(tmp_path, demos=prompts_file(tmp_path, rows), steps=1, prompts_per_step=2)
    model, tokenizer = (
        common.load_policy(reinforce.TINY / "model", CPU),
        common.load_tokenizer(reinforce.TINY / "model"),
    )
    nll = 0.0
    for r in rows:
        ids = torch.tensor(
            [
                tokenizer(r["prompt"]).input_ids
                + tokenizer(r["answer"]).input_ids
                + [tokenizer.eos_token_id]
            ]
        )
        logprobs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        nll -= logprobs[len(r["prompt"]) - 1 :].sum().item()
    assert abs(m[1]["loss"] - nll / 2) < 1e-4 and m[1]["reward"] == 1 and "kl/sample" not in m[1]


def test_demonstrations_as_long_as_may_be_are_kept_and_longer_ones_left_out_and_counted(capsys):
    """Counted with the end that they are given."""
    rows = [([5], {"prompt": "w5", "answer": answer}) for answer in ("w6 w7", "w6 w7 w8", "w9")]
    args = reinforce.Args(max_new_tokens=3)
    kept = reinforce.encode_answers(rows, make_tokenizer(), args)
    assert [record["answer_ids"] for _, record in kept] == [[6, 7, 1], [9, 1]]
    assert "--demos: 1 of 3 left out (--max_new_tokens 3)" in capsys.readouterr().out


def test_a_run_on_demonstrations_and_a_reward_model_resumes_with_the_same_ones(tmp_path, capsys):
    """The judge lowers --max_new_tokens, and a resumed run begins with the lower one."""
    rows = [{"prompt": "9876=", "answer": answer} for answer in ("678", "6789", "678967896", "67")]
    held_out = prompts_file(tmp_path, [{"prompt": "123456="}])
    demos = tmp_path / "demos.jsonl"
    demos.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"demos": str(demos), "eval_data": held_out, "reward": judge(tmp_path, 13)}
    flags |= {"prompts_per_step": 2, "max_new_tokens": 20, "save_every": 1}
    run(tmp_path, "a", steps=2, schedule="constant", **flags)
    assert "--demos: 1 of 4 left out" in capsys.readouterr().out
    known = json.loads((tmp_path / "a" / "args.json").read_text())
    flags["max_new_tokens"] = known["max_new_tokens"]
    assert flags["max_new_tokens"] < 9
    run(tmp_path, "a", steps=3, schedule="constant", resume=True, **flags)
    assert "--demos: 1 of 4 left out" in capsys.readouterr().out


def test_another_model_that_learns_from_demonstrations_needs_no_data():
    args = reinforce.resolve(reinforce.Args(model="owner/name", demos="mine.jsonl"))
    assert args.steps == 250 and args.eval_data == "" and not args.data
    reinforce.resolve(reinforce.Args(model="owner/name", demos="mine.jsonl", reward="none"))


def test_held_out_rows_need_answers_only_for_rewards_that_read_them(tmp_path, capsys):
    """Also when the run learns from demonstrations."""
    (tmp_path / "r.py").write_text("def f(completion, row):\n    return float(len(completion))\n")
    demos = prompts_file(tmp_path, [{"prompt": "52=", "answer": "25"}])
    (tmp_path / "asked.jsonl").write_text('{"prompt": "31="}\n')
    flags = {
        "demos": demos,
        "eval_data": str(tmp_path / "asked.jsonl"),
        "steps": 1,
        "prompts_per_step": 1,
    }
    m = run(tmp_path, reward=f"{tmp_path}/r.py:f", **flags)
    assert m[0]["eval/reward"] > 0 and "eval/exact" not in m[0]
    with pytest.raises(SystemExit):
        run(tmp_path, "b", **flags)
    assert '--reward exact needs an "answer"' in capsys.readouterr().err


def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "catch_signals", lambda steps: lambda: True)
    with pytest.raises(SystemExit, match="(?s)stopped by a signal after step 1 of 5.*--resume"):
        run(tmp_path, steps=5, prompts_per_step=2, max_new_tokens=4)
    assert common.read_checkpoint(tmp_path / "run")["step"] == 1
    monkeypatch.setattr(common, "catch_signals", lambda steps: lambda: False)
    assert len(run(tmp_path, steps=5, resume=True, prompts_per_step=2, max_new_tokens=4)) == 6


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "clip_gradients", lambda *a: math.nan)
    with pytest.raises(SystemExit, match="the gradient is nan"):
        run(tmp_path, steps=1, prompts_per_step=2, max_new_tokens=4)


def test_a_reward_that_fails_stops_the_run_with_its_checkpoint_whole(tmp_path):
    (tmp_path / "r.py").write_text(
        "calls = []\ndef reward(c, r):\n    calls.append(1)\n    return 1.0 if len(calls) <= 32 else float('nan')\n"
    )
    with pytest.raises(SystemExit, match="(?s)returned nan, for prompt.*completion.*--resume"):
        run(
            tmp_path,
            reward=f"{tmp_path}/r.py:reward",
            steps=9,
            prompts_per_step=2,
            max_new_tokens=4,
            save_every=1,
        )
    assert common.read_checkpoint(tmp_path / "run")["step"] == 2


def test_zero_steps_only_evaluate(tmp_path):
    m = run(tmp_path, steps=0, eval_data=None)
    assert len(m) == 1 and 0.08 < m[0]["eval/exact"] <= 0.40


# --- whole runs, against runs written out in float64 ---


def row_by_hand(model, prompt, completion, temperature):
    """Each token's log-probability, and the entropy there, by a plain forward of one row."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
    everything = (logits / temperature).log_softmax(-1)  # [T, V]
    chosen = everything.gather(1, torch.tensor(completion)[:, None])[:, 0]
    return chosen, -(everything.exp() * everything).sum(-1).detach()


@torch.no_grad()
def drawn_by_hand(model, prompts, longest, temperature, seed, end):
    """A completion for each of the prompts, token by token; at temperature 0 the likeliest."""
    generator = torch.Generator().manual_seed(seed)
    completions = [[] for _ in prompts]
    for _ in range(longest):
        u = torch.rand(len(prompts), dtype=torch.float64, generator=generator)
        for i, prompt in enumerate(prompts):
            if completions[i][-1:] == [end]:
                continue
            logits = model(torch.tensor([prompt + completions[i]])).logits[0, -1].double()
            if temperature == 0:
                completions[i].append(int(logits.argmax()))
            else:
                reached = (logits / temperature).softmax(-1).cumsum(-1)
                completions[i].append(int((reached > u[i]).nonzero()[0]))
        if all(c[-1] == end for c in completions):
            break
    return completions


def rate_by_hand(step, f):
    if step <= f.warmup:
        return f.learning_rate * step / (f.warmup + 1)
    # 1 in the first step after the warm-up, 0 one step after the last
    left = (f.steps - step + 1) / (f.steps - f.warmup)
    shapes = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return f.learning_rate * shapes[f.schedule]


def asked_by_hand(count, step, f):
    """The row numbers of a step: the data is shuffled anew each time that it is used up."""
    numbers = []
    for k in range((step - 1) * f.prompts_per_step, step * f.prompts_per_step):
        order = random.Random(common.seed_from(f.seed, k // count, common.ORDER))
        numbers.append(order.sample(range(count), count)[k % count])
    return numbers


def advantages_by_hand(scores, kl, f):
    """Penalise, subtract the baseline, normalize, keep the best: by loops over rows and tokens."""
    n, to_go = f.samples_per_prompt, []
    for i in range(len(scores)):
        T = len(kl[i])
        paid = [-f.beta * kl[i][t] + (scores[i] if t == T - 1 else 0.0) for t in range(T)]
        to_go.append([sum(f.gamma ** (u - t) * paid[u] for u in range(t, T)) for t in range(T)])
    totals, advantages = [row[0] for row in to_go], []
    for i in range(len(scores)):
        group = list(range(i - i % n, i - i % n + n))
        others = [totals[j] for j in group if j != i]
        b = 0.0
        if f.baseline == "batch":
            b = statistics.mean(totals)
        elif f.baseline in ("prompt", "loo"):
            b = statistics.mean(others if f.baseline == "loo" else [*others, totals[i]])
            if all(x == totals[i] for x in others):
                b = totals[i]
        compared = scores if f.baseline in ("none", "batch") else [scores[j] for j in group]
        divisor = 1.0
        if f.normalize and len(set(compared)) > 1:
            divisor = statistics.stdev(compared) + 1e-4
        if f.keep_max and scores[i] < max(scores[j] for j in group):
            advantages.append([0.0] * len(to_go[i]))
        else:
            advantages.append([(G - b) / divisor for G in to_go[i]])
    return advantages


def step_by_hand(step, policy, reference, f, rows, score, tokenizer, norms):
    """One step of the script: moves the policy -> (what is logged, what samples.jsonl shows)."""
    n, end, temperature = f.samples_per_prompt, tokenizer.eos_token_id, f.temperature
    rows = [rows[k] for k in asked_by_hand(len(rows), step, f) for _ in range(n)]
    prompts, N = [tokenizer(row["prompt"]).input_ids for row in rows], len(rows)
    if f.demos:
        completions = [[*tokenizer(row["answer"]).input_ids, end] for row in rows]
    else:
        seed = common.seed_from(f.seed, step, 0, common.DRAW)
        completions = drawn_by_hand(policy, prompts, f.max_new_tokens, temperature, seed, end)
    texts = [tokenizer.decode([t for t in c if t != end]) for c in completions]
    scores = [1.0 if f.demos else score(text, row) for text, row in zip(texts, rows)]

    with torch.no_grad():
        texts_as_ids = list(zip(prompts, completions))
        old = [row_by_hand(policy, p, c, temperature)[0] for p, c in texts_as_ids]
        kl = [[0.0] * len(c) for c in completions]
        if f.beta:
            there = [row_by_hand(reference, p, c, temperature)[0] for p, c in texts_as_ids]
            kl = [(a - b).tolist() for a, b in zip(old, there)]
    A = advantages_by_hand(scores, kl, f)
    # without a KL penalty, rows that teach nothing are not computed and not in what the update logs
    trained = [i for i in range(N) if any(A[i]) or f.beta]

    cut = torch.Generator().manual_seed(common.seed_from(f.seed, step, 0, common.CUT))
    minibatches = torch.randperm(N // n, generator=cut).view(f.minibatches, -1).tolist()
    losses, first, seen = [], [], {"entropy": [], "ratio": [], "moved": [], "sampler": []}
    begun = len(norms)
    for epoch in range(f.epochs):
        shuffle = random.Random(common.seed_from(f.seed, step, epoch, common.PASS))
        for groups in shuffle.sample(minibatches, f.minibatches):
            loss = torch.zeros(1, dtype=torch.float64)
            for i in [g * n + j for g in groups for j in range(n)]:
                if i not in trained:
                    continue
                now, entropy = row_by_hand(policy, prompts[i], completions[i], temperature)
                before = now.detach() if f.demos else old[i]
                for t in range(len(now)):
                    ratio = (now[t].detach() - before[t]).exp()
                    loss = loss - ratio * A[i][t] * now[t] / (N / f.minibatches)
                    seen["entropy"].append(entropy[t].item())
                    seen["ratio"].append(ratio.item())
                    seen["moved"].append(ratio.item() - 1 - math.log(ratio))
                    # the sampler said what `before` is, and the test has added this
                    seen["sampler"].append(abs(0.1 * math.sin(t)))
                    if len(norms) == begun:
                        first.append(abs(ratio.item() - 1))
            losses.append(loss.item())
            if not loss.requires_grad:
                continue  # no row of this mini-batch teaches
            policy.zero_grad()
            loss.backward()
            norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in policy.parameters())))
            with torch.no_grad():
                for p in policy.parameters():
                    p -= rate_by_hand(step, f) * min(1.0, f.max_grad_norm / norms[-1]) * p.grad

    seconds, tokens = 3 * (len(norms) - begun), sum(map(len, completions))
    groups = [scores[i : i + n] for i in range(0, N, n)]
    sampled = 0 if f.demos else 1  # seconds, by the test's clock
    logged = {
        "step": step,
        "reward": statistics.mean(scores),
        "loss": statistics.mean(losses),
        "grad_norm": sum(norms[begun:]) / len(losses),
        "learning_rate": rate_by_hand(step, f),
        "length": tokens / N,
        "truncated": sum(c[-1] != end for c in completions) / N,
        "time/sample": sampled,
        "time/train": seconds,
        "tokens_per_second": tokens / (sampled + seconds),
        "memory_gib": 5.0,
    }
    if f.beta:
        logged["kl/ref"] = sum(map(sum, kl)) / N
    if f.baseline in ("prompt", "loo"):
        logged["equal_groups"] = sum(len(set(g)) == 1 for g in groups) / len(groups)
    if trained:
        logged["entropy"] = statistics.mean(seen["entropy"])
    if trained and not f.demos:
        logged["kl/old"] = sum(seen["moved"]) / f.epochs / len(trained)
        logged["ratio/mean"] = statistics.mean(seen["ratio"])
        logged["kl/sample"] = statistics.mean(seen["sampler"])
        if len(losses) > 1 or f.beta:
            logged["ratio/first"] = max(first)
    prompt = tokenizer.decode(prompts[0])
    shown = []
    for text, value in zip(texts[:n], scores[:n]):
        asked = rows[0]["prompt"]
        shown.append({"step": step, "prompt": asked, "completion": text, "reward": value})
        shown[-1] |= {"answer": rows[0]["answer"], "input": prompt}
    return logged, shown


def evaluated_by_hand(policy, f, rows, score, tokenizer):
    prompts = [tokenizer(row["prompt"]).input_ids for row in rows]
    completions = drawn_by_hand(policy, prompts, f.max_new_tokens, 0, 0, tokenizer.eos_token_id)
    texts = [tokenizer.decode([t for t in c if t != tokenizer.eos_token_id]) for c in completions]
    right = [float(t == row["answer"]) for t, row in zip(texts, rows) if "answer" in row]
    values = [score(t, row) for t, row in zip(texts, rows)]
    scores = {"eval/reward": statistics.mean(values), "eval/exact": statistics.mean(right)}
    if getattr(f, "reward", "") == "none":
        del scores["eval/reward"]
    if score is not reinforce.exact:
        numbers = [reinforce.number(t, row) for t, row in zip(texts, rows) if "answer" in row]
        scores["eval/number"] = statistics.mean(numbers)
    return scores | {"held_out/prompts": len(rows)}


# Nothing is at its default. The samples of the fourth prompt all score the same.
BY_HAND = {
    "steps": 3, "prompts_per_step": 4, "samples_per_prompt": 3, "max_new_tokens": 6,
    "temperature": 0.8, "beta": 0.3, "gamma": 0.9, "epochs": 2, "minibatches": 2,
    "learning_rate": 0.02, "schedule": "linear", "warmup": 1, "max_grad_norm": 2.0,
    "tokens_per_micro_batch": 50, "eval_every": 2, "seed": 5,
    "baseline": "loo", "normalize": False, "keep_max": False, "demos": "",
}  # fmt: skip
ROWS = [
    {"prompt": "52=", "answer": "25"},
    {"prompt": "9310=", "answer": "0139"},
    {"prompt": "60487=", "answer": "04678"},
    {"prompt": "71=", "answer": "17"},
    {"prompt": "884=", "answer": "488"},
]
ONE = {"samples_per_prompt": 1, "baseline": "none", "beta": 0.0, "gamma": 1.0, "temperature": 1.0}


def paid(completion, row):
    """A reward of the length, of the first digit, and of whose prompt it is."""
    if row["prompt"] == "71=":
        return 0.5
    started = completion[:1] == min(row["prompt"].strip("="))
    return 0.3 * len(completion) + (0.7 if started else 0.0) - 0.2 * len(row["prompt"])


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"baseline": "prompt", "normalize": True, "max_grad_norm": 1e9, "learning_rate": 0.004},
        {"baseline": "batch", "normalize": True, "gradient_checkpointing": True},
        {"baseline": "none", "normalize": True, "keep_max": True, "temperature": 1.4},
        {"keep_max": True, "normalize": True, "beta": 0.0, "schedule": "cosine"},
        {"beta": 0.0, "epochs": 1, "minibatches": 1, "schedule": "constant"},
        {"beta": 0.0, "epochs": 1, "minibatches": 4, "reward": "exact", "max_grad_norm": 0.5},
        {"epochs": 1, "minibatches": 1, "samples_per_prompt": 1, "baseline": "batch", "seed": 6},
        ONE | {"demos": "the data", "schedule": "cosine"},
        # distillation, with the baseline that it has by default
        {"reference": "a folder", "reward": "none", "beta": 1.0, "gamma": 0.0, "baseline": None},
    ],
    ids=lambda flags: " ".join(f"{k}={v}" for k, v in flags.items()) or "loo",
)
def test_every_step_of_the_script_is_the_step_written_out(flags, tmp_path, monkeypatch):
    """Every flag in its place: weights after each of three steps, each logged number, the samples
    shown and the held-out scores. The optimizer is plain gradient descent, the reference is another
    model, the sampler's log-probabilities are off by a known amount, the clock is the test's."""
    f = types.SimpleNamespace(**BY_HAND | flags)
    seen, clock, honest = {}, [0], {k: getattr(common, k) for k in ("sample", "load_reference")}

    def moved(*everything):
        model, generator = honest["load_reference"](*everything), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * p.std() * torch.randn(p.shape, generator=generator))
        return model

    def sample(*everything, **settings):
        samples = honest["sample"](*everything, **settings)
        samples.logprobs += 0.1 * torch.arange(samples.ids.shape[1]).sin() * samples.mask
        clock[0] += settings.get("temperature") != 0
        return samples

    class Descent(torch.optim.SGD):
        def step(self):
            clock[0] += 3
            super().step()

    def descent(model, rate):
        assert rate == f.learning_rate
        seen["policy"] = copy.deepcopy(model).double().eval()
        return Descent(model.parameters(), lr=1.0)

    monkeypatch.setattr(common, "sample", sample)
    monkeypatch.setattr(common, "load_reference", moved)
    monkeypatch.setattr(common, "make_optimizer", descent)
    monkeypatch.setattr(common, "memory_used", lambda world: 5 * 2**30)
    monkeypatch.setattr(reinforce, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    (tmp_path / "r.py").write_text(inspect.getsource(paid))
    held_out = [{"prompt": "40=", "answer": "04"}, {"prompt": "9318=", "answer": "1389"}]
    if flags.get("reward") != "exact" and not f.demos:
        held_out.append({"prompt": "5261="})  # without an answer: in eval/reward alone
    (tmp_path / "held_out.jsonl").write_text("\n".join(map(json.dumps, held_out)))
    settings = {"reward": f"{tmp_path}/r.py:paid"} | vars(f) | {"save_every": 1, "keep": 9}
    settings["eval_data"] = str(tmp_path / "held_out.jsonl")
    settings["demos" if f.demos else "data"] = prompts_file(tmp_path, ROWS)
    if "reference" in flags:  # the other model lies in a folder
        settings["reference"] = str(tmp_path / "reference")
        moved(reinforce.Args.model, CPU).save_pretrained(settings["reference"])
        common.load_tokenizer(reinforce.Args.model).save_pretrained(settings["reference"])
        monkeypatch.setattr(common, "load_reference", honest["load_reference"])
    log = run(tmp_path, **settings)

    policy, reference = seen["policy"], moved(reinforce.Args.model, CPU).double()
    tokenizer = common.load_tokenizer(reinforce.Args.model)
    scores = {"exact": reinforce.exact, "none": lambda text, row: 0.0}
    score = scores.get(flags.get("reward"), paid)
    at = (f, held_out, score, tokenizer)
    wanted, shown, norms = [{"step": 0} | evaluated_by_hand(policy, *at)], [], []
    for step in range(1, f.steps + 1):
        before = {k: p.detach().clone() for k, p in policy.named_parameters()}
        logged, texts = step_by_hand(step, policy, reference, f, ROWS, score, tokenizer, norms)
        if step in (2, 3):
            logged |= evaluated_by_hand(policy, *at)
        wanted.append(logged)
        shown += texts
        saved = torch.load(tmp_path / "run" / "checkpoint" / f"{step:06d}.pt")["models"]["policy"]
        for k, p in policy.named_parameters():
            assert (saved[k] - p).norm() <= 2e-3 * (p - before[k]).norm() + 2e-6, (step, k)
    kept = common.load_policy(tmp_path / "run" / "model", CPU)
    assert all(torch.equal(p, saved[k]) for k, p in kept.named_parameters())
    assert len(log) == len(wanted)
    for got, numbers in zip(log, wanted):
        # by a clock that the test does not set
        assert ("time/reward" in got) == (got["step"] > 0 and not f.demos)
        got.pop("time/reward", None)
        assert got.keys() == numbers.keys()
        for name, value in numbers.items():
            assert got[name] == pytest.approx(value, rel=1e-3, abs=2e-6), (got["step"], name)
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    for got, row in zip(map(json.loads, lines), shown, strict=True):
        assert got == row | {"reward": pytest.approx(row["reward"], abs=1e-6)}
    # what would not act would not be tested
    assert f.max_grad_norm > 1e6 or max(norms) > 1.1 * f.max_grad_norm
    if not f.demos:
        assert any(0 < m["truncated"] < 1 for m in log[1:])
        is_logged = f.baseline in ("prompt", "loo")
        assert any(m.get("equal_groups") for m in log[1:]) == is_logged


def test_the_first_ratio_logged_is_the_largest_of_the_first_mini_batch(tmp_path, monkeypatch):
    """Where the same weights give a sample two probabilities, it says so, whichever row it is."""
    honest = reinforce.rollout_logprobs

    def off(model, samples, minibatches, *rest):
        old = honest(model, samples, minibatches, *rest)
        rows = minibatches[0][0]
        old[rows[-1], 0] += 0.3
        old[rows[0], 0] -= 0.1
        return old

    monkeypatch.setattr(reinforce, "rollout_logprobs", off)
    flags = {"steps": 1, "epochs": 2, "beta": 0.0, "prompts_per_step": 4, "max_new_tokens": 6}
    m = run(tmp_path, **flags)
    assert m[1]["ratio/first"] == pytest.approx(1 - math.exp(-0.3), rel=1e-4)


# --- mistakes: one line, status 2, nothing loaded, nothing written ---

GOOD = '{"prompt": "52=", "answer": "25"}\n'


@pytest.mark.parametrize(
    "flags, content, parts",
    [
        ({"data": "{}/none.jsonl"}, None, ["--data", "none.jsonl", "No such file"]),
        ({}, GOOD + "{broken\n", ["line 2", "not JSON"]),
        ({}, GOOD + '{"answer": "25"}\n', ["line 2", "prompt"]),
        ({}, GOOD + '{"prompt": 5}\n', ["line 2", "prompt"]),
        ({}, GOOD + "[1]\n", ["line 2", "prompt"]),
        ({}, "", ["no rows"]),
        ({}, b"\xff\xfe\x00", ["UTF-8"]),
        ({}, '{"prompt": "52="}\n', ["--data", "line 1", "answer"]),
        ({"reward": "nice"}, GOOD, ["--reward nice", "choose exact, number, none,"]),
        ({"reward": "{}/none.py:f"}, GOOD, ["no such file"]),
        ({"reward": "{}/r.py:g"}, GOOD, ["no function 'g'"]),
        ({"reward": "{}/bad.py:f"}, GOOD, ["cannot be imported", "SyntaxError"]),
        ({"reward": "{}/folder"}, GOOD, ["folder", "no"]),
        ({"max_prompt_tokens": 2}, GOOD, ["--data", "no prompt is left"]),
        ({"model": "{}/folder"}, GOOD, ["folder", "config.json"]),
        ({"model": "{}/nowhere"}, GOOD, ["nowhere", "no such folder"]),
        ({"samples_per_prompt": 1}, GOOD, ["--baseline loo", "--samples_per_prompt"]),
        ({"samples_per_prompt": 1, "baseline": "prompt"}, GOOD, ["--baseline prompt"]),
        ({"minibatches": 0}, GOOD, ["--minibatches 0", "1 or more"]),
        (
            {"prompts_per_step": 3, "minibatches": 2},
            GOOD,
            ["--prompts_per_step 3", "--minibatches", "1 processes: 2 or 4"],
        ),
        ({"temperature": 0.0}, GOOD, ["--temperature"]),
        ({"demos": "{}/data.jsonl", "baseline": "loo"}, GOOD, ["--demos", "--baseline"]),
        (
            {"demos": "{}/data.jsonl", "samples_per_prompt": 4},
            GOOD,
            ["--demos", "--samples_per_prompt"],
        ),
        ({"demos": "{}/data.jsonl", "gamma": 0.9}, GOOD, ["--demos", "--gamma"]),
        ({"demos": "{}/data.jsonl", "keep_max": True}, GOOD, ["--demos", "--keep_max"]),
        ({"demos": "{}/data.jsonl", "beta": 0.1}, GOOD, ["--demos", "--beta"]),
        ({"demos": "{}/data.jsonl"}, '{"prompt": "52="}\n', ["--demos", "line 1", "answer"]),
        ({"demos": "{}/data.jsonl", "max_new_tokens": 2}, GOOD, ["--max_new_tokens 2"]),
        ({"out": "{}/full"}, GOOD, ["--out", "--resume"]),
        (
            {"out": "{}/full", "resume": True, "learning_rate": 0.5},
            GOOD,
            ["--learning_rate", "0.5"],
        ),
        ({"eval_data": "{}/none.jsonl"}, GOOD, ["--eval_data", "none.jsonl"]),
        (
            {},
            json.dumps({"prompt": "5" * 80, "answer": "1"}) + "\n",
            ["and the model's context 32"],
        ),
        ({}, '{"prompt": [{"role": "user", "content": "5"}], "answer": "5"}\n', ["chat template"]),
    ],
)
def test_a_mistake_is_one_line_and_leaves_the_disk_as_it_was(
    flags, content, parts, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "full" / "checkpoint").mkdir(parents=True)
    (tmp_path / "full" / "checkpoint" / "000001.pt").touch()
    (tmp_path / "full" / "args.json").write_text(
        json.dumps({"script": "reinforce", "learning_rate": 0.1})
    )
    (tmp_path / "r.py").write_text("def f(c, r):\n    return 1.0\n")
    (tmp_path / "bad.py").write_text("def f(:\n")
    if content is not None:
        (tmp_path / "data.jsonl").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    flags = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in flags.items()}
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    monkeypatch.setattr(common, "load_policy", lambda *a, **k: 1 / 0)
    with pytest.raises(SystemExit) as stopped:
        reinforce.train(
            reinforce.Args(**({"data": str(tmp_path / "data.jsonl"), "device": "cpu"} | flags))
        )
    lines = capsys.readouterr().err.strip().splitlines()
    assert (
        stopped.value.code == 2
        and len(lines) == 1
        and lines[0].startswith("error: ")
        and all(p in lines[0] for p in parts)
    ), lines
    assert {
        p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if "__pycache__" not in str(p)
    } == before


def test_a_row_that_only_fills_a_part_counts_in_no_logged_mean(monkeypatch):
    """As in test_grpo.py: a row without a token that is trained."""
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]).requires_grad_()
    old = torch.tensor([[-1.5, -2.0], [-9.0, -9.0]])
    monkeypatch.setattr(reinforce, "token_logprobs", lambda *a: (logprobs, torch.ones(2, 2)))
    mask = torch.tensor([[True, True], [False, False]])
    samples = types.SimpleNamespace(logprobs=old + 0.25)
    batch = reinforce.Batch(samples, torch.ones(2, 2), mask, old)
    meter = common.Meter()
    args = reinforce.resolve(reinforce.Args(minibatches=2))
    reinforce.update_loss(None, batch, [0, 1], args, meter, True)
    found = meter.result(CPU)
    assert found["kl/old"] == pytest.approx(math.exp(0.5) - 1 - 0.5) and found["kl/old"].count == 1
    assert found["kl/sample"] == pytest.approx(0.25) and found["kl/sample"].count == 2
    assert found["ratio/first"] == pytest.approx(math.exp(0.5) - 1)
