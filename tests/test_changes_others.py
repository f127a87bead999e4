"""The patches of ppo.py, reinforce.py, dpo.py and reward_model.py: each formula against loops or a
formula written out, its gradient, and a short run. Those of grpo.py are in test_changes.py."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from changes_helpers import DIFFS, load, patched, patches_of, train
from conftest import family
from test_reinforce import gradient, rollout

import common
from common import World

CPU = World(0, 1, torch.device("cpu"), torch.float32)
SHORT = "--device cpu --steps 2 --prompts_per_step 8 --max_new_tokens 14 --eval_data=".split()
OTHERS = [
    name for script in ("ppo", "reinforce", "dpo", "reward_model") for name in patches_of(script)
]


def test_there_are_patches_of_four_scripts():
    for script in ("ppo", "reinforce", "dpo", "reward_model"):
        assert patches_of(script), script


@pytest.mark.parametrize("name", OTHERS)
def test_a_patch_names_its_trap(name):
    assert "Trap: " in re.sub(r"\n\+ *#", "", DIFFS[name].read_text())


RATING = """def f(completion, row):
    return len(set(completion)) / 7 + len(completion) / 100 + row["prompt"].count("1")
"""


def rating(completion, prompt):
    """What RATING says. It depends on the prompt, so that a row that is mixed up shows."""
    return len(set(completion)) / 7 + len(completion) / 100 + prompt.count("1")


def record(monkeypatch, module, names):
    """What these functions of a module return -> {name: [one result a call]}."""
    results = {name: [] for name in names}

    def recording(name, function):
        def call(*given, **flags):
            results[name].append(function(*given, **flags))
            return results[name][-1]

        return call

    for name in names:
        monkeypatch.setattr(module, name, recording(name, getattr(module, name)))
    return results


# -- ppo.py ----------------------------------------------------------------------------------------


def gae_by_loops(rewards, values, gamma, lam):
    """Equation (2) of ppo.py for one completion, lists of its T numbers."""
    T = len(rewards)
    values = [*values, 0.0]
    delta = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(T)]
    return [sum((gamma * lam) ** j * delta[t + j] for j in range(T - t)) for t in range(T)]


def last_step_of_ppo(name, tmp_path, monkeypatch, *flags):
    """Two steps -> of the second, in which V is not 0: rewards, values, mask, A_t and R_t."""
    module = load(name)
    seen = record(monkeypatch, module, ["token_rewards", "before_update", "Batch"])
    (tmp_path / "r.py").write_text(RATING)
    learning = "--critic shared --critic_learning_rate 0.05 --warmup 0 --no_whiten".split()
    task = ["--reward", f"{tmp_path}/r.py:f", "--gamma", "0.9"]
    metrics = train(module, tmp_path / "run", *SHORT, *learning, *task, *flags)
    assert metrics[-1]["step"] == 2
    rewards = seen["token_rewards"][-1].double()
    values = seen["before_update"][-1][1].double()
    batch = seen["Batch"][-1]
    mask = batch.samples.mask
    assert values[mask].std() > 0.01, "a critic that says the same everywhere shows little"
    assert mask.sum(1).min() < mask.sum(1).max()
    return rewards, values, mask, batch.advantages, batch.returns


@pytest.mark.parametrize("lam, critic_lam", [(0.6, 0.3), (0.6, 1.0)])
def test_the_critic_has_its_own_lambda(lam, critic_lam, tmp_path, monkeypatch):
    """VC-PPO (Yuan et al. 2025): A_t with one lambda, R_t = A_t + V with the other's A_t."""
    flags = ["--lam", str(lam), "--critic_lam", str(critic_lam)]
    rewards, values, mask, A, R = last_step_of_ppo("critic_lambda", tmp_path, monkeypatch, *flags)
    for i, T in enumerate(mask.sum(1).tolist()):
        row = rewards[i, :T].tolist()
        V = values[i, :T].tolist()
        of_policy = gae_by_loops(row, V, 0.9, lam)
        of_critic = gae_by_loops(row, V, 0.9, critic_lam)
        for t in range(T):
            assert A[i, t].item() == pytest.approx(of_policy[t], abs=1e-5)
            assert R[i, t].item() == pytest.approx(of_critic[t] + V[t], abs=1e-5)


