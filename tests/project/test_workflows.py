"""What runs on GitHub, as far as it can be shown here: the steps of a release, the linters' versions, pinned actions.

The files' schemas, and what zizmor finds in workflows, are checked by `.ci/run`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
assert VERSION


def workflow(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(
        (ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8")
    )
    return loaded


def commands(name: str, job: str) -> list[str]:
    return [step["run"] for step in workflow(name)["jobs"][job]["steps"] if "run" in step]


def bash(command: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A step, as GitHub runs it."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", command],
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def constraints() -> dict[str, str]:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))


def test_what_the_workflows_call_is_there() -> None:
    assert commands("tests", "tests") == ["bash .ci/run"]
    assert any("benchmarks/gpu_check.sh" in command for command in commands("gpu", "check"))
    assert "mkdocs build --strict" in commands("docs", "build")
    assert workflow("release")["jobs"]["build"]["uses"] == "./.github/workflows/wheels.yml"
    config = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for script in set(re.findall(r"\{project\}/([\w./]+)", config)):
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_nothing_may_write_unasked(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    used = re.findall(r"uses: (.+)", text)
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+|\./\.github/workflows/\w+\.yml", each) for each in used)
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}


def test_an_action_has_one_version() -> None:
    used = {line for path in WORKFLOWS for line in re.findall(r"uses: (.+)", path.read_text(encoding="utf-8"))}
    names = [line.partition("@")[0] for line in used]
    assert len(names) == len(set(names))


def test_pre_commit_has_the_linters_of_ci_in_its_versions() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    pinned = {package for hook in hooks for package in hook["additional_dependencies"]}
    versions = constraints()
    assert pinned == {f"{name}=={versions[name]}" for name in (package.partition("==")[0] for package in pinned)}
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    installed = re.search(r"pip install --quiet -c constraints.txt \\\n\s+(.*) &&", script)
    assert installed
    assert set(installed[1].split()) == {package.partition("==")[0] for package in pinned} | {"mypy"}


# ---- a release -------------------------------------------------------------------------------------------------------


def test_a_release_needs_the_tag_of_its_version_and_a_dated_section(tmp_path: Path) -> None:
    (check,) = commands("release", "version")
    for name in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    log = tmp_path / "CHANGELOG.md"
    text = re.sub(r"^## \[(.+?)\] - .*$", r"## [\1] - 2026-12-01", log.read_text(encoding="utf-8"), flags=re.MULTILINE)
    log.write_text(text, encoding="utf-8")
    assert bash(check, tmp_path, GITHUB_REF_NAME=f"v{VERSION[1]}").returncode == 0
    assert bash(check, tmp_path, GITHUB_REF_NAME="v9.9.9").returncode != 0
    log.write_text(text.replace("2026-12-01", "unreleased"), encoding="utf-8")
    assert bash(check, tmp_path, GITHUB_REF_NAME=f"v{VERSION[1]}").returncode != 0


def test_a_release_page_has_the_changelogs_section(tmp_path: Path) -> None:
    (notes,) = commands("release", "notes")
    log = "# Changelog\n\n## [0.2.0] - 2027-01-01\n\n- new\n\n## [0.1.0] - 2026-12-01\n\n### Added\n\n- all\n"
    (tmp_path / "CHANGELOG.md").write_text(log, encoding="utf-8")
    (tmp_path / "gh").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "gh").chmod(0o755)
    done = bash(notes, tmp_path, GITHUB_REF_NAME="v0.1.0", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert done.stdout == "release create v0.1.0 --verify-tag --title v0.1.0 --notes-file notes.md\n"
    assert (tmp_path / "notes.md").read_text(encoding="utf-8").split() == ["###", "Added", "-", "all"]
    bash(notes, tmp_path, GITHUB_REF_NAME="v0.2.0", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert (tmp_path / "notes.md").read_text(encoding="utf-8").split() == ["-", "new"]
