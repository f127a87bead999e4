"""What users give and machines do wrong, for all five scripts. A mistake of the user's is one line, status 2, and nothing is written;
what breaks a run ends it with one sentence, status 1, and its checkpoint whole. Never a traceback, never a lost run."""

import ast
import importlib
import itertools
import json
import os
import shutil
import sys

import pytest
import torch
from conftest import ROOT, family, make_tokenizer

import common

TINY = ROOT / "tests" / "tiny"
ROLLOUTS, PAIRS = ("reinforce", "ppo", "grpo"), ("dpo", "reward_model")
ALL = ROLLOUTS + PAIRS
GOOD = {name: {"prompt": "52=", "answer": "25"} for name in ROLLOUTS} | {
    name: {"prompt": "52=", "chosen": "25", "rejected": "52"} for name in PAIRS
}
SMALL = {
    "reinforce": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 4},
    "grpo": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 4},
    "ppo": {"prompts_per_step": 2, "minibatches": 1, "epochs": 1, "max_new_tokens": 4},
    "dpo": {"pairs_per_step": 2, "eval_prompts": "", "max_tokens": 32},
    "reward_model": {"pairs_per_step": 2, "policy": "", "eval_prompts": "", "max_tokens": 32},
}


def start(script, folder, **flags):
    """A small run of a script in this process, on its good row unless told otherwise."""
    data = folder / "data.jsonl"
    if not data.exists():
        data.write_text((json.dumps(GOOD[script]) + "\n") * 4)
    module = importlib.import_module(script)
    settings = SMALL[script] | {
        "data": str(data),
        "eval_data": "",
        "device": "cpu",
        "steps": 2,
        "save_every": 1,
        "warmup": 0,
    }
    module.train(module.Args(**(settings | {"out": str(folder / "run")} | flags)))


def row(**changes):
    return lambda script: json.dumps(
        {k: v for k, v in (GOOD[script] | changes).items() if v is not ...}
    )


def lines(*rows):
    return lambda script: (
        "\n".join(
            [json.dumps(GOOD[script]), *(r if isinstance(r, str) else r(script) for r in rows)]
        )
        + "\n"
    )


# --- what the user gives: (scripts, what is in the data file, flags, words of the one line) ---

