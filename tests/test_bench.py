"""The comparison of tests/bench: which setting it chooses, what it runs next, how it counts."""

import ast
import importlib
import inspect
import json
import math
import re
import statistics

import numpy as np
import pytest
import tyro
from conftest import ROOT

MODULES = ("common", "reinforce", "ppo", "grpo", "dpo", "reward_model")


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    return importlib.import_module("results")


def rows_of(results, name, score):
    """A complete grid; score(variant, rate) is the validation score of every seed."""
    method = results.METHODS[name]
    return [
        {"method": name, "variant": v, "rate": rate, "seed": seed, "score": score(v, rate)}
        for v in method.variants
        for rate in method.rates
        for seed in results.GRID_SEEDS
    ]


def test_the_grid_has_five_rates_and_three_seeds_and_is_run_before_the_new_seeds(results):
    for name, method in results.METHODS.items():
        rates = np.array(method.rates)
        assert len(rates) >= 5 and np.allclose(rates[1:] / rates[:-1], 2)
        jobs = results.jobs_of([], [name])
        assert len(jobs) == len(set(jobs)) == len(rates) * len(method.variants)
        assert {job[3] for job in jobs} == {1}
        rows = rows_of(results, name, lambda variant, rate: 0.5)
        jobs = results.jobs_of([row for row in rows if row["seed"] == 1], [name])
        assert len(jobs) == len(set(jobs)) == 2 * len(rates) * len(method.variants)
        assert {job[3] for job in jobs} == {2, 3}


def test_the_best_mean_chooses_and_ten_new_seeds_follow(results):
    name = "Dr. GRPO"
    best = ("four updates", 2e-4)

    def score(variant, rate):
        return 0.9 if (variant, rate) == best else 0.5 - 0.01 * abs(math.log2(rate / 2e-4))

    rows = rows_of(results, name, score)
    assert results.chosen(rows, name) == (best, [], [])
    jobs = results.jobs_of(rows, [name])
    assert jobs == [(name, *best, seed) for seed in range(11, 21)]
    lucky = next(row for row in rows if row["rate"] == 1e-4 and row["variant"] != best[0])
    lucky["score"] = 1.0  # one lucky seed is not the best mean
    assert results.chosen(rows, name) == (best, [], [])
    done = rows + [{**rows[0], "variant": best[0], "rate": best[1], "seed": 11, "score": 1.0}]
    assert len(results.jobs_of(done, [name])) == 9
    assert results.chosen(done, name) == (best, [], []), "test scores choose nothing"
    other = {**rows[0], "variant": best[0], "rate": 1e-4, "score": 1.0}
    tested = rows + [{**other, "seed": seed} for seed in range(11, 31)]
    assert results.chosen(tested, name) == (best, [], []), "the mean of 1e-4 would be above 0.9"


@pytest.mark.parametrize("slope, wider", [(1, 1.6e-3), (-1, 2.5e-5)])
def test_a_best_rate_at_the_edge_widens_the_grid_by_one(results, slope, wider):
    name = "CISPO"
    rows = rows_of(results, name, lambda variant, rate: 0.5 + 0.01 * slope * math.log2(rate))
    setting, needed, later = results.chosen(rows, name)
    assert setting is None and needed == [("four updates", pytest.approx(wider), 1)] and not later
    assert {job[2] for job in results.jobs_of(rows, [name])} == {needed[0][1]}
    more = [{**rows[0], "rate": needed[0][1], "seed": seed, "score": 0.1} for seed in (1, 2, 3)]
    setting, needed, later = results.chosen(rows + more, name)
    assert setting == ("four updates", 8e-4 if slope > 0 else 5e-5) and needed == later == []


def test_rates_that_are_far_behind_with_the_first_seed_get_their_other_seeds_last(results):
    name = "CISPO"
    scores = {5e-5: 0.75, 1e-4: 0.84, 2e-4: 0.9, 4e-4: 0.81, 8e-4: 0.2}
    rows = rows_of(results, name, lambda variant, rate: scores[rate])
    firsts = [row for row in rows if row["seed"] == 1]
    setting, needed, later = results.chosen(firsts, name)
    near = {(rate, seed) for rate in (1e-4, 2e-4, 4e-4) for seed in (2, 3)}
    assert setting is None and {run[1:] for run in needed} == near
    assert {run[1:] for run in later} == {(rate, seed) for rate in (5e-5, 8e-4) for seed in (2, 3)}
    jobs = results.jobs_of(firsts, [name])
    assert {job[2:] for job in jobs[:6]} == near and len(jobs) == 10
    most = [row for row in rows if row["seed"] == 1 or scores[row["rate"]] > 0.8]
    setting, needed, later = results.chosen(most, name)
    assert setting == ("four updates", 2e-4) and needed == [] and len(later) == 4
    jobs = results.jobs_of(most, [name])
    assert [job[3] for job in jobs[:10]] == list(range(11, 21)) and len(jobs) == 14
    lucky = [
        {**row, "score": 1.0} if row["rate"] == 5e-5 and row["seed"] > 1 else row for row in rows
    ]
    setting, needed, _ = results.chosen(lucky, name)  # 0.92 in the mean, and at the edge
    assert setting is None and needed == [("four updates", 2.5e-5, 1)]
    fallen = [{**row, "score": 0.6} if row["seed"] > 1 else row for row in most]
    setting, needed, _ = results.chosen(fallen, name)  # the best mean is 0.7: 0.75 is near it
    assert setting is None and needed == [("four updates", 5e-5, 2), ("four updates", 5e-5, 3)]