def test_the_critics_lambda_is_1_and_must_be_from_0_to_1(capsys):
    module = load("critic_lambda")
    assert module.Args().critic_lam == 1.0
    with pytest.raises(SystemExit):
        module.resolve(module.Args(critic_lam=1.5))
    assert "--critic_lam 1.5: must be from 0 to 1" in capsys.readouterr().err


def test_lambda_grows_with_the_length(tmp_path, monkeypatch):
    """VAPO (Yue et al. 2025): 1 - 1 / (alpha l) for A_t, --lam for R_t. It is 0, not negative,
    where a completion has fewer than 1 / alpha tokens."""
    alpha = 0.15
    flags = ["--lam", "0.7", "--lam_alpha", str(alpha)]
    name = "length_adaptive_lambda"
    rewards, values, mask, A, R = last_step_of_ppo(name, tmp_path, monkeypatch, *flags)
    lambdas = set()
    for i, T in enumerate(mask.sum(1).tolist()):
        lam = max(0.0, 1 - 1 / (alpha * T))
        lambdas.add(lam)
        row = rewards[i, :T].tolist()
        V = values[i, :T].tolist()
        of_policy = gae_by_loops(row, V, 0.9, lam)
        of_critic = gae_by_loops(row, V, 0.9, 0.7)
        for t in range(T):
            assert A[i, t].item() == pytest.approx(of_policy[t], abs=1e-5)
            assert R[i, t].item() == pytest.approx(of_critic[t] + V[t], abs=1e-5)
    assert min(lambdas) == 0.0 < max(lambdas), "both kinds of length must occur"


def entropy_by_the_model(model, samples, temperature):
    """The mean over tokens of -sum p log p, from one plain forward for each row."""
    total = 0.0
    for i in range(len(samples.ids)):
        prompt = samples.prompt_ids[i][samples.prompt_mask[i]]
        completion = samples.ids[i][samples.mask[i]]
        logits = model(torch.cat([prompt, completion])[None]).logits[0]
        logits = logits[len(prompt) - 1 : -1] / temperature
        p = logits.softmax(-1)
        total = total - (p * p.log()).sum()
    return total / samples.mask.sum()


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_the_bonus_has_the_gradient_of_the_mean_entropy(critic):
    """Schulman et al. 2017, (9): the loss is smaller by entropy_coef times the mean entropy."""
    module = load("ppo_entropy_bonus")
    policy = family("llama").double()
    trunk = policy if critic == "shared" else family("qwen2").double()
    head = torch.nn.Linear(32, 1)
    samples = rollout(policy)
    randn = torch.Generator().manual_seed(0)
    shape = samples.mask.shape
    A, V, R = [torch.randn(shape, generator=randn, dtype=torch.float64) for _ in range(3)]
    weights = samples.mask / samples.mask.sum()
    batch = module.Batch(samples, weights, samples.logprobs.double(), V, A, R)
    gradients = []
    losses = []
    for coef in (0.0, 0.3):
        flags = {"critic": critic, "entropy_coef": coef, "temperature": 0.7}
        args = module.resolve(module.Args(prompts_per_step=4, samples_per_prompt=4, **flags))
        policy.zero_grad()
        meter = common.Meter()
        for rows in (list(range(7)), list(range(7, 16))):
            module.add_gradients(policy, trunk, head, batch, rows, args, meter, True, True)
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
        losses.append(meter.result(CPU)["loss"])
    entropy = entropy_by_the_model(policy, samples, 0.7)
    wanted = -0.3 * gradient(policy, entropy)
    assert wanted.norm() > 1e-3
    # logits are float32 in the script
    assert (gradients[1] - gradients[0] - wanted).norm() < 1e-4 * wanted.norm()
    assert losses[1] - losses[0] == pytest.approx(-0.3 * entropy.item(), rel=1e-4)


