"""RESULTS.md is what its records render to, and report.py puts no measured number of its own into it."""

import ast
import json
import re

import pytest

from benchmarks import report
from conftest import ROOT


def test_results_are_what_the_records_render_to():
    committed = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    assert committed == report.render(), "run python -m benchmarks.report"


def test_every_record_is_on_the_page():
    page = report.render()
    for path in sorted(report.BENCH.glob("*.json")):
        assert f"](assets/bench/{path.name})" in page, path.name


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", report.render()):
        assert (ROOT / target).exists(), target


def records(value):
    """Yields every dict within a record, at any depth."""
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from records(child)


@pytest.mark.parametrize("path", sorted(report.BENCH.glob("*.json")), ids=lambda path: path.stem)
def test_a_record_s_commands_exist(path):
    for found in records(json.loads(path.read_text(encoding="utf-8"))):
        for command in found["command"].split("; ") if isinstance(found.get("command"), str) else ():
            words = command.split()
            assert words[0] == "python", command
            module = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
            assert (ROOT / module).exists(), command


def test_no_measured_number_stands_in_the_renderer():
    """A decimal number in a section's prose would be a measurement that no record backs. Keys of records may be one."""
    allowed = {"6.3", "0.04"}  # the paper's factor; the standard error of 128 prompts
    for node in ast.walk(ast.parse((ROOT / "benchmarks" / "report.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            prose = re.sub(r"^[\d.]+$", "", node.value)
            found = set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", prose))
            assert found <= allowed, (node.lineno, found - allowed)


def test_the_line_of_files_is_rendered(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "data.py").write_text("1\n2\n")
    (tmp_path / "base.py").write_text("from common import data\n")
    paper = tmp_path / "paper.py"
    paper.write_text('"""A paper.\n\nLimits   none\n"""\n\nimport base\n')
    with pytest.raises(ValueError, match="no `Files` line"):
        report.files_line(paper)
    for _ in range(2):
        report.write_files_line(paper)
        assert report.files_line(paper) == (["paper.py", "base.py", "common/data.py"], 7 + 1 + 2)
    assert paper.read_text().count("Files") == 1
    paper.write_text('"""A paper.\n\nFiles    paper.py, base.py +\n         common/: 9,999 lines in all\n"""\n')
    assert report.files_line(paper) == (["paper.py", "base.py", "common/"], 9999)