def test_a_variant_that_is_not_the_best_is_widened_too(results):
    """A rate above its grid might make it the best."""
    name = "Dr. GRPO"

    def score(variant, rate):
        return 0.9 - abs(rate - 2e-4) if variant == "four updates" else 0.1 + rate

    setting, needed, _ = results.chosen(rows_of(results, name, score), name)
    assert setting is None and needed == [("one update", 1.6e-3, 1)]


def test_of_equal_settings_the_better_curve_decides(results):
    name = "CISPO"
    rows = rows_of(results, name, lambda variant, rate: 1.0 if 5e-5 < rate < 8e-4 else 0.5)
    for row in rows:
        row["curve"] = [0.3, 0.9 if row["rate"] == 2e-4 else 0.8, row["score"]]
    assert results.chosen(rows, name) == (("four updates", 2e-4), [], [])


def test_validation_and_test_prompts_are_new_and_not_the_same(results, tmp_path):
    results.write_lists(tmp_path / "validation.jsonl", 512, results.VALIDATION)
    results.write_lists(tmp_path / "test.jsonl", 2048, 2000)
    prompts = {}
    for path in (*results.TINY.glob("*.jsonl"), *tmp_path.glob("*.jsonl")):
        lines = path.read_text().splitlines()
        prompts[path.stem] = {json.loads(line)["prompt"] for line in lines}
    assert len(prompts["validation"]) == 512 and len(prompts["test"]) == 2048
    for name in ("validation", "test"):
        others = set().union(*(p for other, p in prompts.items() if other != name))
        assert not prompts[name] & others, name


def test_rates_are_written_as_people_write_them(results):
    shown = [results.short(rate) for rate in (1.25e-4, 2.5e-4, 2e-4, 1e-3, 1.6e-3)]
    assert shown == ["1.25e-4", "2.5e-4", "2e-4", "1e-3", "1.6e-3"]


def test_completions_to_a_score_are_those_of_the_first_two_points_that_have_it(results):
    curve = [0.3] * 7 + [0.8, 0.7, 0.8, 0.9] + [0.9] * 10
    assert len(curve) == 21 and results.reached({"curve": curve}) == 9 * 2560
    assert results.reached({"curve": [0.3, 0.79]}) == math.inf
    assert results.reached({"status": 1, "score": 0.0}) == math.inf, "a failed run reaches nothing"


def test_the_interval_is_of_seeds_and_of_prompts(results):
    rng = np.random.default_rng(0)

    def rows(seeds, share):
        right = rng.random((seeds, 512)) < share
        return [{"right": "".join(map(str, row.astype(int)))} for row in right]

    alike = [rows(1, 0.8)[0]] * 10  # all seeds equal: the prompts alone, binomial
    low, high = results.interval(alike, "score")
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.8 * 0.2 / 512), rel=0.15)
    apart = [{"right": "1" * 512}] * 5 + [{"status": 1}] * 5  # the seeds alone; five have failed
    low, high = results.interval(apart, "score")
    spread = np.std([1] * 5 + [0] * 5, ddof=1)
    assert (high - low) / 2 == pytest.approx(2.262 * spread / math.sqrt(10), rel=0.1), "Student's t"
    best_of = [{"best of 4": 0.3 + 0.04 * (i % 2)} for i in range(10)]  # and 2,048 prompts
    low, high = results.interval(best_of, "best of 4")
    variance = np.var([0.3, 0.34] * 5, ddof=1) / 10 * 2.262**2 + 0.32 * 0.68 / 2048 * 1.96**2
    assert (high - low) / 2 == pytest.approx(math.sqrt(variance), rel=0.1)


def complete(results, prompts=64):
    """Rows of a comparison in which a method's score is a made-up number of its place."""
    rows = [{"method": "the start", "variant": "", "rate": 0.0, "seed": 0, "right": "01" * 32}]
    rows[0] |= {"score": 0.5, "status": 0}
    rng = np.random.default_rng(0)
    for place, (name, method) in enumerate(results.METHODS.items()):
        best = ([*method.variants][-1], method.rates[2])
        level = 0.95 - 0.05 * place

        def score(variant, rate, best=best, level=level):
            return level - 0.01 * abs(math.log2(rate / best[1])) - 0.1 * (variant != best[0])

        rows += rows_of(results, name, score)
        for seed in results.FINAL_SEEDS:
            right = "".join(map(str, (rng.random(prompts) < level).astype(int)))
            row = dict(zip(("method", "variant", "rate", "seed"), (name, *best, seed)))
            row |= {"score": level, "curve": [0.3] * 10 + [level] * 11, "right": right}
            row["seconds"] = 12.3
            if method.command.startswith("reward_model.py"):
                del row["curve"], row["right"]
                row |= {f"best of {n}": level for n in results.N_OF_BEST}
            rows.append(row | {"status": 0})
        for base, change in results.CONTROLS:
            if base == name:
                for seed in results.CONTROL_SEEDS:
                    right = "".join(map(str, (rng.random(prompts) < level - 0.2).astype(int)))
                    key = (f"{name}: {change}", *best, seed)
                    row = dict(zip(("method", "variant", "rate", "seed"), key))
                    rows.append(row | {"score": level - 0.2, "right": right, "status": 0})
    return rows


