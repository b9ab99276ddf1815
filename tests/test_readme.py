"""README.md: its commands parse, its code runs, its links lead somewhere, its numbers are measured, --help works."""

import re
import shlex
import subprocess
import sys

import pytest

import sample
import train
from benchmarks.report import papers
from common.cli import parse
from conftest import ROOT
from nano_hybrid import HybridConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.M | re.S)
COMMANDS = [line.split("#")[0].strip() for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
PAPERS = [line.strip("| ").split(" | ") for line in README.splitlines() if line.startswith("| [`")]


@pytest.mark.parametrize("line", [c for c in COMMANDS if re.search(r"(train|sample)\.py", c) and "--help" not in c])
def test_every_flag_of_a_command_exists(line):
    words = shlex.split(line)
    script = next(i for i, word in enumerate(words) if word.endswith(("train.py", "sample.py")))
    flags = words[script + 1 :]
    if words[script].endswith("train.py"):
        given, *_ = parse(
            train.TrainConfig, HybridConfig, *train.SETTINGS.values(), prog="train.py", about="", argv=flags
        )
        recipe = given.get("recipe", "hybrid")
        assert recipe in train.RECIPES or recipe.endswith(".py")  # a file of the reader's own
    else:
        parse(sample.SampleConfig, prog="sample.py", about="", argv=flags)


@pytest.mark.parametrize("code", [text for kind, text in BLOCKS if kind == "python"])
def test_the_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_explains_every_flag(script):
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    config = {"train.py": train.TrainConfig, "sample.py": sample.SampleConfig}[script]
    for name in config.__dataclass_fields__:
        assert f"--{name} " in done.stdout or f"--{name}\n" in done.stdout or f"[--{name}" in done.stdout


def test_the_install_and_test_commands_are_those_of_ci():
    tests = [c for c in COMMANDS if "pytest" in c]
    assert len(tests) == 1 and tests[0].startswith("python3 -m venv")
    assert "requirements-test.txt" in tests[0] and (ROOT / "requirements-test.txt").exists()
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def anchors(path):
    """Returns the anchors that GitHub gives the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_links_and_pictures_are_there():
    targets = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", README)
    for target in (a or b for a, b in targets):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            assert (ROOT / name).exists(), target
            assert not anchor or anchor in anchors(ROOT / name), target


@pytest.mark.parametrize("line", [c for c in COMMANDS if " -m " in c and "pytest" not in c and "-m venv" not in c])
def test_modules_of_commands_exist(line):
    module = line.split(" -m ")[1].split()[0]
    assert (ROOT / f"{module.replace('.', '/')}.py").exists(), line


@pytest.mark.parametrize("row", PAPERS, ids=[row[0].split("`")[1] for row in PAPERS])
def test_a_row_of_the_papers_is_short_and_its_number_is_in_the_results(row):
    file, paper, claim, number = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell) for cell in row)
    for cell in (file, paper, claim, number):
        assert len(cell.split()) <= 15, cell
    results = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    for digits in re.findall(r"\d+\.\d+|\d+,\d+", number):
        assert re.search(rf"(?<![\d.]){re.escape(digits)}(?!\d)", results), f"{digits}: not in RESULTS.md"


def test_every_paper_file_has_a_row():
    listed = {name for row in PAPERS for name in re.findall(r"`(\w+\.py)`", row[0])}
    assert {path.name for path in papers()} <= listed
