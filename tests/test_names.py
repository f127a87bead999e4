"""The page of names in other libraries: what it says of this repository is there."""

import ast
import re

import pytest
from changes_helpers import DIFFS, script_of
from conftest import ROOT
from test_repository import DOCS, flags_of, section

PAGE = DOCS / "names.md"


def tables():
    """[(scripts named in the header, [cells of a row, ...]), ...]"""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", PAGE.read_text(), re.M):
        head, _, *rows = [line.strip("|").split(" | ") for line in block.splitlines()]
        scripts = re.findall(r"(\w+)\.py", head[1])
        found.append((scripts, [[cell.strip() for cell in row] for row in rows]))
    return found


ROWS = [(scripts, row) for scripts, rows in tables() for row in rows]


def types_of_flags(script):
    """{flag: its type as it is written}"""
    fields = [f for f in flags_of(ROOT / f"{script}.py").body if isinstance(f, ast.AnnAssign)]
    return {field.target.id: ast.unparse(field.annotation) for field in fields}


def test_the_page_has_a_table_for_every_script():
    assert len(ROWS) > 100
    assert {script for scripts, _ in ROWS for script in scripts} == {
        "reinforce",
        "ppo",
        "grpo",
        "dpo",
        "reward_model",
    }


@pytest.mark.parametrize("scripts, row", ROWS, ids=lambda value: str(value)[:60])
def test_a_row_names_flags_and_patches_of_its_scripts_or_says_that_there_is_nothing(scripts, row):
    _, here, *_ = row
    assert scripts and len(row) == 3
    patches = re.findall(r"\(\.\./changes/(\w+)\.diff\)", " ".join(row))
    for patch in patches:
        assert [script_of(patch)] == scripts
    for script in scripts:
        types = types_of_flags(script)
        for flag, value in re.findall(r"`--(\w+)(?: ([^`]+))?`", " ".join(row)):
            is_there = flag in types or flag.removeprefix("no_") in types
            assert is_there, f"{script}.py has no --{flag}"
            if value and "Literal" in types[flag]:
                assert repr(value) in types[flag], f"--{flag} {value}"
    answers = [here.startswith("`--"), here.startswith("["), here == "not here"]
    assert answers.count(True) == 1, here


def test_every_patch_is_on_the_page():
    """Those that no other library has under a name of its own are left out."""
    named = set(re.findall(r"\(\.\./changes/(\w+)\.diff\)", PAGE.read_text()))
    assert DIFFS.keys() - named <= {"maxrl"}


@pytest.mark.parametrize(
    "name", ["GRPOConfig", "RLOOConfig", "PPOConfig", "DPOConfig", "RewardConfig"]
)
def test_no_setting_of_a_config_stands_in_two_rows(name):
    """Two rows may name the same setting with different values of it."""
    seen = []
    for line in section(PAGE, f"From TRL's {name}").splitlines():
        if line.startswith("| `"):
            seen += re.findall(r"`(\w+)`", line.split(" | ")[0])
    assert len(seen) > 1 and len(seen) == len(set(seen)), sorted(seen)