def test_a_complete_comparison_leaves_nothing_to_run_and_fills_its_tables(results):
    rows = complete(results)
    assert results.jobs_of(rows, list(results.METHODS)) == []
    assert len({results.key_of(row) for row in rows}) == len(rows)
    lines = results.table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + 1 + len(results.METHODS) + 2, "the start, and best-of-N thrice"
    assert any("| CISPO | 2e-4 | 800 | 0 |" in line and "| 12 |" in line for line in lines)
    assert any(line.startswith("| GRPO, small rollouts | 2e-4 | 800 | 0 |") for line in lines)
    assert any(line.startswith("| GRPO as published | 2e-4 | 200 | 0.04 |") for line in lines)
    assert any(line.startswith("| fine-tuning | 2e-4 | 800 |  | ") for line in lines)
    assert "| 25,600 | 400 |" in lines[4 - 1], "fine-tuning: 10 of 20 points, 400 of 800 updates"
    settings = results.settings_table(rows).splitlines()
    assert len(settings) == 2 + sum(len(method.variants) for method in results.METHODS.values())
    assert sum(line.endswith("| yes |") for line in settings) == len(results.METHODS)
    controls = results.controls_table(rows).splitlines()
    assert len(controls) == 2 + len(results.CONTROLS)
    row = next(line for line in controls if "PPO, shared critic" in line)
    assert re.search(
        r"four updates, 2e-4 \| 32 prompts x 8 \| 0\.6\d\d \| 0\.4\d\d \| -0\.[23]", row
    )
    differences = results.differences_table(rows).splitlines()
    assert len(differences) == 2 + len(results.METHODS) - 1, "best-of-N has no answers to compare"
    assert differences[2].startswith("| fine-tuning | 0.9")


def test_tables_of_some_of_the_rows_say_how_many_seeds_they_have(results):
    rows = [row for row in complete(results) if row["method"] != "GSPO"]
    lines = results.table([row for row in rows if row["seed"] != 20]).splitlines()
    assert "| mean of 9 seeds, 95 % interval |" in lines[0] and "(9 seeds)" not in str(lines)
    rows = [row for row in rows if row["method"] != "CISPO" or row["seed"] != 20]
    lines = results.table(rows).splitlines()
    assert "| mean of 10 seeds, 95 % interval |" in lines[0]
    named = [line for line in lines if "(9 seeds)" in line]
    assert len(named) == 1 and named[0].startswith("| CISPO (9 seeds) |")
    assert not any("GSPO" in line for line in lines)
    assert "GSPO" not in results.settings_table(rows) + results.differences_table(rows)
    few = [row for row in rows if ": " not in row["method"]]
    assert len(results.controls_table(few).splitlines()) == 2
    control = [row for row in rows if row["method"] == "PPO, shared critic: 32 prompts x 8"]
    assert len(results.controls_table(few + control[:4]).splitlines()) == 2, "not all seeds"
    assert len(results.controls_table(few + control).splitlines()) == 3
    assert results.table([]).count("\n") == 2


def test_two_methods_are_told_apart_only_beyond_the_bound_of_all_pairs(results, monkeypatch):
    """Equal methods, the seeds of which are spread: some pairs of the many look unlike by chance."""
    rng = np.random.default_rng(0)
    rows = complete(results)
    for row in rows:
        if "right" in row and row["seed"] in results.FINAL_SEEDS:
            right = round(1000 * (0.8 + 0.03 * rng.standard_normal()))
            row["right"] = "1" * right + "0" * (1000 - right)
    with monkeypatch.context() as patch:
        patch.setattr(math, "comb", lambda n, k: 1)  # as if there were one pair only
        lines = results.differences_table(rows).splitlines()[2:]
        assert any(line.count(";") < len(results.METHODS) - 3 for line in lines)
    lines = results.differences_table(rows).splitlines()[2:]
    others = len(results.METHODS) - 2
    assert all(line.count(";") == others - 1 for line in lines)
    for row in rows:
        if row["method"] == "GSPO" and "right" in row:
            row["right"] = "0" * 1000
    lines = results.differences_table(rows).splitlines()[2:]
    assert lines[-1] == "| GSPO | 0.000 |  |"


def test_the_reach_of_an_interval_is_that_of_students_tables(results):
    known = {(1, 0.05): 12.706, (4, 0.05): 2.776, (9, 0.05): 2.262, (9, 0.001): 4.781}
    for (df, chance), reach in known.items():
        assert results.student(df, chance) == pytest.approx(reach, abs=1e-3)
    assert results.student(1000) == pytest.approx(1.962, abs=1e-3)
    assert results.widened(5) == pytest.approx(2.776 / 1.96 * math.sqrt(5 / 4), abs=1e-3)
    assert results.widened(1) == 1, "one run has no spread to widen"


def test_methods_are_compared_on_the_same_prompts(results):
    """One prompt of 512 makes the whole difference. Of other prompts each mean would be uncertain
    by 0.02."""
    rows = [{"right": "01" * 256}] * 10
    better = [{"right": "01" * 255 + "11"}] * 10
    apart, error, df = results.difference(results.right_of(better), results.right_of(rows))
    assert apart == pytest.approx(1 / 512)
    assert error == pytest.approx(1 / 512, rel=0.01)
    assert df == pytest.approx(511)


def test_methods_of_which_all_runs_have_failed_are_alike(results):
    nothing = np.zeros((10, 64))
    apart, error, df = results.difference(nothing, nothing)
    assert abs(apart) <= results.student(df) * error


def test_a_difference_has_welchs_error_and_degrees_of_freedom(results):
    """Its formulas written out. Each seed is right on all prompts up to a place of its own."""
    counts = [[800, 900, 850, 700, 1000], [500, 510, 490, 505, 495, 500, 500, 502]]
    rows = [[{"right": "1" * n + "0" * (100_000 - n)} for n in part] for part in counts]
    apart, error, df = results.difference(*map(results.right_of, rows))
    first, second = [np.array(part) / 100_000 for part in counts]
    assert apart == pytest.approx(first.mean() - second.mean())
    squares = [np.var(part, ddof=1) / len(part) for part in (first, second)]
    by_prompt = np.mean([np.arange(100_000) < n for n in counts[0]], 0)
    by_prompt = by_prompt - np.mean([np.arange(100_000) < n for n in counts[1]], 0)
    prompts = np.var(by_prompt, ddof=1) / 100_000
    assert error == pytest.approx(math.sqrt(sum(squares) + prompts))
    wanted = (sum(squares) + prompts) ** 2
    wanted /= squares[0] ** 2 / 4 + squares[1] ** 2 / 7 + prompts**2 / 99_999
    assert df == pytest.approx(wanted)