def test_ppo_with_the_entropy_bonus_runs(tmp_path):
    metrics = train(load("ppo_entropy_bonus"), tmp_path / "run", *SHORT, "--critic_warmup", "1")
    assert all(math.isfinite(m["loss"]) and m["step"] in (1, 2) for m in metrics[1:])
    assert metrics[-1]["entropy"] > 0


# -- reinforce.py ----------------------------------------------------------------------------------


def greedy_text(model, tokenizer, prompt, max_new_tokens):
    """The likeliest token each time, from a forward of the whole text."""
    stops = common.stop_ids(model, tokenizer)
    ids = list(prompt)
    while len(ids) - len(prompt) < max_new_tokens:
        with torch.no_grad():
            token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token in stops:
            break
        ids.append(token)
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def remax_run(tmp_path, monkeypatch, *flags):
    """-> of the last step: policy, scores, own scores of greedy completions, what was recorded."""
    module = load("remax")
    seen = record(monkeypatch, module, ["token_advantages", "Batch"])
    own = {}
    drawing = module.rollout

    def draw(policy, tokenizer, *rest):
        samples, scores, greedy, shown = drawing(policy, tokenizer, *rest)
        own["policy"] = policy
        own["scores"] = scores
        own["greedy"] = []
        policy.eval()
        for ids, mask in zip(samples.prompt_ids, samples.prompt_mask):
            text = greedy_text(policy, tokenizer, ids[mask].tolist(), 14)
            own["greedy"].append(rating(text, tokenizer.decode(ids[mask])))
        return samples, scores, greedy, shown

    monkeypatch.setattr(module, "rollout", draw)
    kl_of = module.token_rewards

    def token_rewards(scores, kl, mask, beta):
        own["kl"] = kl
        return kl_of(scores, kl, mask, beta)

    monkeypatch.setattr(module, "token_rewards", token_rewards)
    (tmp_path / "r.py").write_text(RATING)
    rated = ["--reward", f"{tmp_path}/r.py:f", "--samples_per_prompt", "3", "--warmup", "0"]
    metrics = train(module, tmp_path / "run", *SHORT, *rated, *flags)
    assert metrics[-1]["step"] == 2
    assert metrics[-1]["reward"] == pytest.approx(own["scores"].mean().item(), rel=1e-5)
    return module, own, seen


def test_the_score_of_the_greedy_completion_is_the_baseline(tmp_path, monkeypatch):
    """ReMax (Li et al. 2024): A_t = sum over s >= t of r_s, minus r(x, greedy completion)."""
    module, own, seen = remax_run(tmp_path, monkeypatch, "--beta", "0.05")
    A = seen["token_advantages"][-1]
    mask = seen["Batch"][-1].samples.mask
    assert len(set(own["greedy"])) > 3 and own["kl"].abs().max() > 1e-4
    for i, T in enumerate(mask.sum(1).tolist()):
        kl = own["kl"][i].tolist()
        for t in range(mask.shape[1]):
            wanted = 0.0
            if t < T:
                penalty = sum(-0.05 * kl[s] for s in range(t, T))
                wanted = own["scores"][i].item() + penalty - own["greedy"][i]
            assert A[i, t].item() == pytest.approx(wanted, abs=1e-5)


def test_without_a_kl_penalty_the_rows_that_tie_with_the_greedy_one_are_not_trained(
    tmp_path, monkeypatch
):
    """And the gradient of the others is that of (r - r(x, y')) log pi, over all completions."""
    module, own, seen = remax_run(tmp_path, monkeypatch, "--beta", "0")
    batch = seen["Batch"][-1]
    samples = batch.samples
    difference = own["scores"] - torch.tensor(own["greedy"])
    assert torch.equal(batch.mask.any(1), difference.abs() > 1e-6)
    assert 0 < batch.mask.any(1).sum() < 24
    args = module.resolve(module.Args(prompts_per_step=8, samples_per_prompt=3, beta=0.0))
    policy = own["policy"]
    meter = common.Meter()
    loss = module.update_loss(policy, batch, list(range(24)), args, meter, False)
    mine = gradient(policy, loss)
    wanted = 0.0
    for i in range(24):
        prompt = samples.prompt_ids[i][samples.prompt_mask[i]]
        completion = samples.ids[i][samples.mask[i]]
        logits = policy(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, completion[:, None])
        wanted = wanted - difference[i] * logprobs.sum() / 24
    wanted = gradient(policy, wanted)
    assert (mine - wanted).norm() < 1e-3 * wanted.norm()


