"""PPO: rewards, GAE, whitening, clips and values against brute-force sums; the critics; one family with REINFORCE and GRPO."""

import collections
import copy
import itertools
import json
import math
import random

import pytest
import torch
from conftest import ROOT, family, make_tokenizer
from test_grpo import Clock
from test_reinforce import gradient, prompts_file, rollout, weights

import common
import grpo
import ppo
import reinforce
from common import World, as_samples, completion_states
from ppo import (
    before_update,
    clipped_loss,
    explained_variance,
    gae,
    is_clipped,
    k3,
    token_logprobs,
    token_rewards,
    value_loss,
    values_of,
)

CPU = World(0, 1, torch.device("cpu"), torch.float32)
CRITICS = ["separate", "shared"]
CLASSIFIERS = ["gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3"]


def some(seed=0):
    """Numbers for a rollout of six rows: cut ones, early ends, rows of one token, and garbage where there is no token."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 6, 7, 1])[:, None]
    return mask, lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)


# --- rewards, advantages, returns ---


def test_the_score_comes_with_the_last_chosen_token_and_the_kl_with_each():
    mask, randn = some()
    scores, kl = randn(6), randn(6, 7)
    got = token_rewards(scores, kl, mask, 0.3)
    for i, row in enumerate(mask):
        T = int(row.sum())
        for t in range(7):
            wanted = (-0.3 * kl[i, t] + (scores[i] if t == T - 1 else 0.0)) if t < T else 0.0
            assert abs(got[i, t] - wanted) < 1e-12
    torch.testing.assert_close(got.sum(1), scores - 0.3 * (kl * mask).sum(1))


@pytest.mark.parametrize(
    "gamma, lam", list(itertools.product((1.0, 0.9, 0.0), (0.0, 0.5, 0.95, 1.0)))
)
def test_gae_against_brute_force_sums(gamma, lam):
    """What the critic says of places where there is no token must not matter: V after the end is 0."""
    mask, randn = some()
    rewards, values = randn(6, 7) * mask, randn(6, 7)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for i, row in enumerate(mask):
        T = int(row.sum())
        V = [*values[i, :T].tolist(), 0.0]
        delta = [rewards[i, t].item() + gamma * V[t + 1] - V[t] for t in range(T)]
        for t in range(7):
            wanted = sum((gamma * lam) ** k * delta[t + k] for k in range(T - t)) if t < T else 0.0
            assert abs(advantages[i, t].item() - wanted) < 1e-12
            assert abs(returns[i, t].item() - (wanted + V[t] if t < T else 0.0)) < 1e-12


def test_lambda_stands_between_the_k_step_advantages():
    """lam 0 is the 1-step one, lam 1 the last; between, an average whose last member takes what weight is left. Normalised by
    1 + lam + ... over the k there are, it would be another number."""
    mask, randn = some(1)
    rewards, values, gamma = randn(6, 7) * mask, randn(6, 7) * mask, 0.9
    for i, row in enumerate(mask):
        T = int(row.sum())
        V = [*values[i, :T].tolist(), 0.0]

        step = [[sum(gamma**j * rewards[i, t + j].item() for j in range(k)) + gamma**k * V[t + k] - V[t] if k else 0.0
                 for k in range(T - t + 1)] for t in range(T)]  # fmt: skip

        for lam in (0.0, 0.6, 1.0):
            got = gae(rewards, values, mask, gamma, lam)[0][i]
            for t in range(T):
                n = T - t
                share = [(1 - lam) * lam ** (k - 1) for k in range(1, n)] + [lam ** (n - 1)]
                assert abs(sum(share) - 1) < 1e-12
                assert (
                    abs(got[t].item() - sum(w * step[t][k] for k, w in enumerate(share, 1))) < 1e-12
                )
                if lam == 0.6 and n > 1:
                    wrong = sum(lam ** (k - 1) * step[t][k] for k in range(1, n + 1)) / sum(
                        lam**k for k in range(n)
                    )
                    assert abs(got[t].item() - wrong) > 1e-6


def test_monte_carlo_returns_are_what_came_whatever_the_critic_says():
    mask, randn = some()
    rewards = randn(6, 7) * mask
    a, b = (gae(rewards, randn(6, 7), mask, 0.9, 1.0)[1] for _ in range(2))
    torch.testing.assert_close(a, b)
    to_go = reinforce.rewards_to_go(
        token_rewards(torch.ones(6, dtype=torch.float64), -rewards, mask, 1.0), 0.9
    )
    torch.testing.assert_close(
        gae(token_rewards(torch.ones(6), -rewards, mask, 1.0), b, mask, 0.9, 1.0)[1], to_go
    )


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_an_exact_critics_advantage_is_q_minus_v_at_lambda_0_and_at_any_lambda_in_expectation(
    gamma,
):
    """A policy over three tokens, 1 ends, three at most, all paths listed: Q and V from the tree, from the leaves up."""
    g = torch.Generator().manual_seed(0)
    paths = [
        c
        for k in (1, 2, 3)
        for c in itertools.product(range(3), repeat=k)
        if 1 not in c[:-1] and (c[-1] == 1 or k == 3)
    ]
    policy = {p: torch.randn(3, generator=g, dtype=torch.float64).softmax(0).tolist() for k in range(3) for p in itertools.product((0, 2), repeat=k)}  # fmt: skip
    reward = {
        p[: t + 1]: torch.randn(1, generator=g, dtype=torch.float64).item()
        for p in paths
        for t in range(len(p))
    }

    def V(state):
        return 0.0 if state not in policy else sum(policy[state][a] * Q(state, a) for a in range(3))

    def Q(state, a):
        return reward[(*state, a)] + gamma * V((*state, a))

    mask = torch.arange(3) < torch.tensor([len(p) for p in paths])[:, None]
    rewards, values = (torch.zeros(len(paths), 3, dtype=torch.float64) for _ in range(2))
    chance = torch.ones(len(paths), dtype=torch.float64)
    for i, p in enumerate(paths):
        for t, a in enumerate(p):
            rewards[i, t], values[i, t] = reward[p[: t + 1]], V(p[:t])
            chance[i] *= policy[p[:t]][a]
    assert abs(chance.sum() - 1) < 1e-12
    for lam in (0.0, 0.5, 0.95, 1.0):
        advantages, _ = gae(rewards, values, mask, gamma, lam)
        for i, p in enumerate(paths):
            for t, a in enumerate(p):
                exact = Q(p[:t], a) - V(p[:t])
                if lam == 0:
                    assert abs(advantages[i, t] - exact) < 1e-12
                same = [j for j, q in enumerate(paths) if q[: t + 1] == p[: t + 1]]
                assert (
                    abs((chance[same] * advantages[same, t]).sum() / chance[same].sum() - exact)
                    < 1e-12
                )


def test_whitened_advantages_have_mean_0_and_spread_1_over_tokens_alone():
    mask, randn = some()
    x = randn(6, 7)
    got = ppo.whiten(x, mask, CPU)
    kept = x[mask]
    torch.testing.assert_close(got[mask], (kept - kept.mean()) / (kept.std(correction=0) + 1e-4))
    assert (got[~mask] == 0).all()
    noise = torch.full((6, 7), 0.1) + 1e-8 * randn(6, 7).float()
    assert ppo.whiten(noise, mask, CPU).abs().max() < 1e-3, "rounding is not signal"


# --- losses ---


def test_the_clip_in_all_its_cells():
    """The truth table: which ratios may still move, by the sign of the advantage; and the minimum against a loop."""
    for A, ratio, moves in [
        (1, 0.5, 1),
        (1, 1.0, 1),
        (1, 1.5, 0),
        (-1, 0.5, 0),
        (-1, 1.0, 1),
        (-1, 1.5, 1),
    ]:
        logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
        one = torch.ones(1, 1, dtype=torch.float64)
        clipped_loss(logprobs.exp(), A * one, one, 0.2, 0.3).backward()
        low, high = is_clipped(logprobs.exp(), A * one, 0.2, 0.3)
        assert logprobs.grad.item() == pytest.approx(-A * ratio * moves)
        assert (low.item(), high.item()) == (A < 0 and not moves, A > 0 and not moves)


def test_both_losses_against_loops_in_float64():
    mask, randn = some()
    logprobs, old, A, V, V_old, R = (randn(6, 7) for _ in range(6))
    w = mask.double() / mask.sum()
    low, high, clip = 0.2, 0.3, 0.4
    policy, value = 0.0, 0.0
    for i, t in mask.nonzero().tolist():
        rho = math.exp(logprobs[i, t] - old[i, t])
        policy -= min(rho * A[i, t], min(max(rho, 1 - low), 1 + high) * A[i, t])
        near = V_old[i, t] + min(max(V[i, t] - V_old[i, t], -clip), clip)
        value += max((V[i, t] - R[i, t]) ** 2, (near - R[i, t]) ** 2) / 2
    assert abs(clipped_loss((logprobs - old).exp(), A, w, low, high) - policy / mask.sum()) < 1e-12
    assert abs(value_loss(V, V_old, R, w, clip) - value / mask.sum()) < 1e-12
    assert abs(value_loss(V, V_old, R, w, 0.0) - 0.5 * ((V - R)[mask] ** 2).mean()) < 1e-12


def test_a_value_that_has_moved_far_enough_rests_and_one_that_went_away_comes_back():
    one = torch.ones(1, 1)
    for value, moves in (
        (0.1, True),
        (0.5, False),
        (-0.5, True),
    ):  # from 0, the return is 1, the clip 0.2
        v = torch.full((1, 1), value, requires_grad=True)
        value_loss(v, 0 * one, one, one, 0.2).backward()
        assert (v.grad != 0).item() is moves


def test_explained_variance():
    mask, randn = some()
    R = randn(6, 7)
    assert (
        explained_variance(R, R, mask, CPU) == 1
        and abs(explained_variance(0 * R + 3, R, mask, CPU)) < 1e-12
    )
    V, kept = randn(6, 7), R[mask]
    wanted = 1 - ((R - V)[mask].var(correction=0) / kept.var(correction=0)).item()
    assert abs(explained_variance(V, R, mask, CPU) - wanted) < 1e-12 and wanted < 0
    assert explained_variance(V, 0 * R + 3, mask, CPU) is None, (
        "nothing to explain, and nobody to blame"
    )


def test_the_kl_to_the_old_policy_is_estimated_without_bias_and_never_negative():
    """On samples of pi_old, against the sum over all tokens; and in float32, of policies that are nearly the same."""
    _, randn = some()
    old, new = randn(9).log_softmax(0), randn(9).log_softmax(0)
    estimate = k3(old, new)
    assert (estimate >= 0).all() and abs(
        (old.exp() * estimate).sum() - (old.exp() * (old - new)).sum()
    ) < 1e-12
    small = 1e-5 * randn(1000)
    close = k3(torch.zeros(1000), small.float())
    assert (close >= 0).all() and close.mean().item() == pytest.approx(
        (small**2 / 2).mean().item(), rel=1e-3
    )


# --- one family ---


def batch_of_a_policy():
    model = family("llama").double()
    s = rollout(model)
    s.rows_per_prompt = 1
    logprobs, _ = token_logprobs(model, s, list(range(16)), 1.0)
    return (
        model,
        s,
        logprobs,
        torch.rand(16, generator=torch.Generator().manual_seed(5), dtype=torch.float64),
    )


def test_with_a_critic_of_0_it_is_reinforce_without_baseline():
    """gamma 1, lam 1, no whitening, beta 0, one update; a mean over tokens here and over samples there."""
    model, s, logprobs, r = batch_of_a_policy()
    none = torch.zeros_like(logprobs)
    A, _ = gae(token_rewards(r, none, s.mask, 0.0), none, s.mask, 1.0, 1.0)
    ratio = (logprobs - logprobs.detach()).exp()
    loss = clipped_loss(ratio, A, s.mask.double() / s.mask.sum(), 0.2, 0.2)
    mine = gradient(model, loss).clone()
    model, s, logprobs, r = batch_of_a_policy()
    b = reinforce.baselines(r, r, 4, "none")
    to_go = reinforce.rewards_to_go(token_rewards(r, none, s.mask, 0.0), 1.0)
    theirs = gradient(
        model, reinforce.policy_loss(logprobs, logprobs.detach(), to_go - b[:, None], s.mask, 16)[0]
    )
    assert (mine * s.mask.sum() / 16 - theirs).norm() < 1e-6 * theirs.norm() and mine.norm() > 0


def test_with_the_groups_means_for_a_critic_it_is_grpo_without_std():
    model, s, logprobs, r = batch_of_a_policy()
    none = torch.zeros_like(logprobs)
    critic = r.view(-1, 4).mean(1).repeat_interleave(4)[:, None].expand_as(none)
    A, _ = gae(token_rewards(r, none, s.mask, 0.0), critic, s.mask, 1.0, 1.0)
    ratio = (logprobs - logprobs.detach()).exp()
    loss = clipped_loss(ratio, A, s.mask.double() / s.mask.sum(), 0.2, 0.2)
    mine = gradient(model, loss).clone()
    model, s, logprobs, r = batch_of_a_policy()
    w = grpo.token_weights(s.mask, "token", 12, CPU)
    A = grpo.group_advantages(r, r, 4, "none", False)
    ratio = (logprobs - logprobs.detach()).exp()
    theirs = gradient(model, grpo.clipped_loss(ratio, A[:, None], w, 0.2, 0.2))
    assert (mine - theirs).norm() < 1e-6 * theirs.norm() and mine.norm() > 0


# --- the critics ---


def critic_of(name, folder):
    family(name).save_pretrained(folder)
    critic = common.load_scalar(folder, CPU, make_tokenizer(), 0.5)
    return critic, common.scalar_head(critic)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_values_are_unchanged_by_padding_and_company_and_see_only_what_came_before(name, tmp_path):
    """Field notes, test 6, for both critics: alone and in a batch with longer rows; a token that is changed changes no value
    up to its own place."""
    policy, (critic, head) = family(name), critic_of(name, tmp_path)
    linear = torch.nn.Linear(policy.get_output_embeddings().weight.shape[1], 1)
    s = rollout(policy)

    def values_on(trunk, top, samples, rows, rows_per_prompt=1):
        samples.rows_per_prompt = rows_per_prompt
        return values_of(top, completion_states(trunk, samples, rows)[0])

    for trunk, top in ((critic, head), (policy, linear)):
        with torch.no_grad():
            together = values_on(trunk, top, s, list(range(16)))
            assert together.std() > 0.05, "a test on constants would show nothing"
            for row in (0, 5, 9, 15):
                alone = values_on(trunk, top, s, [row])[0]
                torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-4, rtol=1e-4)
            shared = values_on(trunk, top, s, list(range(16)), 4)
            torch.testing.assert_close(shared[s.mask], together[s.mask], atol=1e-4, rtol=1e-4)
            row = int(s.mask.sum(1).argmax())
            other = copy.deepcopy(s)
            other.ids[row, 2] = (other.ids[row, 2] + 7) % 40 + 2
            changed = values_on(trunk, top, other, [row])[0]
            torch.testing.assert_close(changed[:3], together[row, :3], atol=1e-4, rtol=1e-4)
            last = s.mask[row].sum()
            assert (changed[3:last] - together[row, 3:last]).abs().max() > 1e-3


@pytest.mark.parametrize("shared", [1, 4])
@pytest.mark.parametrize("kind", CRITICS)
def test_the_gradient_of_both_losses_is_the_same_however_the_step_is_cut(kind, shared, tmp_path):
    """Field notes, test 3: actor and critic, clipped tokens and values among them."""
    policy = family("llama").double()
    if kind == "separate":
        trunk, head = critic_of("llama", tmp_path)
        trunk = trunk.double()
    else:
        trunk, head = policy, torch.nn.Linear(32, 1)
    s, (_, randn) = rollout(policy), some()
    A, V, R = randn(s.mask.shape), randn(s.mask.shape), randn(s.mask.shape)
    batch = ppo.Batch(s, s.mask / s.mask.sum(), s.logprobs, V, A, R)
    args, grads = ppo.resolve(ppo.Args(critic=kind, prompts_per_step=4, samples_per_prompt=4)), []
    s.rows_per_prompt = shared
    with torch.no_grad():
        now, _ = token_logprobs(policy, s, list(range(16)), 1.0)
    batch.old_logprobs = now + 0.4 * torch.sin(
        torch.arange(now.shape[1]) + torch.arange(16)[:, None]
    )
    for tokens in (100_000, 90, 1):
        for m in (policy, trunk, head):
            m.zero_grad()
        meter = common.Meter()
        for part in ppo.micro_batches(range(len(s.mask)), s.mask.any(1), s, tokens, CPU):
            ppo.add_gradients(policy, trunk, head, batch, part, args, meter, True, True)
        seen = meter.result(CPU)
        assert seen["clip/high"] > 0 and seen["clip/low"] > 0
        models = {id(p): p for m in (policy, trunk, head) for p in m.parameters()}.values()
        grads.append(torch.cat([p.grad.flatten().double() for p in models if p.grad is not None]))
    for other in grads[1:]:
        assert (grads[0] - other).norm() < 1e-6 * grads[0].norm()


def test_what_was_said_before_the_update_is_what_the_update_finds_first(tmp_path):
    policy, (critic, head) = family("llama"), critic_of("llama", tmp_path)
    s = rollout(policy)
    assert s.rows_per_prompt == 4
    parts = ppo.micro_batches(range(len(s.mask)), s.mask.any(1), s, 60, CPU)
    for trunk, top in ((critic, head), (policy, torch.nn.Linear(32, 1))):
        old, values = before_update(policy, trunk, top, s, [parts[:2], parts[2:]], 0.7)
        for part in parts:
            logprobs, _ = token_logprobs(policy, s, part, 0.7)
            assert torch.equal(logprobs, old[part, : logprobs.shape[1]])
            states, _, mask = completion_states(trunk, s, part)
            now = values_of(top, states) * mask
            assert torch.equal(now, values[part, : now.shape[1]])


def test_no_gradient_reaches_a_value_after_the_end_nor_comes_from_there():
    """Field notes, test 5, for the critic; the policy's EOS is the same function's as in reinforce.py."""
    policy, head = family("llama"), torch.nn.Linear(32, 1)
    s = as_samples([[7, 8], [7, 8]], [[5, 1], [5, 6, 7, 8]], make_tokenizer(), CPU)
    values = values_of(head, completion_states(policy, s, [0, 1])[0])
    values.retain_grad()
    value_loss(values, 0 * values.detach(), torch.full((2, 4), 9.0), s.mask / 6, 0.0).backward()
    assert (values.grad[0] != 0).tolist() == [True, True, False, False], (
        "V before the EOS is trained, V after it is not"
    )


# --- a whole step, against one written out in float64 ---


def logprobs_row(model, prompt, completion, temperature, with_entropy=False):
    logits = model(torch.tensor([prompt + completion])).logits[0].double() / temperature
    everything = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    chosen = everything.gather(1, torch.tensor(completion)[:, None])[:, 0]
    entropy = -(everything.exp() * everything).sum(1).detach()
    return (chosen, entropy) if with_entropy else chosen


def values_row(critic, policy, prompt, completion):
    """V before each token of a completion, by a plain forward of one row."""
    ids = torch.tensor([prompt + completion])
    if isinstance(critic, torch.nn.Linear):
        states = policy.model(ids).last_hidden_state[0]
        return critic(states)[len(prompt) - 1 : -1, 0]
    return critic.score(critic.model(ids).last_hidden_state[0])[len(prompt) - 1 : -1, 0]


@pytest.mark.parametrize("named", ["", "a folder"])
@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("kind", CRITICS)
def test_one_step_of_the_script_is_the_step_written_out(kind, whiten, named, tmp_path, monkeypatch):
    """Every equation and every flag in its place: two mini-batches, a reference of its own, a critic with opinions, plain gradient
    descent. The weights after the step and the numbers logged, against those of loops over rows and
    tokens in float64."""
    torch.manual_seed(0)
    f = {"gamma": 0.9, "lam": 0.5, "clip_low": 0.1, "clip_high": 0.3, "beta": 0.7, "value_coef": 0.3, "value_clip": 0.15, "temperature": 0.8,
         "learning_rate": 0.05, "critic_learning_rate": 0.2, "missing_eos_penalty": 0.4, "whiten": whiten, "max_grad_norm": 1e9}  # fmt: skip
    seen, honest = (
        {},
        {
            name: getattr(common, name)
            for name in ("sample", "load_reference", "load_policy", "load_scalar", "make_optimizer")
        },
    )

    def moved(model, seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(
                    0.1
                    * torch.randn(p.shape, generator=generator)
                    * (p.std() if p.numel() > 1 else 1.0)
                )
        return model

    def sample(model, *rest, **settings):
        seen["samples"] = honest["sample"](model, *rest, **settings)
        seen["samples"].logprobs += 0.01  # what the sampler reports is compared, and nothing else
        return seen["samples"]

    def sgd(model, rate):
        """Called for the policy, then for the critic: a place to give a shared critic opinions and to keep what both were."""
        which = "critic" if "policy" in seen else "policy"
        if which == "critic":
            with torch.no_grad():
                (common.scalar_head(model) if kind == "separate" else model).weight.normal_(0, 0.2)
        seen[which] = copy.deepcopy(model).double()
        seen[f"start_{which}"] = {
            k: p.detach().double().clone() for k, p in model.named_parameters()
        }
        return torch.optim.SGD(model.parameters(), lr=rate)

    monkeypatch.setattr(ppo, "time", Clock())
    monkeypatch.setattr(common, "sample", sample)
    if named:  # --reference, instead of a model that is moved once it is loaded
        f["reference"] = str(tmp_path / "moved")
        other = moved(honest["load_reference"](ppo.Args.model, CPU), 1)
        other.save_pretrained(f["reference"])
        common.load_tokenizer(ppo.Args.model).save_pretrained(f["reference"])
    else:
        load = honest["load_reference"]
        monkeypatch.setattr(common, "load_reference", lambda *a: moved(load(*a), 1))
    monkeypatch.setattr(common, "make_optimizer", sgd)
    (tmp_path / "r.py").write_text(
        "def reward(completion, row):\n    return 0.3 * len(completion) - 1.0\n"
    )
    log = run(tmp_path, steps=1, critic=kind, reward=f"{tmp_path}/r.py:reward", prompts_per_step=8, max_new_tokens=7, epochs=2,
              minibatches=2, warmup=0, schedule="constant", **f)  # fmt: skip
    policy, critic, s = seen["policy"], seen["critic"], seen["samples"]
    reference = moved(honest["load_reference"](ppo.Args.model, CPU), 1).double()
    rows = [
        (s.prompt_ids[i][s.prompt_mask[i]].tolist(), s.ids[i][s.mask[i]].tolist()) for i in range(8)
    ]
    assert not s.finished.all() and len({len(c) for _, c in rows}) > 2, (
        "cut ones and unequal lengths"
    )

    with torch.no_grad():
        old = [logprobs_row(policy, p, c, f["temperature"]) for p, c in rows]
        ref = [logprobs_row(reference, p, c, f["temperature"]) for p, c in rows]
        V = [values_row(critic, policy, p, c) for p, c in rows]
    A, R, came, kl_ref, scores = [], [], [], 0.0, []
    for i, (_, c) in enumerate(rows):
        T = len(c)
        score = 0.3 * len(s.texts[i]) - 1.0 - (0.0 if s.finished[i] else f["missing_eos_penalty"])
        r = [
            -f["beta"] * (old[i][t] - ref[i][t]).item() + (score if t == T - 1 else 0.0)
            for t in range(T)
        ]
        kl_ref += (old[i] - ref[i]).sum().item() / 8
        scores.append(0.3 * len(s.texts[i]) - 1.0)
        came.append([sum(f["gamma"] ** k * r[t + k] for k in range(T - t)) for t in range(T)])
        v = [*V[i].tolist(), 0.0]
        delta = [r[t] + f["gamma"] * v[t + 1] - v[t] for t in range(T)]
        A.append(
            [
                sum((f["gamma"] * f["lam"]) ** k * delta[t + k] for k in range(T - t))
                for t in range(T)
            ]
        )
        R.append([a + b for a, b in zip(A[-1], v)])
    everything = torch.tensor([a for row in A for a in row])
    came = torch.tensor([x for row in came for x in row])
    guessed = torch.cat(V)
    spread = (came - guessed).var(correction=0) / came.var(correction=0)
    wanted_log = {
        "returns": sum(map(sum, R)) / len(everything),
        "value/explained": 1 - spread.item(),
        "reward": sum(scores) / 8,
        "kl/ref": kl_ref,
        "kl/penalty": f["beta"] * kl_ref,
        "length": len(everything) / 8,
        "truncated": sum(not x for x in s.finished.tolist()) / 8,
        "learning_rate": f["learning_rate"],
        "value/learning_rate": f["critic_learning_rate"],
        "time/sample": 2.0,
        "time/train": 3.0,
        "tokens_per_second": len(everything) / 5,
        "updates": 4,
        "ratio/first": 0.0,
    }
    if whiten:
        mean, spread = everything.mean().item(), everything.std(correction=0).item()
        A = [[(a - mean) / (spread + 1e-4) for a in row] for row in A]

    order = torch.randperm(
        8, generator=torch.Generator().manual_seed(common.seed_from(1, 1, 0, common.CUT))
    ).view(2, 4)
    sums = collections.Counter()
    norms = {"policy": [], "critic": []}
    for epoch in range(2):
        for m in random.Random(common.seed_from(1, 1, epoch, common.PASS)).sample(range(2), 2):
            mine, loss, v_loss = order[m].tolist(), 0.0, 0.0
            tokens = sum(len(rows[i][1]) for i in mine)
            for i in mine:
                now, entropy = logprobs_row(policy, *rows[i], f["temperature"], True)
                values = values_row(critic, policy, *rows[i])
                for t in range(len(now)):
                    rho = (now[t] - old[i][t]).exp()
                    inside = rho.clamp(1 - f["clip_low"], 1 + f["clip_high"])
                    stopped = bool(rho * A[i][t] > inside * A[i][t])
                    logratio = (now[t] - old[i][t]).item()
                    sums["tokens"] += 1
                    sums["clip/low"] += stopped and rho.item() < 1
                    sums["clip/high"] += stopped and rho.item() > 1
                    sums["ratio/mean"] += rho.item()
                    sums["entropy"] += entropy[t].item()
                    sums["kl/sample"] += abs(old[i][t].item() - s.logprobs[i, t].item())
                    # KL(pi_old || pi) of the four updates, 4 completions each
                    sums["kl/old"] += (math.exp(logratio) - 1 - logratio) / 4 / 4
                    loss = loss - torch.minimum(rho * A[i][t], inside * A[i][t]) / tokens
                    near = V[i][t] + (values[t] - V[i][t]).clamp(-f["value_clip"], f["value_clip"])
                    worse = torch.maximum((values[t] - R[i][t]) ** 2, (near - R[i][t]) ** 2)
                    v_loss = v_loss + 0.5 * worse / tokens
            sums["loss"] += loss.item() / 4
            sums["value/loss"] += v_loss.item() / 4
            policy.zero_grad(), critic.zero_grad()
            (loss + f["value_coef"] * v_loss).backward()
            for name, model in (("policy", policy), ("critic", critic)):
                of_all = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
                norms[name].append(math.hypot(*of_all))
            with torch.no_grad():
                for model, rate in (
                    (policy, f["learning_rate"]),
                    (critic, f["critic_learning_rate"]),
                ):
                    for p in model.parameters():
                        if p.grad is not None:
                            p -= rate * p.grad
    # clips that never act would not be tested
    assert sums["clip/low"] > 0 and sums["clip/high"] > 0
    for name in ("clip/low", "clip/high", "ratio/mean", "entropy", "kl/sample"):
        wanted_log[name] = sums[name] / sums["tokens"]
    for name in ("loss", "value/loss", "kl/old"):
        wanted_log[name] = sums[name]
    wanted_log["grad_norm"] = sum(norms["policy"]) / 4
    wanted_log["value/grad_norm"] = sum(norms["critic"]) / 4
    others = ("step", "memory_gib", "time/reward")
    logged = {name: value for name, value in log[1].items() if name not in others}
    assert logged == pytest.approx(wanted_log, rel=2e-3, abs=5e-5)
    for wanted, saved in ((policy, weights(tmp_path, "run")), (critic, critics(tmp_path, "run"))):
        start = seen["start_policy"] if wanted is policy else seen["start_critic"]
        for k, p in wanted.named_parameters():
            far = (p - start[k]).norm()
            assert (saved[k] - p).norm() <= 2e-3 * far + 1e-6, k


# --- whole runs, on the bundled model ---


def run(tmp_path, name="run", **flags):
    ppo.train(
        ppo.Args(
            **{"out": str(tmp_path / name), "device": "cpu", "eval_data": "", "seed": 1} | flags
        )
    )
    return [
        json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    ]


def critics(tmp_path, name):
    return common.read_checkpoint(tmp_path / name)["models"]["critic"]


SMALL = {"prompts_per_step": 16, "max_new_tokens": 12}


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_ratio_is_1_and_the_kl_0_and_later_ones_are_not(critic, checkpointing, tmp_path):
    """Field notes, test 2, in a run: with checkpointing, another temperature and several samples a prompt, exactly."""
    flags = SMALL | {
        "temperature": 0.7,
        "warmup": 0,
        "learning_rate": 1e-3,
        "samples_per_prompt": 2,
    }
    m = run(tmp_path, steps=2, critic=critic, gradient_checkpointing=checkpointing, **flags)
    for row in m[1:]:
        assert (
            row["ratio/first"] == 0
            and row["kl/sample"] < 1e-5
            and row["kl/old"] > 0
            and row["ratio/mean"] != 1
        )
    assert m[1]["kl/ref"] == 0 == m[1]["kl/penalty"] and m[2]["kl/ref"] != 0
    assert m[2]["kl/penalty"] == pytest.approx(0.05 * m[2]["kl/ref"])
    assert abs(m[1]["value/explained"]) < 1e-9, "a head of 0 explains nothing yet"


@pytest.mark.parametrize("critic", CRITICS)
def test_a_bandits_rewarded_token_becomes_likelier(critic, tmp_path):
    """Field notes, test 9: one prompt, one token, and only `7` pays. Its critic learns what it pays."""
    data = prompts_file(tmp_path, [{"prompt": "42=", "answer": "7"}])
    flags = {
        "prompts_per_step": 64,
        "max_new_tokens": 1,
        "warmup": 0,
        "learning_rate": 1e-3,
        "critic_learning_rate": 3e-3,
    }
    m = run(tmp_path, data=data, steps=25, beta=0.0, critic=critic, schedule="constant", **flags)
    assert m[1]["reward"] < 0.3 and m[-1]["reward"] > 0.9 and "kl/ref" not in m[1]
    assert (
        m[-1]["value/loss"] < 0.5 * max(row["value/loss"] for row in m[1:])
        and m[-1]["value/loss"] < 0.05
    )


@pytest.mark.parametrize("critic", CRITICS)
def test_resuming_is_never_having_stopped(critic, tmp_path):
    """Field notes, test 12, with actor, critic and both optimizers."""
    flags = SMALL | {"critic": critic, "save_every": 2, "critic_warmup": 1, "kl_stop": 10.0}
    straight = run(tmp_path, "a", steps=4, schedule="constant", **flags)
    run(tmp_path, "b", steps=2, schedule="constant", **flags)
    resumed = run(tmp_path, "b", steps=4, schedule="constant", resume=True, **flags)
    clocks = ("time/sample", "time/reward", "time/train", "tokens_per_second", "memory_gib")
    for a, b in zip(straight, resumed, strict=True):
        assert {k: v for k, v in a.items() if k not in clocks} == {
            k: v for k, v in b.items() if k not in clocks
        }
    for kept in (weights, critics):
        a, b = kept(tmp_path, "a"), kept(tmp_path, "b")
        assert all(torch.equal(a[k], b[k]) for k in a) and any(a[k].abs().sum() > 0 for k in a)


@pytest.mark.parametrize("critic", CRITICS)
def test_while_the_critic_warms_up_the_policy_rests(critic, tmp_path):
    run(tmp_path, "warm", steps=1, critic=critic, critic_warmup=1, warmup=0, **SMALL)
    run(tmp_path, "cold", steps=1, critic=critic, warmup=0, **SMALL)
    assert "entropy" not in json.loads(
        (tmp_path / "warm" / "metrics.jsonl").read_text().splitlines()[1]
    )
    start = dict(common.load_policy(ppo.Args.model, CPU).named_parameters())
    warm, cold = weights(tmp_path, "warm"), weights(tmp_path, "cold")
    assert all(torch.equal(warm[k], start[k]) for k in start) and not all(
        torch.equal(cold[k], start[k]) for k in start
    )
    assert any(
        v.abs().sum() > 0
        for k, v in critics(tmp_path, "warm").items()
        if "score" in k or critic == "shared"
    )


def test_the_updates_of_a_rollout_end_when_the_kl_has_passed_its_stop(tmp_path):
    flags = SMALL | {
        "steps": 2,
        "epochs": 4,
        "minibatches": 2,
        "learning_rate": 3e-4,
        "warmup": 0,
        "schedule": "constant",
    }
    free, held, tight = (run(tmp_path, f"k{k}", kl_stop=k, **flags) for k in (0.0, 0.02, 1e-9))
    assert free[2]["updates"] == 8 and 1 <= held[2]["updates"] < 8
    assert tight[1]["updates"] == tight[2]["updates"] == 1, (
        "the first finds a KL of exactly 0, the second anything else"
    )


def test_the_kl_stop_is_in_nats_a_completion_of_one_update(tmp_path, monkeypatch):
    """A stop between the KLs that two updates find, measured in a run without one: updates are made
    until the next one finds a KL above the stop, and that one is not made."""
    found, honest = [], ppo.k3

    def k3(before, logprobs):
        kl = honest(before, logprobs)
        found.append(kl.sum().item() / len(kl))
        return kl

    losses = {"clipped_loss": [], "value_loss": []}

    def keep(name, honest):
        def loss(*a):
            losses[name].append(honest(*a))
            return losses[name][-1]

        return loss

    monkeypatch.setattr(ppo, "k3", k3)
    for name in losses:
        monkeypatch.setattr(ppo, name, keep(name, getattr(ppo, name)))
    flags = SMALL | {"steps": 1, "epochs": 3, "minibatches": 2, "tokens_per_micro_batch": 10**6}
    flags |= {"learning_rate": 5e-5, "warmup": 0, "schedule": "constant"}
    free = run(tmp_path, "free", **flags)
    assert len(found) == 6 and free[1]["kl/old"] == pytest.approx(sum(found) / 6, rel=1e-5)
    growing = list(found)
    for updates in (1, 3):
        before, past = max(growing[:updates]), growing[updates]
        assert past > 1.05 * before, "a stop fits between"
        found.clear()
        for kept in losses.values():
            kept.clear()
        held = run(tmp_path, f"held{updates}", kl_stop=(before + past) / 2, **flags)
        assert held[1]["updates"] == updates
        # a mean over the updates that were looked at, the one that was not made among them
        assert found == growing[: updates + 1]
        assert held[1]["kl/old"] == pytest.approx(sum(found) / len(found), rel=1e-5)
        for name, logged in (("clipped_loss", "loss"), ("value_loss", "value/loss")):
            mean = sum(x.item() for x in losses[name]) / len(found)
            assert held[1][logged] == pytest.approx(mean, rel=1e-5)


def test_the_kl_stop_adds_up_the_parts_of_an_update(tmp_path, monkeypatch):
    found, honest = [], ppo.add_gradients

    def add_gradients(*given, **flags):
        found.append(honest(*given, **flags).item())
        return torch.tensor(found[-1])

    monkeypatch.setattr(ppo, "add_gradients", add_gradients)
    flags = SMALL | {"steps": 1, "epochs": 3, "minibatches": 2, "learning_rate": 5e-5}
    flags |= {"warmup": 0, "schedule": "constant"}
    run(tmp_path, "free", tokens_per_micro_batch=10**6, **flags)
    assert len(found) == 6 and found[3] > 1.05 * max(found[:3]), "a stop fits between"
    stop = (found[3] + max(found[:3])) / 2
    for tokens, parts in ((10**6, 4), (1, 4 * 8)):
        found.clear()
        log = run(tmp_path, f"of{tokens}", kl_stop=stop, tokens_per_micro_batch=tokens, **flags)
        assert log[1]["updates"] == 3 and len(found) == parts


def test_the_kl_stop_asks_all_processes(tmp_path, monkeypatch):
    """One that stopped alone would leave the others waiting for it. Here another has gone far."""
    found, honest = [], {"add": ppo.add_gradients, "sum": common.all_sum}

    def add_gradients(*given, **flags):
        found.append(honest["add"](*given, **flags))
        return found[-1]

    def all_sum(world, *numbers):
        others = 1.0 if found and numbers == (found[-1],) else 0.0
        return [total + others for total in honest["sum"](world, *numbers)]

    monkeypatch.setattr(ppo, "add_gradients", add_gradients)
    monkeypatch.setattr(common, "all_sum", all_sum)
    flags = SMALL | {"steps": 1, "kl_stop": 0.9, "learning_rate": 1e-5, "warmup": 0}
    log = run(tmp_path, tokens_per_micro_batch=10**6, **flags)
    assert log[1]["updates"] == 1 and len(found) == 2 and found[1] < 0.1


@pytest.mark.parametrize("critic", CRITICS)
def test_the_gradients_of_an_update_that_was_not_made_are_in_no_later_one(
    critic, tmp_path, monkeypatch
):
    """--kl_stop finds the KL in a forward that has a backward: what that has left must not be added
    to the first update of the next rollout."""
    models, honest = [], {name: getattr(common, name) for name in ("make_optimizer", "sample")}

    def make_optimizer(model, rate):
        models.append(model)
        return honest["make_optimizer"](model, rate)

    def sample(*given, **settings):
        for p in itertools.chain(*(model.parameters() for model in models)):
            assert p.grad is None or not p.grad.any()
        return honest["sample"](*given, **settings)

    for stand_in in (make_optimizer, sample):
        monkeypatch.setattr(common, stand_in.__name__, stand_in)
    flags = SMALL | {"critic": critic, "kl_stop": 1e-9, "warmup": 0, "schedule": "constant"}
    log = run(tmp_path, steps=2, epochs=2, minibatches=2, **flags)
    assert len(models) == 2 and [m["updates"] for m in log[1:]] == [1, 1]


def test_the_policys_rate_begins_after_the_critics_warm_up_and_the_critics_with_the_first_step(
    tmp_path,
):
    flags = SMALL | {"critic_warmup": 2, "warmup": 1, "schedule": "linear"}
    log = run(tmp_path, steps=6, learning_rate=1.2e-4, critic_learning_rate=1e-3, **flags)
    of_policy = [0, 0, 0.6e-4, 1.2e-4, 0.8e-4, 0.4e-4]
    assert [m["learning_rate"] for m in log[1:]] == pytest.approx(of_policy)
    of_critic = [0.5e-3, 1e-3, 0.8e-3, 0.6e-3, 0.4e-3, 0.2e-3]
    assert [m["value/learning_rate"] for m in log[1:]] == pytest.approx(of_critic)
    assert ["entropy" in m for m in log[1:]] == [False] * 2 + [True] * 4


def test_a_cut_completion_pays_for_its_missing_eos(tmp_path):
    data = prompts_file(tmp_path, [{"prompt": "4213576=", "answer": "1234567"}])
    flags = SMALL | {"data": data, "max_new_tokens": 3, "steps": 1, "beta": 0.0, "lam": 1.0}
    m = run(tmp_path, missing_eos_penalty=0.5, **flags)[1]
    assert m["truncated"] == 1 and m["reward"] == 0 and m["returns"] == pytest.approx(-0.5)


def test_the_shown_completions_are_those_of_one_prompt_with_the_rewards_they_were_given(tmp_path):
    """Without the penalty for a cut, as in the mean that is logged."""
    (tmp_path / "r.py").write_text("def f(completion, row):\n    return 0.3 * len(completion)\n")
    flags = SMALL | {"samples_per_prompt": 3, "max_new_tokens": 3, "missing_eos_penalty": 0.5}
    run(tmp_path, steps=1, reward=f"{tmp_path}/r.py:f", **flags)
    shown = [json.loads(line) for line in open(tmp_path / "run" / "samples.jsonl")]
    assert len(shown) == 3 and len({line["prompt"] for line in shown}) == 1
    for line in shown:
        # 0.3 x 3 is 0.8999999999999999, and in float32 0.8999999761581421
        assert line["reward"] == round(0.3 * len(line["completion"]), 5)
        assert line["answer"] == "".join(sorted(line["prompt"].rstrip("=")))


def test_the_critic_starts_from_a_reward_model_that_has_the_policys_words(tmp_path, monkeypatch):
    started, honest = [], common.load_scalar

    def load_scalar(path, *args, **settings):
        started.append((str(path), settings.get("head_std") == 0.0))
        return honest(path, *args, **settings)

    monkeypatch.setattr(common, "load_scalar", load_scalar)
    run(tmp_path, "first", steps=1, **SMALL)
    assert started == [(ppo.Args.model, True)]
    for name, words in (("same", None), ("other", 48)):
        critic, _ = critic_of("llama", tmp_path / "x")
        tokenizer = make_tokenizer() if words else common.load_tokenizer(ppo.Args.model)
        common.save_model(critic, tokenizer, tmp_path / name, CPU)
        started.clear()
        run(tmp_path, f"with_{name}", steps=1, reward=str(tmp_path / name), **SMALL)
        assert started[-1] == (str(tmp_path / name) if name == "same" else ppo.Args.model, True)


def test_a_reward_model_that_cannot_read_as_far_as_the_policy_writes_is_no_critic(tmp_path):
    tokenizer = common.load_tokenizer(ppo.Args.model)
    judge = common.load_scalar(ppo.Args.model, CPU, tokenizer, 0.5)
    common.save_model(judge, tokenizer, tmp_path / "judge", CPU)
    args = ppo.Args(reward=str(tmp_path / "judge"), max_new_tokens=5)
    config = common.policy_config(args.model)
    room = common.context_of(judge.config)
    for longest, wanted in ((room - 5, args.reward), (room - 4, args.model)):
        assert ppo.critic_folder(args, config, tokenizer, longest, True) == wanted
    assert ppo.critic_folder(args, config, tokenizer, 1, False) == args.model


def test_a_policy_of_a_family_without_a_classifier_needs_a_reward_model_for_its_critic(
    tmp_path, capsys
):
    tokenizer = common.load_tokenizer(ppo.Args.model)
    judge = common.load_scalar(ppo.Args.model, CPU, tokenizer, 0.5)
    common.save_model(judge, tokenizer, tmp_path / "judge", CPU)
    args = ppo.Args(reward=str(tmp_path / "judge"), max_new_tokens=5)
    config = family("mamba").config
    assert ppo.critic_folder(args, config, tokenizer, 1, True) == args.reward
    with pytest.raises(SystemExit):
        ppo.critic_folder(args, config, tokenizer, 1, False)
    assert "no sequence classifier for the family 'mamba'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"lam": 1.5}, "--lam 1.5: must be from 0 to 1"),
        ({"gamma": -0.1}, "--gamma -0.1: must be 0 or more"),
        ({"clip_low": 2.0}, "--clip_low 2.0: must be from 0 to 1"),
        ({"value_clip": -1.0}, "--value_clip -1.0: must be 0 or more"),
        ({"kl_stop": -1.0}, "--kl_stop -1.0: must be 0 or more"),
        ({"critic_learning_rate": -1.0}, "--critic_learning_rate -1.0: must be 0 or more"),
        ({"beta": math.nan}, "--beta nan: must be 0 or more"),
        ({"max_grad_norm": 0.0}, "--max_grad_norm 0.0: must be above 0"),
        ({"value_coef": 0.0}, "--value_coef must be above 0"),
        ({"temperature": 0.0}, "--temperature 0.0: must be above 0"),
        ({"resume": True, "steps": 0}, "--steps 0 evaluates a model"),
        ({"minibatches": 3}, "a multiple of --minibatches 3 x 1 processes: 126 or 129"),
        ({"reward": "no_such"}, "--reward no_such: choose exact, number"),
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


def test_a_family_without_a_sequence_classifier_is_told_of_the_shared_critic(tmp_path, capsys):
    model, tokenizer = family("mamba"), make_tokenizer()
    model.save_pretrained(tmp_path / "mamba"), tokenizer.save_pretrained(tmp_path / "mamba")
    with pytest.raises(SystemExit) as stop:
        run(
            tmp_path,
            model=str(tmp_path / "mamba"),
            data=prompts_file(tmp_path, [{"prompt": "w5", "answer": "w6"}]),
        )
    assert stop.value.code == 2 and "--critic shared" in capsys.readouterr().err


def test_what_each_method_holds_counted_both_ways():
    """8 billion parameters: on slides 128 GB for PPO and 80 for GRPO, which leaves out gradients and has Adam in 16 bits."""
    from bench.held import held, keys_and_values, llama_8b, qwen

    page = " ".join((ROOT / "tests" / "docs" / "running.md").read_text().split())
    small, large = keys_and_values(llama_8b(), 256, 662), keys_and_values(qwen("1.5 B"), 1024, 3200)
    assert f"{small / 1e9:.0f} GB for 32 prompts x 8 with 150 + 512 tokens and 8.0 B" in page
    assert f"{large / 1e9:.0f} GB for 128 x 8 with 200 + 3,000 tokens and 1.5 B" in page
    count, rows = held(llama_8b(), 16)
    assert abs(count / 8e9 - 1) < 0.005
    slides = {}
    here = {}
    for name, (in_16_bits, ours, adapted, *scored) in rows.items():
        slides[name] = [bytes / count for bytes in (in_16_bits, *scored[:1])]
        here[name] = [bytes / count for bytes in (ours, *scored[1:])]
        # 32 layers of 7 pairs: rank x (in + out) numbers each
        pairs = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
        learn = 2 if "separate" in name else 1
        assert adapted == 2 * count + 16 * learn * pairs
    ppo_name = "PPO with its KL, a separate critic"
    assert slides[ppo_name][1] * 8 == 128 and slides["GRPO with its KL"][1] * 8 == 80
    # weight, gradient, two moments; while the policy samples, its copy (2) is in the gradients' place
    assert here[ppo_name] == [2 * (4 + 4 + 8) + 2, 2 * (4 + 4 + 8) + 2 * 2]
    assert here["GRPO without (beta 0)"] == [16, 16 + 2]
    assert here["DPO, reference scored before"] == [16]
    config = common.read_config(ppo.Args.model)
    count, rows = held(config, 16)
    world = World(0, 1, torch.device("cpu"), torch.float32)
    lasting = common.lasting_memory(ppo.Args.model, world, learning=2)
    assert lasting == (count, 2 * 16 * count), "a run counts alike when it starts"


def test_a_reward_model_of_the_policys_context_reads_cut_completions(tmp_path):
    """A completion that fills the context has no EOS, and gets one to be read by: the policy leaves room for it."""
    critic, tokenizer = common.load_scalar(ppo.Args.model, CPU, common.load_tokenizer(ppo.Args.model), 0.5), common.load_tokenizer(ppo.Args.model)  # fmt: skip
    common.save_model(critic, tokenizer, tmp_path / "judge", CPU)
    data = prompts_file(tmp_path, [{"prompt": "421357689=", "answer": "1"}])
    m = run(
        tmp_path,
        data=data,
        reward=str(tmp_path / "judge"),
        steps=1,
        prompts_per_step=64,
        temperature=3.0,
    )
    assert m[1]["truncated"] > 0