def test_of_twenty_intervals_of_equal_methods_one_misses(results):
    """Five seeds against ten, whose spreads differ threefold, on prompts of which some are easy."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(400):
        easy = rng.random(128)  # by prompt
        right = []
        for seeds, spread in ((5, 0.12), (10, 0.04)):
            shares = easy + spread * rng.standard_normal((seeds, 1))
            right.append((rng.random((seeds, 128)) < shares).astype(int))
        apart, error, df = results.difference(*right)
        missed += abs(apart) > results.student(df) * error
    assert 0.02 < missed / 400 < 0.08


def test_a_control_changes_one_thing_of_its_method(results):
    name, variant = "REINFORCE, no baseline", results.SMALL
    for change, flags in (
        ("one sample a prompt", "--prompts_per_step 64 --samples_per_prompt 1"),
        ("no bound of the norm", "--max_grad_norm 100"),
    ):
        plain = results.command_of(name, variant, 1e-4)
        changed = results.command_of(f"{name}: {change}", variant, 1e-4)
        place = len(plain) - 2  # of --learning_rate
        assert changed == plain[:place] + flags.split() + plain[place:]
    critics = []
    for change in ("", ": critic's rate halved", ": critic's rate doubled"):
        command = results.command_of(f"PPO, shared critic{change}", "one update", 3e-4)
        critics.append(float(command.pop()))
        assert command == results.command_of("PPO, shared critic", "one update", 3e-4)[:-1]
    assert critics == [5e-3, 2.5e-3, 1e-2]


def test_the_controls_are_understood_by_their_scripts(results):
    for name, change in results.CONTROLS:
        method = results.METHODS[name]
        for variant in method.variants:
            found = []
            for of in (name, f"{name}: {change}"):
                script, *words = results.command_of(of, variant, 2e-4)
                module = importlib.import_module(script.removesuffix(".py"))
                args = module.resolve(tyro.cli(module.Args, args=words, use_underscores=True))
                found.append(vars(args))
            plain, changed = found
            differ = {name for name in plain if plain[name] != changed[name]}
            assert bool(differ) == (change != results.AGAIN), (name, change)
            if change.startswith("no critic"):
                assert changed["critic_learning_rate"] == 0, "the value stays the first, 0"
                assert changed["lam"] == changed["gamma"] == 1 and not changed["beta"]
                assert changed["whiten"] == (change == "no critic")
                assert differ <= {"critic_learning_rate", "lam", "whiten"}
            for size in ("prompts_per_step", "samples_per_prompt"):
                assert (size in differ) <= (change[0].isdigit() or change.startswith("one sample"))
            rows = [args["prompts_per_step"] * args["samples_per_prompt"] for args in found]
            assert rows[0] == rows[1], "the same budget"


def test_runs_that_have_all_failed_count_as_nothing_right(results):
    rows = complete(results, prompts=results.TEST[0])
    for row in rows:
        if row["method"].endswith("no bound of the norm"):
            del row["right"]
            row["score"] = 0.0
    lines = results.controls_table(rows).splitlines()
    assert sum("| 0.000 | -" in line for line in lines) == 4


def test_pictures_of_some_of_the_rows_are_drawn(results, tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    rows = complete(results)
    few = [row for row in rows if row["method"] == "GSPO"]
    grid = [row for row in rows if row["seed"] in results.GRID_SEEDS]
    for kept in (rows, few, grid, []):
        results.draw_curves(kept, tmp_path / "curves.png")
        results.draw_rates(kept, tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 10_000


def test_labels_keep_their_distance(results):
    assert results.apart([], 0.05) == []
    moved = results.apart([0.99, 1.0, 0.98, 0.2], 0.05)
    assert max(moved) <= 1 and moved[3] == 0.2
    assert moved[1] > moved[0] > moved[2]
    gaps = np.diff(sorted(moved))
    assert gaps.min() > 0.049


def test_every_run_has_the_same_budget_and_200_or_800_updates(results):
    for name, method in results.METHODS.items():
        for variant in method.variants:
            script, *words = results.command_of(name, variant, 1e-3)
            if script == "reward_model.py":
                words += ["--eval_prompts", "prompts.jsonl"]
            module = importlib.import_module(script.removesuffix(".py"))
            args = module.resolve(tyro.cli(module.Args, args=words, use_underscores=True))
            seen = 2 * getattr(args, "pairs_per_step", 0)
            if not seen:
                seen = args.prompts_per_step * args.samples_per_prompt
            updates = args.steps * getattr(args, "epochs", 1) * getattr(args, "minibatches", 1)
            assert args.steps * seen == 51_200
            assert updates == (800 if "four" in variant else 200)
            assert args.schedule == "linear" and args.warmup == args.steps // 20
            assert args.learning_rate == 1e-3
            penalty = {"DPO": 0.5, "GRPO as published": 0.04}.get(name, 0)
            penalty = 0.1 if "beta 0.1" in variant else penalty
            assert getattr(args, "beta", 0) == penalty
            if script == "ppo.py":
                ratio = 50 / 3 if args.critic == "shared" else 5 / 3
                assert args.critic_learning_rate == pytest.approx(1e-3 * ratio, rel=1e-2)


def test_what_the_pages_say_of_one_and_four_updates_is_in_the_rows(results):
    rows = results.read(ROOT / "tests" / "bench" / "results.jsonl")
    found = {}
    for count in ("one", "four"):
        means = results.means_of(
            rows, f"GRPO, {count} updates".replace("one updates", "one update")
        )
        scores = {rate: mean for (_, rate), (mean, _) in means.items()}
        assert max(scores, key=scores.get) == 2e-4
        found[count] = [f"{scores[rate]:.2f}" for rate in (2e-4, 4e-4)]
    (one, one_above), (four, four_above) = found.values()
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"was {four_above} with four updates (one seed) and {one_above} with one" in readme
    means = results.means_of(rows, "PPO, separate critic")
    ppo = [f"{means[f'{count}', 4e-4][0]:.2f}" for count in ("four updates", "one update")]
    assert f"PPO with a separate critic had {ppo[0]} and {ppo[1]} there" in readme
    recipes = " ".join((ROOT / "tests" / "docs" / "recipes.md").read_text().split())
    assert f"one update ended at {one} on the validation" in recipes
    assert f"(`--minibatches 4`) at {four}; at twice that rate, at {one_above} and" in recipes
    assert f"with one seed, at {four_above}" in recipes
    grid = results.grid_of(rows, "GRPO, four updates")["four updates", 4e-4]
    assert len(grid) == 1, "the pages say that it is one seed"


def test_the_page_of_measurements_has_the_numbers_of_the_rows(results):
    rows = results.read(ROOT / "tests" / "bench" / "results.jsonl")
    half = []
    four = {}
    fall = []
    ratio = []
    for name, method in results.METHODS.items():
        means = {key: mean for key, (mean, _) in results.means_of(rows, name).items()}
        complete = results.means_of(rows, name, complete=True)
        for variant in method.variants:
            best = max((key for key in complete if key[0] == variant), key=complete.get)
            half.append(means[best] - means.get((variant, best[1] / 2), math.inf))
            if (variant, best[1] * 4) in means:
                key = name.partition(",")[0]
                four[key] = max(four.get(key, 0), means[variant, best[1] * 4])
        final = results.final_rows(rows, name)
        setting, *_ = results.chosen(rows, name)
        fall.append(means[setting] - np.mean([results.score_of(row) for row in final]))
        seconds = [row["seconds"] for row in final if "seconds" in row]
        ratio.append(max(seconds) / min(seconds))
    page = " ".join((ROOT / "tests" / "bench" / "README.md").read_text().split())
    dpo, best_of = four.pop("DPO"), four.pop("best of N")
    usual = math.ceil(100 * max(four.values())) / 100
    assert f"Half the best rate costs up to {max(half):.2f}." in page
    assert f"gives {usual:.2f} or less (DPO {dpo:.2f}, best of 16 {best_of:.2f})" in page
    assert f"settings are lower, by up to {max(fall):.2f}:" in page
    assert f"differ by up to {max(ratio):.1f} times between seeds" in page


def test_the_page_of_measurements_describes_the_prompts_as_they_are(results, tmp_path):
    results.write_lists(tmp_path / "validation.jsonl", 512, results.VALIDATION)
    results.write_lists(tmp_path / "test.jsonl", *results.TEST)
    digits = {}
    for name in ("validation", "test"):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        digits[name] = np.mean([len(json.loads(line)["answer"]) for line in lines])
    pairs = results.read(results.TINY / "pairs_train.jsonl")
    right = np.mean([row["chosen"] == row["answer"] for row in pairs])
    rows = results.read(ROOT / "tests" / "bench" / "results.jsonl")
    [start] = [results.score_of(row) for row in rows if row["method"] == results.START]
    first = {row["seed"] in results.FINAL_SEEDS: row["curve"][0] for row in rows if "curve" in row}
    page = " ".join((ROOT / "tests" / "bench" / "README.md").read_text().split())
    assert f"({digits['test']:.2f} and {digits['validation']:.2f} digits on average)" in page
    assert (
        f"each of {len(pairs):,} pairs" in page and f"{100 * right:.0f} % of their better" in page
    )
    scores = (
        f"{start:.2f} of the test prompts, {first[True]:.2f} of the bundled and {first[False]:.2f}"
    )
    assert f"The start is right on {scores} of the validation prompts" in page


def test_a_row_says_how_it_was_made(results, monkeypatch, tmp_path):
    """A run in the place of a script's: its log, its flags, and whose prompts it was scored on."""
    seen = []

    def call_in_child(command, scripts, log):
        words = dict(zip(command[1:], command[2:]))
        out = tmp_path.parent / words["--out"]
        out.mkdir(parents=True)
        log.write_text("")
        held_out = results.read(tmp_path / words.get("--eval_prompts", words["--eval_data"]))
        seen.append((command[0], len(held_out), words))
        if words["--steps"] == "0":
            samples = [{"reward": float(i % 4 == 0)} for i in range(len(held_out))]
            lines = "".join(json.dumps(row) + "\n" for row in samples)
            (out / "eval_samples.jsonl").write_text(lines)
            return 0
        lines = [{"step": 0, "eval/exact": 0.3}]
        lines += [{"step": i, "time/sample": 1.0, "time/train": 2.5} for i in (1, 2)]
        last = {"step": 3, "eval/exact": 0.7} | {f"best_of/true@{n}": n / 20 for n in (1, 4, 16)}
        lines = "".join(json.dumps(row) + "\n" for row in [*lines, last])
        (out / "metrics.jsonl").write_text(lines)
        return 0

    monkeypatch.setattr(results, "call_in_child", call_in_child)
    path = tmp_path / "rows.jsonl"
    jobs = [
        ("GRPO, one update", "one update", 2e-4, 1),
        ("GRPO, one update", "one update", 2e-4, 11),
    ]
    jobs.append(("best of N, by a reward model", "one update", 1e-3, 11))
    jobs.append(("CISPO", "four updates", 1e-4, 2))
    for job in jobs:
        results.run(job, path)
    grid, final, best_of, patched = results.read(path)
    assert [row["score"] for row in (grid, final, best_of)] == [0.7, 0.25, 0.8]
    assert grid["curve"] == final["curve"] == [0.3, 0.7] and "right" not in grid
    assert final["right"] == "1000" * 512
    assert grid["seconds"] == final["seconds"] == best_of["seconds"] == 7.0
    assert best_of["best of 4"] == 0.2 and "curve" not in best_of
    flags = "grpo.py --prompts_per_step 32 --samples_per_prompt 8 --steps 200 --epochs 1 "
    assert grid["flags"] == flags + "--minibatches 1 --learning_rate 0.0002"
    assert "tests/tiny/pairs_train.jsonl" in best_of["flags"] and "/work" not in best_of["flags"]
    assert grid["code"] == final["code"] and len({r["code"] for r in (grid, best_of, patched)}) == 3
    assert [(script, count) for script, count, _ in seen] == [
        ("grpo.py", 512),  # validation
        ("grpo.py", 512),  # the bundled prompts
        ("grpo.py", 2048),  # test
        ("reward_model.py", 2048),
        ("grpo.py", 512),
    ]
    every = [words.get("--eval_every") for _, _, words in seen]
    assert every[:2] == ["50", "10"] and seen[0][2]["--seed"] == "1"
    assert seen[1][2]["--eval_data"] == str(results.TINY / "sort_test.jsonl")


