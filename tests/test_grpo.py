"""GRPO: advantages, clip, aggregation and KL against closed forms and brute force; shared prompts against plain ones."""

import collections
import copy
import dataclasses
import itertools
import json
import math
import random
from statistics import stdev
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, family, make_tokenizer
from test_reinforce import enumerable, exact_logprobs, gradient, prompts_file, rollout, weights

import common
import grpo
import ppo
import reinforce
from common import World, as_samples, sample
from grpo import (
    clipped_loss,
    group_advantages,
    is_clipped,
    k3,
    micro_batches,
    pass_at_k,
    sequence_logratio,
    token_logprobs,
    token_weights,
)

CPU = World(0, 1, torch.device("cpu"), torch.float32)
AGGREGATES = ["sequence", "token", "constant"]


# --- advantages ---


def test_advantages_by_hand():
    r = torch.tensor([1.0, 0.0, 0.0, 0.0, 2.0, 2.0, 0.0, 0.0])
    group = group_advantages(r, r, 4, "group", False)
    torch.testing.assert_close(
        group[:4], torch.tensor([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4)
    )  # unbiased: std is 0.5
    torch.testing.assert_close(
        group[4:], torch.tensor([1.0, 1.0, -1.0, -1.0]) / (math.sqrt(4 / 3) + 1e-4)
    )
    torch.testing.assert_close(
        group_advantages(r, r, 4, "none", False),
        torch.tensor([0.75, -0.25, -0.25, -0.25, 1, 1, -1, -1]),
    )
    torch.testing.assert_close(
        group_advantages(r, r, 4, "batch", False),
        torch.tensor([0.75, -0.25, -0.25, -0.25, 1, 1, -1, -1]) / (r.std() + 1e-4),
    )
    best = group_advantages(r, r, 4, "none", True)
    assert best.tolist() == [0.75, 0, 0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, 0.7, 1.0, 1000.1])
def test_equal_rewards_have_exactly_no_advantage(scale, value):
    """NeMo-RL 4161: eight rewards of 1000.1 have a mean that is not 1000.1, and over a spread of nearly 0 that is not small."""
    r = torch.full((8,), value)
    assert value != 1000.1 or ((r - r.mean()) / (r.std() + 1e-4)).abs().max() > 0.3
    assert (group_advantages(r, torch.rand(99), 8, scale, False) == 0).all()


def test_the_group_std_makes_rare_successes_weigh_more():
    """Dr. GRPO's difficulty bias: one right of eight is worth 2.6 times as much as with a prompt got right half the time."""
    rare, even = torch.tensor([1.0] + [0] * 7), torch.tensor([1.0] * 4 + [0] * 4)
    scaled, centred = (
        [group_advantages(r, r, 8, s, False)[0].item() for r in (rare, even)]
        for s in ("group", "none")
    )
    assert abs(centred[0] / centred[1] - 1.75) < 1e-4 and abs(scaled[0] / scaled[1] - 2.646) < 2e-3


# --- the clip ---


@pytest.mark.parametrize(
    "advantage, ratio, passes",
    [
        (1, 0.5, 1),
        (1, 1.0, 1),
        (1, 1.25, 1),
        (1, 1.5, 0),
        (-1, 0.5, 0),
        (-1, 0.85, 1),
        (-1, 1.0, 1),
        (-1, 1.5, 1),
    ],
)
def test_the_clip_stops_the_gradient_in_two_cells_of_the_table_only(advantage, ratio, passes):
    """Every cell of the mask M(A, rho): the gradient of rho * A, or exactly 0. low 0.2, high 0.28."""
    old = torch.tensor([[-2.0]])
    logprobs = (old + math.log(ratio)).requires_grad_()
    one = torch.ones(1, 1)
    A = torch.tensor([[float(advantage)]])
    r = (logprobs - old).exp()
    loss = clipped_loss(r, A, one, 0.2, 0.28)
    low, high = is_clipped(r, A, 0.2, 0.28)
    loss.backward()
    assert abs(logprobs.grad.item() - -advantage * ratio * passes) < 1e-6
    assert abs(r.item() - ratio) < 1e-6
    assert low.item() == (advantage < 0 and not passes) and high.item() == (
        advantage > 0 and not passes
    )
    bounded = min(max(ratio, 0.8), 1.28)
    assert abs(loss.item() - -min(ratio * advantage, bounded * advantage)) < 1e-6


def test_before_the_first_update_the_gradient_is_reinforces():
    """Ratio 1, nothing clipped, and an old policy that is a constant: with it in the graph the gradient would be 0."""
    logprobs = torch.randn(4, 5).requires_grad_()
    mask, A = torch.rand(4, 5) > 0.3, torch.randn(4)
    ratio = (logprobs - logprobs.detach()).exp()
    clipped_loss(ratio, A[:, None], mask / 7, 0.2, 0.2).backward()
    low, high = is_clipped(ratio, A[:, None], 0.2, 0.2)
    torch.testing.assert_close(logprobs.grad, -A[:, None] * mask / 7)
    assert (ratio == 1).all() and not low.any() and not high.any()


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_ratios_beyond_floating_point_stay_finite(ratio, monkeypatch):
    """exp(999) is inf. One token that the update has made that much likelier would make every weight NaN."""
    logprobs = torch.tensor([[-1.0, -1000.0, -1.0]]).requires_grad_()
    old = torch.tensor([[-1000.0, -1.0, -1.0]])
    samples = SimpleNamespace(logprobs=old)
    mask = torch.ones(1, 3).bool()
    monkeypatch.setattr(grpo, "token_logprobs", lambda *a: (logprobs, torch.zeros(1, 3)))
    batch = grpo.Batch(samples, torch.tensor([-1.0]), mask / 3, old, old)
    args = grpo.resolve(grpo.Args(ratio=ratio, beta=0.1))
    loss = grpo.update_loss(None, batch, [0], args, common.Meter(), True)
    loss.backward()
    assert math.isfinite(loss.item()) and torch.isfinite(logprobs.grad).all()


def test_the_sequence_ratio_is_the_geometric_mean_and_moves_every_token_alike():
    """GSPO: s = (pi(y) / pi_old(y))^(1/|y|); the gradient is s A grad log pi(y) / |y|, and the clip takes whole completions."""
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -9.0]], requires_grad=True)
    old = torch.tensor([[-1.2, -2.1, -3.3], [-1.1, -1.5, -1.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    w = token_weights(mask, "sequence", 3, CPU)
    A = torch.ones(2, 1)
    ratio = sequence_logratio(logprobs - old, mask).exp()
    loss = clipped_loss(ratio, A, w, 0.1, 0.25)
    _, high = is_clipped(ratio, A, 0.1, 0.25)
    s = torch.tensor([math.exp(0.6 / 3), math.exp(0.6 / 2)])
    torch.testing.assert_close(ratio, s[:, None].expand(2, 3))
    assert abs(loss.item() - -(s[0].item() + 1.25) / 2) < 1e-6, "the second is clipped at 1.25"
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-s[0] / 6] * 3, [0.0] * 3]))
    assert (high & mask).tolist() == [[False] * 3, [True, True, False]]


# --- aggregation ---


