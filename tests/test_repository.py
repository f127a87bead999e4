"""What holds for all files together: copies are copies, imports are few, and the README says what is there."""

import ast
import itertools
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = [p for p in (ROOT / f"{n}.py" for n in ("reinforce", "ppo", "grpo", "dpo", "reward_model")) if p.exists()]
README = (ROOT / "README.md").read_text()
MEASURED = (ROOT / "tests" / "bench" / "README.md").read_text()
TABLES = [p for p in sorted((ROOT / "tests" / "bench").glob("*.md")) if p.name != "README.md"]


def functions(path):
    tree = ast.parse(path.read_text())
    return {f.name: ast.unparse(f) for f in tree.body if isinstance(f, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("a, b", list(itertools.combinations(SCRIPTS, 2)))
def test_functions_of_the_same_name_are_the_same_in_every_script(a, b):
    ours, theirs = functions(a), functions(b)
    for name in (ours.keys() & theirs.keys()) - {"train", "evaluate", "advise", "Args", "resolve"}:
        assert ours[name] == theirs[name], f"{name} differs between {a.name} and {b.name}"


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "common.py"])
def test_scripts_import_only_what_requirements_bring(path):
    allowed = {
        "torch",
        "transformers",
        "numpy",
        "tyro",
        "tensorboard",
        "tqdm",
        "safetensors",
        "common",
    } | sys.stdlib_module_names
    for node in ast.walk(ast.parse(path.read_text())):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        assert {n.split(".")[0] for n in names} <= allowed


@pytest.mark.parametrize("path", SCRIPTS)
def test_every_flag_says_what_it_does(path):
    """A string follows every field of Args: it is the flag's line in --help."""
    args = next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    for field, after in zip(args.body, [*args.body[1:], None]):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(after, ast.Expr) and isinstance(after.value.value, str), field.target.id


@pytest.mark.parametrize("path", SCRIPTS)
def test_every_logged_number_and_only_those_is_in_the_readme(path):
    explained = set(
        re.findall(r"`([a-z_]+(?:/[a-z@_]+)?)`", README[README.index("## Every logged number") : README.index("## Beside TRL")])
    )
    logged = set(
        re.findall(
            r'"([a-z]+/[a-z_]+|reward|loss|entropy|grad_norm|length|truncated|equal_groups|returns|updates)":', path.read_text()
        )
    )
    assert logged <= explained, logged - explained


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.name)
def test_every_benchs_table_stands_in_one_readme_as_it_was_written(path):
    assert (path.read_text() in README) + (path.read_text() in MEASURED) == 1


def test_the_rounding_that_the_readme_names_is_the_measured_one():
    row = next(line for line in README.splitlines() if line.startswith("| `kl/sample` | RPG"))
    known = json.loads((ROOT / "tests" / "bench" / "first.json").read_text())["kl/sample"]
    assert len(known) == 4
    for value in known.values():
        shown = f"{value:.0e}".replace("e-0", "e-") if value < 1e-4 else f"{value:.1g}"
        assert re.search(rf"\b{shown}\b", row), shown


def test_the_readme_counts_the_cases_of_faults():
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "test_faults.py"), "--collect-only", "-q"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    assert re.search(r"holds (\d+) cases", MEASURED).group(1) == re.search(r"(\d+) tests collected", said).group(1)


def test_no_section_of_the_readme_stands_twice():
    headings = re.findall(r"^#+ .+$", README + MEASURED, re.M)
    assert len(headings) > 20 and len(headings) == len(set(headings))


def anchors(text):
    return {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in re.findall(r"^## (.+)$", text, re.M)}


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", ROOT / "tests" / "bench" / "README.md"], ids=["README", "tests/bench/README"]
)
def test_every_file_section_and_flag_that_a_readme_names_exists(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("https://"):
            file, _, section = target.partition("#")
            file = path.parent / file if file else path
            assert file.exists(), target
            assert not section or re.fullmatch(r"L\d+", section) or section in anchors(file.read_text()), target
    fields = {f for p in SCRIPTS for f in re.findall(r"^    (\w+): ", p.read_text(), re.M)}
    torchrun = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "rdzv_id"}
    slurm = {"nodes", "ntasks", "gpus", "requeue", "signal"}
    known = {"help", "logdir", "agree", "learn", "time"} | torchrun | slurm | fields | {f"no_{f}" for f in fields}
    assert set(re.findall(r"--(\w+)", text)) <= known


def test_the_repository_speaks_of_itself_alone():
    """No path of the machine that it was written on."""
    for path in ROOT.rglob("*"):
        if (
            path.suffix in (".py", ".md", ".txt", ".toml", ".cff", ".json")
            and ".git" not in path.parts
            and "runs" not in path.parts
        ):
            text = path.read_text(errors="replace")
            assert not re.search(r"/(work|root|home)/\w|/tmp/\w+/(main|v)\b", text), path


def places(readme):
    """Every link of the README to a line: (what the line says, file, the line's number, the number that it should be)."""
    for text, file, number in re.findall(r"\[`([^`]+)`\]\(([\w/]+\.py)#L(\d+)\)", readme):
        lines = (ROOT / file).read_text().splitlines()
        forms = (rf"def {text}\(", rf"    {text}: ", rf"{text} = ") if text.isidentifier() else (rf".*{re.escape(text)}",)
        hits = ([i for i, line in enumerate(lines, 1) if re.match(form, line)] for form in forms)
        here = next(filter(None, hits), [])
        yield text, file, int(number), here


def test_every_line_that_the_readme_names_is_there():
    """`python tests/test_repository.py` writes the numbers anew."""
    found = list(places(README))
    assert len(found) > 80
    for text, file, number, here in found:
        assert here == [number], (text, file, here)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_the_readme_has_every_flag_in_its_group(path):
    section = README[README.index("## The flags") : README.index("## A run's folder")]
    args = next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    for field in (n.target.id for n in args.body if isinstance(n, ast.AnnAssign)):
        assert f"`{field}`" in section, field


if __name__ == "__main__":
    for text, file, number, here in places(README):
        if len(here) == 1:
            README = README.replace(f"[`{text}`]({file}#L{number})", f"[`{text}`]({file}#L{here[0]})")
    (ROOT / "README.md").write_text(README)