MISTAKES = [
    (ALL, None, {"data": "{}/none.jsonl"}, ["--data", "none.jsonl", "No such file"]),
    (ALL, None, {"data": "{}/folder"}, ["--data", "folder", "directory"]),
    (ALL, lambda s: "", {}, ["no rows"]),
    (ALL, lambda s: b"\x7fELF\xff\xfe\x00\x01", {}, ["UTF-8"]),
    (ALL, lines("{broken"), {}, ["line 2", "not JSON"]),
    (ALL, lines('{"prompt": "5", "x": "\\ud83d"}'), {}, ["line 2", "surrogate"]),
    (ALL, lambda s: "[\n" + json.dumps(GOOD[s]) + "\n]\n", {}, ["line 1", "array"]),
    (ALL, lambda s: json.dumps([GOOD[s]]), {}, ["an array", 'load_dataset("json", data_files="']),
    (ALL, None, {"data": "{}/x.csv"}, ["x.csv", "not JSON", 'load_dataset("csv", data_files="']),
    (ALL, None, {"data": "{}/x.parquet"}, ["UTF-8", 'load_dataset("parquet", data_files="']),
    (ALL, None, {"data": "owner/name"}, ["No such file", 'load_dataset("owner/name")["train"]']),
    (ALL, lines('{"instruction": "5", "x": 7}'), {}, ["line 2", "it has instruction, x"]),
    (
        ROLLOUTS,
        lines('{"instruction": "5"}'),
        {},
        ["; convert", 'row["output"]', 'to_json("data.jsonl"'],
    ),
    (ROLLOUTS, lines('{"messages": [1]}'), {}, ["it has messages; convert", "[:-1]"]),
    (
        ROLLOUTS,
        None,
        {"eval_data": "a/b"},
        ['load_dataset("a/b")["test"].to_json("eval_data.jsonl")'],
    ),
    (PAIRS, lines('{"messages": [1]}'), {}, ["line 2", "it has messages\n"]),
    (ALL, lines('{"query": "5"}'), {}, ["line 2", "it has query\n"]),
    (ALL, lines(row(prompt=[{"content": [{"type": "image"}]}])), {}, ["line 2", "type 'image'"]),
    (ALL, lines(row(prompt=[{"role": "user", "content": ["5"]}])), {}, ["line 2", "type 'str'"]),
    (ALL, lines("null"), {}, ["line 2", "needs"]),
    (ALL, lines("[1, 2]"), {}, ["line 2", "needs"]),
    (ALL, lines(row(prompt=None)), {}, ["line 2", "prompt"]),
    (ALL, lines(row(prompt=5)), {}, ["line 2", "prompt"]),
    (ALL, lines(row(prompt="")), {}, ["line 2", "prompt"]),
    (ALL, lines(row(prompt=[{"role": "user"}])), {}, ["line 2", "prompt"]),
    (ALL, lines(row(prompt=[{"role": "user", "content": None}])), {}, ["line 2", "prompt"]),
    ((*ROLLOUTS, "dpo"), lines(row(prompt=[{"role": "user", "content": "5"}])), {}, ["template"]),
    (ROLLOUTS, lines(row(answer=None)), {}, ["--data", "answer", "52="]),
    (ROLLOUTS, lines(row(answer=...)), {}, ["--data", "answer", "52="]),
    (ROLLOUTS, lines(row(prompt="5" * 31 + "=")), {}, ["and the model's context 32"]),
    (ROLLOUTS, None, {"max_prompt_tokens": 2}, ["--max_prompt_tokens 2"]),
    (PAIRS, lines(row(chosen=None)), {}, ["line 2", "chosen"]),
    (PAIRS, lines(row(rejected=...)), {}, ["line 2", "rejected"]),
    (PAIRS, lines(row(chosen=["25"])), {}, ["line 2", "chosen"]),
    (PAIRS, lines(row(chosen=[{"role": "user", "content": "25"}])), {}, ["line 2", "chosen"]),
    (
        PAIRS,
        lines(
            row(chosen=[{"role": "user", "content": "9="}, {"role": "assistant", "content": "9"}])
        ),
        {},
        ["is not what the messages before the answer say"],
    ),
    (PAIRS, row(rejected="25"), {}, ["no pair is left"]),
    (PAIRS, None, {"max_tokens": 3}, ["no pair is left"]),
    (ROLLOUTS, None, {"reward": "nice"}, ["--reward nice", "choose"]),
    (ROLLOUTS, None, {"reward": "none", "beta": 0.1}, ["--reward none", "--reference"]),
    (ROLLOUTS, lines(row(answer="Lima")), {"reward": "number"}, ["--reward number", "'Lima'"]),
    (ROLLOUTS, None, {"reward": "{}/none.py:f"}, ["no such file"]),
    (ROLLOUTS, None, {"reward": "{}/bad.py:f"}, ["cannot be imported", "SyntaxError"]),
    (ROLLOUTS, None, {"reward": "{}/good.py:g"}, ["no function 'g'"]),
    (ROLLOUTS, None, {"reward": str(TINY / "model")}, ["no reward model with one score"]),
    (ALL, None, {"model": "owner/name", "data": None}, ["--model owner/name needs --data"]),
    (ALL, None, {"model": "owner/name", "data": None, "steps": 0}, ["--steps 0 evaluates"]),
    (ALL, None, {"model": "{}/nowhere"}, ["nowhere", "no such folder"]),
    (ALL, None, {"model": "{}/run"}, ["the model of this run is in", "run/model"]),
    (ALL, None, {"model": "{}/folder"}, ["folder", "config.json"]),
    (ALL, None, {"model": "{}/unreadable"}, ["unreadable"]),
    (ALL, None, {"model": "{}/no_eos"}, ["no_eos", "no EOS token"]),
    (ALL, None, {"model": "{}/two_families"}, ["two_families", "do not belong together"]),
    (("reinforce", "ppo", "grpo", "dpo"), None, {"model": "{}/judge"}, ["judge", "a reward model"]),
    (ALL, None, {"out": "{}/full"}, ["--out", "full", "--resume"]),
    (ALL, None, {"out": "{}/good.py"}, ["--out", "good.py"]),
    (ALL, None, {"out": "/proc/none/run"}, ["--out", "cannot write there"]),
    (ALL, None, {"out": "{}/folder", "resume": True}, ["--resume", "holds no run"]),
    (ALL, None, {"out": "{}/full", "resume": True}, ["--resume", "a run of other.py"]),
    (ALL, None, {"resume": True}, ["--resume", "--out"]),
    (ALL, None, {"learning_rate": float("nan")}, ["--learning_rate nan"]),
    (ALL, None, {"max_grad_norm": 0.0}, ["--max_grad_norm"]),
    (ALL, None, {"tokens_per_micro_batch": 0}, ["--tokens_per_micro_batch 0"]),
    (ALL, None, {"keep": 0}, ["--keep 0"]),
]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """What the mistakes name: folders, models and files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "folder").mkdir()
    (folder / "full").mkdir()
    shutil.copytree(TINY / "model", folder / "run" / "model")
    (folder / "full" / "args.json").write_text(json.dumps({"script": "other"}))
    (folder / "x.csv").write_text("prompt,answer\n52=,25\n")
    (folder / "x.parquet").write_bytes(b"PAR1\xff\xfe")
    (folder / "good.py").write_text("def f(completion, row):\n    return 1.0\n")
    (folder / "bad.py").write_text("def f(:\n")
    shutil.copytree(TINY / "model", folder / "unreadable")
    (folder / "unreadable" / "config.json").write_text('{"model_type": "lla')
    make_tokenizer(pad="<pad>", eos=None).save_pretrained(folder / "no_eos")
    family("llama").save_pretrained(folder / "no_eos")
    family("llama", vocab_size=20).save_pretrained(folder / "two_families")
    make_tokenizer().save_pretrained(folder / "two_families")
    tokenizer = common.load_tokenizer(TINY / "model")
    world = common.start("cpu")
    judge = common.load_scalar(TINY / "model", world, tokenizer, 0.1)
    common.save_model(judge, tokenizer, folder / "judge", world)
    return folder


def named(case):
    scripts, _, flags, words = case
    return "-".join(str(w) for w in (*flags.keys(), *words)).replace("/", "_")[:60]


EVERY = [pytest.param(s, *case[1:], id=f"{s}-{named(case)}") for case in MISTAKES for s in case[0]]


@pytest.mark.parametrize("script, content, flags, words", EVERY)
def test_a_mistake_is_one_line_and_leaves_the_disk_as_it_was(
    script, content, flags, words, shelf, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        content = content(script)
        (tmp_path / "data.jsonl").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    else:
        (tmp_path / "data.jsonl").write_text((json.dumps(GOOD[script]) + "\n") * 4)
    flags = {"out": ""} | {
        k: v.format(shelf) if isinstance(v, str) else v for k, v in flags.items()
    }
    before = {
        p: p.stat().st_mtime_ns for p in itertools.chain(tmp_path.rglob("*"), shelf.rglob("*"))
    }
    monkeypatch.setattr(common, "load_policy", lambda *a, **k: 1 / 0)
    monkeypatch.setattr(common, "shard", lambda *a, **k: 1 / 0)
    with pytest.raises(SystemExit) as stopped:
        start(script, tmp_path, **flags)
    said = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(said) == 1 and said[0].startswith("error: "), said
    assert all(word in said[0] + "\n" for word in words), said
    ast.parse(said[0].partition("convert it: ")[2])  # what is to be typed is Python
    after = {
        p: p.stat().st_mtime_ns
        for p in itertools.chain(tmp_path.rglob("*"), shelf.rglob("*"))
        if "__pycache__" not in str(p)
    }
    assert after == before


# --- odd, but right: these run ---

ODD = {
    "right to left": row(
        prompt="\u05e9\u05dc\u05d5\u05dd=", answer="\u0645\u0631\u062d\u0628\u0627"
    ),
    "astral and combining": row(prompt="\U0001f600e\u0301=", answer="\U0001f600"),
    "line separators inside": row(prompt="5\u20282\u0085=", answer="25"),
    "an empty answer": row(answer="", chosen="", rejected="5"),
    "a number for an answer": row(answer=25),
    "the prompt twice": row(
        chosen=[{"role": "user", "content": "52="}, {"role": "assistant", "content": "25"}],
        rejected=[{"role": "user", "content": "52="}, {"role": "assistant", "content": "52"}],
    ),
    "more fields": row(level={"deep": [1, None]}),
}


@pytest.mark.parametrize("script", ALL)
@pytest.mark.parametrize("what", ODD)
def test_odd_rows_are_no_mistakes(script, what, tmp_path):
    (tmp_path / "data.jsonl").write_text((ODD[what](script) + "\n\n") * 3, encoding="utf-8")
    start(script, tmp_path, steps=1)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    draws = script in ROLLOUTS
    assert (tmp_path / "run" / "samples.jsonl").exists() == draws, "no empty file"


# --- a run that breaks: one sentence, status 1, the older checkpoint whole ---


def broken(script, folder, capsys, words, **flags):
    """Breaks in its second step: one sentence, the first step's checkpoint, and how to go on."""
    with pytest.raises(SystemExit) as stopped:
        start(script, folder, **flags)
    said = str(stopped.value.code)
    assert (
        "Traceback" not in said and len(said.splitlines()) == 2 and all(w in said for w in words)
    ), said
    assert (
        common.read_checkpoint(folder / "run")["step"] == 1 and "--resume" in said.splitlines()[1]
    )


