"""What holds for all files together: copies are copies, imports are few, and the README says what is there."""

import ast
import importlib
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


FULL = {  # short runs that log everything their script can
    "reinforce": {"epochs": 2, "beta": 0.1},
    "ppo": {"beta": 0.1},
    "grpo": {"epochs": 2, "beta": 0.1, "eval_samples": 2},
    "dpo": {},
    "reward_model": {"best_of": (1, 2)},
}


def logged(script, folder):
    """The names of all numbers in metrics.jsonl of a short run on the embedded task."""
    module = importlib.import_module(script)
    flags = FULL[script] | {"steps": 1, "max_new_tokens": 4, "device": "cpu", "out": str(folder)}
    rows = "pairs_per_step" if hasattr(module.Args, "pairs_per_step") else "prompts_per_step"
    prompts = "".join(f'{{"prompt": "{n}=", "answer": "{n}"}}\n' for n in "123")
    (folder.parent / "prompts.jsonl").write_text(prompts)
    sides = '"prompt": "12=", "chosen": "21", "rejected": "1"', '"prompt": "12=", "chosen": "2", "rejected": "12"'
    (folder.parent / "pairs.jsonl").write_text("".join(f"{{{side}}}\n" for side in sides))
    kind = "pairs" if rows == "pairs_per_step" else "prompts"
    (folder.parent / "r.py").write_text("def f(completion, row):\n    return int(row['answer'])\n")
    flags["reward"] = f"{folder.parent}/r.py:f"
    flags |= {rows: 4, "data": f"{folder.parent}/{kind}.jsonl", "eval_data": f"{folder.parent}/{kind}.jsonl"}
    if kind == "pairs":
        flags["eval_prompts"] = f"{folder.parent}/prompts.jsonl"
    if script == "reward_model":
        flags["policy"] = module.Args.model
    module.train(module.Args(**flags))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {name for line in lines for name in json.loads(line)} - {"step"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_every_logged_number_and_only_those_is_in_the_readme(path, tmp_path):
    """A row of the table names numbers and the letters of the scripts that log them; both ways."""
    table = README[README.index("## Every logged number") : README.index("## Why the loss says little")]
    letters = {file.removesuffix(".py"): letter for letter, file in re.findall(r"\b([A-Z]) (\w+\.py)", table)}
    rows = re.findall(r"^\| (`.+?) \| ([A-Z]+) \|", table, re.M)
    explained = set()
    for names, scripts in rows:
        if letters[path.stem] in scripts:
            explained |= set(re.findall(r"`([^`]+)`", names))
    found = {re.sub(r"(?<=pass@)\d+", "K", n) for n in logged(path.stem, tmp_path / "run")}
    found = {re.sub(r"(?<=@)\d+", "N", name) for name in found}
    assert len(rows) > 20 and found - explained == set(), "logged, and not explained"
    assert explained - found == set(), "explained, and not logged"


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