def test_aggregations_by_hand():
    mask = torch.arange(4) < torch.tensor([[1], [3]])
    assert token_weights(mask, "sequence", 10, CPU).sum(1).tolist() == pytest.approx([1 / 2, 1 / 2])
    assert token_weights(mask, "token", 10, CPU).sum(1).tolist() == pytest.approx([1 / 4, 3 / 4])
    assert token_weights(mask, "constant", 10, CPU).sum(1).tolist() == pytest.approx(
        [1 / 20, 3 / 20]
    )
    cut = torch.tensor(
        [[False] * 4, [True, True, True, False]]
    )  # the first was cut and is left out
    assert token_weights(cut, "sequence", 10, CPU).sum().item() == pytest.approx(1), (
        "a mean over those that are left"
    )
    assert token_weights(cut, "constant", 10, CPU).sum().item() == pytest.approx(3 / 20), (
        "a constant, whatever was cut"
    )
    nothing = token_weights(mask & False, "token", 10, CPU)
    assert (nothing == 0).all(), "all completions cut: no division by 0"


def test_the_mean_per_sequence_pushes_short_answers_up_and_long_wrong_ones_down_least():
    """The length bias, with the sign of A. Two answers of 2 and 8 tokens: as published, a token of the short one has four times
    the weight. Where both are right (A > 0) that favours the short one; where both are wrong (A < 0) the long one
    is discouraged least a token, so wrong answers get longer. Token mean and constant treat all tokens alike."""
    mask = torch.arange(8) < torch.tensor([[2], [8]])
    for aggregate, times in (("sequence", 4.0), ("token", 1.0), ("constant", 1.0)):
        for A in (1.0, -1.0):
            logprobs = torch.full((2, 8), -1.0, requires_grad=True)
            w = token_weights(mask, aggregate, 8, CPU)
            ratio = (logprobs - logprobs.detach()).exp()
            clipped_loss(ratio, torch.full((2, 1), A), w, 0.2, 0.2).backward()
            push = -logprobs.grad[
                :, 0
            ]  # the direction in which the optimizer moves a token's log-probability
            assert (push.sign() == math.copysign(1, A)).all()
            assert abs((push[0] / push[1]).item() - times) < 1e-5