@pytest.mark.parametrize("script", ROLLOUTS)
@pytest.mark.parametrize(
    "what, words",
    [
        ("1 / 0", ["in r.py, line 4 (ZeroDivisionError", "52="]),
        ("float('nan')", ["returned nan", "must return a finite number", "52="]),
        ("float('inf')", ["returned inf", "must return a finite number"]),
        ("'high'", ["'high'", "must return a finite number"]),
        ("'1.0'", ["'1.0'", "must return a finite number"]),
        ("None", ["None", "must return a finite number"]),
        ("__import__('torch').zeros(3)", ["tensor([0., 0., 0.])", "must return a finite number"]),
        ("exit(3)", ["in r.py, line 4 (SystemExit: 3)", "52="]),
    ],
)
def test_a_reward_that_fails_stops_the_run(script, what, words, tmp_path, capsys):
    (tmp_path / "r.py").write_text(
        f"seen = []\ndef f(c, r):\n    seen.append(c)\n    return 1.0 if len(seen) <= {2 if script == 'ppo' else 4} else {what}\n"
    )
    broken(script, tmp_path, capsys, words, reward=f"{tmp_path}/r.py:f")
    (tmp_path / "r.py").write_text("def f(c, r):\n    return 1.0\n")  # mended, it goes on
    start(script, tmp_path, reward=f"{tmp_path}/r.py:f", resume=True)
    assert common.read_checkpoint(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize("script", ROLLOUTS)
@pytest.mark.parametrize("save_every", [50, 2])
def test_a_reward_that_fails_loses_no_step(script, save_every, tmp_path):
    """The third step fails, after two with a checkpoint or without. Resumed, the run ends as one that
    never failed does."""
    count = 2 if script == "ppo" else 4  # completions of a step
    failing = f"    if len(seen) == {3 * count}:\n        raise OSError('service down')\n"
    text = "seen = []\ndef f(c, r):\n    seen.append(c)\n{}    return float(len(c) % 3)\n"
    for name in ("failed", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / "r.py").write_text(text.format(failing if name == "failed" else ""))
        flags = {"reward": f"{tmp_path}/r.py:f", "steps": 4, "save_every": save_every}
        flags["keep"] = 9
        if name == "failed":
            with pytest.raises(SystemExit, match="(?s)service down.*go on from the last"):
                start(script, tmp_path / name, **flags)
            saved = common.checkpoints(tmp_path / name / "run")
            assert [path.name for path in saved] == ["000002.pt"]
            (tmp_path / "r.py").write_text(text.format(""))
            flags["resume"] = True
        start(script, tmp_path / name, **flags)
    ends = [common.read_checkpoint(tmp_path / name / "run") for name in ("failed", "whole")]
    assert ends[0]["step"] == ends[1]["step"] == 4
    for key, value in ends[0]["models"]["policy"].items():
        assert torch.equal(value, ends[1]["models"]["policy"][key]), key
    assert not common.UNSAVED


@pytest.mark.parametrize("script", ROLLOUTS)
def test_a_failure_after_an_update_saves_no_older_step_with_newer_weights(script, tmp_path):
    """An evaluation whose reward fails is left out; a failing first one ends the run."""
    count = 2 if script == "ppo" else 4
    text = "seen = []\ndef f(c, r):\n    seen.append(c)\n    return 1 / (len(seen) != {})\n"
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps(GOOD[script]) + "\n")
    flags = {"reward": f"{tmp_path}/r.py:f", "eval_data": str(held_out), "eval_every": 1}
    flags |= {"save_every": 50, "steps": 3}
    # completions scored: 1 held out, then in each step `count` and 1 held out
    (tmp_path / "r.py").write_text(text.format(1 + count + 1))
    start(script, tmp_path, **flags)
    log = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["eval/reward" in row for row in log] == [True, False, True, True]
    (tmp_path / "r.py").write_text(text.format(1))
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        start(script, tmp_path, **flags, out=str(tmp_path / "second"))
    assert not common.checkpoints(tmp_path / "second")


