"""The finished parts of a study on disk: what is there is not done again, and several processes may share the work."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import UserError

Content = dict[str, Any]
Compute = Callable[[], tuple[Content, dict[str, Tensor]]]


class Cells:
    """A folder of cells, one file each: what was found, as JSON in the header, and tensors.

    Args:
        folder: Made if it is not there.
        identity: The settings that every cell in it shares.

    Raises:
        UserError: The folder holds cells of other settings.
    """

    def __init__(self, folder: Path, identity: Content) -> None:
        self.folder = folder / "cells"
        path = folder / "study.json"
        with self.lock("study"):
            if not path.exists():
                write_record(path, identity)
        begun, wanted = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(identity))
        if differing := [key for key in wanted if begun.get(key) != wanted[key]]:
            raise UserError(
                f"{folder} holds a study with other {', '.join(differing)} ({path.name}): "
                "give another --out, or delete it."
            )

    def _path(self, names: tuple[str, ...], suffix: str = ".safetensors") -> Path:
        return self.folder.joinpath(*names).with_name(f"{names[-1]}{suffix}")

    def lock(self, *names: str) -> FileLock:
        """A lock that one process at a time can hold; the system takes it from one that died."""
        path = self._path(names, ".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def read(self, *names: str) -> Content | None:
        """What a finished cell says; None if it is not finished."""
        path = self._path(names)
        return _content(path) if path.exists() else None

    def tensors(self, *names: str) -> dict[str, Tensor]:
        """The tensors of a finished cell, on the CPU."""
        return load_file(self._path(names))

    def get(self, names: tuple[str, ...], compute: Compute) -> Content:
        """What the cell of these names says; if it is not finished, `compute` finishes it.

        Raises:
            filelock.Timeout: Another process is at it.
        """
        if (found := self.read(*names)) is not None:
            return found
        with self.lock(*names).acquire(timeout=0):
            if (found := self.read(*names)) is None:  # whoever had the lock before may have finished it
                found, tensors = compute()
                part = self._path(names, ".part")
                save_file(tensors, part, {"content": json.dumps(found, allow_nan=False)})
                os.replace(part, self._path(names))  # nobody reads a half
        return found

    def forget_failures(self) -> None:
        """Have what failed in an earlier run done again."""
        for path in self.folder.rglob("*.safetensors"):
            if _content(path)["error"] is not None:
                path.unlink(missing_ok=True)


def _content(path: Path) -> Content:
    with safe_open(path, "pt") as file:
        content: Content = json.loads(file.metadata()["content"])
    return content


def key_of(hyper: Mapping[str, float]) -> str:
    """A name for hyperparameters, fit for a file."""
    text = ",".join(f"{name}={float(value)!r}" for name, value in sorted(hyper.items())) or "none"
    return text if len(text) <= 100 else hashlib.sha256(text.encode()).hexdigest()[:16]


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write JSON with a line for every key, or for every item of a list: small, and compared line by line."""
    lines = []
    for key, value in record.items():
        items = ",\n".join(map(_dump, value)) if isinstance(value, list) else ""
        lines.append(f"{_dump(key)}:" + (f"[\n{items}\n]" if items else _dump(value)))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(part, path)  # nobody reads a half


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