@pytest.mark.parametrize("shared", [1, 4])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_the_gradient_is_the_same_however_the_step_is_cut(aggregate, sequence, shared):
    """Field notes, test 3 (trl 3021, 5619, verl 906, ...), for every aggregation, with KL, with clipped tokens among them."""
    model = family("llama").double()
    s = rollout(model)
    g = torch.Generator().manual_seed(0)
    A = torch.randn(16, generator=g, dtype=torch.float64)
    grads = []
    for tokens in (100_000, 90, 1):
        model.zero_grad()
        w = token_weights(s.mask, aggregate, 12, CPU)
        s.rows_per_prompt = shared
        for part in micro_batches(range(len(s.mask)), s.mask.any(1), s, tokens, CPU):
            logprobs, _ = token_logprobs(model, s, part, 1.0)
            C = logprobs.shape[1]
            mask = s.mask[part, :C]
            shift = 0.4 * torch.sin(torch.arange(C) + torch.tensor(part)[:, None])
            old = logprobs.detach() + shift
            logratio = sequence_logratio(logprobs - old, mask) if sequence else logprobs - old
            loss = clipped_loss(logratio.exp(), A[part, None], w[part, :C], 0.2, 0.2)
            (loss + 0.1 * (k3(logprobs, old - 0.2) * w[part, :C]).sum()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in grads[1:]:
        assert (grads[0] - other).norm() < 1e-6 * grads[0].norm()


# --- KL ---


def test_k3_is_never_negative_has_the_kl_as_mean_and_the_reverse_kls_gradient():
    """By enumeration: E[k3] = KL(pi || ref), and E[grad k3] = grad KL(ref || pi), which is another."""
    (model, _), (other, _) = enumerable(vocab=4, length=1), enumerable(vocab=4, length=1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    single = as_samples([[0, 2]] * 4, [[0], [1], [2], [3]], make_tokenizer(), CPU)
    ref = exact_logprobs(other, single).detach()[:, 0]
    logprobs = exact_logprobs(model, single)[:, 0]
    p = logprobs.exp()
    estimate = k3(logprobs, ref)
    assert (estimate >= 0).all() and abs((p * estimate).sum() - (p * (logprobs - ref)).sum()) < 1e-6
    expected = gradient(model, (p.detach() * k3(logprobs, ref)).sum()).clone()
    backward = gradient(
        model, (ref.exp() * (ref - exact_logprobs(model, single)[:, 0])).sum()
    ).clone()
    again = exact_logprobs(model, single)[:, 0]
    forward = gradient(model, (again.exp() * (again - ref)).sum()).clone()
    assert (expected - backward).norm() < 1e-6 * backward.norm()
    assert (expected - forward).norm() > 1e-2 * forward.norm()


def kl_gradients(monkeypatch, moved_by, **flags):
    """Expected gradient of `update_loss` with advantages of 0, by all completions of three tokens of
    five, and the gradients of each token's KL(pi || ref) and KL(ref || pi), all by enumeration.

    pi_old, which draws, is `moved_by` away from pi. The prefixes are weighed as pi_old has them."""
    generator = torch.Generator().manual_seed(5)

    def table(scale):  # logits of the next token after each prefix of up to two tokens
        return scale * torch.randn(3, 5, 5, 5, generator=generator, dtype=torch.float64)

    logits = table(1.0).requires_grad_()
    ref = (logits.detach() + table(0.7)).log_softmax(-1)
    old = (logits.detach() + moved_by * table(1.0)).log_softmax(-1)
    now = logits.log_softmax(-1)
    y = torch.cartesian_prod(*[torch.arange(5)] * 3)
    zero = torch.zeros_like(y[:, 0])
    prefixes = [(zero, zero), (y[:, 0], zero), (y[:, 0], y[:, 1])]

    def rows_of(t):  # [125, 3, 5]: the distribution of each token of each completion
        return torch.stack([t[i][prefix] for i, prefix in enumerate(prefixes)], 1)

    def chosen(t):
        return rows_of(t).gather(2, y[..., None])[..., 0]

    chance = chosen(old).sum(1, keepdim=True).exp()  # of a completion
    assert chance.sum().item() == pytest.approx(1)
    entropy = torch.zeros(125, 3)
    monkeypatch.setattr(grpo, "token_logprobs", lambda *a: (chosen(now), entropy))
    batch = grpo.Batch(
        SimpleNamespace(logprobs=chosen(old)),
        torch.zeros(125),
        chance.expand(125, 3),
        chosen(old) if moved_by else None,
        chosen(ref),
    )
    args = grpo.resolve(grpo.Args(beta=1.0, **flags))
    loss = grpo.update_loss(None, batch, list(range(125)), args, common.Meter(), True)
    pi, other = rows_of(now), rows_of(ref)
    reverse = (chance * (pi.exp() * (pi - other)).sum(2)).sum()
    forward = (chance * (other.exp() * (other - pi)).sum(2)).sum()
    return [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, reverse, forward)]


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("moved_by", [0.0, 0.5])
def test_k3_times_the_ratio_has_the_gradient_of_each_tokens_kl_for_any_old_policy(
    moved_by, monkeypatch
):
    """DeepSeek-V3.2. KL(pi || ref) after each prefix, prefixes from pi_old. With one update, too, where
    the ratio is 1 but has a gradient."""
    got, reverse, forward = kl_gradients(monkeypatch, moved_by)
    assert grpo.Args().kl == "k3_ratio"
    assert apart(got, reverse) < 1e-12 and apart(got, forward) > 0.1


def test_k3_times_a_ratio_of_1_has_the_gradient_of_k2():
    """The log-ratio, where k3 alone has 1 - ref / pi: -147 for a token that pi made unlikely."""
    logprobs = torch.tensor([-9.0, -2.0, -0.5], dtype=torch.float64).requires_grad_()
    ref = torch.tensor([-4.0, -2.5, -0.5], dtype=torch.float64)
    ratio = (logprobs - logprobs.detach()).exp()
    [got] = torch.autograd.grad((k3(logprobs, ref) * ratio).sum(), logprobs)
    [alone] = torch.autograd.grad(k3(logprobs, ref).sum(), logprobs)
    torch.testing.assert_close(got, (logprobs - ref).detach())
    assert alone[0].item() == pytest.approx(1 - math.exp(5.0)) and round(alone[0].item()) == -147


def test_k3_alone_has_the_gradient_of_the_other_kl_and_only_while_the_policy_is_the_old_one(
    monkeypatch,
):
    got, reverse, forward = kl_gradients(monkeypatch, 0.0, kl="k3")
    assert apart(got, forward) < 1e-12 and apart(got, reverse) > 0.1
    got, reverse, forward = kl_gradients(monkeypatch, 0.5, kl="k3")
    assert apart(got, forward) > 0.1 and apart(got, reverse) > 0.1


def test_with_a_sequence_ratio_the_penalty_has_the_gradient_of_neither_kl(monkeypatch):
    """The ratio of a completion spreads a token's score over all tokens, as in TRL."""
    got, reverse, forward = kl_gradients(monkeypatch, 0.0, ratio="sequence")
    scale = (got * reverse).sum() / reverse.square().sum()  # whatever the weights' divisor
    assert apart(got / scale, reverse) > 0.1 and apart(got / scale, forward) > 0.1


# --- pass@k ---


def test_pass_at_k_against_every_choice_of_k_samples():
    for n, right in ((5, 2), (6, 0), (4, 4), (5, 1)):
        outcomes = [1] * right + [0] * (n - right)
        for k in range(1, n + 1):
            tries = [max(c) for c in itertools.combinations(outcomes, k)]
            assert abs(pass_at_k(n, right, k) - sum(tries) / len(tries)) < 1e-12


# --- the shared prompt ---


@pytest.mark.parametrize("name", [f for f in FAMILIES if f != "mamba"])
def test_a_prompt_computed_once_gives_the_gradient_of_a_prompt_computed_for_each_sample(name):
    """Relative 1e-4 in float32, prompts of unequal lengths, groups cut in slices, sliding windows shorter than the prompt."""
    model = family(name)
    s = rollout(model, n=3)
    w = torch.randn(s.mask.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for group in (1, 3):
        model.zero_grad()
        seen = torch.zeros_like(s.logprobs)
        for part in ([0, 1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11]):  # the second group is cut
            s.rows_per_prompt = group
            logprobs, _ = token_logprobs(model, s, part, 0.8)
            (logprobs * w[part, : logprobs.shape[1]]).sum().backward()
            seen[part, : logprobs.shape[1]] = logprobs.detach()
        results.append(
            (seen, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        )
    (plain, g), (shared, h) = results
    torch.testing.assert_close(shared, plain, atol=1e-4, rtol=1e-4)
    assert (g - h).norm() < 1e-4 * g.norm()


def gradients_added(model, s):
    """How often the gradients of the blocks' weights are added to in one backward of shared prompts."""
    count, weights = [], list(model.model.layers.parameters())
    for p in weights:
        p.register_post_accumulate_grad_hook(lambda p: count.append(p))
    logprobs, _ = token_logprobs(model, s, list(range(len(s.ids))), 1.0)
    logprobs.sum().backward()
    return {sum(p is q for q in count) for p in weights}


def test_no_gradient_waits_for_that_of_the_prompts():
    """In one graph autograd holds a weight's gradient of the completions until that of the prompts has
    come, then adds both: twice the memory of all gradients. Here each is added as soon as it is there."""
    assert gradients_added(family("llama"), rollout(family("llama"), n=3)) == {2}


def test_no_gradient_waits_for_that_of_the_prompts_where_fsdp2_computes(bfloat16, tmp_path):
    """And prompts are shared there: the self-check finds the gradient of prompts computed again."""
    family("llama").save_pretrained(tmp_path)
    model = common.load_policy(tmp_path, bfloat16)
    assert common.prompts_can_be_shared(model, bfloat16, False)
    assert gradients_added(model, rollout(family("llama"), n=3)) == {2}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_on_a_gpus_path_as_in_float32(name, bfloat16, tmp_path):
    """FSDP2 and bfloat16: prompts are shared where they are in float32, policy and reference agree to the
    last bit, and the gradient is that of float32 but for rounding."""
    family(name).save_pretrained(tmp_path)
    plain, policy = common.load_policy(tmp_path, CPU), common.load_policy(tmp_path, bfloat16)
    reference = common.load_reference(tmp_path, bfloat16)
    shared = common.prompts_can_be_shared(policy, bfloat16, False)
    assert shared == (name != "mamba")
    n = 3 if shared else 1
    s = rollout(policy, n=n)
    parts = micro_batches(list(range(len(s.ids))), s.mask.any(1), s, 40, bfloat16)
    old = [grpo.rollout_logprobs(model, s, [parts], 1.0) for model in (policy, reference)]
    assert torch.equal(*old)
    for model in (plain, policy):
        for part in parts:
            logprobs, _ = token_logprobs(model, s, part, 1.0)
            logprobs.sum().backward()
    a, b = (
        torch.cat(
            [
                common.whole(p.grad).flatten()
                for p in common.at_rest(model).parameters()
                if p.grad is not None
            ]
        )
        for model in (plain, policy)
    )
    assert (
        torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98
        and 0.9 < b.norm() / a.norm() < 1.1
    )


def test_completions_of_one_token_need_no_second_forward_to_be_right():
    model = family("llama")
    s = sample(model, make_tokenizer(), [[5, 6, 7], [8]], n=2, max_new_tokens=1, seed=0)
    s.rows_per_prompt = 2
    shared, _ = token_logprobs(model, s, [0, 1, 2, 3], 1.0)
    s.rows_per_prompt = 1
    plain, _ = token_logprobs(model, s, [0, 1, 2, 3], 1.0)
    torch.testing.assert_close(shared, plain)


def test_the_self_check_turns_sharing_off_where_it_would_be_wrong(monkeypatch):
    """Under gradient checkpointing transformers drops the cache: without the fall-back the log-probabilities would be of completions
    without their prompt. A cache that forgets the gradient is found too, and a family without such a cache."""
    model = family("llama").train()
    check = common.prompts_can_be_shared
    assert check(model, CPU, False)
    assert not check(family("mamba"), CPU, False)

    honest = common.DynamicCache.reorder_cache

    def forgetful(self, rows):
        honest(self, rows)
        for layer in self.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()

    with monkeypatch.context() as patch:
        patch.setattr(common.DynamicCache, "reorder_cache", forgetful)
        assert not check(model, CPU, False)
    with (
        monkeypatch.context() as patch
    ):  # a cache that mixes up whose prompt is whose: rows of two prompts show it
        patch.setattr(
            common.DynamicCache, "reorder_cache", lambda self, rows: honest(self, rows * 0)
        )
        assert not check(model, CPU, False)
    with monkeypatch.context() as patch:  # a cache that cannot do it at all
        patch.setattr(common.DynamicCache, "reorder_cache", lambda self, rows: 1 / 0)
        assert not check(model, CPU, False)
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    assert not check(model, CPU, False)
    assert all(p.grad is None for p in model.parameters())


# --- whole steps, against ones written out in float64 ---

BRIGHT = "52817= 4031= 993= 6120458= 71= 84403= 5=".split()
DULL = "2639= 107= 86612=".split()  # prompts whose completions are all paid alike

PAYS = """
def reward(completion, row):
    if row["dull"]:
        return 0.25
    return sum((ord(c) % 5 - 1.6) * (i + 0.7) ** 0.5 for i, c in enumerate(completion)) / 4
"""

# what --schedule and --warmup make of the learning rate in steps 1, 2 and 3 of 3
SHARES = {
    ("constant", 0): [1.0, 1.0, 1.0],
    ("linear", 1): [1 / 2, 1.0, 1 / 2],
    ("linear", 2): [1 / 3, 2 / 3, 1.0],
    ("cosine", 0): [1.0, 3 / 4, 1 / 4],
}

STEP = {
    "steps": 3,
    "seed": 7,
    "prompts_per_step": 4,
    "samples_per_prompt": 4,
    "max_new_tokens": 7,
    "temperature": 1.25,
    "epochs": 2,
    "minibatches": 2,
    "beta": 0.3,
    "ref_update_every": 1,
    "schedule": "linear",
    "warmup": 1,
    "learning_rate": 0.03,
    "max_grad_norm": 1.0,
    "clip_low": 0.05,
    "clip_high": 0.12,
    "aggregate": "token",
    "tokens_per_micro_batch": 60,
    "sample_rows": 5,
    "eval_every": 2,
    "save_every": 1,
    "keep": 9,
}


GSPO = {"ratio": "sequence", "aggregate": "sequence", "minibatches": 4}


@dataclasses.dataclass
class Completion:
    """One drawn completion: its prompt, its ids, and what the reward said."""

    place: int  # of its prompt in the data
    prompt: list
    ids: list
    finished: bool
    text: str
    sampler: list  # log-probabilities as the sampler reported them
    reward: float


def trained_rows(advantages, weights, beta):
    """Which completions have a part in the update and in the means over its tokens: those that have
    a gradient. The KL penalty has one wherever there is a weight."""
    return [w > 0 and (beta > 0 or a != 0) for a, w in zip(advantages, weights)]


def plain_logprobs(model, prompt, ids, temperature):
    """log pi of each token of one completion and the entropy at its place, by a plain forward."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
    logprobs = (logits / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(1).detach()
    return logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0], entropy


@torch.no_grad()
def plain_greedy(model, prompt, longest, eos):
    """The likeliest continuation of one prompt, by plain forwards, without its end."""
    ids = []
    while len(ids) < longest:
        ids.append(model(torch.tensor([prompt + ids])).logits[0, -1].argmax().item())
        if ids[-1] == eos:
            return ids[:-1]
    return ids


def plain_pick(count, place, seed):
    """Element `place` of one shuffled copy of range(count) after another."""
    copy_seed = common.seed_from(seed, place // count, common.ORDER)
    return random.Random(copy_seed).sample(range(count), count)[place % count]


def plain_advantages(rewards, everyone, scale, keep_max):
    """Equation (1) for one group."""
    if max(rewards) == min(rewards):
        return [0.0 for _ in rewards]
    mean = sum(rewards) / len(rewards)
    divisor = {"group": stdev(rewards) + 1e-4, "batch": stdev(everyone) + 1e-4, "none": 1.0}[scale]
    kept = [not keep_max or r == max(rewards) for r in rewards]
    return [k * (r - mean) / divisor for k, r in zip(kept, rewards)]


def plain_weights(lengths, aggregate, longest):
    """Equation (5)'s w for each completion of an update; one that is left out has length 0."""
    divisors = {
        "sequence": [n * sum(m > 0 for m in lengths) for n in lengths],
        "token": [sum(lengths) for _ in lengths],
        "constant": [len(lengths) * longest for _ in lengths],
    }
    return [1 / d if n else 0.0 for n, d in zip(lengths, divisors[aggregate])]


def groups_of(completions, n):
    return [completions[i : i + n] for i in range(0, len(completions), n)]


def is_equal(group):
    return len({c.reward for c in group}) == 1


def moved(model):
    """The same model with noise on its weights: a reference that is not the first policy."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * p.std() * torch.randn(p.shape, generator=generator))
    return model


class Clock:
    """For a loop that asks three times a step: sampling takes 2 seconds, the rest 3."""

    def __init__(self):
        self.now, self.waits = 0.0, itertools.cycle([7.0, 2.0, 3.0])

    def perf_counter(self):
        self.now += next(self.waits)
        return self.now


def record(monkeypatch):
    """Puts plain gradient descent, a moved reference, a clock and a sampler that misreports its
    log-probabilities in the place of the real ones. Returns (the first policy in float64, the
    calls of `sample` with what each drew), both filled in by the run."""
    policy, calls = [], []
    honest_sample, honest_reference = common.sample, common.load_reference

    def sample(model, tokenizer, prompts, **settings):
        samples = honest_sample(model, tokenizer, prompts, **settings)
        samples.logprobs += 0.01 * torch.arange(1, 1 + samples.mask.shape[1])
        calls.append(({"prompts": prompts, **settings}, samples))
        return samples

    def sgd(model, learning_rate):
        policy.append(copy.deepcopy(model).double())
        return torch.optim.SGD(model.parameters(), lr=learning_rate)

    monkeypatch.setattr(common, "sample", sample)
    monkeypatch.setattr(common, "make_optimizer", sgd)
    monkeypatch.setattr(common, "load_reference", lambda *a: moved(honest_reference(*a)))
    monkeypatch.setattr(grpo, "time", Clock())
    return policy, calls


def completions_of(samples, places, n, pays, rows):
    found = []
    for i in range(len(samples.texts)):
        T, row = int(samples.mask[i].sum()), rows[places[i // n]]
        found.append(
            Completion(
                place=places[i // n],
                prompt=samples.prompt_ids[i][samples.prompt_mask[i]].tolist(),
                ids=samples.ids[i, :T].tolist(),
                finished=samples.finished[i].item(),
                text=samples.texts[i],
                sampler=samples.logprobs[i, :T].tolist(),
                reward=pays(samples.texts[i], row),
            )
        )
    return found


def rollout_written_out(step, f, calls, encoded, rows, pays):
    """What step `step` trains on and all that it drew, out of the script's own calls of `sample`,
    which must be these and no others."""

    def drawn(places, step):
        seed = common.seed_from(f.seed, step, 0, common.DRAW)
        wanted = {"prompts": [encoded[i] for i in places], "n": f.samples_per_prompt}
        wanted |= {"max_new_tokens": f.max_new_tokens, "temperature": f.temperature, "seed": seed}
        wanted["max_rows"] = f.sample_rows
        settings, samples = calls.pop(0)
        assert settings == wanted
        return completions_of(samples, places, f.samples_per_prompt, pays, rows)

    n = f.samples_per_prompt
    P = f.prompts_per_step * (2 if f.drop_equal_groups else 1)
    places = [plain_pick(len(rows), (step - 1) * P + i, f.seed) for i in range(P)]
    everything = drawn(places, step)
    batch = everything
    if f.drop_equal_groups:  # those that differ first, then equal ones, each in the order drawn
        groups = groups_of(everything, n)
        kept = [g for g in groups if not is_equal(g)] + [g for g in groups if is_equal(g)]
        batch = [c for group in kept[: f.prompts_per_step] for c in group]
    return batch, everything


def step_written_out(step, f, policy, reference, batch, everything):
    """Equations (1) to (5) for one step; moves `policy` and, when it is time, `reference`. Returns
    the numbers that the step is to log, and how often the gradient was scaled down."""
    n, P, T = f.samples_per_prompt, f.prompts_per_step, f.temperature
    everyone = [c.reward for c in batch]
    A = []
    for group in groups_of(batch, n):
        A += plain_advantages([c.reward for c in group], everyone, f.scale, f.keep_max)
    assert all(a == 0 or abs(a) > 1e-5 for a in A), "in float32 the sign of one could be another"
    with torch.no_grad():
        old = [plain_logprobs(policy, c.prompt, c.ids, T)[0] for c in batch]
        ref = [plain_logprobs(reference, c.prompt, c.ids, T)[0] for c in batch]

    generator = torch.Generator().manual_seed(common.seed_from(f.seed, step, 0, common.CUT))
    cut = torch.randperm(P, generator=generator).view(f.minibatches, -1).tolist()
    updates = []
    for epoch in range(f.epochs):
        shuffle = random.Random(common.seed_from(f.seed, step, epoch, common.PASS))
        updates += shuffle.sample(cut, f.minibatches)

    rate = f.learning_rate * SHARES[f.schedule, f.warmup][step - 1]
    sums, norms, first_ratios = collections.Counter(), [], []
    for groups in updates:
        update = [g * n + j for g in groups for j in range(n)]
        left = [len(batch[i].ids) * (batch[i].finished or not f.mask_truncated) for i in update]
        w = plain_weights(left, f.aggregate, f.max_new_tokens)
        trained = trained_rows([A[i] for i in update], w, f.beta)
        loss = torch.zeros((), dtype=torch.float64, requires_grad=True)
        for i, weight in [(i, x) for i, x, there in zip(update, w, trained) if there]:
            c = batch[i]
            now, entropy = plain_logprobs(policy, c.prompt, c.ids, T)
            whole = ((now - old[i]).sum() / len(c.ids)).exp()
            for t in range(len(c.ids)):
                ratio = whole if f.ratio == "sequence" else (now[t] - old[i][t]).exp()
                inside = ratio.clamp(1 - f.clip_low, 1 + f.clip_high)
                gain = torch.minimum(ratio * A[i], inside * A[i])
                d = now[t] - ref[i][t]
                factor = ratio if f.kl == "k3_ratio" else 1.0
                loss = loss + weight * (-gain + f.beta * factor * ((-d).exp() - 1 + d))
                stopped = bool(ratio * A[i] > inside * A[i])
                sums["tokens"] += 1
                sums["ratio/mean"] += ratio.item()
                sums["entropy"] += entropy[t].item()
                sums["clip/low"] += stopped and ratio.item() < 1
                sums["clip/high"] += stopped and ratio.item() > 1
                sums["kl/sample"] += abs(old[i][t].item() - c.sampler[t])
                moved_by = (now[t] - old[i][t]).item()
                sums["kl/old"] += math.exp(moved_by) - 1 - moved_by  # KL(pi_old || pi)
                sums["kl/ref"] += (old[i][t] - ref[i][t]).item()
                if not norms:
                    first_ratios.append(abs(ratio.item() - 1))
            sums["rows"] += 1
        sums["loss"] += loss.item()
        policy.zero_grad()
        loss.backward()
        # without a row that is trained there is no gradient, and nothing moves
        moving = [p for p in policy.parameters() if p.grad is not None]
        norms.append(math.hypot(*(p.grad.norm().item() for p in moving)))
        with torch.no_grad():
            for p in moving:
                p -= rate * f.max_grad_norm / max(norms[-1], f.max_grad_norm) * p.grad
    if f.ref_update_every and step % f.ref_update_every == 0:
        reference.load_state_dict(policy.state_dict())

    of_tokens = ("ratio/mean", "entropy", "clip/low", "clip/high", "kl/sample")
    wanted = {name: sums[name] / sums["tokens"] for name in of_tokens}
    wanted |= {name: sums[name] / sums["rows"] for name in ("kl/old", "kl/ref")}
    if len(updates) > 1:
        wanted["ratio/first"] = max(first_ratios)
    if not f.beta:
        del wanted["kl/ref"]
    drawn = groups_of(everything, n)
    wanted |= {
        "step": step,
        "loss": sums["loss"] / len(updates),
        "grad_norm": sum(norms) / len(norms),
        "learning_rate": rate,
        "reward": sum(c.reward for c in everything) / len(everything),
        "equal_groups": sum(map(is_equal, drawn)) / len(drawn),
        "length": sum(len(c.ids) for c in batch) / len(batch),
        "truncated": sum(not c.finished for c in batch) / len(batch),
        "time/sample": 2.0,
        "time/train": 3.0,
        "tokens_per_second": sum(len(c.ids) for c in everything) / 5.0,
    }
    return wanted, sum(x > f.max_grad_norm for x in norms)


def held_out_written_out(f, policy, calls, rows, pays, tokenizer):
    """Greedy completions of all held-out prompts, their reward, and how many are the answer."""
    encoded = [tokenizer(row["prompt"]).input_ids for row in rows]
    settings, _ = calls.pop(0)
    rows_at_once = settings.pop("max_rows")
    assert settings == {"prompts": encoded, "max_new_tokens": f.max_new_tokens, "temperature": 0}
    assert rows_at_once == f.sample_rows
    texts = []
    for ids in encoded:
        greedy = plain_greedy(policy, ids, f.max_new_tokens, tokenizer.eos_token_id)
        texts.append(tokenizer.decode(greedy))
    right = sum(text == row["answer"] for text, row in zip(texts, rows))
    paid = sum(pays(text, row) for text, row in zip(texts, rows))
    numbers = sum(grpo.last_number(text) == int(row["answer"]) for text, row in zip(texts, rows))
    scores = {"eval/reward": paid, "eval/exact": right, "eval/number": numbers}
    scores = {name: value / len(rows) for name, value in scores.items()}
    return scores | {"held_out/prompts": len(rows)}


def is_near(model, saved, before):
    """Whether weights went where the model's went: the difference is small beside the way."""
    for name, p in model.named_parameters():
        way = (p - before[name]).norm()
        assert (saved[name] - p).norm() <= 2e-3 * way + 1e-6, name
        assert way > 1e-5, f"{name} has not moved, and would show nothing"


@pytest.mark.parametrize(
    "changed",
    [
        {"aggregate": "token", "scale": "group"},
        {"aggregate": "sequence", "scale": "batch", "keep_max": True, "ref_update_every": 2},
        {"aggregate": "constant", "scale": "none", "mask_truncated": True, "warmup": 2},
        {"aggregate": "sequence", "mask_truncated": True, "schedule": "cosine", "warmup": 0},
        {"kl": "k3"},
        GSPO | {"clip_low": 0.02, "clip_high": 0.035},
        {"drop_equal_groups": True, "mask_truncated": True, "scale": "batch"},
        {"epochs": 1, "minibatches": 1, "beta": 0.0, "ref_update_every": 0},
        {"keep_max": True, "beta": 0.0, "ref_update_every": 0, "scale": "none"},
        {"epochs": 1, "minibatches": 1, "ref_update_every": 0, "schedule": "constant", "warmup": 0},
        {"reference": "a folder", "ref_update_every": 0},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_the_steps_of_the_script_are_the_steps_written_out(changed, tmp_path, monkeypatch):
    """Every equation and every flag in its place, over three steps with plain gradient descent: the
    weights after each, the reference, the numbers logged and the samples shown, against loops over
    rows and tokens in float64. Of the script only the ids that it drew are taken over."""
    f = SimpleNamespace(**vars(grpo.Args()) | STEP | changed)
    rows = []
    for prompt in BRIGHT + DULL:
        answer = "".join(sorted(prompt[:-1]))
        rows.append({"prompt": prompt, "answer": answer, "dull": prompt in DULL})
    held_out = rows[:4]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    (tmp_path / "r.py").write_text(PAYS)
    files = {
        "data": prompts_file(tmp_path, rows),
        "eval_data": f"{tmp_path}/test.jsonl",
        "reward": f"{tmp_path}/r.py:reward",
    }
    honest = common.load_reference
    policies, calls = record(monkeypatch)
    if "reference" in changed:  # the moved model lies in a folder
        monkeypatch.setattr(common, "load_reference", honest)
        moved(common.load_policy(f.model, CPU)).save_pretrained(tmp_path / "moved")
        common.load_tokenizer(f.model).save_pretrained(tmp_path / "moved")
        files["reference"] = str(tmp_path / "moved")
    log = run(tmp_path, **STEP | changed | files)

    monkeypatch.undo()
    [policy] = policies
    reference = moved(common.load_policy(f.model, CPU).double())
    tokenizer = common.load_tokenizer(f.model)
    pays = common.load_function(files["reward"], "--reward")
    encoded = [tokenizer(row["prompt"]).input_ids for row in rows]
    start = {k: p.detach().clone() for k, p in policy.named_parameters()}
    first_reference = {k: p.detach().clone() for k, p in reference.named_parameters()}
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    shown = [json.loads(line) for line in lines]
    scaled_down = clipped_low = clipped_high = left_out = drawn_again = 0
    wanted = {"step": 0} | held_out_written_out(f, policy, calls, held_out, pays, tokenizer)
    assert log[0] == pytest.approx(wanted)
    for step in (1, 2, 3):
        batch, everything = rollout_written_out(step, f, calls, encoded, rows, pays)
        wanted, often = step_written_out(step, f, policy, reference, batch, everything)
        if step in (2, 3):  # --eval_every 2, and the last
            wanted |= held_out_written_out(f, policy, calls, held_out, pays, tokenizer)
        memory = log[step].pop("memory_gib")
        assert 0 <= log[step].pop("time/reward") < 60  # by a clock that the test does not set
        assert memory > 0 and log[step].keys() == wanted.keys()
        assert log[step] == pytest.approx(wanted, rel=2e-3, abs=2e-5)
        for line, c in zip([x for x in shown if x["step"] == step], batch[:4], strict=True):
            asked = rows[c.place]["prompt"]
            assert (line["prompt"], line["completion"]) == (asked, c.text)
            assert line["reward"] == pytest.approx(c.reward, rel=1e-5)
            assert line["answer"] == rows[c.place]["answer"]
        checkpoint = tmp_path / "run" / "checkpoint" / f"{step:06d}.pt"
        saved = torch.load(checkpoint, weights_only=True)["models"]
        is_near(policy, saved["policy"], start)
        if step == 3 and f.ref_update_every:
            is_near(reference, saved["reference"], first_reference)
        scaled_down += often
        clipped_low += wanted["clip/low"]
        clipped_high += wanted["clip/high"]
        left_out += sum(not c.finished for c in batch)
        drawn_again += len(everything) - len(batch)
    assert not calls and len(log) == 4
    # what never acts would not be tested
    assert scaled_down > 0
    assert clipped_high > 0 or f.epochs == 1
    assert clipped_low > 0 or f.epochs == 1 or f.keep_max  # the best completions have A > 0
    assert left_out > 0 or not f.mask_truncated
    assert drawn_again > 0 or not f.drop_equal_groups


# --- whole runs, on the bundled model ---


def run(tmp_path, name="run", **flags):
    grpo.train(
        grpo.Args(
            **{"out": str(tmp_path / name), "device": "cpu", "eval_data": "", "seed": 1} | flags
        )
    )
    return [
        json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    ]


def few_rows(tmp_path):
    lines = (grpo.TINY / "sort_test.jsonl").read_text().splitlines()[:32]
    return prompts_file(tmp_path, [json.loads(line) for line in lines])


SMALL = {"prompts_per_step": 4, "max_new_tokens": 12}


def test_the_first_ratio_is_1_and_the_kl_0_and_later_ones_are_not(tmp_path):
    """Field notes, test 2, in a run: with checkpointing and another temperature, exactly."""
    flags = SMALL | {"beta": 0.1, "temperature": 0.7, "warmup": 0, "learning_rate": 1e-3}
    for checkpointing in (False, True):
        m = run(
            tmp_path, f"c{checkpointing}", steps=2, gradient_checkpointing=checkpointing, **flags
        )
        assert m[1]["kl/ref"] == 0 and m[1]["kl/sample"] < 1e-5 and m[2]["kl/ref"] != 0
        assert "ratio/first" not in m[1], (
            "with one update there is no other forward to compare with"
        )
        m = run(
            tmp_path,
            f"e{checkpointing}",
            steps=1,
            epochs=2,
            minibatches=2,
            gradient_checkpointing=checkpointing,
            **flags,
        )
        assert m[1]["ratio/first"] == 0 and m[1]["ratio/mean"] != 1 and m[1]["kl/old"] != 0


def test_no_reference_is_loaded_at_beta_0(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "load_reference", lambda *a: 1 / 0)
    assert "kl/ref" not in run(tmp_path, steps=1, **SMALL)[1]


def test_one_update_per_rollout_computes_every_row_once_forward(tmp_path, monkeypatch):
    """No pass for old log-probabilities; with epochs there is one."""
    rows, honest = [], grpo.token_logprobs

    def count(model, samples, part, temperature):
        rows.append(len(part))
        return honest(model, samples, part, temperature)

    monkeypatch.setattr(common, "prompts_can_be_shared", lambda *a: True)
    monkeypatch.setattr(grpo, "has_gradient", lambda w, *a: torch.ones(len(w), dtype=torch.bool))
    monkeypatch.setattr(grpo, "token_logprobs", count)
    run(tmp_path, "a", steps=2, **SMALL)
    assert sum(rows) == 2 * 4 * 8
    rows.clear()
    run(tmp_path, "b", steps=1, epochs=3, **SMALL)
    assert sum(rows) == 4 * 4 * 8


def test_shared_and_plain_prompts_train_the_same_weights(tmp_path, monkeypatch):
    run(tmp_path, "a", steps=2, learning_rate=1e-4, **SMALL)
    monkeypatch.setattr(common, "prompts_can_be_shared", lambda *a: False)
    run(tmp_path, "b", steps=2, learning_rate=1e-4, **SMALL)
    a, b = weights(tmp_path, "a"), weights(tmp_path, "b")
    assert all((a[k] - b[k]).abs().max() < 1e-5 for k in a)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_groups_are_not_mixed_up(scale, tmp_path):
    """Search-R1 88: a reward that is the prompt's own number leaves nothing to learn, in every cut of the step."""
    data = prompts_file(tmp_path, [{"prompt": f"{i}=", "answer": str(i)} for i in range(8)])
    (tmp_path / "r.py").write_text(
        "def reward(completion, row):\n    return 0.1 * float(row['prompt'][:-1])\n"
    )
    for tokens in (30, 8192):
        flags = {
            "reward": f"{tmp_path}/r.py:reward",
            "tokens_per_micro_batch": tokens,
            "prompts_per_step": 8,
        }
        m = run(tmp_path, f"t{tokens}", data=data, scale=scale, steps=1, max_new_tokens=8, **flags)
        assert (
            m[1]["grad_norm"] == 0
            and m[1]["equal_groups"] == 1
            and abs(m[1]["reward"] - 0.35) < 1e-6
        )


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"ratio": "sequence", "epochs": 2},
        {"scale": "none", "aggregate": "constant"},
        {"keep_max": True, "beta": 0.01},
    ],
)
def test_a_bandits_rewarded_token_becomes_likelier(flags, tmp_path):
    """Field notes, test 9: one prompt, one token, and only `7` pays."""
    data = prompts_file(tmp_path, [{"prompt": "42=", "answer": "7"}])
    flags = flags | {
        "prompts_per_step": 4,
        "samples_per_prompt": 16,
        "max_new_tokens": 1,
        "warmup": 0,
        "learning_rate": 1e-3,
    }
    m = run(tmp_path, data=data, steps=25, **flags)
    assert m[1]["reward"] < 0.3 and m[-1]["reward"] > 0.9


def test_truncated_completions_do_not_move_the_weights_when_masked(tmp_path):
    """All are cut at 3 tokens: masked, there is no gradient at all."""
    data = prompts_file(tmp_path, [{"prompt": "4213576=", "answer": "1234567"}])
    (tmp_path / "r.py").write_text(
        "def reward(completion, row):\n    return float(completion.count('1'))\n"
    )
    flags = {
        "data": data,
        "reward": f"{tmp_path}/r.py:reward",
        "max_new_tokens": 3,
        "prompts_per_step": 2,
        "steps": 1,
    }
    masked, plain = run(tmp_path, "m", mask_truncated=True, **flags), run(tmp_path, "p", **flags)
    assert masked[1]["truncated"] == plain[1]["truncated"] == 1
    assert masked[1]["grad_norm"] == 0 and plain[1]["grad_norm"] > 0


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            {"ratio": "sequence", "aggregate": "token"},
            "--ratio sequence does not go with --aggregate token",
        ),
        ({"ref_update_every": 2}, "--ref_update_every needs a --beta above 0"),
        ({"samples_per_prompt": 1}, "--samples_per_prompt must be 2 or more"),
        ({"clip_low": 1.5}, "--clip_low must be from 0 to 1"),
        ({"eval_samples": -1}, "--eval_samples -1: must be 0 or more"),
        ({"beta": -0.1}, "--beta -0.1: must be 0 or more"),
        ({"max_grad_norm": -1.0}, "--max_grad_norm -1.0: must be above 0"),
        ({"steps": -1}, "--steps -1: must be 0 or more"),
        ({"resume": True, "steps": 0}, "--steps 0 evaluates a model"),
        ({"minibatches": 3}, "a multiple of --minibatches 3 x 1 processes: 30 or 33"),
        ({"prompts_per_step": 2, "minibatches": 5}, "x 1 processes: 5 or 10"),
    ],
)
def test_flags_that_contradict_each_other_are_one_line(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, **flags)
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and words in error
        and error.count("\n") == 1
        and not (tmp_path / "run").exists()
    )