@pytest.mark.parametrize("script", ROLLOUTS)
def test_a_reward_that_changes_its_row_changes_no_data(script, tmp_path):
    (tmp_path / "r.py").write_text("def f(c, r):\n    return float(len(r.pop('answer')))\n")
    (tmp_path / "held_out.jsonl").write_text(json.dumps(GOOD[script]) + "\n")
    flags = {"reward": f"{tmp_path}/r.py:f", "eval_data": f"{tmp_path}/held_out.jsonl"}
    start(script, tmp_path, steps=1, **flags)
    for name in ("samples", "eval_samples"):
        for line in (tmp_path / "run" / f"{name}.jsonl").read_text().splitlines():
            assert json.loads(line)["answer"] == "25" and json.loads(line)["reward"] == 2


def test_a_reward_may_import_a_file_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "words_of_this_test.py").write_text("VALUE = 0.5\n")
    (tmp_path / "r.py").write_text(
        "import words_of_this_test as w\ndef f(c, r):\n    return w.VALUE\n"
    )
    assert common.load_function(f"{tmp_path}/r.py:f", "--reward")("x", {}) == 0.5


def test_held_out_answers_that_the_rule_calls_wrong_are_named_by_dpo_too(tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "52=", "answer": "Lima"}\n')
    with pytest.raises(SystemExit):
        start("dpo", tmp_path, eval_prompts=str(tmp_path / "prompts.jsonl"), reward="number")
    assert "'Lima' of prompt '52=' is wrong by this rule" in capsys.readouterr().err


