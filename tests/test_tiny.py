"""The bundled model and its data have the properties that the scripts and the README count on; not these bytes."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import common
from common import World, sample

TINY = ROOT / "tests" / "tiny"
CPU = World(0, 1, torch.device("cpu"), torch.float32)


def rows(name):
    return [json.loads(line) for line in (TINY / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def sort():
    import importlib.util

    spec = importlib.util.spec_from_file_location("sort", TINY / "sort.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_model_is_small_in_bfloat16_with_a_pad_of_its_own():
    from safetensors import safe_open

    assert sum(p.stat().st_size for p in (TINY / "model").iterdir()) < 3e6
    with safe_open(TINY / "model" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(k).dtype for k in file.keys()} == {torch.bfloat16}
    model, tokenizer = (
        common.load_policy(TINY / "model", CPU),
        common.load_tokenizer(TINY / "model"),
    )
    assert 0.5e6 <= sum(p.numel() for p in model.parameters()) <= 1.5e6
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.chat_template is None
    ids = tokenizer("52817= 12578\nabc").input_ids
    assert len(ids) == 16 and tokenizer.decode(ids) == "52817= 12578\nabc"


def test_lists_are_right_and_no_list_is_in_two_files():
    train, test, pairs, held = (
        rows(f"{n}.jsonl") for n in ("sort_train", "sort_test", "pairs_train", "pairs_test")
    )
    assert len(test) == 512 and len(train) >= 4096
    for r in train + test:
        digits = r["prompt"].removesuffix("=")
        assert 4 <= len(digits) <= 8 and r["answer"] == "".join(sorted(digits))
    seen = [{r["prompt"] for r in x} for x in (train, test, held)]
    assert all(not a & b for i, a in enumerate(seen) for b in seen[:i])
    assert len(seen[0]) == len(train) and {r["prompt"] for r in pairs} <= seen[0]


def test_the_model_is_right_now_and_then_and_no_more():
    """Sampled 15 %, greedy 31 %: enough to learn from, and much left to learn. Both are known exactly, up to the few
    completions that rounding may turn."""
    model, tokenizer, test = (
        common.load_policy(TINY / "model", CPU),
        common.load_tokenizer(TINY / "model"),
        rows("sort_test.jsonl"),
    )
    for n, temperature, wanted, few in ((4, 1.0, 312, 8), (1, 0.0, 160, 1)):
        s = sample(
            model,
            tokenizer,
            [r["prompt"] for r in test],
            n=n,
            max_new_tokens=23,
            temperature=temperature,
            seed=0,
        )
        right = sum(t == test[i // n]["answer"] for i, t in enumerate(s.texts))
        assert right == pytest.approx(wanted, abs=few)
        assert s.finished.float().mean() > 0.7, (
            "it knows how to end an answer (greedily it sometimes runs on)"
        )


def test_pairs_are_ranked_without_ties(sort):
    train, test = rows("pairs_train.jsonl"), rows("pairs_test.jsonl")
    assert len(train) >= 2500 and len(test) >= 400
    for r in train + test:
        assert sort.position(r["chosen"], r) > sort.position(r["rejected"], r)


@pytest.mark.parametrize(
    "said, position, adjacent",
    [
        ("1257", 1.0, 1.0),
        (" 1257\n", 1.0, 1.0),
        ("1275", 0.5, 0.5 + 0.5 * 2 / 3),
        ("", 0.0, 0.0),
        ("12578", 0.8, 0.5 * 0.8 + 0.5),
        ("9999", 0.0, 0.5),
    ],
)
def test_the_partial_rewards_by_hand(said, position, adjacent, sort):
    row = {"prompt": "7215=", "answer": "1257"}
    assert (
        abs(sort.position(said, row) - position) < 1e-9
        and abs(sort.adjacent(said, row) - adjacent) < 1e-9
    )


def test_the_data_is_remade_the_same(sort):
    test = sort.lists(512, 0)
    assert test == rows("sort_test.jsonl")
    assert sort.lists(8192, 1, without={r["prompt"] for r in test}) == rows("sort_train.jsonl")


def test_scripts_name_default_files_by_their_own_place(monkeypatch, tmp_path):
    import reinforce

    monkeypatch.chdir(tmp_path)
    args = reinforce.resolve(reinforce.Args())
    assert Path(args.model).is_dir() and Path(args.data).is_file()


# --- a reward for code ---

programs = sys.modules[common.load_function(f"{TINY}/programs.py:passes", "--reward").__module__]

ADD = {
    "tests": [
        "assert add(1, 2) == 3",
        "assert add(0, 0) == 0",
        "assert add('a', 'b') == 'ab'",
        "assert add(2, 2) == 5",
    ]
}


@pytest.mark.parametrize(
    "completion, share",
    [
        ("def add(a, b):\n    return a + b\n", 0.75),
        ("Sure:\n```python\ndef add(a, b): return 0\n```\nNo, this:\n```python\ndef add(a, b):\n    return a + b\n```\n", 0.75),
        ("def add(a, b):\n    return int(a) + int(b)\n", 0.5),  # a test that raises does not end the others
        ("def add(a, b): return", 0),
        ("def add(a, b:\n", 0),
        ("I would rather not.", 0),
        ("", 0),
        ("def add(a, b): return a + b\nimport sys\nsys.exit(0)", 0),
        ("print('passed\\n' * 100)\nimport os\nos._exit(0)", 0),
        ("x = [0]\nwhile True:\n    x += x\n", 0),  # memory
        ("print('y' * (1 << 24))\ndef add(a, b): return a + b", 0),  # more than it may write
    ],
)  # fmt: skip
def test_programs_are_paid_by_the_tests_they_pass(completion, share):
    assert programs.passes(completion, ADD) == share


def test_a_program_is_out_of_reach_of_ctrl_c():
    """It goes to all processes of the terminal, and a right program would be paid nothing."""
    leads = "assert os.getsid(0) == os.getpid()"
    assert programs.passes("import os", {"tests": [leads]}) == 1


def test_a_program_that_never_ends_is_ended(monkeypatch):
    monkeypatch.setattr(programs, "RUNNER", programs.RUNNER.replace('("CPU", 5)', '("CPU", 1)'))
    began = time.perf_counter()
    assert programs.passes("while True: pass", ADD) == 0
    assert time.perf_counter() - began < 8


# --- a task with longer answers ---

chain = sys.modules[common.load_function(f"{TINY}/chain.py:steps", "--reward").__module__]

WORKED = "7 + 5 = 12\n12 - 3 = 9\n9 + 8 = 17\nResult: 17"  # the answer to 7 + 5 - 3 + 8


@pytest.mark.parametrize(
    "completion, steps, form, end",
    [
        (WORKED, 1, 1, 1),
        ("\n" + WORKED.replace("\n", " \n\n") + "\n", 1, 1, 1),  # spaces and empty lines
        ("7 + 5 = 12\n12 - 3 = 8\n8 + 8 = 16\nResult: 16", 3 / 4, 1, 0),  # a wrong sum
        ("7 + 5 = 12\n12 + 8 = 20\n20 - 3 = 17\nResult: 17", 2 / 4, 1, 1),  # another order
        ("7 + 5 = 2\n2 - 3 = -1\n-1 + 8 = 7\nResult: 7", 3 / 4, 1, 0),  # below zero
        ("7 + 5 = 12\n12 - 3 = 9\n9 + 8 = 17", 3 / 4, 0, 1),  # no result
        ("7 + 5 = 12", 1 / 4, 0, 0),
        (WORKED.replace("17", "17."), 2 / 4, 0, 1),
        # attempts to be paid without the work
        ("", 0, 0, 0),
        (" \n", 0, 0, 0),
        ("Result: 17", 0, 0, 1),
        ("17\n17\n17\n17", 0, 0, 1),
        ("7 + 5 - 3 + 8", 0, 0, 0),
        (" ".join(str(number) for number in range(20)), 0, 0, 0),  # all numbers
        ("\n".join(f"Result: {number}" for number in range(20)), 0, 0, 0),
        ("1 + 1 = 2\n2 + 2 = 4\n4 + 4 = 8\nResult: 17", 0, 1, 1),  # a right end, wrong steps
        ("1 + 1 = 2\n2 + 2 = 4\n4 + 4 = 8\nResult: 8", 1 / 4, 1, 0),  # another problem
        ("7 + 5 = 12\n" * 4, 1 / 4, 0, 0),  # one right step again and again
        (WORKED + "\nResult: 16", 4 / 5, 0, 0),
        (WORKED + "\n" + WORKED, 4 / 8, 0, 1),
        ("Sure:\n" + WORKED, 0, 0, 1),
        (WORKED.replace("Result: 17", "Result: -17"), 3 / 4, 1, 0),
        (WORKED.replace("Result: 17", "Result: 3.17"), 3 / 4, 0, 0),
    ],
)
def test_a_chain_is_paid_for_each_line_that_follows_from_the_one_before(
    completion, steps, form, end
):
    row = {"answer": WORKED}
    assert chain.steps(completion, row) == steps
    assert chain.form(completion, row) == form
    assert chain.end(completion, row) == end
    named = {"reward": steps, "form": form, "right": end}
    assert chain.parts(completion, row) == named


def test_chains_are_different_problems_with_right_answers_of_small_numbers(tmp_path):
    chain.main(tmp_path)
    test, train = rows(tmp_path / "test.jsonl"), rows(tmp_path / "train.jsonl")
    assert len(test) == 256 and len(train) == 4096
    problems = {row["prompt"][-1]["content"] for row in test + train}
    assert len(problems) == len(test) + len(train) and not problems & set(chain.EXAMPLES)
    for row in test + train:
        problem = row["prompt"][-1]["content"]
        *steps, result = row["answer"].splitlines()
        assert 3 <= len(steps) <= 5 and problem.count(" ") == 2 * len(steps)
        assert result == f"Result: {eval(problem)}"
        for step in steps:
            worked, _, value = step.partition(" = ")
            assert eval(worked) == int(value) and 0 <= int(value) <= 19
        assert chain.steps(row["answer"], row) == 1
    assert chain.rows(5) == test[:5], "another run makes other data"
