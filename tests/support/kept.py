"""Files that all processes and all runs of the tests share: compiled once for each state of their sources.

They are in the folder ``ivon_kernels-UID`` of the temporary directory; deleting it has everything compiled anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path


def digest(how: object, files: Iterable[Path]) -> str:
    """Of what a file is made of: the contents of `files`, and the text of everything else that decides."""
    content = hashlib.sha256(repr(how).encode())
    for path in sorted(files):
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def kept(name: str, make: Callable[[Path], None]) -> Path:
    """The file of a name that tells its content; where there is none, `make` writes it to the path that it is given."""
    folder = Path(tempfile.gettempdir()) / f"ivon_kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / name
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            make(unfinished)
            unfinished.rename(path)
    return path