def test_demonstrations_are_not_scored_so_no_rule_refuses_them(tmp_path):
    (tmp_path / "demos.jsonl").write_text('{"prompt": "52=", "answer": "two"}\n' * 2)
    flags = {"demos": str(tmp_path / "demos.jsonl"), "samples_per_prompt": None}
    start("reinforce", tmp_path, steps=1, reward="number", **flags)


def test_a_folder_that_is_a_model_may_hold_another_one(shelf, tmp_path):
    shutil.copytree(TINY / "model", tmp_path / "outer")
    shutil.copytree(TINY / "model", tmp_path / "outer" / "model")
    assert common.read_config(tmp_path / "outer").model_type == "llama"


@pytest.mark.parametrize("script", ROLLOUTS)
def test_the_passes_over_the_prompts_are_told(script, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text((json.dumps(GOOD[script]) + "\n") * 4)
    start(script, tmp_path, steps=3, out=str(tmp_path / "run"))
    assert "6 prompts will be drawn from 4, 1.5 passes\n" in capsys.readouterr().out
    if script == "grpo":
        start(script, tmp_path, steps=1, drop_equal_groups=True, out=str(tmp_path / "twice"))
        assert "4 prompts will be drawn from 4, 1.0 passes\n" in capsys.readouterr().out
    data = str(tmp_path / "data.jsonl")
    start(script, tmp_path, steps=0, eval_data=data, out=str(tmp_path / "scored"))
    assert " passes" not in capsys.readouterr().out


@pytest.mark.parametrize("script", PAIRS)
def test_the_passes_over_the_pairs_are_told(script, tmp_path, capsys):
    start(script, tmp_path, steps=3)
    assert "\n6 pairs will be drawn from 4, 1.5 passes\n" in capsys.readouterr().out


def test_the_passes_over_demonstrations_are_told(tmp_path, capsys):
    rows = [{"prompt": "52=", "answer": "25"}] * 2 + [{"prompt": "52=", "answer": "too long"}]
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"demos": str(tmp_path / "demos.jsonl"), "samples_per_prompt": None}
    start("reinforce", tmp_path, steps=3, **flags)
    assert "\n6 prompts will be drawn from 2, 3.0 passes\n" in capsys.readouterr().out