def test_flags_left_open_are_filled_in_from_the_others():
    """As README and --help say; a flag that is given stays."""
    elsewhere = {"model": "owner/name", "data": "mine.jsonl"}
    args = grpo.resolve(grpo.Args())
    assert (args.clip_low, args.clip_high, args.aggregate) == (0.2, 0.2, "token")
    assert args.learning_rate == 2e-4 and args.eval_data == str(grpo.TINY / "sort_test.jsonl")
    args = grpo.resolve(grpo.Args(ratio="sequence", **elsewhere))
    assert (args.clip_low, args.clip_high, args.aggregate) == (3e-4, 4e-4, "sequence")
    assert args.learning_rate == 1e-6 and args.eval_data == ""
    given = {"clip_low": 0.1, "clip_high": 0.3, "aggregate": "constant", "learning_rate": 0.5}
    args = grpo.resolve(grpo.Args(eval_data="other.jsonl", **given))
    assert {name: getattr(args, name) for name in given} == given
    assert args.eval_data == "other.jsonl"


def test_pass_at_k_wants_answers(tmp_path, capsys):
    data = prompts_file(tmp_path, [{"prompt": "5="}])
    with pytest.raises(SystemExit):
        run(tmp_path, eval_data=data, eval_samples=2, reward="tests/tiny/sort.py:position")
    assert "--eval_samples needs an" in capsys.readouterr().err