def test_the_mean_of_a_prompt_would_cancel_the_greedy_score():
    """The trap that the patch names, and why its default is another."""
    module = load("remax")
    assert module.resolve(module.Args()).baseline == "none"
    mask = torch.ones(4, 2, dtype=torch.bool)
    kl = torch.zeros(4, 2)
    scores = torch.tensor([0.0, 1.0, 0.5, 2.0])
    greedy = torch.tensor([1.0, 1.0, 0.25, 0.25])
    for baseline in ("loo", "prompt"):
        args = module.resolve(module.Args(samples_per_prompt=2, baseline=baseline))
        with_greedy = module.token_advantages(scores - greedy, kl, mask, args, CPU)
        without = module.token_advantages(scores, kl, mask, args, CPU)
        torch.testing.assert_close(with_greedy, without)


def test_demonstrations_still_train(tmp_path):
    module = load("remax")
    flags = [*SHORT, "--demos", str(module.TINY / "sort_train.jsonl")]
    metrics = train(module, tmp_path / "run", *flags)
    assert metrics[-1]["step"] == 2 and metrics[-1]["reward"] == 1.0


# -- dpo.py ----------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_odds(logprob, n):
    p = math.exp(logprob / n)
    return math.log(p / (1 - p))


def orpo(c, r, a, b, m, n, beta):
    """Hong et al. 2024, (6) and (7)."""
    return -c / m - beta * math.log(sigmoid(log_odds(c, m) - log_odds(r, n)))


def norm(c, r, a, b, m, n, beta):
    """Lambert et al. 2024 (Tulu 3), (6)."""
    return -math.log(sigmoid(beta * (c - a) / m - beta * (r - b) / n))


def apo_zero(c, r, a, b, m, n, beta):
    """D'Oosterlinck et al. 2024, (7)."""
    return 1 - sigmoid(beta * (c - a)) + sigmoid(beta * (r - b))


DPO = {"orpo": orpo, "dpo_norm": norm, "apo_zero": apo_zero}
BETAS = {"orpo": 0.5, "dpo_norm": 5.0, "apo_zero": 0.5}
PER_TOKEN = {"orpo", "dpo_norm"}


def numbers():
    """Log-probabilities [5] of chosen, rejected, and by the reference; lengths of the sides."""
    g = torch.Generator().manual_seed(0)
    logprobs = [-20 * torch.rand(5, generator=g, dtype=torch.float64) for _ in range(4)]
    logprobs[0][2] = -0.01  # a chosen side of one token that is almost sure
    return logprobs, torch.tensor([3, 9, 1, 4, 7]), torch.tensor([5, 2, 1, 8, 7])


def dpo_args(name, **flags):
    module = load(name)
    return module.resolve(module.Args(loss=DPO[name].__name__, **flags))