@pytest.mark.parametrize("script", ALL)
def test_a_gradient_that_is_not_finite_is_not_stepped_on(script, tmp_path, monkeypatch, capsys):
    honest, calls = common.clip_gradients, []

    def spoil(model, most):
        calls.append(model)
        return honest(model, most) if len(calls) <= (2 if script == "ppo" else 1) else float("nan")

    monkeypatch.setattr(common, "clip_gradients", spoil)
    broken(script, tmp_path, capsys, ["gradient is", "nan"])
    # with several updates a step, its weights may have moved: nothing is saved after the fact
    calls.clear()
    with pytest.raises(SystemExit, match="gradient is nan|'s gradient is"):
        start(script, tmp_path, save_every=50, out=str(tmp_path / "second"))
    assert not common.checkpoints(tmp_path / "second") and not common.UNSAVED


@pytest.mark.parametrize("script", ALL)
def test_out_of_memory_names_the_flags_that_help(script, tmp_path, monkeypatch, capsys):
    honest, calls = common.clip_gradients, []

    def spoil(model, most):
        calls.append(model)
        if len(calls) > (2 if script == "ppo" else 1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return honest(model, most)

    monkeypatch.setattr(common, "clip_gradients", spoil)
    broken(script, tmp_path, capsys, ["out of memory", "--tokens_per_micro_batch"])


@pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full"
)
@pytest.mark.parametrize("script", ALL)
def test_a_full_disk_stops_the_run_and_leaves_the_older_checkpoint(
    script, tmp_path, monkeypatch, capsys
):
    honest = common.save_checkpoint

    def fill(out, *rest):
        honest(out, *rest)
        (out / "metrics.jsonl").unlink()
        (out / "metrics.jsonl").symlink_to("/dev/full")

    monkeypatch.setattr(common, "save_checkpoint", fill)
    broken(script, tmp_path, capsys, ["No space left on device"])


