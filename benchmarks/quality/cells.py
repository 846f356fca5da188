"""The finished parts of a study on disk: what is there is not done again, and several processes may share the work."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import UserError

STUDY = "study.json"
_WEIGHTS, _STATE = "weights.", "state."


class Cells:
    """A folder of finished cells."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """Open the folder of a study, or begin it.

        Args:
            folder: Made if it is not there.
            identity: The settings that every cell in it shares.

        Raises:
            UserError: It holds cells of other settings.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / STUDY
        if not path.exists():
            write_json(path, identity)
        begun = json.loads(path.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(identity))
        if differing := [key for key in wanted if begun.get(key) != wanted[key]]:
            raise UserError(
                f"{folder} holds a study with other {', '.join(differing)} ({path.name}): "
                "give another --out, or delete it."
            )

    def path(self, *names: Any) -> Path:
        """Where the cell of these names is."""
        return self.folder.joinpath("cells", *map(str, names))

    def read(self, *names: Any) -> dict[str, Any] | None:
        """What a finished cell says; None if it is not finished."""
        path = self.path(*names) / "cell.json"
        if not path.exists():
            return None
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content

    def finish(self, content: dict[str, Any], *names: Any) -> None:
        """Write what a cell found: from now on it is finished."""
        write_json(self.path(*names) / "cell.json", content)

    def forget(self, *names: Any) -> None:
        """Have a cell done again."""
        (self.path(*names) / "cell.json").unlink(missing_ok=True)

    @contextmanager
    def claim(self, *names: Any) -> Iterator[bool]:
        """Whether the cell is this process's to do; it is nobody else's for the length of the block.

        A claim of a process that died is taken over.
        """
        path = self.path(*names) / "claim"
        path.parent.mkdir(parents=True, exist_ok=True)
        owned = _create(path) or (_is_stale(path) and _take_over(path))
        try:
            yield owned
        finally:
            if owned:
                path.unlink(missing_ok=True)

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def save_trained(self, weights: dict[str, Tensor], state: dict[str, Tensor], *names: Any) -> None:
        """Keep an adapter's weights and a method's state."""
        tensors = {
            **{_WEIGHTS + name: value for name, value in weights.items()},
            **{_STATE + name: value for name, value in state.items()},
        }
        kept = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        path = self.path(*names) / "trained.safetensors"
        part = path.with_name(f".{os.getpid()}.part")
        save_file(kept, part)
        os.replace(part, path)

    def load_trained(self, *names: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights and the state of :meth:`save_trained`."""
        tensors = load_file(self.path(*names) / "trained.safetensors")
        weights = {name[len(_WEIGHTS) :]: value for name, value in tensors.items() if name.startswith(_WEIGHTS)}
        return weights, {name[len(_STATE) :]: value for name, value in tensors.items() if name.startswith(_STATE)}


def key_of(hyper: Mapping[str, float]) -> str:
    """A name for hyperparameters, fit for a folder."""
    text = ",".join(f"{name}={float(value)!r}" for name, value in sorted(hyper.items()))
    return text if len(text) <= 100 else hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write it in one piece, so that nobody reads a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def _create(path: Path) -> bool:
    part = path.with_name(f".claim.{os.getpid()}")
    part.write_text(str(os.getpid()), encoding="utf-8")
    try:
        os.link(part, path)  # unlike a file that is opened and then written, it is never seen empty
    except FileExistsError:
        return False
    finally:
        part.unlink()
    return True


def _is_stale(path: Path) -> bool:
    """Whether the process that claimed is gone."""
    try:
        owner = int(path.read_text(encoding="utf-8"))
        if owner == os.getpid():
            return True
        os.kill(owner, 0)
    except (ProcessLookupError, ValueError, FileNotFoundError):
        return True
    except PermissionError:
        return False
    return False


def _take_over(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return _create(path)