def test_dropping_equal_groups_fills_the_batch_with_signal(tmp_path, monkeypatch):
    """DAPO: of the groups that are trained on, fewer have equal rewards; where all have, a step ends all the same."""
    kept = []
    honest = grpo.group_advantages
    monkeypatch.setattr(
        grpo,
        "group_advantages",
        lambda r, *a: (kept.append(grpo.equal_groups(r, 8).sum().item()), honest(r, *a))[1],
    )
    flags = {"steps": 2, "prompts_per_step": 16, "max_new_tokens": 12}
    run(tmp_path, "plain", **flags)
    run(tmp_path, "dropped", drop_equal_groups=True, **flags)
    assert sum(kept[:2]) >= 12 and sum(kept[2:]) <= sum(kept[:2]) / 2

    (tmp_path / "r.py").write_text("def reward(completion, row):\n    return 1.0\n")
    draws, honest_sample = [], common.sample
    monkeypatch.setattr(
        common, "sample", lambda *a, **k: (draws.append(a[2]), honest_sample(*a, **k))[1]
    )
    m = run(
        tmp_path,
        "never",
        reward=f"{tmp_path}/r.py:reward",
        drop_equal_groups=True,
        steps=2,
        **SMALL,
    )
    assert (
        [len(x) for x in draws] == [8, 8] and m[1]["equal_groups"] == 1 and m[1]["grad_norm"] == 0
    )
    assert len({str(prompt) for draw in draws for prompt in draw}) == 16, "no prompt is drawn twice"