@pytest.mark.parametrize("script", ALL)
def test_a_disk_that_fills_up_while_saving_leaves_the_older_checkpoint(
    script, tmp_path, monkeypatch, capsys
):
    honest = torch.save

    def fill(state, file):
        if state.get("step") == 2:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        honest(state, file)

    monkeypatch.setattr(torch, "save", fill)
    broken(script, tmp_path, capsys, ["No space left on device"])
    assert [p.name for p in (tmp_path / "run" / "checkpoint").iterdir()] == ["000001.pt"], (
        "half a file would be in the way"
    )


@pytest.mark.parametrize("script", ALL)
def test_a_model_that_cannot_be_written_stops_the_run_after_its_checkpoint(
    script, tmp_path, monkeypatch
):
    def full(*args, **kwargs):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(SystemExit, match="(?s)model could not be written.*No space left.*--resume"):
        start(script, tmp_path)
    assert common.read_checkpoint(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize("script", ALL)
def test_a_checkpoint_cut_short_or_of_another_model_is_named(script, tmp_path, capsys):
    start(script, tmp_path, steps=1)
    saved = tmp_path / "run" / "checkpoint" / "000001.pt"
    whole = torch.load(saved, weights_only=True)
    for spoil, words in (
        (lambda: saved.write_bytes(saved.read_bytes()[:2000]), ["000001.pt", "cut short"]),
        (lambda: saved.write_bytes(b"not a checkpoint at all"), ["000001.pt", "cannot be read"]),
        (lambda: torch.save(other(whole), saved), ["another model"]),
    ):
        spoil()
        with pytest.raises(SystemExit) as stopped:
            start(script, tmp_path, resume=True)
        said = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and len(said) == 1 and all(w in said[0] for w in words), said


def other(state):
    """A checkpoint whose weights have other shapes."""
    models = {
        name: {k: v[..., :1] for k, v in weights.items()}
        for name, weights in state["models"].items()
    }
    return state | {"models": models}


def test_a_folder_in_which_a_killed_run_has_left_half_a_file_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json.tmp").write_text("{")
    start("grpo", tmp_path, steps=1)
    assert common.read_checkpoint(tmp_path / "run")["step"] == 1


@pytest.mark.parametrize("script", ALL)
def test_a_run_does_not_go_back(script, tmp_path, capsys):
    start(script, tmp_path, steps=2)
    with pytest.raises(SystemExit):
        start(script, tmp_path, steps=1, resume=True)
    assert "--steps 1, and the run in" in capsys.readouterr().err


def test_scores_of_a_reference_that_cannot_be_read_are_named(tmp_path, capsys):
    start("dpo", tmp_path, steps=1)
    (tmp_path / "run" / "reference.pt").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(SystemExit):
        start("dpo", tmp_path, steps=2, resume=True)
    assert "reference.pt cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("script", ALL)
def test_the_newest_checkpoints_are_kept(script, tmp_path):
    start(script, tmp_path, steps=4, keep=2)
    assert [p.name for p in common.checkpoints(tmp_path / "run")] == ["000003.pt", "000004.pt"]
    (tmp_path / "run" / "checkpoint" / "000004.pt").unlink()
    start(script, tmp_path, steps=4, keep=1, resume=True)  # from the one before
    assert [p.name for p in common.checkpoints(tmp_path / "run")] == ["000004.pt"]
    log = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [m["step"] for m in log if "scale/mean" not in m] == [
        0,
        1,
        2,
        3,
        4,
    ]  # a reward model's scale comes after the last
    assert sum("scale/mean" in m for m in log) == (script == "reward_model")
