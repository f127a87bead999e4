"""What holds for all files together: copies are copies, imports are few, the pages are true.

python tests/test_repository.py     # writes the line numbers of all links to code anew
"""

import ast
import importlib
import itertools
import json
import re
import shutil
import subprocess
import sys

import pytest
from changes_helpers import patches_of
from conftest import ROOT

NAMES = ("reinforce", "ppo", "grpo", "dpo", "reward_model")
SCRIPTS = [ROOT / f"{name}.py" for name in NAMES if (ROOT / f"{name}.py").exists()]
BENCH = ROOT / "tests" / "bench"
DOCS = ROOT / "tests" / "docs"
CHANGES = ROOT / "tests" / "changes"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"), reverse=True)]
PAGES += [BENCH / "README.md", CHANGES / "README.md"]
TABLES = [path for path in sorted(BENCH.glob("*.md")) if path.name != "README.md"]
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)  # (language, text)


def page_name(path):
    return str(path.relative_to(ROOT))


def prose(path):
    """A page without its blocks of code."""
    return FENCED.sub("", path.read_text())


def section(path, heading):
    """What stands under a heading, up to the next one of the same level."""
    _, found, rest = path.read_text().partition(f"\n## {heading}\n")
    assert found, f"{page_name(path)} has no section {heading}"
    return rest.partition("\n## ")[0]


# -- The scripts -----------------------------------------------------------------------------------


# what differs between algorithms by its nature
OWN = {"Args", "resolve", "Batch", "update_loss", "train", "rollout", "evaluate", "load_task"}


def functions(path):
    tree = ast.parse(path.read_text())
    parts = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {part.name: ast.unparse(part) for part in parts}


def flags_of(path):
    """The class Args of a script."""
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    return next(node for node in classes if node.name == "Args")


def names_of_flags(path):
    return [f.target.id for f in flags_of(path).body if isinstance(f, ast.AnnAssign)]


@pytest.mark.parametrize("a, b", list(itertools.combinations(SCRIPTS, 2)))
def test_functions_of_the_same_name_are_the_same_in_every_script(a, b):
    ours, theirs = functions(a), functions(b)
    for name in (ours.keys() & theirs.keys()) - OWN:
        assert ours[name] == theirs[name], f"{name} differs between {a.name} and {b.name}"


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "common.py"])
def test_scripts_import_only_what_requirements_bring(path):
    libraries = {"torch", "transformers", "numpy", "tyro", "tensorboard", "tqdm", "safetensors"}
    allowed = libraries | {"common"} | sys.stdlib_module_names
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        assert {name.split(".")[0] for name in names} <= allowed


@pytest.mark.parametrize("path", SCRIPTS)
def test_every_flag_says_what_it_does(path):
    """A string follows every field of Args: it is the flag's line in --help."""
    body = flags_of(path).body
    for field, after in zip(body, [*body[1:], None]):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(after, ast.Expr), field.target.id
            assert isinstance(after.value.value, str), field.target.id


# -- Flags and logged numbers are explained --------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_the_page_of_flags_has_every_flag_in_its_table(path):
    rows = re.findall(r"^\| .+ \|$", (DOCS / "flags.md").read_text(), re.M)
    for name in names_of_flags(path):
        assert any(f"`{name}`" in row for row in rows), name


def test_the_page_of_flags_has_no_flag_that_no_script_has():
    text = (DOCS / "flags.md").read_text()
    known = set(itertools.chain.from_iterable(names_of_flags(path) for path in SCRIPTS))
    for row in re.findall(r"^\| .+ \|$", text, re.M):
        assert set(re.findall(r"`(\w+)`", row)) <= known, row


FULL = {  # short runs that log everything their script can
    "reinforce": {"epochs": 2, "beta": 0.1},
    "ppo": {"beta": 0.1},
    "grpo": {"epochs": 2, "beta": 0.1, "eval_samples": 2},
    "dpo": {},
    "reward_model": {"best_of": (1, 2)},
}
FIRST = '{"prompt": "12=", "chosen": "21", "rejected": "1"}\n'  # the shorter side is rejected
SECOND = '{"prompt": "12=", "chosen": "2", "rejected": "12"}\n'  # the longer side is