@pytest.mark.parametrize("script", [reinforce, ppo, grpo], ids=lambda m: m.__name__)
def test_every_epoch_visits_every_minibatch_once_in_an_order_of_its_own(
    script, tmp_path, monkeypatch
):
    seen, honest = [], common.completion_states
    monkeypatch.setattr(
        common,
        "completion_states",
        lambda model, s, rows: (seen.append(tuple(rows)), honest(model, s, rows))[1],
    )
    for name in ("has_gradient", "rows_to_train"):
        if hasattr(script, name):  # every row is trained, whatever its reward
            monkeypatch.setattr(script, name, lambda x, *a: torch.ones(len(x), dtype=torch.bool))
    flags = {
        "prompts_per_step": 8,
        "samples_per_prompt": 2,
        "epochs": 4,
        "minibatches": 4,
        "steps": 1,
        "max_new_tokens": 4,
    }
    if script is ppo:
        flags["critic"] = "shared"  # one forward for both
    script.train(
        script.Args(out=str(tmp_path / "run"), device="cpu", eval_data="", beta=0.0, **flags)
    )
    updates = seen[-16:]  # after the forwards of the old policy
    epochs = [tuple(updates[i : i + 4]) for i in range(0, 16, 4)]
    assert all(sorted(e) == sorted(epochs[0]) and len(set(e)) == 4 for e in epochs), epochs
    assert len(set(epochs)) > 1, "shuffled anew"


