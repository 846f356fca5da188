"""The site is built strictly, and what leaves it, or was written for another reader, is right."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/ivon-kernels/ivon-kernels/"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built so that every warning is an error: a page without a place in the menu, a link or an anchor to nothing."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_links_to_the_repository_lead_to_what_is_there(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    found = {
        link for page in pages for link in re.findall(rf'"{REPOSITORY}(?:blob|tree)/main/([^"#]+)', page.read_text())
    }
    assert len(found) > 30
    assert [link for link in found if not (ROOT / link).exists()] == []


def test_docstrings_are_markdown_there(site: Path) -> None:
    for page in (site / "api").rglob("index.html"):
        assert not re.search(r":(attr|class|func|meth|mod):|<p>::|::</p>", page.read_text(encoding="utf-8")), page