def logged(script, folder):
    """The names of all numbers in metrics.jsonl of a short run on the bundled task."""
    module = importlib.import_module(script)
    flags = FULL[script] | {"steps": 1, "max_new_tokens": 4, "device": "cpu", "out": str(folder)}
    takes_pairs = hasattr(module.Args, "pairs_per_step")
    prompts = "".join(f'{{"prompt": "{n}=", "answer": "{n}"}}\n' for n in "123")
    (folder.parent / "prompts.jsonl").write_text(prompts)
    (folder.parent / "pairs.jsonl").write_text(FIRST + SECOND)
    reward = "def f(completion, row):\n    return {'reward': int(row['answer']), 'form': 1}\n"
    (folder.parent / "r.py").write_text(reward)
    flags["reward"] = f"{folder.parent}/r.py:f"
    data = f"{folder.parent}/{'pairs' if takes_pairs else 'prompts'}.jsonl"
    flags |= {"data": data, "eval_data": data}
    flags["pairs_per_step" if takes_pairs else "prompts_per_step"] = 4
    if takes_pairs:
        flags["eval_prompts"] = f"{folder.parent}/prompts.jsonl"
    if script == "reward_model":
        flags["policy"] = module.Args.model
    module.train(module.Args(**flags))
    names = set()
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        names |= json.loads(line).keys()
    return names - {"step"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_every_logged_number_and_only_those_is_in_the_readme(path, tmp_path):
    """A row of the table names numbers and the letters of the scripts that log them; both ways."""
    table = section(ROOT / "README.md", "Every logged number")
    letters = {name: letter for letter, name in re.findall(r"\b([A-Z]) (\w+)\.py", table)}
    rows = re.findall(r"^\| (`.+?) \| ([A-Z]+) \|", table, re.M)
    explained = set()
    for names, scripts in rows:
        if letters[path.stem] in scripts:
            explained |= set(re.findall(r"`([^`]+)`", names))
    found = {re.sub(r"(?<=pass@)\d+", "K", name) for name in logged(path.stem, tmp_path / "run")}
    found = {re.sub(r"(?<=@)\d+", "N", name) for name in found}
    found = {name.replace("reward/form", "reward/NAME") for name in found}
    assert len(rows) > 20
    assert found - explained == set(), "logged, and not explained"
    assert explained - found == set(), "explained, and not logged"


# -- Measurements ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.name)
def test_every_benchs_table_stands_on_one_page_as_it_was_written(path):
    assert sum(page.read_text().count(path.read_text()) for page in PAGES) == 1


def test_the_readme_has_the_table_of_results():
    assert (BENCH / "results.md").read_text() in (ROOT / "README.md").read_text()


def test_grpo_as_published_was_measured_with_the_flags_that_its_script_names():
    named = re.search(r"GRPO as published +(--.*)", (ROOT / "grpo.py").read_text())[1].split()
    text = (BENCH / "results.py").read_text()
    measured = re.search(r'"GRPO as published": Method\(\s+f"(.*?)"', text)[1]
    assert measured.split() == ["grpo.py", "{GROUPS}", *named] and "k3" in named


def test_the_rounding_that_the_readme_names_is_the_measured_one():
    table = section(ROOT / "README.md", "Every logged number")
    row = next(line for line in table.splitlines() if line.startswith("| `kl/sample` | RPG"))
    known = json.loads((BENCH / "first.json").read_text())["kl/sample"]
    assert len(known) == 4
    for value in known.values():
        shown = f"{value:.0e}".replace("e-0", "e-") if value < 1e-4 else f"{value:.1g}"
        assert re.search(rf"\b{shown}\b", row), shown


def test_what_the_page_says_of_the_agreement_with_trl_was_measured():
    report = json.loads((BENCH / "agree_trl.json").read_text())
    cases = report["cases"]
    worst = max(max(case["loss_apart"], case["gradient_apart"]) for case in cases)
    assert worst == report["largest"] < 1e-5
    for case in cases:  # without the flags or the patch the gradient would be another
        noticed = case.get("gradient_apart_without", 1)
        assert noticed > 100 * case["gradient_apart"], case["case"]
        assert case["clipped"] > 0 or "epochs" not in case["grpo.py"]
    defaults = {case["case"]: (case["TRL"], case["grpo.py"]) for case in cases}
    assert defaults["defaults"] == ({}, {})
    assert defaults["defaults, k3_ratio"] == ({"beta": 0.1}, {"beta": 0.1})
    compared = {case["patch"] for case in cases} - {None}
    assert compared | set(report["not in TRL"]) == set(patches_of("grpo"))
    page = " ".join((BENCH / "README.md").read_text().split())
    assert f"In {len(cases)} cases they differ by at most {worst:.1e}" in page
    assert f"and {len(compared)} of the [patches]" in page
    assert f"the others, {' and '.join(report['not in TRL'])}, TRL has no setting" in page


def test_what_the_pages_say_of_a_gpus_speed_was_measured():
    rows = json.loads((BENCH / "gpu.json").read_text())
    assert {(row["device"], row["torch"]) for row in rows} == {("NVIDIA H200", "2.11.0+cu130")}
    bench, running = (
        " ".join(path.read_text().split())
        for path in (BENCH / "README.md", ROOT / "tests/docs/running.md")
    )
    decode = {row["case"]["rows"]: row["got"] for row in rows if row["piece"] == "decode"}
    times = [decode[64][f"{way}: ms"] for way in ("captured", "eager", "generate")]
    words = "a token took {:.1f} ms, the same loop without the graph {:.1f} ms, and `generate`"
    assert f"{words} {{:.1f}} ms".format(*times) in bench
    assert f"without it took {decode[1024]['eager / captured']:.1f} times as long" in bench
    token = {row["case"]["rows"]: row["got"] for row in rows if row["piece"] == "token"}[64]
    capture = 2 * 1000 * token["capture, s"] / 127
    parts = (token["replay, ms"], token["draw, ms"], capture)
    words = "of a token with 64 rows takes {:.1f} ms, the draw {:.1f}, and two captures {:.1f} for"
    assert words.format(*parts) in bench
    assert f"{sum(parts):.1f} in all, where decode had {times[0]:.1f}" in bench
    of_one = 1000 * token["kernels, ms"] / token["kernels"]
    assert f"has {token['kernels']:,} kernels of {of_one:.1f} microseconds on average" in bench
    others = [decode[rows]["generate: ms"] for rows in (256, 1024)]
    words = "The {:.1f} ms of `generate` are of another day than its {:.1f} and {:.1f}"
    assert words.format(times[2], *others) in bench
    train = {}
    for row in rows:
        if row["piece"] == "train" and not row["case"]["shared"]:
            what = "checkpointing" if row["case"]["checkpointing"] else row["case"]["learns"]
            key = (row["case"]["model"], what, row["case"]["tokens in a micro-batch"])
            train[key] = (row["got"]["tokens/s"], row["got"]["peak, GiB"], row["got"]["said, GiB"])
    large = train["0.5B", "all weights", 32768]
    small = train["0.5B", "all weights", 8192]
    assert f"{large[0] / small[0]:.1f} times the speed of 8192" in running
    assert f"in {large[1]:.0f} GiB instead of {small[1]:.0f}" in running
    full = train["1.5B", "all weights", 8192]
    assert f"took {full[1]:.0f} GiB in micro-batches of 8192 tokens" in running
    assert f"the script says {full[2]:.0f} GiB" in running
    full = [train["1.5B", "all weights", tokens] for tokens in (8192, 32768)]
    again = [train["1.5B", "checkpointing", tokens] for tokens in (8192, 32768)]
    shares = [b[0] / a[0] for a, b in zip(full, again)]
    assert "trained at {:.2f} to {:.2f} of the speed".format(*shares) in bench
    assert f"in {again[1][1]:.0f} GiB in place of {full[1][1]:.0f}" in bench
    adapters = [train["1.5B", "adapters", tokens] for tokens in (8192, 32768)]
    assert all(0.9 < b[0] / a[0] < 1.1 for a, b in zip(full, adapters))
    assert f"about as fast as all weights, in {adapters[1][1]:.0f} GiB" in bench


def test_what_the_pages_say_of_whole_runs_on_a_gpu_holds():
    rows = json.loads((BENCH / "gpu.json").read_text())
    steps = {"grpo.py": 400, "ppo.py": 150, "reinforce.py": 250, "dpo.py": 300}
    steps["reward_model.py"] = 375
    ends = {}
    for row in rows:
        if row["piece"] == "learn":
            script = row["case"]["script"]
            assert row["got"]["step"] == steps[script]
            ends.setdefault(script, []).append(row["got"]["at the end"])
    assert {script: len(found) for script, found in ends.items()} == dict.fromkeys(steps, 1) | {
        "grpo.py": 6
    }
    running = " ".join((ROOT / "tests/docs/running.md").read_text().split())
    runs = json.loads((BENCH / "learning.json").read_text())["runs"]
    for script, found in ends.items():
        on_cpu = [run["held_out"][-1][1] for run in runs if run["command"] == script]
        said = f"{min(found):.2f}"
        if len(found) > 1:
            said = f"three seeds in bfloat16 and three in float32, {said} to {max(found):.2f}"
        said += f" ({'CPU ' * (len(found) > 1)}{min(on_cpu):.2f} to {max(on_cpu):.2f})"
        assert f"{script}{', ' if len(found) > 1 else ' '}{said}" in running
        assert min(on_cpu) - 0.05 < min(found) and max(found) < max(on_cpu) + 0.05
        outside = (min(found) < min(on_cpu) - 0.01) - (max(found) > max(on_cpu) + 0.01)
        assert outside == {"reinforce.py": -1, "dpo.py": 1}.get(script, 0)
    low, high = min(ends["grpo.py"]), max(ends["grpo.py"])
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"grpo.py's default run ends at {low:.2f} to {high:.2f} there, too" in readme


@pytest.mark.parametrize("name", NAMES)
def test_the_page_of_recipes_has_the_defaults_for_a_model_of_a_hub(name, tmp_path):
    shutil.copytree(ROOT / "tests" / "tiny" / "model", tmp_path / "model")
    module = importlib.import_module(name)
    flags = {"model": str(tmp_path / "model"), "data": "prompts.jsonl", "device": "cpu"}
    args = module.resolve(module.Args(**flags))
    with_adapters = module.resolve(module.Args(**flags, lora_rank=1))

    def rate(value):
        return f"{value:.0e}".replace("e-0", "e-")

    cells = [f"{rate(args.learning_rate)}, adapters {rate(with_adapters.learning_rate)}"]
    if name == "ppo":
        cells = [f"{rate(args.learning_rate)}, {rate(args.critic_learning_rate)}"]
    if name in ("dpo", "reward_model"):
        cells += [f"{args.pairs_per_step}", f"{args.max_tokens:,}"]
    else:
        cells += [f"{args.prompts_per_step} x {args.samples_per_prompt}", f"{args.max_new_tokens}"]
    if name != "reward_model":
        cells += [f"{args.beta:g}"]
    if name in ("reinforce", "ppo", "grpo"):
        cells += [f"{args.epochs * args.minibatches}"]
    text = section(DOCS / "recipes.md", f"Settings for {name}.py")
    assert f"| here | {' | '.join(cells)} |" in text
    # the same limit in all scripts
    assert f"`--max_new_tokens` (default {args.max_new_tokens})" in (ROOT / "README.md").read_text()


def test_the_page_of_recipes_has_the_measured_scores_of_more_updates():
    text = section(DOCS / "recipes.md", "Settings for grpo.py")
    table = (BENCH / "ablations.md").read_text()
    scores = re.findall(r"^\| Updates per rollout \| [^|]+ \| ([^|]+) \|", table, re.M)
    assert len(scores) == 3
    for score in scores:
        assert score in text


def test_what_the_page_of_measurements_says_of_the_distillation_was_measured():
    page = " ".join(section(BENCH / "README.md", "Distillation beside GRPO").split())
    known = json.loads((BENCH / "distill.json").read_text())
    first, last = known["runs"][0]["kl/ref"]
    assert f"which ended at {known['teacher']:.2f} " in page
    assert f"falls from {first:.1f} to {last:.1f} nats a completion (3e-4, seed 1)" in page


def test_the_page_of_measurements_counts_the_cases_of_faults():
    faults = str(ROOT / "tests" / "test_faults.py")
    command = [sys.executable, "-m", "pytest", faults, "--collect-only", "-q"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    written = re.search(r"holds (\d+) cases", (BENCH / "README.md").read_text()).group(1)
    assert written == re.search(r"(\d+) tests collected", said).group(1)


# -- Pages -----------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 25_000


@pytest.mark.parametrize("path", PAGES[1:], ids=page_name)
def test_a_page_says_first_whom_it_is_for_and_the_readme_links_it(path):
    title, _, rest = path.read_text().partition("\n\n")
    assert title.startswith("# ") and rest.startswith("This page is for those who "), rest[:80]
    assert f"]({page_name(path)})" in (ROOT / "README.md").read_text()


def test_no_heading_stands_twice():
    headings = []
    for path in PAGES:
        headings += re.findall(r"^#+ .+$", prose(path), re.M)
    assert len(headings) > 20 and len(headings) == len(set(headings))


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_all_code_of_a_page_is_fenced_and_names_its_language(path):
    """What is not fenced is not found by the tests of test_readme.py."""
    text = prose(path)
    assert "```" not in text, "a fence is not closed, or names no language"
    assert not re.search(r"^(    |\t)", text, re.M), "an indented block"


def anchors(path):
    """The names that GitHub gives to the headings of a page."""
    titles = re.findall(r"^##+ (.+)$", prose(path), re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_every_file_and_section_that_a_page_links_exists(path):
    for target in re.findall(r"\]\(([^)]+)\)", prose(path)):
        if target.startswith("https://"):
            continue
        file, _, place = target.partition("#")
        file = path.parent / file if file else path
        assert file.exists(), target
        assert not place or re.fullmatch(r"L\d+", place) or place in anchors(file), target


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_every_flag_that_a_page_names_exists(path):
    known = {"help", "logdir", "agree", "learn", "time", "script", "only", "jobs", "tasks"}
    known |= {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "rdzv_id"}  # torchrun's
    known |= {"nodes", "ntasks", "gpus", "requeue", "signal"}  # SLURM's
    for script in SCRIPTS:
        for name in names_of_flags(script):
            known |= {name, f"no_{name}"}
    assert set(re.findall(r"--(\w+)", path.read_text())) <= known


def test_the_readme_and_the_citation_file_say_the_same():
    citing = section(ROOT / "README.md", "Citing")
    citation = (ROOT / "CITATION.cff").read_text()
    version = re.search(r"^version: (.+)$", citation, re.M).group(1)
    title = re.search(r'^title: "(.+)"$', citation, re.M).group(1)
    assert f"version = {{{version}}}" in citing
    assert f"`v{version}`" in citing
    assert f"title = {{{title}}}" in citing


def test_the_repository_speaks_of_itself_alone():
    """No path of the machine that it was written on."""
    kinds = (".py", ".md", ".txt", ".toml", ".cff", ".json")
    for path in ROOT.rglob("*"):
        if path.suffix in kinds and not {".git", "runs"} & set(path.parts):
            text = path.read_text(errors="replace")
            assert not re.search(r"/(work|root|home)/\w|/tmp/\w+/(main|v)\b", text), path


# -- Lines of code that the pages name -------------------------------------------------------------


LINK = re.compile(r"\[`([^`]+)`\]\(([\w/.]+\.py)#L(\d+)\)")


def lines_that_say(text, file):
    """The numbers of the lines to which a link with this text may lead.

    An identifier is a function, a flag or a name that is set; anything else is a part of a line."""
    forms = [rf".*{re.escape(text)}"]
    if text.isidentifier():
        forms = [rf"def {text}\(", rf"    {text}: ", rf"{text} = "]
    lines = file.read_text().splitlines()
    for form in forms:
        found = [number for number, line in enumerate(lines, 1) if re.match(form, line)]
        if found:
            return found
    return []


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_every_line_that_a_page_names_is_there(path):
    """`python tests/test_repository.py` writes the numbers anew."""
    for text, file, number in LINK.findall(path.read_text()):
        assert lines_that_say(text, path.parent / file) == [int(number)], (text, file)


def test_many_lines_are_named():
    assert sum(len(LINK.findall(path.read_text())) for path in PAGES) > 100


def test_the_loop_in_the_readme_is_that_of_grpo():
    """Every line of the block is a line of grpo.py, in its order; `...` marks what is left out."""
    block = FENCED.search(section(ROOT / "README.md", "The loop of grpo.py"))[2]
    if "<!-- LOOP -->" in block:
        pytest.skip("the block is a draft")
    lines = iter([line.strip() for line in (ROOT / "grpo.py").read_text().splitlines()])
    for shown in block.splitlines():
        if shown.strip() not in ("", "..."):
            assert shown.strip() in lines, shown  # `in` goes on from the line found before


def write_line_numbers():
    for path in PAGES:
        text = path.read_text()
        for words, file, number in LINK.findall(text):
            here = lines_that_say(words, path.parent / file)
            if len(here) != 1:
                print(f"{page_name(path)}: `{words}` must be on one line of {file}, not {here}")
                continue
            text = text.replace(f"[`{words}`]({file}#L{number})", f"[`{words}`]({file}#L{here[0]})")
        path.write_text(text)


@pytest.mark.parametrize("broken, status", [(False, 0), (True, 1)])
def test_somebodys_copy_of_a_script_is_tested_by_its_tests(broken, status, tmp_path):
    """`--script my_grpo.py` tests that file: one that takes the loss with the wrong sign fails."""
    text = (ROOT / "grpo.py").read_text()
    assert "return -(gain * weights)" in text
    if broken:
        text = text.replace("return -(gain * weights)", "return (gain * weights)")
    (tmp_path / "my_grpo.py").write_text(text)
    tests = [str(ROOT / "tests" / "test_grpo.py"), "--script", str(tmp_path / "my_grpo.py")]
    command = [sys.executable, "-m", "pytest", "-q", *tests, "-k", "the_clip_stops_the_gradient"]
    assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == status


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "common.py"], ids=lambda p: p.name)
def test_a_script_stays_easy_to_read(path):
    """Short functions, short lines, one thing in a line: dense code takes the most time to read."""
    text = path.read_text()
    for f in ast.walk(ast.parse(text)):
        if isinstance(f, ast.FunctionDef):
            assert f.end_lineno - f.lineno < (130 if f.name == "train" else 60), f.name
        if isinstance(f, ast.Assign) and isinstance(f.targets[0], ast.Tuple):
            assert not isinstance(f.value, ast.Tuple), f"line {f.lineno} assigns several things"
    full = [line for line in text.splitlines() if line.strip()]
    assert sum(map(len, full)) / len(full) <= 56 and max(map(len, full)) <= 100
    assert "fmt: skip" not in text


if __name__ == "__main__":
    write_line_numbers()
