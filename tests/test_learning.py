"""Scripts as a newcomer starts them, until they have learnt (pytest tests -m learning)."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.learning


def scores(script, out, *flags):
    subprocess.run([sys.executable, str(ROOT / f"{script}.py"), "--out", str(out), *flags], check=True, cwd=out.parent)
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [m["eval/exact"] for m in log if "eval/exact" in m]


def test_reinforce_learns_to_sort(tmp_path):
    """Shortened: from at most 0.40 to at least 0.60 in half the steps."""
    curve = scores("reinforce", tmp_path / "run", "--steps", "125")
    assert curve[0] <= 0.40 and curve[-1] >= 0.60, curve


def test_fine_tuning_on_demonstrations_learns_to_sort(tmp_path):
    curve = scores(
        "reinforce", tmp_path / "run", "--demos", str(ROOT / "tests" / "tiny" / "sort_train.jsonl"), "--steps", "150"
    )
    assert curve[0] <= 0.40 and curve[-1] >= 0.80, curve
