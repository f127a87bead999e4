"""A reward for code: a completion's Python is run against the unit tests of its row.

    python grpo.py --model CHAT_MODEL --data problems.jsonl --reward tests/tiny/programs.py:passes

A row: {"prompt": "Write a function add(a, b) ...", "tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}

This is no sandbox. The program runs as you, in a process of its own with limits on seconds, memory and what it writes. That stops
accidents (an endless loop, a list that grows for ever), not intent: it can read your files, use the network, and, since it shares
an interpreter with its tests, find a way to have passed them. What a policy writes once it is paid for passing tests is
not harmless by nature: for anything but a toy run the whole training in a container without a network.
"""

import json
import re
import secrets
import subprocess
import sys
import tempfile

SECONDS, BYTES = 5, 1 << 30

RUNNER = f"""
import json, os, resource, sys
for what, most in (("CPU", {SECONDS}), ("AS", {BYTES}), ("FSIZE", 1 << 20)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
job, names = json.load(sys.stdin), {{"__name__": "__main__"}}
exec(job["program"], names)
for test in job["tests"]:
    try:
        exec(test, names)
    except Exception:  # the next one may pass
        continue
    os.write(1, job["word"].encode())
"""


def passes(completion, row):
    """The share of the row's tests that pass. The program is the last fenced block, or else the whole completion. Each test that
    passes is told by a word that is drawn anew, because a program may print whatever it likes."""
    blocks = re.findall(r"```(?:python|py)?\n(.*?)```", completion, flags=re.DOTALL)
    word = secrets.token_hex(16)
    job = {"program": blocks[-1] if blocks else completion, "tests": row["tests"], "word": word}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:
        try:
            subprocess.run(
                [
                    sys.executable,
                    "-I",
                    "-c",
                    RUNNER,
                ],  # -I: none of the user's settings and packages
                input=json.dumps(job).encode(),
                stdout=said,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                timeout=2 * SECONDS,
                start_new_session=True,  # Ctrl-C is for the run, which finishes its step
            )
        except subprocess.TimeoutExpired:
            return 0.0
        said.seek(0)
        return min(said.read().count(word.encode()) / len(row["tests"]), 1.0)