def test_the_rows_that_are_kept_are_of_these_methods_and_come_once(results):
    rows = results.read(ROOT / "tests" / "bench" / "results.jsonl")
    keys = [results.key_of(row) for row in rows]
    assert len(keys) == len(set(keys)) > 30
    for row in rows:
        if row["method"] != results.START:
            assert row["variant"] in results.method_of(row["method"]).variants
        assert 0 <= row["score"] <= 1 and (row["status"] == 0 or row["score"] == 0)


@pytest.fixture
def real(results):
    return importlib.import_module("real")


def made_up(real, job, status=0):
    """A row of the comparison with a real model: the higher the rate, the higher the reward."""
    task, method, rate, seed = job
    row = {"task": task, "method": method, "rate": rate, "seed": seed, "status": status}
    if method != real.START:
        step = {"form": 0.5, "right": 0.25, "time/sample": 5.0, "time/train": 7.0}
        count = real.TASKS[task][1] if not status else 3 if seed == 12 else 0
        row["train"] = [step | {"reward": 1e4 * rate} for _ in range(count)]
    if seed != 1:
        row |= {"reward": 0.5, "form": "11" * 50, "right": "01" * 50, "both": "01" * 50}
    return row


@pytest.mark.parametrize("fails", [False, True])
def test_the_comparison_with_a_real_model_comes_to_an_end_and_fills_its_table(real, fails):
    args = real.Args(model=ROOT)
    rows = []
    order = []
    while real.jobs_of(rows, args):
        order.append(real.jobs_of(rows, args)[0])
        failed = [
            ("sums", "GRPO", 8e-5, 1),
            ("chain", "GRPO", 4e-5, 12),
            ("sums", "GRPO", 4e-5, 13),
        ]
        status = int(fails and order[-1] in failed)
        rows.append(made_up(real, order[-1], status))
        real.table(rows) + real.rates_table(rows)  # also of some of the rows
    # each grid is widened once, GRPO's not if its highest rate has failed
    assert len(order) == len(set(order)) == 2 + 4 * (4 + 1) - fails + 4 * 2 * 3 + 2
    assert order[:2] == [("sums", "the start", 0.0, 0), ("chain", "the start", 0.0, 0)]
    wanted = {"GRPO": 4e-5 if fails else 1.6e-4, "PPO, shared critic": 1.6e-4}
    for method, rate in wanted.items():  # 8e-5 was at the edge; a run that fails is worth nothing
        assert real.best_rate(rows, method) == (rate, [])
    lines = real.table(rows).splitlines()
    row = next(line for line in lines if line.startswith("| chain | PPO, shared critic"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3:8] == ["1.6e-4", "3,072", "0.50", "1.00", "0.50 (0.40 to 0.60)"]
    if fails:
        assert "| sums | GRPO | 8e-5 | 0.000, 1 |\n" in real.rates_table(rows)


def test_the_picture_of_a_real_model_is_drawn_of_some_of_the_runs(real, tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    jobs = [("sums", "GRPO", rate, 1) for rate in (*real.RATES, 1.6e-4)]
    rows = [made_up(real, job) for job in jobs]
    rows += [made_up(real, ("sums", "GRPO", 1.6e-4, seed), seed != 11) for seed in real.SEEDS]
    for part in ([], rows[:3], rows):
        real.draw(part, tmp_path / "real.png")
    assert (tmp_path / "real.png").stat().st_size > 10_000


def test_the_commands_with_a_real_model_are_understood_by_their_scripts(real):
    for task in real.TASKS:
        for method in real.METHODS:
            script, *words = real.command_of(task, method, 2e-5)
            module = importlib.import_module(script.removesuffix(".py"))
            words += ["--model", str(ROOT / "tests" / "tiny" / "model"), "--data", "train.jsonl"]
            args = module.resolve(tyro.cli(module.Args, args=words, use_underscores=True))
            assert (args.prompts_per_step, args.samples_per_prompt, args.beta) == (8, 8, 0)
            assert args.epochs == args.minibatches == 1 and args.learning_rate == 2e-5


def test_the_tables_are_those_of_the_rows(results, real):
    bench = ROOT / "tests" / "bench"
    rows = results.read(bench / "results.jsonl")
    assert results.table(rows) == (bench / "results.md").read_text()
    assert results.settings_table(rows) == (bench / "results_settings.md").read_text()
    assert results.controls_table(rows) == (bench / "results_controls.md").read_text()
    assert results.differences_table(rows) == (bench / "results_differences.md").read_text()
    rows = results.read(bench / "real.jsonl")
    assert real.table(rows) == (bench / "real.md").read_text()
    assert real.rates_table(rows) == (bench / "real_rates.md").read_text()


def test_what_the_page_says_of_rates_and_seeds_holds(results):
    rows = results.read(ROOT / "tests/bench/results.jsonl")
    page = " ".join((ROOT / "tests/bench/README.md").read_text().split())
    costs = {}
    for name in results.METHODS:
        (variant, rate), *_ = results.chosen(rows, name)
        mean = {}
        for times in (1, 2):
            keys = [(name, variant, times * rate, seed) for seed in results.GRID_SEEDS]
            scores = [row["score"] for row in rows if results.key_of(row) in keys]
            mean[times] = statistics.mean(scores)
        if len(scores) == 3:
            assert mean[1] - mean[2] < 0.085, name
        else:
            assert len(scores) == 1
            costs[name] = f"{mean[1] - mean[2]:.2f}"
    assert costs == {
        "GRPO as published": "0.24",
        "GSPO": "0.44",
        "GRPO, four updates": "0.57",
        "Dr. GRPO": "0.60",
    }
    words = (
        "0.24 with GRPO as published, 0.44 with GSPO, 0.57 with GRPO's four updates and 0.60 with"
    )
    assert words in page
    finals = {
        name: [results.score_of(row) for row in sorted(results.final_rows(rows, name), key=seed_of)]
        for name in results.METHODS
    }
    grpo = sorted(finals["GRPO, four updates"])
    assert (f"{grpo[0]:.2f}", f"{grpo[5]:.2f}") == ("0.81", "0.83")
    assert (f"{grpo[6]:.2f}", f"{grpo[9]:.2f}") == ("0.91", "0.93")
    assert "six seeds end at 0.81 to 0.83, four at 0.91 to 0.93" in page
    ppo = [sorted(finals[name]) for name in finals if name.startswith("PPO")]
    assert sorted(f"{found[0]:.2f}" for found in ppo) == ["0.87", "0.93"]
    assert all(0.965 < share < 0.986 for found in ppo for share in found[1:])
    assert min(finals["fine-tuning"]) > max(found[-1] for found in ppo)
    halves = {
        name: [statistics.mean(found[:5]), statistics.mean(found[5:])]
        for name, found in finals.items()
        if "best of" not in name
    }
    adapters = halves.pop("GRPO with adapters")
    assert "0.03, without overlap ({:.3f} and {:.3f})".format(*adapters) in page
    found = finals["GRPO with adapters"]
    assert max(found[:5]) < min(found[5:])
    assert all(abs(a - b) < 0.025 for a, b in halves.values())
    ppo = json.loads((ROOT / "tests/bench/learning.json").read_text())["runs"]
    ppo = [dict(run["held_out"])[100] for run in ppo if run["command"] == "ppo.py"]
    assert f"is at {min(ppo):.2f} to {max(ppo):.2f} after 12,800" in page


def seed_of(row):
    return row["seed"]


def test_what_the_page_says_of_a_real_model_holds(real, results):
    rows = results.read(ROOT / "tests/bench/real.jsonl")
    page = " ".join((ROOT / "tests/bench/README.md").read_text().split())
    start = real.final_rows(rows, "sums", real.START)[0]
    assert f"right for {results.share(start['right']):.2f} of the prompts, and stands" in page
    assert set(start["both"]) == {"0"}, "alone for none"
    runs = [row for method in real.METHODS for row in real.final_rows(rows, "sums", method)]
    forms = [results.share(row["form"]) for row in runs]
    alone = [results.share(row["right"]) for row, form in zip(runs, forms) if form > 0.9]
    sentence = [results.share(row["right"]) for row, form in zip(runs, forms) if form < 0.1]
    assert (len(runs), len(alone), len(sentence)) == (12, 10, 2)
    assert "Ten of twelve runs end with a number alone" in page
    assert f"right for {min(alone):.2f} to {max(alone):.2f} of the prompts" in page
    assert f"and have {max(sentence):.2f} and {min(sentence):.2f} right" in page
    fewer = sum(share < results.share(start["right"]) for share in (*alone, *sentence))
    assert fewer == 9 and "In nine of twelve runs fewer results are right at the end" in page
    said = "The other two, both of seed 12, kept the sentence"
    assert [row["seed"] for row, form in zip(runs, forms) if form < 0.1] == [
        12,
        12,
    ] and said in page
    for row in runs:  # with seed 12 all methods first learnt the result
        right, form = ([step[part] for step in row["train"]] for part in ("right", "form"))
        right, form = real.smooth(right), real.smooth(form)
        best = right.index(max(right))
        assert (max(right) > 0.5 and form[best] < 0.2) == (row["seed"] == 12)
    first = {
        seed: [row["train"][0]["right"] for row in runs if row["seed"] == seed]
        for seed in (11, 12, 13)
    }
    assert all(len(set(found)) == 1 for found in first.values()), "the same first samples"
    assert "(At the start, 0.02 to 0.11 of these have the right result.)" in page
    assert (f"{first[13][0]:.2f}", f"{first[12][0]:.2f}") == ("0.02", "0.11")
    steps = [row["train"] for row in real.final_rows(rows, "chain", "REINFORCE, leave one out")]
    means = [
        statistics.mean(step["right"] for run in steps for step in run[part])
        for part in (slice(0, 5), slice(9, 16), slice(-5, None))
    ]
    assert "{:.2f}, {:.2f} and {:.2f} of REINFORCE's samples are right over".format(*means) in page
    others = [row for row in rows if (row["device"], row["dtype"]) != ("NVIDIA H200", "bfloat16")]
    (other,) = [(row["task"], row["method"], row["seed"], row["dtype"]) for row in others]
    assert other == ("chain", "PPO, shared critic", 13, "float32")
    rates = {method: real.best_rate(rows, method)[0] for method in real.METHODS}
    low = rates["the best of 8"]
    assert rates == {
        "GRPO": 4 * low,
        "REINFORCE, leave one out": low,
        "the best of 8": low,
        "PPO, shared critic": 2 * low,
    }


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("bench/*.py")), ids=lambda p: p.name)
def test_a_measurement_calls_functions_of_the_scripts_that_exist_as_they_are(path):
    """Most measurements are too long for a test, so a change of a script could break them unseen."""
    for call in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        module = getattr(call.func.value, "id", "")
        if module not in MODULES:
            continue
        function = getattr(importlib.import_module(module), call.func.attr)
        starred = any(isinstance(argument, ast.Starred) for argument in call.args)
        if not starred and all(keyword.arg for keyword in call.keywords):
            names = {keyword.arg: None for keyword in call.keywords}
            inspect.signature(function).bind(*call.args, **names)


