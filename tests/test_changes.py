"""tests/changes: every patch applies, is small, and does what its page says. Formulas of those of grpo.py.

A formula is written out here anew, token by token in float64, and autograd gives its gradient."""

import importlib
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import pytest
import torch
from changes_helpers import (
    CHANGES,
    DIFFS,
    QUICK,
    apply,
    changed_lines,
    load,
    patched,
    patches_of,
    script_of,
    train,
)
from conftest import ROOT, family, make_tokenizer

import common
import grpo
from common import World, as_samples

CPU = World(0, 1, torch.device("cpu"), torch.float32)
TEXT = (CHANGES / "README.md").read_text()
GRPO = patches_of("grpo")
IN_PARTS = f"{ROOT}/tests/tiny/sums.py:brief"  # pays for digits alone and for the right ones


def close(value, wanted):
    """Equal but for rounding."""
    value = torch.as_tensor(value, dtype=torch.float64)
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-9)


# -- All patches: they apply, they are small, and the page tells of them ---------------------------


def test_there_are_patches_of_grpo():
    assert len(GRPO) >= 10


@pytest.mark.parametrize("name", DIFFS)
def test_a_patch_applies_and_changes_at_most_ten_lines(name):
    """A change of the script that breaks a patch fails here: write the patch anew."""
    patched(name)
    assert 1 <= changed_lines(name) <= 10


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@pytest.mark.parametrize("name", DIFFS)
def test_git_apply_takes_a_patch_as_the_page_says(name):
    """From the root of a checkout with .git. Without one it takes it, too, as `apply` does."""
    command = ["git", "apply", "--check", f"tests/changes/{name}.diff"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0


@pytest.mark.skipif(not shutil.which("patch"), reason="needs patch")
@pytest.mark.parametrize("name", DIFFS)
def test_patch_takes_a_patch_too(name):
    """It is stricter about a hunk whose context is longer on one side."""
    command = ["patch", "-p1", "--fuzz=0", "--dry-run", "-s", "-i", f"tests/changes/{name}.diff"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0


def test_a_patch_that_does_not_fit_is_noticed(tmp_path):
    """In a folder of a repository, `git apply` would leave the file out and say nothing."""
    (tmp_path / "grpo.py").write_text((ROOT / "grpo.py").read_text().replace("clipped_loss", "x"))
    with pytest.raises(AssertionError, match="does not apply"):
        apply("cispo", tmp_path)


def test_patches_of_different_functions_can_be_combined(tmp_path):
    shutil.copy(ROOT / "grpo.py", tmp_path)
    for name in ("cispo", "maxrl", "soft_overlong_punishment"):
        apply(name, tmp_path)


@pytest.mark.parametrize("name", DIFFS)
def test_a_patched_script_keeps_the_style_of_the_scripts(name):
    """At most 100 columns, and a comment on what is new."""
    assert max(map(len, patched(name).read_text().splitlines())) <= 100
    assert re.search(r"^\+ *# .*\(?[A-Z]", DIFFS[name].read_text(), re.M)
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists():
        pytest.skip("ruff is not installed")
    for command in (["check"], ["format", "--check"]):
        # under the script's own name, so that ruff knows `common` for a file of the repository
        command = [str(ruff), *command, "--quiet", "--stdin-filename", f"{script_of(name)}.py", "-"]
        assert subprocess.run(command, cwd=ROOT, input=patched(name).read_bytes()).returncode == 0


@pytest.mark.parametrize("name", DIFFS)
def test_the_page_has_a_row_for_a_patch_with_its_number_of_lines(name):
    section = TEXT.partition(f"\n## {script_of(name)}.py\n")[2].partition("\n## ")[0]
    rows = re.findall(rf"^\| \[{name}\]\({name}\.diff\) \|.*$", section, re.M)
    assert len(rows) == 1, "no row under the heading of its script, or two"
    assert f"| {changed_lines(name)} |" in rows[0], "another number of lines"


def test_the_page_names_no_patch_that_is_not_there():
    assert set(re.findall(r"\]\((\w+)\.diff\)", TEXT)) == set(DIFFS)


# -- The losses: value and gradient, token by token ------------------------------------------------


def tokens():
    """Four completions of unequal lengths, advantages of both signs and 0, ratios on all sides of the
    bounds, and a sampler whose probabilities are off by factors of up to 3."""
    generator = torch.Generator().manual_seed(8)

    def noise(scale):
        return scale * torch.randn(4, 6, generator=generator, dtype=torch.float64)

    mask = torch.arange(6) < torch.tensor([[6], [3], [5], [4]])
    old = (-2.5 + noise(0.5)) * mask
    logprobs = (old + noise(1.0)) * mask
    sampled = torch.where(mask, old + noise(0.5), -9.0)  # off the mask anything may stand
    ref = (old + noise(0.3)) * mask
    A = torch.tensor([1.3, -0.8, -1.7, 0.0], dtype=torch.float64)
    weights = mask / torch.tensor([[12.0], [6.0], [10.0], [8.0]], dtype=torch.float64)
    entropy = torch.rand(4, 6, generator=generator, dtype=torch.float64) * mask
    return SimpleNamespace(**locals())


def loss_of(module, monkeypatch, t, **flags):
    """Value and gradient of the script's `update_loss` for these tokens."""
    logprobs = t.logprobs.clone().requires_grad_()
    entropy = t.entropy.clone().requires_grad_()
    monkeypatch.setattr(module, "token_logprobs", lambda *a: (logprobs, entropy))
    samples = SimpleNamespace(logprobs=t.sampled)
    batch = module.Batch(samples, t.A, t.weights, t.old, t.ref)
    args = module.resolve(module.Args(**flags))
    loss = module.update_loss(None, batch, [0, 1, 2, 3], args, common.Meter(), False)
    loss.backward()
    return loss.item(), logprobs.grad, entropy.grad


def written_out(t, token_loss, beta=0.0):
    """The same for a formula: token_loss(log pi, log pi_old, log q, A, row) of one token, q the
    sampler, and k3 times the ratio beside it."""
    logprobs = t.logprobs.clone().requires_grad_()
    total = 0.0
    for row, column in t.mask.nonzero().tolist():
        own = logprobs[row, column]
        others = [x[row, column].item() for x in (t.old, t.sampled)]
        loss = token_loss(own, *others, t.A[row].item(), row)
        gap = own - t.ref[row, column].item()
        kl = ((-gap).exp() - 1 + gap) * (own - others[0]).exp()
        total = total + t.weights[row, column].item() * (loss + beta * kl)
    total.backward()
    return total.item(), logprobs.grad


def clipped(own, old, A, low=0.2, high=0.2):
    """Equation (3)."""
    ratio = (own - old).exp()
    if A > 0:
        return -A * ratio if ratio < 1 + high else -A * (1 + high) + 0 * own
    return -A * ratio if ratio > 1 - low else -A * (1 - low) + 0 * own


def cispo(own, old, sampled, A, row):
    weight = min(math.exp(own.item() - old), 1.2)
    return -weight * A * own


def sapo(own, old, sampled, A, row):
    tau = 1.0 if A > 0 else 1.05
    gate = 4 / tau / (1 + (-tau * ((own - old).exp() - 1)).exp())
    return -gate * A


def dual_clip(own, old, sampled, A, row):
    loss = clipped(own, old, A)
    return 0 * own - 3 * A if A < 0 and loss.item() > -3 * A else loss


def truncated_importance_sampling(own, old, sampled, A, row):
    return min(math.exp(old - sampled), 2.0) * clipped(own, old, A)


def masked_importance_sampling(own, old, sampled, A, row):
    t = tokens()
    length = int(t.mask[row].sum())
    weight = math.prod(math.exp(t.old[row, i] - t.sampled[row, i]) for i in range(length))
    return (weight if weight <= 3 else 0.0) * clipped(own, old, A)


LOSSES = [cispo, sapo, dual_clip, truncated_importance_sampling, masked_importance_sampling]


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("formula", LOSSES, ids=lambda f: f.__name__)
def test_a_loss_is_its_formula_and_leaves_the_kl_alone(formula, beta, monkeypatch):
    t = tokens()
    loss, gradient, _ = loss_of(load(formula.__name__), monkeypatch, t, beta=beta)
    wanted_loss, wanted_gradient = written_out(t, formula, beta)
    close(loss, wanted_loss)
    close(gradient, wanted_gradient)


def test_the_plain_loss_is_equation_3_on_these_tokens(monkeypatch):
    """So the formulas above are held against what the patches change."""
    t = tokens()
    loss, gradient, _ = loss_of(grpo, monkeypatch, t)
    wanted = written_out(t, lambda own, old, sampled, A, row: clipped(own, old, A))
    close(loss, wanted[0])
    close(gradient, wanted[1])


def test_the_tokens_of_the_tests_reach_every_case():
    t = tokens()
    ratio = (t.logprobs - t.old).exp()
    weight = (t.old - t.sampled).exp()
    for A in (1, -1):
        here = t.mask & (t.A[:, None].sign() == A)
        assert ratio[here].min() < 0.8 and ratio[here].max() > 1.2
        assert (weight[here] > 2).any() and (weight[here] < 1).any()
    assert ratio[t.mask & (t.A[:, None] < 0)].max() > 3
    whole = ((t.old - t.sampled) * t.mask).sum(1).exp()[t.A != 0]
    assert (whole > 3).any() and ((0 < whole) & (whole < 3)).any()


def test_cispo_keeps_the_gradient_of_a_token_that_the_clip_has_silenced(monkeypatch):
    """A good token at ratio 2: (3) gives no gradient, CISPO that of 1.2 A log pi. Its trap: with the cap
    at clip_high, as in TRL, epsilon_high 1.2 is this --clip_high 0.2."""
    t = tokens()
    t.logprobs = t.old + math.log(2.0) * t.mask
    t.A = torch.ones(4, dtype=torch.float64)
    _, plain, _ = loss_of(grpo, monkeypatch, t)
    _, gradient, _ = loss_of(load("cispo"), monkeypatch, t)
    assert (plain == 0).all()
    close(gradient, -1.2 * t.weights)
    _, gradient, _ = loss_of(load("cispo"), monkeypatch, t, clip_high=4.0)
    close(gradient, -2.0 * t.weights)


def test_the_log_counts_what_the_dual_clip_silences():
    module = load("dual_clip")
    ratio = torch.tensor([[0.5, 1.0, 2.0, 4.0]])
    low, high = module.is_clipped(ratio, torch.tensor([[-1.0]]), 0.2, 0.2)
    assert low.tolist() == [[True, False, False, False]]
    assert high.tolist() == [[False, False, False, True]]
    low, high = module.is_clipped(ratio, torch.tensor([[1.0]]), 0.2, 0.2)
    assert high.tolist() == [[False, False, True, True]]


# -- The entropy bonus -----------------------------------------------------------------------------


def test_the_entropy_bonus_is_in_the_loss_with_the_tokens_weights(monkeypatch):
    t = tokens()
    plain_loss, plain, nothing = loss_of(grpo, monkeypatch, t)
    loss, gradient, of_entropy = loss_of(load("entropy_bonus"), monkeypatch, t)
    assert nothing is None
    close(loss, plain_loss - 0.01 * (t.entropy * t.weights).sum())
    close(gradient, plain)
    close(of_entropy, -0.01 * t.weights)


def test_the_entropys_gradient_is_that_of_the_whole_distribution():
    """Against a forward for each completion, without padding, and -sum p log p over the vocabulary."""
    module = load("entropy_bonus")
    model = family("llama").double()
    prompts, completions = [[7, 12, 3], [5, 9]], [[4, 8, 1], [6, 1]]
    samples = as_samples(prompts, completions, make_tokenizer(), CPU)
    weights = torch.tensor([[0.3, 0.2, 0.1], [0.5, 0.4, 0.0]], dtype=torch.float64)

    _, entropy = module.token_logprobs(model, samples, [0, 1], 0.8)
    (entropy * weights).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    model.zero_grad()
    total = 0.0
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        logits = model(torch.tensor([prompt + completion])).logits[0] / 0.8
        for j in range(len(completion)):
            p = logits[len(prompt) - 1 + j].softmax(-1)
            total = total - weights[i, j] * (p * p.log()).sum()
    total.backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (gradient - wanted).norm() < 1e-6 * wanted.norm() and wanted.norm() > 0


def test_the_entropy_bonus_trains_groups_with_equal_rewards(tmp_path):
    """With one reward for all, the plain script makes no step, and the bonus raises the entropy."""
    (tmp_path / "r.py").write_text("def same(completion, row):\n    return 1.0\n")
    flags = [
        *QUICK,
        "--reward",
        f"{tmp_path}/r.py:same",
        "--learning_rate",
        "1e-3",
        "--warmup",
        "0",
    ]
    plain = train(grpo, tmp_path / "plain", *flags)
    bonus = train(load("entropy_bonus"), tmp_path / "bonus", *flags)
    assert plain[-1]["grad_norm"] == 0
    assert all(line["grad_norm"] > 0 for line in bonus if "grad_norm" in line)
    assert bonus[-1]["equal_groups"] == 1


# -- The advantages --------------------------------------------------------------------------------


REWARDS = [[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0]]


def advantages_of(name, rows, scale=None):
    """With --scale as the patched script has it."""
    module = load(name)
    rewards = torch.tensor(rows, dtype=torch.float64).flatten()
    scale = scale or module.Args().scale
    return module.group_advantages(rewards, rewards, len(rows[0]), scale, False)


def test_maxrl_divides_by_the_mean():
    wanted = []
    for group in REWARDS:
        m = mean(group)
        wanted += [(r - m) / m if m else 0.0 for r in group]
    close(advantages_of("maxrl", REWARDS), wanted)


def test_maxrl_learns_nothing_where_the_mean_is_0_or_less():
    """As in prime-rl; 1 and -1 would give an infinite advantage, and below 0 the sign would turn."""
    close(advantages_of("maxrl", [[1.0, -1.0, 1.0, -1.0], [1.0, -2.0, -2.0, -1.0]]), [0.0] * 8)


@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_maxrls_expected_gradient_is_that_of_the_first_terms_of_log_p(n, p):
    """All groups of n answers, right with the chance p. d log pi is 1 / p or -1 / (1 - p), by dp.
    log p = -sum of (1 - p)^k / k over k, whose derivative by p is the sum of (1 - p)^(k - 1)."""
    total = 0.0
    for group in itertools.product([0.0, 1.0], repeat=n):
        chance = math.prod(p if r else 1 - p for r in group)
        A = advantages_of("maxrl", [group]).tolist()
        score = [a * (1 / p if r else -1 / (1 - p)) for a, r in zip(A, group)]
        total += chance * sum(score) / n
    close(total, sum((1 - p) ** (k - 1) for k in range(1, n)))


def test_reinforce_plus_plus_divides_by_the_spread_of_the_differences():
    """Not by that of the rewards, in which the prompts' means differ: 0 to 3 here."""
    A = [r - mean(group) for group in REWARDS for r in group]
    wanted = [a / (stdev(A) + 1e-4) for a in A]
    close(advantages_of("reinforce_plus_plus_baseline", REWARDS), wanted)
    by_rewards = advantages_of("cispo", REWARDS, "batch")  # a patch that leaves (1) as it is
    assert stdev(sum(REWARDS, [])) > 1.5 * stdev(A)
    assert (by_rewards.abs() <= torch.tensor(wanted).abs()).all()


# -- The rewards -----------------------------------------------------------------------------------


def rollout_of(module, monkeypatch, lengths, reward, **flags):
    """Rewards and log of a rollout whose completions have these lengths, four of each prompt."""
    completions = [[4] * length for length in lengths]
    samples = as_samples([[7]] * len(lengths), completions, make_tokenizer(), CPU)
    monkeypatch.setattr(common, "sample", lambda *a, **k: samples)
    prompts = [([7], {"prompt": str(i)}) for i in range(len(lengths) // 4)]
    settings = {"samples_per_prompt": 4, "prompts_per_step": len(prompts), "max_new_tokens": 20}
    args = module.resolve(module.Args(**settings | flags))
    meter = common.Meter()
    _, rewards, _ = module.rollout(None, None, prompts, reward, False, args, CPU, 1, meter)
    return rewards, meter.result(CPU)


def test_the_punishment_of_length_is_that_of_dapo(monkeypatch):
    """L_max 20, so L_cache is 4: nothing up to 16 tokens, then -1/4 a token down to -1."""
    lengths = [1, 15, 16, 17, 18, 19, 20, 20]
    reward = SimpleNamespace(seconds=0.0)
    reward.score = lambda samples, records: {"reward": [1.0] * len(records)}
    module = load("soft_overlong_punishment")
    rewards, log = rollout_of(module, monkeypatch, lengths, reward)
    wanted = []
    for length in lengths:
        punishment = 0.0
        if length > 20 - 4:
            punishment = ((20 - 4) - length) / 4
        wanted.append(1.0 + punishment)
    close(rewards, wanted)
    assert log["reward"] == 1, "the log is of the task's reward, as in the plain script"
    assert log["equal_groups"] == 0, "answers of equal reward and unequal length are not equal"


def apart(parts, n):
    """GDPO's advantages, written out: parts is a list of rewards, each a list of groups."""
    sums = [0.0] * sum(map(len, parts[0]))
    for part in parts:
        row = 0
        for group in part:
            for r in group:
                spread = stdev(group) + 1e-4
                sums[row] += 0.0 if len(set(group)) == 1 else (r - mean(group)) / spread
                row += 1
    centre = mean(sums)
    return [(s - centre) / (stdev(sums) + 1e-4) for s in sums]


def test_gdpo_normalises_each_part_apart(monkeypatch):
    """The second part's spread is 100 times as large. In equation (1) of the sum, the first one would
    hardly count; here the two count the same."""
    right = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    short = [[0.0, 100.0, 30.0, 0.0], [50.0, 50.0, 50.0, 50.0]]
    parts = {"reward/right": sum(right, []), "reward/short": sum(short, [])}
    scores = {"reward": [-1.0] * 8} | parts  # the reward itself is only logged
    reward = SimpleNamespace(score=lambda samples, records: scores, seconds=0.0)
    module = load("gdpo")
    rewards, log = rollout_of(module, monkeypatch, [5] * 8, reward)
    A = module.group_advantages(rewards, rewards, 4, module.Args().scale, False)
    torch.testing.assert_close(A.tolist(), apart([right, short], 4), rtol=1e-4, atol=1e-5)
    assert A[0] > 0.5, "right, and not short"
    assert log["reward"] == -1 and log["reward/short"] == mean(sum(short, []))
    assert log["equal_groups"] == 0


def test_gdpo_of_a_reward_without_parts_is_grpo_divided_by_the_std_of_the_batch(monkeypatch):
    right = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    reward = SimpleNamespace(seconds=0.0)
    reward.score = lambda samples, records: {"reward": sum(right, [])}
    module = load("gdpo")
    rewards, _ = rollout_of(module, monkeypatch, [5] * 8, reward)
    A = module.group_advantages(rewards, rewards, 4, module.Args().scale, False)
    torch.testing.assert_close(A.tolist(), apart([right], 4), rtol=1e-4, atol=1e-5)


# -- Whole runs ------------------------------------------------------------------------------------


def first_gradient(module, out, monkeypatch, *flags):
    """The gradient of a run's first update."""
    seen = []
    honest = common.clip_gradients

    def clip_gradients(model, limit):
        seen.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))
        return honest(model, limit)

    monkeypatch.setattr(common, "clip_gradients", clip_gradients)
    train(module, out, *QUICK, *flags)
    monkeypatch.setattr(common, "clip_gradients", honest)
    return seen[0]


@pytest.mark.parametrize("formula", LOSSES, ids=lambda f: f.__name__)
def test_with_one_update_and_a_true_sampler_the_gradient_is_that_of_the_plain_script(
    formula, tmp_path, monkeypatch
):
    """Every ratio is 1, and the sampler's log-probabilities are the trainer's but for rounding."""
    flags = ["--beta", "0.1", "--steps", "1"]
    plain = first_gradient(grpo, tmp_path / "plain", monkeypatch, *flags)
    gradient = first_gradient(load(formula.__name__), tmp_path / "own", monkeypatch, *flags)
    assert (gradient - plain).norm() < 1e-4 * plain.norm() and plain.norm() > 0


@pytest.mark.parametrize("name", GRPO)
def test_a_patched_script_trains(name, tmp_path):
    """Two updates a step and a reference, so that ratios and KL are there."""
    flags = ["--minibatches", "2", "--beta", "0.1"]
    if name == "gdpo":
        flags += ["--reward", IN_PARTS]
    lines = train(load(name), tmp_path / "run", *QUICK, *flags)
    assert lines[-1]["step"] == 2 and math.isfinite(lines[-1]["loss"])
    assert lines[-1]["grad_norm"] > 0 and (tmp_path / "run" / "model").is_dir()


def test_a_patched_script_runs_from_the_command_line(tmp_path):
    command = [sys.executable, str(patched("cispo")), *QUICK, "--out", str(tmp_path / "run")]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0


def test_every_patch_has_a_row_of_runs(monkeypatch):
    """Three seeds of each patch and of the unchanged script beside it, at three learning rates."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    changes = importlib.import_module("changes")
    assert changes.PATCHES.keys() == DIFFS.keys()
    rows = json.loads((ROOT / "tests" / "bench" / "changes.json").read_text())
    seeds = {(row["name"], row["factor"], row["seed"]) for row in rows}
    names = [*changes.PLAIN, *changes.PATCHES]
    assert len(rows) == len(seeds)
    assert seeds == set(itertools.product(names, changes.FACTORS, (1, 2, 3)))
    assert all(row["status"] == 0 for row in rows)
    assert (ROOT / "tests" / "bench" / "changes.md").read_text() == changes.table(rows)


@pytest.mark.parametrize("name", ["defaults", "gdpo", "cispo, k3_ratio"])
def test_our_half_of_the_comparison_with_trl_runs_and_gives_the_numbers_that_are_kept(
    name, monkeypatch
):
    """A step of a script by tests/bench/agree_trl.py, which needs TRL for the other half."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    agree = importlib.import_module("agree_trl")
    (patch, flags) = next((case[1], case[3]) for case in agree.cases() if case[0] == name)
    world = common.start("cpu", seed=0)
    tokenizer = common.load_tokenizer(str(grpo.TINY / "model"))
    data = grpo.TINY / "sort_train.jsonl"
    prompts = common.load_prompts(data, "--data", tokenizer, grpo.Args(), "")[: agree.PROMPTS]
    script = load(patch) if patch else grpo
    loss, gradient, _, _ = agree.step_of_grpo(script, flags, prompts, tokenizer, world)
    kept = json.loads((ROOT / "tests" / "bench" / "agree_trl.json").read_text())["cases"]
    row = next(row for row in kept if row["case"] == name)
    assert loss == pytest.approx(row["loss"], abs=1e-4) and gradient.norm() > 0


@pytest.mark.learning
@pytest.mark.parametrize(
    "name, flags",
    [
        ("cispo", ["--minibatches", "2"]),
        ("maxrl", []),
        ("gdpo", ["--reward", IN_PARTS]),
    ],
)
def test_a_patched_script_learns_to_sort(name, flags, tmp_path):
    """Shortened, from at most 0.40; the plain script gets from 0.31 to about 0.5 in these steps."""
    lines = train(load(name), tmp_path / "run", "--device", "cpu", "--steps", "40", *flags)
    curve = [line["eval/exact"] for line in lines if "eval/exact" in line]
    assert curve[0] <= 0.40 and curve[-1] >= curve[0] + 0.1, curve
