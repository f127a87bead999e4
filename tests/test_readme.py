"""What the README shows runs: its commands, shortened, with the embedded model for those of a hub, in the README's order."""

import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text() + (ROOT / "tests" / "bench" / "README.md").read_text()
TINY = ROOT / "tests" / "tiny"
FOUND = [(m.start(), m[0]) for m in re.finditer(r"(?:^    .*\n)+", README, re.M)]
BLOCKS = [re.sub(r"^    ", "", text, flags=re.M).replace("\\\n", " ") for _, text in FOUND]
LINES = [(at, line) for (at, _), b in zip(FOUND, BLOCKS) for line in b.splitlines()]
LINES += [(m.start(), m[1]) for m in re.finditer(r"`((?:python|torchrun) [^`]+)`", README)]
COMMANDS = list(dict.fromkeys(line for _, line in sorted(LINES, key=lambda x: x[0])))
PYTHON = [c for c in COMMANDS if re.match(r"python (?!-m|tests/bench)\S+\.py", c)]
TORCHRUN = [c for c in COMMANDS if c.startswith("torchrun")]
SHORT = {
    "grpo.py": "--steps 2 --prompts_per_step 2 --max_new_tokens 4",
    "reinforce.py": "--steps 2 --prompts_per_step 2 --max_new_tokens 40",
    "ppo.py": "--steps 2 --prompts_per_step 4 --max_new_tokens 4",
    "dpo.py": "--steps 2 --pairs_per_step 4",
    "reward_model.py": "--pairs_per_step 4",
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Where a reader types: the files that the README speaks of lie there."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "tests").symlink_to(ROOT / "tests")
    for name in SHORT:
        (folder / name).symlink_to(ROOT / name)

    # the embedded model with room for longer texts stands for those of a hub
    shutil.copytree(TINY / "model", folder / "MODEL")
    config = json.loads((folder / "MODEL" / "config.json").read_text())
    (folder / "MODEL" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))

    sums = [{"question": f"{i}{j}=", "answer": f"Sorted they are\n#### {i}{j}"} for i in range(1, 5) for j in range(5, 9)]
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl", "answers.jsonl"):
        write(name, sums)
    write("prompts.jsonl", [{"prompt": r["question"]} for r in sums])
    forms = next(b for b in BLOCKS if b.startswith('{"prompt": "What is'))
    *_, messages = re.findall(r'"chosen": (\[.*?\])', forms)
    forms = forms.replace('[the same with "5"]', messages.replace('"4"', '"5"'))
    (folder / "messages.jsonl").write_text(forms)
    # the embedded model has no chat template and no letters: texts of digits for its commands
    plain = {"prompt": "22=", "chosen": "4", "rejected": "5"}
    write("pairs.jsonl", [plain] * 4)
    write("held_out_pairs.jsonl", [plain] * 2)
    (folder / "my_reward.py").write_text(next(b for b in BLOCKS if b.startswith("def brief")))
    return folder


def words(command):
    """The command, with a model of the desk."""
    words = shlex.split(command.split("  #")[0])
    while "..." in words:
        i = words.index("...")
        words[i : i + 1] = ["MODEL"] if words[i - 1] == "--model" else []
    return ["MODEL" if w.startswith("Qwen/") else w for w in words]


def run(arguments, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    runpy.run_path(arguments[0], run_name="__main__")


def test_commands_were_found():
    assert len(PYTHON) >= 10 and len(TORCHRUN) == 2, (PYTHON, TORCHRUN)


@pytest.mark.parametrize("command", PYTHON)
def test_a_command_of_the_readme_runs(command, desk, monkeypatch, capsys):
    _, script, *flags = words(command)
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


def test_the_reward_of_the_readme_runs(desk, monkeypatch):
    assert "`--reward my_reward.py:brief`" in README
    flags = "--data gsm8k_train.jsonl --reward my_reward.py:brief --out runs/brief --device cpu"
    run(["grpo.py", *flags.split(), *SHORT["grpo.py"].split()], desk, monkeypatch)


def test_the_forms_of_pairs_are_read(desk):
    import dpo

    rows = dpo.read_pairs(desk / "messages.jsonl", "--data")
    asked = "What is 2 + 2?"
    assert [(r["chosen"], r["rejected"]) for r in rows] == [("4", "5")] * 3
    assert [r["prompt"] for r in rows] == [asked, [{"role": "user", "content": asked}], [{"role": "user", "content": asked}]]


def test_the_model_is_used_as_the_readme_says(desk, monkeypatch, capsys):
    """After the commands above: the first grpo.py of them has written runs/grpo."""
    monkeypatch.chdir(desk)
    exec(next(b for b in BLOCKS if "pipeline(" in b), {})
    assert "52817=" in capsys.readouterr().out


@pytest.mark.learning
@pytest.mark.parametrize("command", TORCHRUN)
def test_torchrun_as_the_readme_says(command, desk, tmp_path):
    """Eight processes are two here; two nodes are two torchruns on this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    nodes = 2 if "--nnodes" in command else 1
    command = command.replace("_per_node 8", f"_per_node {2 // nodes}").replace("FIRST_NODE:29500", f"127.0.0.1:{port}")
    command = command.replace("/shared/run", str(tmp_path / "run"))
    _, *rest = words(command)
    flags = [*rest, *SHORT["grpo.py"].split(), "--device", "cpu", *([] if nodes > 1 else ["--out", str(tmp_path / "run")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *flags], cwd=desk, env=environment)
        for _ in range(nodes)
    ]
    assert [p.wait(300) for p in started] == [0] * nodes
    assert len((Path(tmp_path) / "run" / "metrics.jsonl").read_text().splitlines()) >= 2