def test_what_the_page_says_of_simpo_holds():
    """The most pairs right and the fewest answers of all losses, and fewer than at the start."""
    runs = json.loads((ROOT / "tests" / "bench" / "learning.json").read_text())["runs"]
    ends = {}
    for run in runs:
        if run["command"].startswith("dpo.py") and "--lora_rank" not in run["command"]:
            ends.setdefault(run["command"], []).append(run)
    simpo = ends.pop("dpo.py --loss simpo")
    for other in ends.values():
        assert min(r["eval/accuracy"] for r in simpo) > max(r["eval/accuracy"] for r in other)
        last = [[r["held_out"][-1][1] for r in runs] for runs in (simpo, other)]
        assert max(last[0]) < min(last[1])
    for run in simpo:
        scores = [score for _, score in run["held_out"]]
        assert min(scores) < scores[0] < scores[-1]


def test_the_pages_say_what_the_controls_show(results):
    rows = results.read(ROOT / "tests" / "bench" / "results.jsonl")
    readme = " ".join((ROOT / "README.md").read_text().split())
    page = " ".join((ROOT / "tests" / "bench" / "README.md").read_text().split())

    def chosen(name):
        return np.mean([results.score_of(row) for row in results.final_rows(rows, name)])

    def changed(name, change):
        scores = [results.score_of(row) for row in rows if row["method"] == f"{name}: {change}"]
        assert len(scores) == 5
        return np.mean(scores)

    name = "REINFORCE, no baseline"
    one_sample = changed(name, "one sample a prompt")
    assert f"REINFORCE without baseline has {one_sample:.2f}. So PPO's prompts" in readme
    words = f"REINFORCE without baseline ends at {one_sample:.2f} in place of {chosen(name):.2f}"
    assert words in page
    with_mean = changed("REINFORCE, leave one out", "one sample a prompt, the batch's mean")
    assert f"{with_mean:.3f} with the batch's mean, {one_sample:.3f} without" in page

    name = "GRPO, four updates"
    in_twos = changed(name, "128 prompts x 2")
    assert f"(GRPO with 128 x 2: {in_twos:.2f}.)" in readme
    assert f"GRPO with four updates ends at {in_twos:.3f} in place of {chosen(name):.3f}," in page
    assert f"GRPO with four updates ends ({chosen(name):.3f})" in page
    name = "GRPO as published"
    no_kl = changed(name, "no KL penalty")
    assert f"without, it ends at {no_kl:.3f} in place of {chosen(name):.3f}." in page

    separate, shared = "PPO, separate critic", "PPO, shared critic"
    in_eights = [changed(name, results.GROUPED) for name in (separate, shared)]
    alone = changed(separate, "no critic")
    words = "With 32 x 8 PPO has {:.2f} and {:.2f}; without its critic {:.2f};"
    words = words.format(*in_eights, alone)
    assert words in readme
    words = "PPO ends at {:.3f} (separate critic) and {:.3f} (shared) in place of {:.3f} and {:.3f}"
    assert words.format(*in_eights, chosen(separate), chosen(shared)) in page
    assert f"256 x 1 ends at {alone:.3f} in place of {chosen(separate):.3f}" in page
    again = changed("GRPO with adapters", results.AGAIN)
    assert f"seeds 11 to 15 of the adapters have {again:.3f}" in page
    again = changed("GRPO, four updates", results.AGAIN)
    assert f"as chosen, run again on the same processor, it has {again:.3f}." in page
    for name, reach, words in (
        ("GRPO, four updates", (0.78, 0.84), "seeds 11 to 15 all end at 0.78 to 0.84"),
        ("REINFORCE, no baseline", (0.84, 0.94), "run again, has each seed's score to 0.01"),
    ):
        first = {row["seed"]: results.score_of(row) for row in results.final_rows(rows, name)}
        key = f"{name}: {results.AGAIN}"
        second = {r["seed"]: results.score_of(r) for r in rows if r["method"] == key}
        ends = (round(min(second.values()), 2), round(max(second.values()), 2))
        assert ends == reach and words in page
        if name.startswith("GRPO"):
            assert (round(first[14], 2), round(first[15], 2)) == (0.91, 0.93)
            most = max(abs(first[seed] - second[seed]) for seed in second)
            assert f"with GRPO's four updates by up to {most:.2f}." in page
        else:
            assert max(abs(first[seed] - second[seed]) for seed in second) < 0.01
