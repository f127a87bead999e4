"""What the pages show runs: their commands, shortened, with the bundled model for those of a hub.

The pages are README.md, those of tests/docs and tests/bench/README.md, read in that order."""

import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys

import pytest
from conftest import ROOT
from test_repository import FENCED, PAGES

TEXT = "\n".join(path.read_text() for path in PAGES)
TINY = ROOT / "tests" / "tiny"
SHORT = {
    "grpo.py": "--steps 2 --prompts_per_step 8 --max_new_tokens 4",
    "reinforce.py": "--steps 2 --prompts_per_step 2 --max_new_tokens 40",
    "ppo.py": "--steps 2 --prompts_per_step 8 --max_new_tokens 4",
    "dpo.py": "--steps 2 --pairs_per_step 4",
    "reward_model.py": "--pairs_per_step 4",
}


def shown_lines():
    """Every line in a fenced block, and every inline `python ...` or `torchrun ...`, in order."""
    found = []
    for block in FENCED.finditer(TEXT):
        for line in block[2].replace("\\\n", " ").splitlines():
            found.append((block.start(), line))
    for inline in re.finditer(r"`((?:python|torchrun) [^`\n]+)`", TEXT):
        found.append((inline.start(), inline[1]))
    found.sort(key=lambda item: item[0])
    return list(dict.fromkeys(line for _, line in found))


BLOCKS = [block[2] for block in FENCED.finditer(TEXT)]
COMMANDS = shown_lines()
PYTHON = [c for c in COMMANDS if re.match(r"python (?!-m|tests/bench)\S+\.py", c)]
TORCHRUN = [c for c in COMMANDS if c.startswith("torchrun")]
BENCHES = [c for c in COMMANDS if c.startswith("python tests/bench")]
PYTEST = [c for c in COMMANDS if c.startswith("python -m pytest")]


def block_with(words):
    return next(block for block in BLOCKS if words in block)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Where a reader types: the files that the pages speak of lie there."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "tests").symlink_to(ROOT / "tests")
    for name in SHORT:
        (folder / name).symlink_to(ROOT / name)

    # the bundled model with room for longer texts stands for those of a hub
    shutil.copytree(TINY / "model", folder / "MODEL")
    config = json.loads((folder / "MODEL" / "config.json").read_text())
    config["max_position_embeddings"] = 256
    (folder / "MODEL" / "config.json").write_text(json.dumps(config))

    sums = []
    for i in range(1, 5):
        for j in range(5, 9):
            sums.append({"question": f"{i}{j}=", "answer": f"Sorted they are\n#### {i}{j}"})
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl", "answers.jsonl"):
        write_lines(folder / name, sums)
    write_lines(folder / "prompts.jsonl", [{"prompt": row["question"]} for row in sums])

    forms = block_with('{"prompt": "What is')
    *_, messages = re.findall(r'"chosen": (\[.*?\])', forms)
    forms = forms.replace('[the same with "5"]', messages.replace('"4"', '"5"'))
    (folder / "messages.jsonl").write_text(forms)
    # the bundled model has no chat template and no letters: texts of digits for its commands
    plain = {"prompt": "22=", "chosen": "4", "rejected": "5"}
    write_lines(folder / "pairs.jsonl", [plain] * 4)
    write_lines(folder / "held_out_pairs.jsonl", [plain] * 2)
    rewards = [block_with(f"def {name}(") for name in ("brief", "short", "judged")]
    (folder / "my_reward.py").write_text("\n".join(rewards))
    return folder


def words_of(command):
    """The command as a list, with the desk's model for one of a hub."""
    words = shlex.split(command.split("  #")[0])
    while "..." in words:
        i = words.index("...")
        words[i : i + 1] = ["MODEL"] if words[i - 1] == "--model" else []
    return ["MODEL" if word.startswith("Qwen/") else word for word in words]


def run(arguments, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    runpy.run_path(arguments[0], run_name="__main__")


def test_commands_were_found():
    assert len(PYTHON) >= 29, PYTHON
    assert len(TORCHRUN) == 2, TORCHRUN
    assert len(BENCHES) >= 3, BENCHES
    assert PYTEST[0] == "python -m pytest tests", "the first of the README is what .ci/run runs"


@pytest.mark.parametrize("command", PYTHON)
def test_a_command_of_the_pages_runs(command, desk, monkeypatch, capsys):
    _, script, *flags = words_of(command)
    short = shlex.split(SHORT.get(script, ""))
    if "--help" in flags:
        with pytest.raises(SystemExit) as stopped:
            run([script, *flags], desk, monkeypatch)
        assert not stopped.value.code and "--learning_rate" in capsys.readouterr().out
        return
    if script == "reward_model.py" and "--steps" not in flags:
        short += ["--steps", "2"]
    if script in SHORT:
        short += ["--device", "cpu"]
    run([script, *flags, *short], desk, monkeypatch)


@pytest.mark.parametrize("command", BENCHES + PYTEST)
def test_a_command_that_is_too_long_to_run_here_names_a_file_that_exists(command):
    paths = [word for word in command.split() if word.startswith("tests")]
    assert paths and all((ROOT / path).exists() for path in paths)


@pytest.mark.parametrize("name", ["brief", "short", "judged"])
def test_the_rewards_of_the_pages_run(name, desk, monkeypatch):
    assert "`--reward my_reward.py:brief`" in TEXT
    flags = f"--data gsm8k_train.jsonl --reward my_reward.py:{name} --out runs/{name} --device cpu"
    run(["grpo.py", *flags.split(), *SHORT["grpo.py"].split()], desk, monkeypatch)


def test_the_output_in_the_readme_is_that_of_the_command(desk, monkeypatch, capsys):
    """The lines that every machine prints alike: the first text and the first scores."""
    shown = block_with("step 0: held-out reward").splitlines()
    short = "--steps 1 --prompts_per_step 2 --out runs/output --device cpu"
    run(["grpo.py", *short.split()], desk, monkeypatch)
    said = capsys.readouterr()
    for start in ("first text, as the model sees it: ", "step 0: "):
        line = next(line for line in shown if line.startswith(start))
        assert line in said.out + said.err


def test_the_forms_of_pairs_are_read(desk):
    import dpo

    rows = dpo.read_pairs(desk / "messages.jsonl", "--data")
    asked = "What is 2 + 2?"
    message = [{"role": "user", "content": asked}]
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("4", "5")] * 3
    assert [row["prompt"] for row in rows] == [asked, message, message]


def test_the_model_is_used_as_the_pages_say(desk, monkeypatch, capsys):
    """After the commands above: the first grpo.py of them has written runs/grpo."""
    monkeypatch.chdir(desk)
    exec(block_with("pipeline("), {})
    assert "52817=" in capsys.readouterr().out


@pytest.mark.learning
@pytest.mark.parametrize("command", TORCHRUN)
def test_torchrun_as_the_pages_say(command, desk, tmp_path):
    """Eight processes are two here; two nodes are two torchruns on this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    nodes = 2 if "--nnodes" in command else 1
    command = command.replace("_per_node 8", f"_per_node {2 // nodes}")
    command = command.replace("FIRST_NODE:29500", f"127.0.0.1:{port}")
    command = command.replace("/shared/run", str(tmp_path / "run"))
    _, *flags = words_of(command)
    flags += [*SHORT["grpo.py"].split(), "--device", "cpu"]
    if nodes == 1:
        flags += ["--out", str(tmp_path / "run")]
    start = [sys.executable, "-m", "torch.distributed.run", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(start, cwd=desk, env=environment) for _ in range(nodes)]
    assert [process.wait(300) for process in started] == [0] * nodes
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 2