@pytest.mark.parametrize("beta", [0.2, 3.0])
@pytest.mark.parametrize("name", DPO)
def test_a_loss_and_its_gradient_against_the_formula(name, beta):
    (c, r, a, b), m, n = numbers()
    c.requires_grad_()
    r.requires_grad_()
    got = load(name).preference_loss(c, r, a, b, m, n, dpo_args(name, beta=beta))
    grad_c, grad_r = torch.autograd.grad(got.sum(), (c, r))
    step = 1e-6
    for i in range(5):
        x = [v[i].item() for v in (c, r, a, b, m, n)]
        assert got[i].item() == pytest.approx(DPO[name](*x, beta), rel=1e-9)
        for place, grad in ((0, grad_c), (1, grad_r)):
            up = list(x)
            up[place] += step
            down = list(x)
            down[place] -= step
            slope = (DPO[name](*up, beta) - DPO[name](*down, beta)) / (2 * step)
            assert grad[i].item() == pytest.approx(slope, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("name", DPO)
def test_the_logged_margin_is_in_the_units_of_the_loss(name):
    (c, r, a, b), m, n = numbers()
    args = dpo_args(name)
    assert args.beta == BETAS[name]
    logprobs = torch.stack([c, r], 1)
    ref = torch.stack([a, b], 1)
    length = torch.stack([m, n], 1)
    wanted = args.beta * (logprobs - ref)
    if name in PER_TOKEN:
        wanted = wanted / length
    torch.testing.assert_close(load(name).implicit_reward(logprobs, ref, length, args), wanted)


def test_two_sides_that_are_sure_make_no_infinite_odds():
    """Infinity minus infinity would be nan."""
    sure = torch.zeros(1, requires_grad=True)
    one = torch.ones(1)
    loss = load("orpo").preference_loss(sure, sure, sure, sure, one, one, dpo_args("orpo"))
    loss.sum().backward()
    assert loss.isfinite().all() and sure.grad.isfinite().all()


@pytest.mark.parametrize("name", DPO)
def test_dpo_with_another_loss_runs(name, tmp_path, capsys):
    module = load(name)
    pairs = (module.TINY / "pairs_train.jsonl").read_text().splitlines()[:16]
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs))
    data = str(tmp_path / "pairs.jsonl")
    flags = ["--loss", DPO[name].__name__, "--data", data, "--eval_data", data, "--steps", "2"]
    small = ["--device", "cpu", "--pairs_per_step", "16", "--warmup", "0"]
    metrics = train(module, tmp_path / "run", *flags, *small)
    assert [m["step"] for m in metrics] == [0, 1, 2]
    # step 1 trains on all pairs, which are those held out: its loss is that before training
    assert metrics[1]["loss"] == pytest.approx(metrics[0]["eval/loss"], rel=1e-4)
    assert metrics[2]["eval/loss"] < metrics[0]["eval/loss"]
    has_reference = name != "orpo"
    assert (tmp_path / "run" / "reference.pt").exists() == has_reference
    assert (metrics[1]["margin"] == pytest.approx(0, abs=1e-4)) == has_reference
    assert "below the reference" not in capsys.readouterr().out
    if name == "apo_zero":
        assert metrics[0]["eval/loss"] == pytest.approx(1.0, abs=1e-4)
    if name == "dpo_norm":
        assert metrics[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_orpo_is_not_warned_of_leaving_a_reference_that_it_has_not():
    module = load("orpo")
    warned = set()
    module.warn_if_unlikely(3.0, dpo_args("orpo"), warned)
    assert warned == set()
    module.warn_if_unlikely(3.0, module.resolve(module.Args()), warned)
    assert warned == {"lost"}


def test_orpo_evaluates_pairs_without_training_and_without_a_reference():
    module = load("orpo")
    flags = {"steps": 0, "eval_data": str(module.TINY / "pairs_test.jsonl")}
    assert module.resolve(module.Args(loss="orpo", **flags)).steps == 0
    with pytest.raises(SystemExit):
        module.resolve(module.Args(**flags))


def test_orpo_refuses_a_reference(capsys):
    with pytest.raises(SystemExit):
        dpo_args("orpo", reference="MODEL")
    assert "--reference: --loss orpo uses no reference" in capsys.readouterr().err


# -- reward_model.py -------------------------------------------------------------------------------


def scored_pairs(path, scores):
    """Pairs of the bundled task whose sides have these scores, [(chosen, rejected), ...]."""
    module = load("margin_from_scores")
    rows = []
    for line, (chosen, rejected) in zip(
        (module.TINY / "pairs_train.jsonl").read_text().splitlines(), scores
    ):
        rows.append({**json.loads(line), "score_chosen": chosen, "score_rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


POINTS = [(8.5, 3), (10, 1), (5, 5), (4, 6.5)]


def test_a_margin_is_the_scaled_difference_of_the_scores(tmp_path):
    """Touvron et al. 2023, (2): -log sigmoid(r(chosen) - r(rejected) - margin)."""
    module = load("margin_from_scores")
    rows = scored_pairs(tmp_path / "pairs.jsonl", POINTS)
    args = module.Args(use_margin=True, margin_scale=0.25)
    margins = module.read_margins(rows, args)
    assert margins.tolist() == pytest.approx([0.25 * (a - b) for a, b in POINTS])
    assert module.read_margins(rows, module.Args()).tolist() == [0.0] * 4
    chosen = torch.tensor([0.5, 2.0, -1.0, 0.1], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.2, -1.0, -2.0, 0.4], dtype=torch.float64)
    loss = module.pair_loss(chosen, rejected, margins, 4, 0.0)
    loss.backward()
    wanted = 0.0
    for i, (a, b) in enumerate(POINTS):
        gap = chosen[i].item() - rejected[i].item() - 0.25 * (a - b)
        wanted -= math.log(sigmoid(gap)) / 4
        assert chosen.grad[i].item() == pytest.approx(-sigmoid(-gap) / 4, rel=1e-6)
    assert loss.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("missing", ["score_chosen", "score_rejected"])
@pytest.mark.parametrize("value", [None, "8"])
def test_a_pair_without_scores_is_named(missing, value, tmp_path, capsys):
    module = load("margin_from_scores")
    rows = scored_pairs(tmp_path / "pairs.jsonl", POINTS)
    rows[2][missing] = value
    with pytest.raises(SystemExit):
        module.read_margins(rows, module.Args(use_margin=True))
    assert 'needs "score_chosen", "score_rejected"' in capsys.readouterr().err


def test_a_reward_model_with_margins_from_scores_runs(tmp_path):
    """The head starts small, so the first loss is that of scores that are all about equal."""
    module = load("margin_from_scores")
    scored_pairs(tmp_path / "pairs.jsonl", POINTS)
    flags = ["--data", str(tmp_path / "pairs.jsonl"), "--use_margin", "--steps", "2"]
    small = "--device cpu --pairs_per_step 4 --learning_rate 1e-9".split()
    small += ["--policy=", "--eval_prompts="]
    metrics = train(module, tmp_path / "run", *flags, *small)
    steps = [m for m in metrics if "loss" in m]
    wanted = sum(-math.log(sigmoid(-0.3 * (a - b))) for a, b in POINTS) / 4
    assert len(steps) == 2
    assert steps[0]["loss"] == pytest.approx(wanted, rel=0.2)


# -- Whole runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, flags",
    [
        ("length_adaptive_lambda", SHORT),
        ("remax", SHORT),
        ("orpo", "--loss orpo --device cpu --steps 2 --pairs_per_step 8 --eval_prompts=".split()),
        (
            "margin_from_scores",
            "--device cpu --steps 2 --pairs_per_step 8 --policy= --eval_prompts=".split(),
        ),
    ],
)
def test_a_patched_script_ends_with_status_0(name, flags, tmp_path):
    command = [sys.executable, str(patched(name)), *flags, "--out", str(tmp_path / "run")]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0
    assert (tmp_path / "run" / "model").is_dir()


@pytest.mark.learning
@pytest.mark.parametrize(
    "name, flags, gain", [("remax", [], 0.15), ("orpo", ["--loss", "orpo"], 0.10)]
)
def test_a_patched_script_learns_to_sort(name, flags, gain, tmp_path):
    """Shortened: a hundred steps, from at most 0.40."""
    short = ["--device", "cpu", "--steps", "100", "--eval_every", "100"]
    lines = train(load(name), tmp_path / "run", *short, *flags)
    curve = [line["eval/exact"] for line in lines if "eval/exact" in line]
    assert curve[0] <= 0.40 and curve[-1] >= curve[0] + gain, curve