def test_the_clips_shares_are_logged_under_their_names(tmp_path, monkeypatch):
    everywhere = torch.ones(1, 1, dtype=torch.bool)
    monkeypatch.setattr(
        grpo, "is_clipped", lambda ratio, *a: (everywhere.expand_as(ratio), ratio < 0)
    )
    m = run(tmp_path, steps=1, **SMALL)
    assert m[1]["clip/low"] == pytest.approx(1.0) and m[1]["clip/high"] == 0


def test_the_reference_follows_the_policy_when_told_to(tmp_path):
    flags = SMALL | {
        "steps": 4,
        "beta": 0.1,
        "learning_rate": 1e-3,
        "warmup": 0,
        "schedule": "constant",
    }
    still, moving = run(tmp_path, "a", **flags), run(tmp_path, "b", ref_update_every=2, **flags)
    assert (
        still[2]["kl/ref"] == moving[2]["kl/ref"] != 0
        and moving[3]["kl/ref"] == 0 != moving[4]["kl/ref"]
    )
    assert still[3]["kl/ref"] != 0


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"epochs": 2, "minibatches": 2, "beta": 0.1, "ref_update_every": 2},
        {"drop_equal_groups": True, "mask_truncated": True},
    ],
)
def test_resuming_equals_never_having_stopped(flags, tmp_path):
    """Bit for bit: the moved reference is part of the checkpoint, new prompts come from the step's number."""
    flags = SMALL | flags | {"eval_every": 3, "eval_data": few_rows(tmp_path), "eval_samples": 2}
    straight = run(tmp_path, "a", steps=4, **flags)
    run(tmp_path, "b", steps=3, **flags)
    resumed = run(tmp_path, "b", steps=4, resume=True, **flags)
    clocks = ("time/sample", "time/reward", "time/train", "tokens_per_second", "memory_gib")
    assert [{k: v for k, v in m.items() if k not in clocks} for m in resumed] == [
        {k: v for k, v in m.items() if k not in clocks} for m in straight
    ]
    a, b = weights(tmp_path, "a"), weights(tmp_path, "b")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_printed_lines_of_python_use_the_model(tmp_path, capsys):
    """With the first prompt of the data, so that they answer something."""
    run(tmp_path, steps=1, **SMALL)
    said = capsys.readouterr().out
    prompt = json.loads((grpo.TINY / "sort_train.jsonl").read_text().splitlines()[0])["prompt"]
    exec(said[said.index("  from transformers") :].replace("\n  ", "\n").strip(), {})
    assert eval(capsys.readouterr().out)[0]["generated_text"].startswith(prompt)
    assert "held-out" not in said
    assert "step 0:" not in said


