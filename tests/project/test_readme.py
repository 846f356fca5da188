"""What README.md and the documents say of other files is so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from benchmarks.readme import DOCUMENTS, TABLES, fill

ROOT = Path(__file__).parents[2]
FEATURES = ["accumulation", "clipping", "AMP", "resume", "evaluation", "save"]


def rows() -> list[list[str]]:
    """The cells of the table of frameworks, its head first."""
    text = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    section = text.partition("\n## What is right where\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| ---")]


def test_the_table_has_every_framework_and_feature() -> None:
    head, *body = rows()
    assert head[2:] == FEATURES
    names = " ".join(row[0] for row in body)
    assert all(name in names for name in ("Transformers", "TRL", "Accelerate", "Lightning", "DDP", "FSDP2"))


@pytest.mark.parametrize("row", rows()[1:], ids=lambda row: row[0])
def test_every_cell_of_the_table_is_a_test(row: list[str]) -> None:
    assert len(row) == 2 + len(FEATURES)
    for cell in row[2:]:
        found = re.fullmatch(r'\[yes\]\(\.\./(tests/\w+/\w+\.py) "([\w, ]+)"\)', cell)
        assert found, cell
        tree = ast.parse((ROOT / found[1]).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert set(found[2].split(", ")) <= functions, cell


def test_the_readme_can_be_read() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 160
    commands = ("python3 -m venv", "![")
    assert not [line for line in lines if len(line) > 120 and not line.startswith(commands)]
    assert not [line for line in lines if line.startswith("|") and line.count("|") > 7]  # of six columns


def test_links_lead_somewhere() -> None:
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for target in re.findall(r"\]\(([^)\s#]+)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_file_of_tests_stands_in_the_table_of_promises() -> None:
    named = re.findall(r"`(tests/\w+/test_\w+\.py)`", (ROOT / "docs" / "testing.md").read_text(encoding="utf-8"))
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("*/test_*.py")}
    assert set(named) == {name for name in files if not name.startswith("tests/benchmarks/")}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_figures_are_those_of_the_committed_records(name: str) -> None:
    document = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- figures: " in document
    assert document == fill(document, ROOT), "run python -m benchmarks readme"


def test_every_table_stands_in_a_document() -> None:
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS)
    assert set(re.findall(r"<!-- figures: (\w+) -->", text)) == TABLES.keys()


def test_a_stale_figure_is_found() -> None:
    block = "before\n<!-- figures: finetune -->\n| 1 |\n<!-- end -->\nafter"
    filled = fill(block, ROOT)
    assert filled != block and filled == fill(filled, ROOT)
    assert filled.startswith("before\n") and filled.endswith("<!-- end -->\nafter")
