"""Patched scripts for the tests: copies of the scripts with one of tests/changes/*.diff applied.

The copies lie in a temporary folder, so that the tests work in a checkout without .git, too."""

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro
from conftest import ROOT

CHANGES = ROOT / "tests" / "changes"
DIFFS = {path.stem: path for path in sorted(CHANGES.glob("*.diff"))}
QUICK = "--device cpu --steps 2 --prompts_per_step 4 --max_new_tokens 8 --eval_data=".split()


def script_of(name):
    """The one script that a patch changes: "grpo"."""
    targets = re.findall(r"^\+\+\+ b/(\S+)", DIFFS[name].read_text(), re.M)
    assert len(targets) == 1 and targets[0].endswith(".py"), f"{name}.diff changes {targets}"
    return targets[0].removesuffix(".py")


def patches_of(script):
    return [name for name in DIFFS if script_of(name) == script]


def changed_lines(name):
    """Lines of code that a patch changes. A line that replaces another counts once; comments and
    empty lines do not count."""
    count = 0
    run = {"-": 0, "+": 0}
    for line in [*DIFFS[name].read_text().splitlines(), " "]:
        if line.startswith(("+++ ", "--- ")):
            continue
        sign = line[:1]
        if sign not in run:
            count += max(run.values())
            run = {"-": 0, "+": 0}
        elif line[1:].strip() and not line[1:].strip().startswith("#"):
            run[sign] += 1
    return count


@functools.cache
def place():
    """A temporary folder that looks to a script like the repository's root."""
    folder = tempfile.TemporaryDirectory(prefix="changes-")  # goes when Python ends
    shutil.copy(ROOT / "common.py", folder.name)
    shutil.copytree(ROOT / "tests" / "tiny", Path(folder.name) / "tests" / "tiny")
    return folder


def apply(name, folder):
    """Applies a patch to the script of that name in `folder`, and shows why if it does not fit."""
    command = ["git", "apply", "--verbose", str(DIFFS[name])]
    if not shutil.which("git"):
        command = ["patch", "-p1", "--fuzz=0", "-i", str(DIFFS[name])]
    # inside a repository `git apply` leaves out what lies outside of the current folder, silently
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env["GIT_CEILING_DIRECTORIES"] = str(Path(folder).resolve().parent)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{name}.diff does not apply: {done.stderr}{done.stdout}"


@functools.cache
def patched(name):
    """The file of a script with one patch applied."""
    script = f"{script_of(name)}.py"
    with tempfile.TemporaryDirectory(dir=place().name) as folder:
        shutil.copy(ROOT / script, folder)
        apply(name, folder)
        text = (Path(folder) / script).read_text()
    assert text != (ROOT / script).read_text()
    path = Path(place().name) / f"{name}.py"
    path.write_text(text)
    return path


@functools.cache
def load(name):
    """The patched script as a module, beside the plain one. Its `common` is the repository's."""
    spec = importlib.util.spec_from_file_location(f"changed_{name}", patched(name))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def train(module, out, *flags):
    """A run as from the command line, in this process -> the lines of metrics.jsonl."""
    module.train(tyro.cli(module.Args, args=["--out", str(out), *flags], use_underscores=True))
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