def test_with_dropped_groups_the_completions_of_the_first_kept_one_are_shown(monkeypatch):
    completions = [[i + 4] for i in range(4)]
    samples = common.as_samples([[7]] * 4, completions, make_tokenizer(), CPU)
    monkeypatch.setattr(common, "sample", lambda *a, **k: samples)
    reward = SimpleNamespace(seconds=0.0)
    reward.score = lambda s, records: {"reward": [1.0, 1.0, 0.0, 1.0]}
    flags = {"samples_per_prompt": 2, "prompts_per_step": 1, "drop_equal_groups": True}
    args = grpo.resolve(grpo.Args(**flags))
    prompts = [([7], {"prompt": "p"})] * 2
    *_, shown = grpo.rollout(None, None, prompts, reward, False, args, CPU, 1, common.Meter())
    assert [line["reward"] for line in shown] == [0.0, 1.0]


def test_a_row_that_only_fills_a_part_counts_in_no_logged_mean(monkeypatch):
    """FSDP needs equally many parts everywhere: a process that has fewer takes a row without weight."""
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]).requires_grad_()
    old = torch.tensor([[-1.5, -2.0], [-9.0, -9.0]])
    ref = torch.tensor([[-2.0, -3.0], [-1.0, -1.0]])
    monkeypatch.setattr(grpo, "token_logprobs", lambda *a: (logprobs, torch.ones(2, 2)))
    weights = torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    samples = SimpleNamespace(logprobs=old + 0.25)
    batch = grpo.Batch(samples, torch.ones(2), weights, old, ref)
    meter = common.Meter()
    args = grpo.resolve(grpo.Args(beta=0.1, minibatches=2))
    grpo.update_loss(None, batch, [0, 1], args, meter, True)
    found = meter.result(CPU)
    assert found["kl/ref"] == pytest.approx((2 - 1.5) + (3 - 2)) and found["kl/ref"].count == 1
    assert found["kl/old"] == pytest.approx(math.exp(0.5) - 1 - 0.5) and found["kl/old"].count == 1
    assert found["kl/sample"] == pytest.approx(0.25) and found["kl/sample"].count == 2
    assert found["ratio/first"] == pytest.approx(math.exp(0.5) - 1)
    assert found["ratio/mean"] == pytest.approx((math.exp(0.5) + 1) / 2)
