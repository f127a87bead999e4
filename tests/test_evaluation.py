"""What the five loops share: held-out scores by hand, and when they are taken; rates, limits, seeds
and temperatures that are those of the flags in the steps, too.
"""

import collections
import dataclasses
import io
import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import run as run_processes
from safetensors.torch import load_file
from test_reinforce import prompts_file

import common
import dpo
import grpo
import ppo
import reinforce
import reward_model
from common import World

CPU = World(0, 1, torch.device("cpu"), torch.float32)
ROLLOUTS = [reinforce, ppo, grpo]  # scripts that draw what they learn from
EVALUATED = [reinforce, ppo, grpo, dpo]  # scripts whose evaluation draws completions
SCRIPTS = [reinforce, ppo, grpo, dpo, reward_model]


def named(script):
    return script.__name__


# --- held-out scores, by hand ---


def held_out_rows(count, longest=1):
    """As `load_prompts` gives them. A prompt's ids are the row's number, once or, in some rows, up to
    `longest` times; every fifth row has no answer."""
    rows = []
    for i in range(count):
        row = {"prompt": str(i)}
        if i % 5 != 4:
            row["answer"] = str(3 * i)
        rows.append(([i] * (1 + i * (longest // 7) % longest), row))
    rows[-1] = ([count - 1] * longest, rows[-1][1])
    return rows


def kind_of_draw(i, j):
    """What the stand-in says to prompt i: 0 the answer, 1 the right number in a sentence, 2 what is
    wrong. Its greedy completion is j = 0, and what it draws at a temperature begins with j = 1."""
    return (i + j * j) % 3


def said(i, j):
    """The stand-in's completion j of prompt i."""
    return [f"{3 * i}", f"it is {3 * i}.", f"{3 * i + 1}"][kind_of_draw(i, j)]


def stand_in(asked=None):
    """In the place of common.sample. Nothing is drawn: what is said depends on the prompt, the
    sample's number and the temperature."""

    def sample(
        model, tokenizer, prompts, *, n=1, max_new_tokens, temperature=1.0, seed=None, max_rows=None
    ):
        if asked is not None:
            call = {"prompts": prompts, "n": n, "temperature": temperature, "seed": seed}
            asked.append(call | {"max_new_tokens": max_new_tokens})
        first = 0 if temperature == 0 else 1
        return SimpleNamespace(texts=[said(ids[0], first + j) for ids in prompts for j in range(n)])

    return sample


def pay(texts, rows):
    """Depends on completion and row, so that a completion scored with another's row shows."""
    pairs = zip(texts, rows, strict=True)
    return [len(text) + 0.001 * int(row["prompt"]) ** 1.5 for text, row in pairs]


def pay_in_parts(samples, rows):
    """As a loaded reward that has a part."""
    return {"reward": pay(samples.texts, rows), "reward/length": list(map(len, samples.texts))}


def scores_by_hand(count, rule, n, with_number=False):
    """What evaluation is to say of `held_out_rows(count)`. `rule`: which kinds of completion are
    right."""
    rows = [row for _, row in held_out_rows(count)]
    paid = [pay([said(i, 0)], [row])[0] for i, row in enumerate(rows)]
    known = [i for i, row in enumerate(rows) if "answer" in row]
    lengths = [len(said(i, 0)) for i in range(count)]
    wanted = {"eval/reward": sum(paid) / count, "eval/reward/length": sum(lengths) / count}
    wanted["held_out/prompts"] = count
    if known:
        wanted["eval/exact"] = sum(kind_of_draw(i, 0) in rule for i in known) / len(known)
    if with_number:
        wanted["eval/number"] = sum(kind_of_draw(i, 0) < 2 for i in known) / len(known)
    for k in (1, 2, 4, 8, n) if n and known else ():
        if k <= n:
            total = 0.0
            for i in known:
                right = [kind_of_draw(i, 1 + j) in rule for j in range(n)]
                tries = [any(choice) for choice in itertools.combinations(right, k)]
                total += sum(tries) / len(tries)
            wanted[f"eval/pass@{k}"] = total / len(known)
    return wanted


def loaded(script, spec):
    """--reward as the script loads it, which says what is right, with `pay` for the scores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_function", lambda *a: pay)
        loaded = common.load_reward(spec, script.RULES, CPU)
        return dataclasses.replace(loaded, function=pay_in_parts)


def evaluated(script, count, reward, n=0, world=CPU, longest=1, **flags):
    flags |= {"reward": reward, "temperature": 0.7, "max_new_tokens": 9, "seed": 5}
    if script is dpo:
        del flags["temperature"]
    if script is grpo:
        flags["eval_samples"] = n
    args = script.resolve(script.Args(device="cpu", **flags))
    rows = held_out_rows(count, longest)
    found = script.evaluate(None, None, rows, loaded(script, reward), args, world)
    found.pop("eval_samples", None)
    return found


@pytest.mark.parametrize("reward, rule", [("exact", {0}), ("number", {0, 1}), ("r.py:f", {0})])
@pytest.mark.parametrize("script", EVALUATED, ids=named)
def test_held_out_scores_are_of_every_rows_greedy_completion(script, reward, rule, monkeypatch):
    """More rows than one round draws for, and a last round that is not full. `number` says what is
    right where that is the reward, and `exact` otherwise; a row without an answer is neither. With
    a reward of one's own both are logged."""
    asked = []
    monkeypatch.setattr(common, "sample", stand_in(asked))
    for count in (1, 5, 256, 600):
        asked.clear()
        wanted = scores_by_hand(count, rule, 0, with_number=reward == "r.py:f")
        assert evaluated(script, count, reward) == pytest.approx(wanted)
        prompts = [ids for a in asked for ids in a["prompts"]]
        assert prompts == [[i] for i in range(count)], "each once"
        asked_for = {(a["temperature"], a["n"], a["max_new_tokens"]) for a in asked}
        assert asked_for == {(0, 1, 9)}
        assert max(len(a["prompts"]) for a in asked) <= 256


@pytest.mark.parametrize("script", EVALUATED, ids=named)
def test_what_a_process_says_to_a_stand_in_is_no_sample(script, monkeypatch):
    """The second process has no row left, and samples the first one, for FSDP's sake."""
    asked = []
    monkeypatch.setattr(common, "sample", stand_in(asked))
    monkeypatch.setattr(common, "all_sum", lambda world, *numbers: [float(x) for x in numbers])
    monkeypatch.setattr(common, "all_gather", lambda world, tensor: tensor)
    args = script.resolve(script.Args(device="cpu", max_new_tokens=9))
    for rank, count in ((0, 1), (1, 0)):
        world = World(rank, 2, torch.device("cpu"), torch.float32)
        given = (None, None, held_out_rows(1), loaded(script, "exact"), args, world)
        found = script.evaluate(*given)
        assert len(found.get("eval_samples", [])) == found["held_out/prompts"] == count
    assert len(asked) == 2


@pytest.mark.parametrize("script", EVALUATED, ids=named)
def test_rows_without_any_answer_have_a_reward_and_no_share_of_right_ones(script, monkeypatch):
    monkeypatch.setattr(common, "sample", stand_in())
    rows = [{"prompt": "0"}, {"prompt": "1"}]
    args = script.resolve(script.Args(reward="r.py:f"))
    held_out = [([0], rows[0]), ([1], rows[1])]
    scores = script.evaluate(None, None, held_out, loaded(script, "r.py:f"), args, CPU)
    assert not any("answer" in row for row in scores.pop("eval_samples"))
    paid = pay([said(0, 0), said(1, 0)], rows)
    length = (len(said(0, 0)) + len(said(1, 0))) / 2
    wanted = {"eval/reward": sum(paid) / 2, "eval/reward/length": length}
    assert scores == pytest.approx(wanted | {"held_out/prompts": 2})


def test_the_share_of_right_numbers_is_logged_where_every_held_out_answer_has_a_number():
    """And the reward is none of the two rules, which say themselves what is right."""
    answers = ["18", "16 - 3 = 13\n#### 13", 7, "2.50", "1,234"]
    rows = [([1], {"prompt": "p", "answer": answer}) for answer in answers]
    rows.append(([1], {"prompt": "p"}))
    for script in EVALUATED:
        own = loaded(script, "r.py:f")
        assert list(common.rules_that_fit(own, rows)) == ["exact", "number"]
        words = [*rows, ([1], {"prompt": "p", "answer": "none"})]
        assert list(common.rules_that_fit(own, words)) == ["exact"]
        for spec in ("exact", "number"):
            fitting = common.rules_that_fit(loaded(script, spec), rows)
            assert fitting == {"exact": script.RULES[spec]}


@pytest.mark.parametrize("reward, rule", [("exact", {0}), ("number", {0, 1})])
@pytest.mark.parametrize("n", [1, 2, 6, 300])
def test_pass_at_k_counts_the_right_ones_of_each_prompts_samples(n, reward, rule, monkeypatch):
    asked = []
    monkeypatch.setattr(common, "sample", stand_in(asked))
    count = 300 if n < 300 else 3
    found = evaluated(grpo, count, reward, n)
    if n < 300:
        assert found == pytest.approx(scores_by_hand(count, rule, n))
    else:  # too many choices to list
        powers = [2**i for i in range(9)]
        assert [k for k in found if "pass" in k] == [f"eval/pass@{k}" for k in (*powers, 300)]
    drawn = [a for a in asked if a["temperature"] == 0.7]
    assert [ids for a in drawn for ids in a["prompts"]] == [[i] for i in range(count)]
    assert all(a["n"] == n and a["max_new_tokens"] == 9 for a in drawn)
    assert max(len(a["prompts"]) for a in drawn) <= max(256 // n, 1), "no more rows than greedy"
    assert len({a["seed"] for a in drawn}) == len(drawn), "each round draws with a seed of its own"
    asked.clear()
    assert evaluated(grpo, count, reward, n) == found
    seeds = [a["seed"] for a in asked if a["temperature"] == 0.7]
    assert seeds == [a["seed"] for a in drawn], "before and after training alike"


@pytest.mark.parametrize("script", EVALUATED, ids=named)
def test_no_more_is_drawn_at_once_than_in_a_rollout_however_long_the_prompts(script, monkeypatch):
    """It was 256 rows, whatever their length and however few a rollout draws, and memory ran out in
    the evaluation. 8192 tokens are always drawn at once, and a rollout's rows, too."""
    asked = []
    monkeypatch.setattr(common, "sample", stand_in(asked))
    steps = (
        {"pairs_per_step": 2} if script is dpo else {"prompts_per_step": 2, "samples_per_prompt": 4}
    )
    small = steps | ({"minibatches": 1} if script is ppo else {})
    for longest, rows in ((119, 64), (1991, 4), (9991, 1)):  # 9 more are drawn
        if script is dpo:
            small["tokens_per_micro_batch"] = 4
        asked.clear()
        found = evaluated(script, 90, "number", longest=longest, **small)
        assert found == pytest.approx(scores_by_hand(90, {0, 1}, 0))
        drawn = [len(a["prompts"]) for a in asked]
        assert [ids[0] for a in asked for ids in a["prompts"]] == list(range(90)), (
            "each once, in order"
        )
        assert max(drawn) == (rows if script is dpo else max(rows, 8))


def test_pass_at_k_draws_no_more_than_greedy(monkeypatch):
    asked = []
    monkeypatch.setattr(common, "sample", stand_in(asked))
    evaluated(grpo, 90, "number", 4, longest=1991, prompts_per_step=2, samples_per_prompt=4)
    assert max(len(a["prompts"]) * a["n"] for a in asked if a["temperature"]) == 8


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A folder of what each of two processes finds in all evaluations."""
    folder = tmp_path_factory.mktemp("two")
    run_processes(evaluate_everywhere, 2, folder)
    return folder


def evaluate_everywhere(out):
    world = common.start("cpu")
    best_of_everywhere(out, world)
    asked, found = [], {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "sample", stand_in(asked))
        # of 1 row the second process has none; of 513 the first has 257, a round more than it
        # of 37 long ones 4 are drawn at once, and the second process has 18, a round that is not full
        for count, longest in ((1, 1), (2, 1), (7, 1), (513, 1), (37, 1991)):
            for script in EVALUATED:
                n = 2 if script is grpo else 0
                found[f"{named(script)} {count}"] = evaluated(
                    script, count, "number", n, world, longest
                )
        seeds = [a["seed"] for a in asked if a["temperature"] > 0]
    (out / f"{world.rank}.json").write_text(json.dumps([found, seeds]))


def test_two_processes_share_the_rows_out_and_count_each_once(two_processes):
    tmp_path = two_processes
    found, seeds = json.loads((tmp_path / "0.json").read_text())
    same, others = json.loads((tmp_path / "1.json").read_text())
    assert found == same
    assert len(found) == 20 and not set(seeds) & set(others), "no seed serves two processes"
    for case, scores in found.items():
        script, count = case.split()
        wanted = scores_by_hand(int(count), {0, 1}, 2 if script == "grpo" else 0)
        assert scores == pytest.approx(wanted), case


@pytest.mark.parametrize("script", EVALUATED, ids=named)
def test_completions_are_shown_with_their_prompts_answers_and_scores(script, monkeypatch):
    monkeypatch.setattr(common, "sample", stand_in())
    reward = common.Reward(pay_in_parts, script.exact, {"exact": script.exact})
    args = script.resolve(script.Args())
    found = script.evaluate(None, None, held_out_rows(300), reward, args, CPU)
    shown = found["eval_samples"]
    assert len(shown) == 300
    for i, row in enumerate(shown):
        text = said(i, 0)
        answer = None if i % 5 == 4 else str(3 * i)
        paid = pay([text], [{"prompt": str(i)}])[0]
        assert row.pop("reward") == pytest.approx(paid, rel=1e-5)
        assert (row.pop("reward/length"), row.pop("answer", None)) == (len(text), answer)
        assert row == {"prompt": str(i), "completion": text}


def test_a_shown_completion_has_the_prompt_of_the_data_and_what_the_model_has_read():
    """So that its prompt can be used again: the template is in `input` alone."""
    tokenizer = common.load_tokenizer(grpo.Args.model)
    prompts = [tokenizer("52=").input_ids, tokenizer("731=").input_ids]
    samples = common.as_samples(prompts, [[5], [6]], tokenizer, CPU)
    records = [{"prompt": [{"role": "user", "content": "5"}]}, {"prompt": "7"}]
    shown = common.examples(samples, {"reward": [0.0, 1.0]}, records, [0, 1], tokenizer)
    assert [row["prompt"] for row in shown] == [record["prompt"] for record in records]
    assert [row["input"] for row in shown] == ["52=", "731="]
    (plain, _) = common.examples(samples, {"reward": [0.0, 1.0]}, records, [0, 1])
    assert "input" not in plain and plain["completion"] == shown[0]["completion"]


@pytest.mark.parametrize("script", EVALUATED, ids=named)
def test_a_run_keeps_eight_held_out_completions_of_each_evaluation_and_all_of_step_0(
    script, tmp_path
):
    lines = (grpo.TINY / "sort_test.jsonl").read_text().splitlines()[:20]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    held_out = {"eval_prompts" if script is dpo else "eval_data": str(tmp_path / "test.jsonl")}
    flags = held_out | {"eval_every": 2, "save_every": 1, "keep": 9, "samples_per_prompt": 2}
    run(script, tmp_path, steps=4, **flags)
    path = tmp_path / "run" / "eval_samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0] * 20 + [2] * 8 + [4] * 8
    prompts = [json.loads(line)["prompt"] for line in lines]
    assert [row["prompt"] for row in rows] == prompts + 2 * prompts[:8]
    before = path.read_text()
    for step in (3, 4):
        (tmp_path / "run" / "checkpoint" / f"{step:06d}.pt").unlink()
    run(script, tmp_path, steps=4, resume=True, **flags)
    assert path.read_text() == before, "what is made again does not stand there twice"


@pytest.mark.parametrize("script", ROLLOUTS, ids=named)
def test_the_greedy_score_of_the_embedded_model_is_known(script, tmp_path):
    """160 of 512. Sampled at temperature 1 it would be about 78, and at half the tokens 0."""
    flags = {"steps": 0, "out": str(tmp_path / "run"), "device": "cpu"}
    script.train(script.Args(**flags))
    [line] = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    right = json.loads(line)["eval/exact"] * 512
    assert right == pytest.approx(160, abs=1), "rounding may turn one"


# --- how sure a score is ---


def wilson(right, count):
    """The shares that a test at 1.96 standard deviations, of the share itself, does not reject."""
    found = right / count
    kept = []
    for i in range(100_001):
        share = i / 100_000
        if abs(found - share) <= 1.96 * math.sqrt(share * (1 - share) / count):
            kept.append(share)
    return kept[0], kept[-1]


@pytest.mark.parametrize("right, count", [(0, 5), (5, 5), (1, 2), (261, 512), (3, 200), (1, 1)])
def test_a_share_has_wilsons_interval(right, count):
    meter = common.Meter()
    meter.mean("right", torch.tensor([True] * right + [False] * (count - right)))
    share = meter.result(CPU)["right"]
    assert share == right / count and share.count == count
    assert (share.low, share.high) == pytest.approx(wilson(right, count), abs=2e-5)
    assert -1e-9 <= share.low and share.high <= 1 + 1e-9


def test_another_mean_has_1_96_standard_errors_on_both_sides():
    values = torch.tensor([0.5, 2.0, -1.0, 4.5, 0.5])
    meter = common.Meter()
    mask = torch.tensor([True, True, True, False, False])
    meter.mean("some", values, mask)
    meter.mean("some", values, ~mask)
    for mean in (meter.result(CPU)["some"], common.mean_of(values)):
        half = 1.96 * values.std().item() / math.sqrt(5)
        assert (mean, mean.count) == (pytest.approx(1.3), 5)
        assert (mean.low, mean.high) == pytest.approx((1.3 - half, 1.3 + half))
        assert json.dumps({"mean": mean}) == '{"mean": 1.3}', "in a file it is a number"


def test_one_value_that_is_no_share_says_nothing_of_how_sure_it_is():
    alone = common.mean_of(torch.tensor([2.5]))
    assert (alone, alone.low, alone.high) == (2.5, -math.inf, math.inf)


# --- evaluations that are short, stopped, or left out ---


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_with_eval_every_0_nothing_is_scored(script, tmp_path, monkeypatch):
    scored(script, monkeypatch, [])
    held_out = {"eval_prompts": None, "eval_data": None, "samples_per_prompt": 2}
    log = run(script, tmp_path, steps=2, eval_every=0, **held_out)
    assert [m["step"] for m in log] == [0, 1, 2]
    assert not any(name.startswith("eval/") for m in log for name in m)


def test_a_run_without_steps_and_without_evaluations_is_refused(capsys):
    with pytest.raises(SystemExit):
        grpo.resolve(grpo.Args(steps=0, eval_every=0))
    assert "--eval_every 0 turns that off" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_eval_rows_are_the_same_in_every_run_and_no_training_row_is_left_out(script):
    """A choice from the whole file, in its order."""
    args = script.resolve(script.Args(eval_rows=40, device="cpu"))
    every = script.resolve(script.Args(device="cpu"))
    some, whole = script.load_task(args, CPU), script.load_task(every, CPU)
    counts = []
    for few, many in zip(some, whole):
        if isinstance(few, list):
            assert [row for row in many if row in few] == few, "in the order of the file"
            counts.append((len(few), len(many)))
    fewer = [few for few, many in counts if few < many]
    assert fewer == [40, 40] if script is dpo else fewer == [40]
    again = script.load_task(dataclasses.replace(args, seed=9), CPU)
    assert [x for x in again if isinstance(x, list)] == [x for x in some if isinstance(x, list)]
    rows = list(range(100))
    assert common.some_rows(rows, 0) == common.some_rows(rows, 200) == rows
    assert max(common.some_rows(rows, 40)) > 80, "not the first ones"


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_a_signal_in_an_evaluation_saves_at_once_and_leaves_it_out(
    script, tmp_path, monkeypatch, capsys
):
    """It comes while the first part of step 2's evaluation is computed."""
    asked = []
    inside = [0]
    honest = common.until_stopped

    def until_stopped(parts, world, stop_asked=None):
        inside[0] += 1
        for number, part in enumerate(honest(parts, world, stop_asked), 1):
            if (tmp_path / "run" / "checkpoint" / "000001.pt").exists():
                asked.append(number)
            yield part

    monkeypatch.setattr(common, "until_stopped", until_stopped)
    monkeypatch.setattr(common, "catch_signals", lambda steps: lambda: bool(asked))
    monkeypatch.setattr(common, "rows_at_once", lambda *given: 4)
    name = "pairs_test.jsonl" if script in (dpo, reward_model) else "sort_test.jsonl"
    held_out = {"eval_data": str(grpo.TINY / name), "eval_rows": 20}
    flags = held_out | {"save_every": 1, "keep": 9, "eval_every": 2, "samples_per_prompt": 2}
    flags |= {"tokens_per_micro_batch": 100}
    with pytest.raises(SystemExit) as stopped:
        run(script, tmp_path, steps=4, **flags)
    assert "stopped by a signal after step 2 of 4, which is saved" in str(stopped.value)
    assert asked == [1], "after one part of several"
    assert "the held-out scores of step 2 are left out" in capsys.readouterr().out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert [m["step"] for m in log] == [0, 1, 2]
    scored = [m["step"] for m in log if any(name.startswith("eval/") for name in m)]
    assert scored == [0]
    assert "000002" in [p.stem for p in common.checkpoints(tmp_path / "run")]


def test_a_signal_in_the_last_evaluation_leaves_an_older_score_with_its_step(
    tmp_path, monkeypatch, capsys
):
    scored(grpo, monkeypatch, [0.1, 0.5])
    before = grpo.evaluate

    def evaluate(*everything):
        if (tmp_path / "run" / "checkpoint" / "000002.pt").exists():
            raise common.Ended("as by a signal")
        return before(*everything)

    monkeypatch.setattr(grpo, "evaluate", evaluate)
    run(grpo, tmp_path, steps=3, **FEW | {"eval_every": 2})
    assert "held-out reward: 0.100 -> 0.500 at step 2\n" in capsys.readouterr().out
    assert (tmp_path / "run" / "model").is_dir()


def test_a_signal_before_the_first_step_ends_the_run_with_nothing_to_save(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "catch_signals", lambda steps: lambda: True)
    with pytest.raises(SystemExit) as stopped:
        run(grpo, tmp_path, steps=3, eval_data=None, eval_rows=4)
    assert "stopped by a signal during the evaluation\nno checkpoint was written" in str(
        stopped.value
    )


def test_a_signal_in_the_last_part_of_an_evaluation_ends_it_too():
    """It would begin a step otherwise, which may take minutes."""
    seen = []
    with pytest.raises(common.Ended):
        for part in common.until_stopped([1, 2], CPU, lambda: len(seen) == 2):
            seen.append(part)
    assert seen == [1, 2]


def test_scores_that_are_all_alike_have_no_interval(tmp_path, monkeypatch, capsys):
    (tmp_path / "r.py").write_text("def f(completion, row):\n    return 0.3")
    data = str(grpo.TINY / "sort_test.jsonl")
    flags = {"reward": f"{tmp_path}/r.py:f", "eval_data": data, "eval_rows": 3}
    run(grpo, tmp_path, steps=1, samples_per_prompt=2, warmup=1, **flags)
    said = capsys.readouterr().out
    assert "held-out reward: 0.300 -> 0.300\n" in said and "3 rows, 95 % interval" in said
    assert "does not reach its peak: --warmup would end at step 1, the run at step 1" in said


def test_an_evaluation_shows_its_progress_on_the_first_process_only(monkeypatch):
    shown = []

    def bar(parts, **settings):
        shown.append(settings["disable"])
        return parts

    monkeypatch.setattr(common, "tqdm", bar)
    for rank in (0, 1):
        world = World(rank, 1, torch.device("cpu"), torch.float32)
        assert list(common.until_stopped([1, 2], world)) == [1, 2]
    assert shown == [None, True], "None: in a terminal"


# --- the best model ---


def scored(script, monkeypatch, scores):
    """The script's evaluation gives these numbers, one after another."""
    left = iter(scores)

    def evaluate(*everything):
        found = {
            "eval/loss": 9.0,
            "eval/accuracy" if script is reward_model else "eval/reward": next(left),
        }
        return found

    monkeypatch.setattr(script, "evaluate", evaluate)


def best(tmp_path, name="run"):
    """The step and the weights of best/, or None."""
    folder = tmp_path / name / "best"
    if not folder.exists():
        return None, None
    return json.loads((folder / "score.json").read_text()), load_file(folder / "model.safetensors")


FEW = {"save_every": 1, "keep": 9, "eval_every": 1, "warmup": 0, "learning_rate": 1e-4}
FEW |= {"samples_per_prompt": 2, "schedule": "constant"}


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_the_model_with_the_best_held_out_score_is_kept_and_named(
    script, tmp_path, monkeypatch, capsys
):
    """The first of equal ones. A resumed run goes on with the best so far."""
    scored(script, monkeypatch, [0.1, 0.5, 0.5, 0.2])
    run(script, tmp_path, steps=3, **FEW)
    measure = "accuracy" if script is reward_model else "reward"
    kept = f"kept in {tmp_path / 'run' / 'best'}"
    assert f"best held-out {measure}: 0.500 at step 1, {kept}" in capsys.readouterr().out
    note, weights = best(tmp_path)
    assert note == {"step": 1, f"eval/{measure}": 0.5}
    there = saved(tmp_path, 1)["model" if script is reward_model else "policy"]
    assert all(torch.equal(p, there[k]) for k, p in weights.items() if k in there)
    assert set(there) - set(weights) <= {"lm_head.weight"}

    scored(script, monkeypatch, [0.4])
    run(script, tmp_path, steps=4, resume=True, **FEW)
    assert best(tmp_path)[0]["step"] == 1 and f"0.500 at step 1, {kept}" in capsys.readouterr().out
    scored(script, monkeypatch, [0.7])
    run(script, tmp_path, steps=5, resume=True, **FEW)
    assert best(tmp_path)[0]["step"] == 5
    assert "best held-out" not in capsys.readouterr().out, "the last one is the best"


def test_a_model_that_only_got_worse_is_not_the_best(tmp_path, monkeypatch, capsys):
    scored(grpo, monkeypatch, [0.6, 0.5, 0.55])
    run(grpo, tmp_path, steps=2, **FEW)
    said = capsys.readouterr().out
    assert best(tmp_path)[0] is None
    assert "best held-out reward: 0.600 at step 0\n" in said
    scored(grpo, monkeypatch, [0.6, 0.5, 0.6])
    run(grpo, tmp_path, "equal", steps=2, **FEW)
    assert "best held-out" not in capsys.readouterr().out, "the last one is as good"


def test_a_best_model_that_cannot_be_written_costs_no_checkpoint(tmp_path, monkeypatch, capsys):
    scored(grpo, monkeypatch, [0.1, 0.2, 0.3])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.tmp").write_text("in the way")
    run(grpo, tmp_path, steps=2, **FEW)
    assert saved(tmp_path, 2) and (tmp_path / "run" / "model").is_dir()
    assert "warning: " in (said := capsys.readouterr().out) and "--no_keep_best" in said


def test_without_evaluations_nothing_is_said_of_what_is_held_out(tmp_path, capsys):
    data = str(grpo.TINY / "sort_test.jsonl")
    run(grpo, tmp_path, steps=1, eval_every=0, eval_data=data, samples_per_prompt=2)
    run(grpo, tmp_path, "no data", steps=1, samples_per_prompt=2)
    assert capsys.readouterr().out.count("nothing was held out") == 1


def test_without_keep_best_the_best_score_is_named_and_nothing_else_changes(
    tmp_path, monkeypatch, capsys
):
    for name, keep_best in (("a", True), ("b", False)):
        scored(grpo, monkeypatch, [0.1, 0.5, 0.4])
        run(grpo, tmp_path, name, steps=2, keep_best=keep_best, **FEW)
    assert "best held-out reward: 0.500 at step 1\n" in capsys.readouterr().out
    assert best(tmp_path, "a")[0]["step"] == 1 and best(tmp_path, "b")[0] is None
    a, b = (saved(tmp_path, 2, name)["policy"] for name in "ab")
    assert all(torch.equal(p, b[k]) for k, p in a.items())


def test_best_survives_a_crash_that_lost_its_step(tmp_path, monkeypatch, capsys):
    """Resumed from step 1, the run makes step 2 again, and step 3. best/ stays that of the lost
    step 3 until a score is above it; a run that begins anew has none."""
    scored(grpo, monkeypatch, [0.1, 0.2, 0.3, 0.6])
    run(grpo, tmp_path, steps=3, **FEW)
    lost = best(tmp_path)
    for step in (2, 3):
        (tmp_path / "run" / "checkpoint" / f"{step:06d}.pt").unlink()
    capsys.readouterr()
    scored(grpo, monkeypatch, [0.5, 0.55])
    run(grpo, tmp_path, steps=3, resume=True, **FEW)
    assert lost[0] == {"step": 3, "eval/reward": 0.6} == best(tmp_path)[0]
    assert "best held-out reward: 0.600 at step 3, kept in" in capsys.readouterr().out
    for checkpoint in common.checkpoints(tmp_path / "run"):
        checkpoint.unlink()
    scored(grpo, monkeypatch, [0.1, 0.05])
    run(grpo, tmp_path, steps=1, resume=True, **FEW)
    assert best(tmp_path)[0] is None


def test_with_adapters_best_has_its_own(tmp_path, monkeypatch):
    """One folder for the best and one for the last; both are merged into their models."""
    scored(grpo, monkeypatch, [0.1, 0.5, 0.4])
    (tmp_path / "r.py").write_text("def f(said, row):\n    return sum(map(ord, said)) % 7\n")
    run(grpo, tmp_path, steps=2, lora_rank=2, reward=f"{tmp_path}/r.py:f", **FEW)
    assert best(tmp_path)[0]["step"] == 1
    names = ("best_adapter", "adapter")
    first, last = (load_file(tmp_path / "run" / n / "adapter_model.safetensors") for n in names)
    assert any(not torch.equal(p, last[k]) for k, p in first.items())
    [name] = [k for k in first if "layers.0.self_attn.q_proj.lora_B" in k]
    step_1 = saved(tmp_path, 1)["policy"]
    assert torch.equal(first[name], step_1[name.removeprefix("base_model.model.")])


@pytest.mark.parametrize("script", ROLLOUTS, ids=named)
def test_another_model_is_evaluated_on_held_out_prompts_alone(script, tmp_path, capsys):
    shutil.copytree(script.TINY / "model", tmp_path / "model")
    data = prompts_file(tmp_path, [{"prompt": "52=", "answer": "25"}])
    flags = {"steps": 0, "out": str(tmp_path / "run"), "device": "cpu"}
    script.train(script.Args(model=str(tmp_path / "model"), eval_data=data, **flags))
    assert "first text, as the model sees it: '52='" in capsys.readouterr().out
    [line] = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert "eval/exact" in json.loads(line)


# --- best of N ---


def best_of_everywhere(out, world):
    """Best-of-N with a sampler that draws nothing; score and true reward depend on text and row."""

    def sample(policy, tokenizer, prompts, *, n, max_new_tokens, temperature, seed):
        return SimpleNamespace(texts=[f"{ids[0]} {j}" for ids in prompts for j in range(n)])

    def score(model, tokenizer, texts, rows, world):
        return [bon_score(t, r) for t, r in zip(texts, rows, strict=True)]

    def reward(samples, rows):
        truths = [bon_truth(t, r) for t, r in zip(samples.texts, rows, strict=True)]
        return {"reward": truths, "reward/half": [truth / 2 for truth in truths]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_reference", lambda *a: None)
        patch.setattr(common, "sample", sample)
        patch.setattr(common, "score_texts", score)
        found = {}
        for count in (1, 7):
            args = reward_model.Args(best_of=(1, 2, 4), sample_rows=8, policy="x")
            rows = [([i], {"prompt": str(i)}) for i in range(count)]
            loaded = common.Reward(reward, None, {})
            asked = (None, None, None, rows, loaded, args, world, lambda: False)
            found[count] = reward_model.report_best_of(*asked)
    (out / f"best{world.rank}.json").write_text(json.dumps(found))


def bon_score(text, row):
    i, j = map(int, text.split())
    return float((3 * i + 5 * j) % 7) + 10 * (int(row["prompt"]) == i)


def bon_truth(text, row):
    i, j = map(int, text.split())
    return i + 0.1 * j + 100 * (int(row["prompt"]) == i)


@pytest.mark.parametrize("size", [1, 2])
def test_best_of_n_asks_for_every_prompt_and_pays_by_its_own_row(size, request, tmp_path):
    folder = request.getfixturevalue("two_processes") if size == 2 else tmp_path
    if size == 1:
        best_of_everywhere(folder, CPU)
    for rank in range(size):
        for count, found in json.loads((folder / f"best{rank}.json").read_text()).items():
            wanted = {}
            for n in (1, 2, 4):
                scores, truths = [], []
                for i in range(int(count)):
                    drawn = [
                        (
                            bon_score(f"{i} {j}", {"prompt": str(i)}),
                            bon_truth(f"{i} {j}", {"prompt": str(i)}),
                        )
                        for j in range(4)
                    ]
                    best = [max(choice) for choice in itertools.combinations(drawn, n)]
                    scores.append(sum(s for s, _ in best) / len(best))
                    truths.append(sum(t for _, t in best) / len(best))
                wanted[f"best_of/score@{n}"] = sum(scores) / len(scores)
                wanted[f"best_of/true@{n}"] = sum(truths) / len(truths)
                wanted[f"best_of/reward/half@{n}"] = sum(truths) / len(truths) / 2
                wanted[f"best_of/kl@{n}"] = math.log(n) - (n - 1) / n
            assert found == pytest.approx(wanted)


# --- runs ---


def run(script, tmp_path, name="run", **flags):
    """A short run of any of the five scripts; what a script does not know is not given to it."""
    settings = {
        "out": str(tmp_path / name),
        "device": "cpu",
        "eval_data": "",
        "eval_prompts": "",
        "policy": "",
    }
    settings |= {"prompts_per_step": 4, "pairs_per_step": 4, "max_new_tokens": 6}
    settings |= {"unit_scale": False}
    task = "sort_train.jsonl" if script in ROLLOUTS else "pairs_train.jsonl"
    settings |= {"data": str(grpo.TINY / task)} | flags
    known = {k: v for k, v in settings.items() if k in vars(script.Args())}
    script.train(script.Args(**known))
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def saved(tmp_path, step, name="run"):
    path = tmp_path / name / "checkpoint" / f"{step:06d}.pt"
    return torch.load(path, weights_only=True)["models"]


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_scores_and_checkpoints_are_made_when_the_flags_say(script, tmp_path, monkeypatch):
    """Scores before the first step, every --eval_every steps, and after the last, of the weights as
    that step has left them; checkpoints every --save_every steps, and after the last."""
    seen = []

    def evaluate(model, *rest):
        seen.append({k: p.detach().clone() for k, p in model.named_parameters()})
        return {"eval/reward": float(len(seen))}

    monkeypatch.setattr(script, "evaluate", evaluate)
    few = grpo.TINY / ("pairs_test.jsonl" if script is reward_model else "sort_test.jsonl")
    held_out = {"eval_prompts" if script is dpo else "eval_data": str(few)}
    flags = {"eval_every": 2, "save_every": 1, "keep": 9, "warmup": 0, "learning_rate": 1e-4}
    log = run(script, tmp_path, steps=5, **held_out, **flags)
    assert [(m["step"], m["eval/reward"]) for m in log if "eval/reward" in m] == [
        (0, 1),
        (2, 2),
        (4, 3),
        (5, 4),
    ]
    which = "model" if script is reward_model else "policy"
    for weights, step in zip(seen[1:], (2, 4, 5)):
        there = saved(tmp_path, step)[which]
        assert all(torch.equal(p, there[k]) for k, p in weights.items())
    monkeypatch.undo()
    greedy, sample = [], common.sample

    def counted(*everything, **settings):
        if settings.get("temperature") == 0:
            greedy.append(settings)
        return sample(*everything, **settings)

    monkeypatch.setattr(common, "sample", counted)
    log = run(script, tmp_path, "other", steps=5, save_every=2, keep=9)
    assert [p.stem for p in common.checkpoints(tmp_path / "other")] == [
        "000002",
        "000004",
        "000005",
    ]
    assert not greedy, "nothing was held out"
    assert not any(key.startswith("eval/") for m in log for key in m)


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_a_step_is_its_rate_times_the_limit_on_the_gradient(script, tmp_path, monkeypatch):
    """Plain gradient descent under a limit that every gradient exceeds. A rate or a limit that is
    logged and not used would be found here."""
    limit, peak = 1e-3, {"learning_rate": 4.0, "critic_learning_rate": 8.0}

    def sgd(model, rate):
        return torch.optim.SGD(model.parameters(), lr=rate)

    monkeypatch.setattr(common, "make_optimizer", sgd)
    paid = "0.3 * len(completion) + completion.count('1')"
    (tmp_path / "r.py").write_text(f"def f(completion, row):\n    return {paid}\n")
    settings = {
        "reward": f"{tmp_path}/r.py:f",
        "epochs": 1,
        "minibatches": 1,
        "beta": 0.1,
        "samples_per_prompt": 4,
    }
    settings |= {
        "save_every": 1,
        "keep": 9,
        "max_grad_norm": limit,
        "warmup": 1,
        "schedule": "linear",
    }
    log = run(script, tmp_path, steps=4, **peak, **settings)
    rates = [1 / 2, 1.0, 2 / 3, 1 / 3]
    for name in saved(tmp_path, 1):
        of_critic = name == "critic"
        key = "value/" if of_critic else ""
        top = peak["critic_learning_rate" if of_critic else "learning_rate"]
        logged = [m[f"{key}learning_rate"] for m in log[1:5]]
        assert logged == pytest.approx([rate * top for rate in rates])
        for step in (2, 3, 4):
            before, after = saved(tmp_path, step - 1)[name], saved(tmp_path, step)[name]
            ways = [(after[k] - before[k]).double().norm().item() for k in after]
            way = math.hypot(*ways)
            assert log[step][f"{key}grad_norm"] > limit
            assert way == pytest.approx(rates[step - 1] * top * limit, rel=1e-2), (
                name,
                step,
            )


@pytest.mark.parametrize("script", ROLLOUTS, ids=named)
def test_a_rollout_is_drawn_from_the_steps_prompts_at_the_flags_temperature_with_a_seed_of_its_own(
    script, tmp_path, monkeypatch
):
    """The prompts are shuffled copies of the data one after another, in an order of the seed."""
    asked, honest = [], common.sample

    def sample(model, tokenizer, prompts, **settings):
        asked.append({"prompts": [tokenizer.decode(ids) for ids in prompts], **settings})
        return honest(model, tokenizer, prompts, **settings)

    monkeypatch.setattr(common, "sample", sample)
    digits = [f"{i}{i}=" for i in range(6)]
    data = prompts_file(tmp_path, [{"prompt": d, "answer": "1"} for d in digits])
    flags = {
        "data": data,
        "samples_per_prompt": 2,
        "temperature": 0.6,
        "max_new_tokens": 5,
        "steps": 3,
    }
    for seed in (1, 2):
        run(script, tmp_path, f"seed{seed}", seed=seed, **flags)
    assert all((a["n"], a["temperature"], a["max_new_tokens"]) == (2, 0.6, 5) for a in asked)
    assert len({a["seed"] for a in asked}) == 6, "every step of every seed draws with another"
    orders = [[p for a in asked[i : i + 3] for p in a["prompts"]] for i in (0, 3)]
    for order in orders:
        assert sorted(order[:6]) == sorted(order[6:]) == digits and order[:6] != order[6:]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("script", ROLLOUTS, ids=named)
def test_every_completion_is_paid_by_the_row_of_its_own_prompt(script, tmp_path, monkeypatch):
    """Each is made to say its prompt, for which only that prompt's row pays."""
    honest = common.sample

    def sample(model, tokenizer, prompts, **settings):
        samples = honest(model, tokenizer, prompts, **settings)
        masked = zip(samples.prompt_ids, samples.prompt_mask)
        samples.texts = [tokenizer.decode(ids[mask]) for ids, mask in masked]
        return samples

    monkeypatch.setattr(common, "sample", sample)
    (tmp_path / "r.py").write_text("def f(said, row):\n    return float(said == row['prompt'])\n")
    data = prompts_file(tmp_path, [{"prompt": f"{i}{i}=", "answer": "1"} for i in range(7)])
    flags = {"data": data, "reward": f"{tmp_path}/r.py:f", "samples_per_prompt": 3}
    log = run(script, tmp_path, steps=2, **flags)
    assert [m["reward"] for m in log[1:]] == [1, 1]


@pytest.mark.parametrize("script", ROLLOUTS, ids=named)
def test_the_first_ratio_tells_of_two_probabilities_for_one_token(script, tmp_path, monkeypatch):
    """Old log-probabilities that are 0.1 too high at each completion's first token: the first ratio
    is exp(-0.1) there, and 1 elsewhere."""
    name = "before_update" if script is ppo else "rollout_logprobs"
    honest = getattr(script, name)

    def too_high(*inputs):
        found = honest(*inputs)
        old = found[0] if script is ppo else found
        old[:, 0] += 0.1
        return found

    monkeypatch.setattr(script, name, too_high)
    flags = {"steps": 1, "epochs": 2, "minibatches": 1, "beta": 0.0, "samples_per_prompt": 8}
    paid = "sum(map(ord, completion)) % 7"
    (tmp_path / "r.py").write_text(f"def f(completion, row):\n    return {paid}\n")
    log = run(script, tmp_path, reward=f"{tmp_path}/r.py:f", **flags)
    assert log[1]["ratio/first"] == pytest.approx(1 - math.exp(-0.1), abs=1e-5)


def test_a_learning_rate_falls_to_0_just_after_the_last_step_whatever_the_warm_up():
    """In equal parts, or in half a cosine; step `steps + 1` would have none left."""
    for steps, warmup in ((10, 0), (10, 3), (5, 4), (7, 1)):
        linear, cosine = (
            [common.learning_rate_at(s, steps, 2.0, schedule, warmup) for s in range(1, steps + 2)]
            for schedule in ("linear", "cosine")
        )
        rising = [2.0 * s / (warmup + 1) for s in range(1, warmup + 1)]
        falling = [i / (steps - warmup) for i in range(steps - warmup + 1)]
        straight = [2.0 * (1 - done) for done in falling]
        assert linear == pytest.approx(rising + straight, abs=1e-12)
        curve = [1.0 + math.cos(math.pi * done) for done in falling]
        assert cosine == pytest.approx(rising + curve, abs=1e-12)


# --- what a run leaves behind ---


def test_console_log_and_tensorboard_have_every_step_once(tmp_path, capsys):
    """A run of 3 steps whose last checkpoint is of step 2, resumed and taken to step 4. What log
    and TensorBoard had of step 3 is replaced."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = {"schedule": "constant", "warmup": 0, "eval_every": 9, "samples_per_prompt": 2}
    lines = (grpo.TINY / "sort_test.jsonl").read_text().splitlines()[:20]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    flags |= {"eval_data": str(tmp_path / "test.jsonl"), "save_every": 2, "keep": 9}
    run(grpo, tmp_path, steps=3, **flags)
    out = tmp_path / "run"
    (out / "checkpoint" / "000003.pt").unlink()
    capsys.readouterr()
    log = run(grpo, tmp_path, steps=4, resume=True, **flags)
    said = capsys.readouterr().out
    assert [m["step"] for m in log] == [0, 1, 2, 3, 4]
    shown = [json.loads(line)["step"] for line in (out / "samples.jsonl").read_text().splitlines()]
    assert shown == [1, 1, 2, 2, 3, 3, 4, 4]

    first, last = log[0]["eval/exact"], log[4]["eval/exact"]
    assert "going on after step 2 of 4" in said
    low, high = (f"{end:.3f}" for end in wilson(round(20 * last), 20))
    assert (
        f"held-out exact: {first:.3f} -> {last:.3f} (20 rows, 95 % interval {low} to {high})"
        in said
    )
    assert log[4]["held_out/prompts"] == 20
    assert f"step 4: held-out reward {log[4]['eval/reward']:.3f}, exact {last:.3f}" in said
    assert 'print(pipeline("text-generation", ' in said

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    for name in ("reward", "loss", "learning_rate", "eval/exact"):
        there = {e.step: e.value for e in events.Scalars(name)}
        wanted = {m["step"]: m[name] for m in log if name in m}
        assert there == pytest.approx(wanted) and len(there) == len(events.Scalars(name)), name


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_the_progress_bar_moves_with_every_step_and_begins_where_a_resumed_run_does(
    script, tmp_path, monkeypatch
):
    bars = []

    class Bar(common.tqdm):
        def __init__(self, *parts, **settings):
            super().__init__(*parts, **settings | {"disable": False, "file": io.StringIO()})
            if not parts:  # not that of an evaluation
                bars.append(self)

    monkeypatch.setattr(common, "tqdm", Bar)
    flags = {"save_every": 2, "schedule": "constant", "warmup": 0}
    for steps, resume in ((2, False), (3, True)):
        log = run(script, tmp_path, steps=steps, resume=resume, **flags)
        number = "reward" if script in ROLLOUTS else "accuracy"
        assert f"{number} {log[steps][number]:.3f}" in bars[-1].postfix
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [(0, 2, 2), (2, 3, 3)]


@pytest.mark.parametrize("script", ROLLOUTS, ids=named)
def test_the_time_of_the_reward_is_logged_apart(script, tmp_path):
    """A slow reward, and one that is slow for held-out rows only."""
    lines = "import time\ndef slow(completion, row):\n    time.sleep(row.get('wait', 0.01))\n    return 1"
    (tmp_path / "reward.py").write_text(lines)
    row = {"prompt": "52=", "answer": "25"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    (tmp_path / "test.jsonl").write_text(json.dumps(row | {"wait": 0.5}))
    flags = {"data": str(tmp_path / "data.jsonl"), "eval_data": str(tmp_path / "test.jsonl")}
    flags |= {"reward": f"{tmp_path}/reward.py:slow", "samples_per_prompt": 4}
    metrics = run(script, tmp_path, steps=1, prompts_per_step=2, **flags)
    assert 0.08 <= metrics[1]["time/reward"] < 0.45 and "time/reward" not in metrics[0]
    assert metrics[1]["time/reward"] <= metrics[1]["time/sample"]


def test_tensorboard_has_a_tab_for_the_run_at_a_glance(tmp_path):
    run(reinforce, tmp_path, steps=1, eval_rows=4, samples_per_prompt=2)
    written = b"".join(path.read_bytes() for path in (tmp_path / "run" / "tensorboard").iterdir())
    assert b"custom_scalars" in written and b"the run at a glance" in written
    for name in ("eval/exact$", "reward$", "kl/ref$", "truncated$"):  # $: not reward/format
        assert name.encode() in written.partition(b"the run at a glance")[2]


def test_the_share_of_no_right_ones_has_an_interval_that_begins_at_0():
    for count in range(2, 60):
        assert common.Mean(0.0, count, 0.0).low == 0.0
        assert not f"{common.Mean(0.0, count, 0.0).low:.3f}".startswith("-")


def test_a_log_is_read_as_it_was_written_whatever_the_names_and_the_locale(tmp_path, monkeypatch):
    """A user's reward names its parts, and a line separator in a name is no end of a line."""
    row = {"step": 1, "reward/é\u2028ü": 0.5}
    (tmp_path / "metrics.jsonl").write_bytes(
        (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
    )
    read = Path.read_text

    def in_latin_1(path, encoding="latin-1", **named):
        return read(path, encoding=encoding, **named)

    monkeypatch.setattr(Path, "read_text", in_latin_1)
    assert common.read_log(tmp_path) == [row]


def test_a_best_model_whose_scores_are_not_in_the_log_compares_with_nothing(tmp_path):
    """A run that was resumed without evaluations."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 0.5}) + "\n")
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "score.json").write_text(json.dumps({"step": 1, "eval/exact": 0.5}))
    assert common.scores_so_far(tmp_path) == (None, [], [])


def test_after_best_of_n_nothing_is_said_of_data_that_is_held_out(tmp_path, capsys):
    args = SimpleNamespace(eval_every=1, steps=0)
    for name, said in (("best_of/true@4", False), ("held_out/prompts", False), ("reward", True)):
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, name: 0.5}) + "\n")
        bar = SimpleNamespace(close=lambda: None)
        writer = SimpleNamespace(close=lambda: None, held_out={})
        common.conclude(tmp_path, args, writer, bar, "")
        assert ("nothing was held out" in capsys.readouterr().out) == said


@pytest.mark.parametrize(
    "processes, here, launcher",
    [
        ("1", "1", "python "),
        ("4", "4", "torchrun --nproc_per_node 4 "),
        ("4", "2", "torchrun ... "),
    ],
)
def test_the_command_that_resumes_a_run_names_its_processes(
    processes, here, launcher, tmp_path, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    words = common.last_words(common.Ended("stopped"), tmp_path, SimpleNamespace(steps=3))
    assert f"with: {launcher}" in words and words.endswith(f"--resume --out {tmp_path}")


def test_shown_scores_have_six_digits():
    samples = SimpleNamespace(texts=["25"])
    [shown] = common.examples(samples, {"reward": [0.1 + 0.2]}, [{"prompt": "52="}], [0])
    assert shown == {"prompt": "52=", "completion": "25", "reward": 0.3}


def test_without_reward_to_go_there_is_no_baseline_unless_asked_for():
    """With gamma 0 a baseline of G_1 would be of the first token alone."""
    for flags, baseline in (({}, "loo"), ({"gamma": 0.0}, "none"), ({"gamma": 0.9}, "loo")):
        assert reinforce.resolve(reinforce.Args(**flags)).baseline == baseline
    assert reinforce.resolve(reinforce.Args(gamma=0.0, baseline="loo")).baseline == "loo"


@pytest.mark.parametrize("reward, told", [("exact", True), ("none", False)])
def test_other_lengths_are_no_warning_where_a_teacher_decides_them(reward, told, capsys):
    args, bad_steps = SimpleNamespace(reward=reward), collections.Counter()
    for _ in range(3):
        common.advise({"length / first length": 4.0}, args, bad_steps)
    assert ("completions are much shorter or longer" in capsys.readouterr().out) == told
