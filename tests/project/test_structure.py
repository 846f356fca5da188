"""The house: who inherits from whom, who writes what, and that the map of docs/design.md is true.

That rooms import downwards and without circles is checked by import-linter in CI.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ivon_kernels import IVON

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ivon_kernels"
FRONT_END = [PACKAGE / "optimizer.py", PACKAGE / "weights.py", *sorted((PACKAGE / "training").glob("*.py"))]
PICKLING = PACKAGE / "training" / "pickling.py"
HOOKED = PACKAGE / "training" / "hooked.py"  # in the place of torch's own wrapper of a step, which touches the same
OTHERS = {"grad", "atexit"}  # attributes of parameters, which are torch's, and of weakref's finalizers


def test_ivon_inherits_from_torchs_optimizer_alone() -> None:
    assert IVON.__mro__ == (IVON, torch.optim.Optimizer, object)


def _foreign(path: Path) -> Iterator[tuple[ast.Attribute, str]]:
    """Attributes of something else than self or cls, with where they stand."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        ):
            yield node, f"{path.name}:{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", [path for path in FRONT_END if path != HOOKED], ids=lambda path: path.stem)
def test_a_part_writes_its_own_attributes(path: Path) -> None:
    written = [
        where for node, where in _foreign(path) if not isinstance(node.ctx, ast.Load) and node.attr not in OTHERS
    ]
    assert written == []


@pytest.mark.parametrize(
    "path", [path for path in FRONT_END if path not in (PICKLING, HOOKED)], ids=lambda path: path.stem
)
def test_a_part_reads_no_private_attribute_of_another(path: Path) -> None:
    # A tensor's version, a NamedTuple's method, and what belongs to another object of the same class.
    allowed = {"_version", "_asdict"}
    private = [where for node, where in _foreign(path) if re.match(r"_[^_]", node.attr) and node.attr not in allowed]
    assert private == []


def test_the_parts_do_not_refer_to_the_optimizer() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = IVON([parameter], lr=0.1, ess=10.0, seed=1)
    parts = [value for value in vars(optimizer).values() if type(value).__module__.startswith("ivon_kernels")]
    names = {type(part).__name__ for part in parts}
    assert names == {"Parameters", "Weights", "Samples", "Modes", "Update", "Beginning"}
    seen: set[int] = set()
    waiting = list(parts)
    while waiting:
        part = waiting.pop()
        assert part is not optimizer
        for value in vars(part).values():
            if (
                type(value).__module__.startswith("ivon_kernels")
                and hasattr(value, "__dict__")
                and id(value) not in seen
            ):
                seen.add(id(value))
                waiting.append(value)


def _definitions(path: Path) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found |= {
                node.name,
                *(f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)),
            }
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return found


def test_the_map_names_what_is_there() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    rooms = re.findall(r"^\| (`.*?`) \|", text.split("## Four places")[0], re.MULTILINE)
    named = {name.rstrip("/") for room in rooms for name in re.findall(r"`([^`]+)`", room)}
    there = {path.name for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert named == there - {"__init__.py", "__main__.py", "_version.py", "__pycache__"}
    places = re.findall(r"`(ivon_kernels/\S+\.py)` ((?:`[\w.]+`(?:, (?:and )?)?)+)", text)
    assert len(places) >= 5
    for path, names in places:
        assert set(re.findall(r"`([\w.]+)`", names)) <= _definitions(ROOT / path), path
    for path in re.findall(r"`((?:ivon_kernels|csrc|tests)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path


def test_a_backend_writes_seven_methods() -> None:
    from ivon_kernels.backends import Backend

    for document in ("design.md", "new-backend.md"):
        text = (ROOT / "docs" / document).read_text()
        assert all(f"`{name}`" in text or f"def {name}(" in text for name in Backend.__abstractmethods__)
    assert len(Backend.__abstractmethods__) == 7
