"""The GPU kernels under other versions of Triton: compiled, their PTX executed, launched by the host. Not part of CI.

    python -m tests.support.versions [OUT] [VERSION...]

Each version is installed into a folder that comes before this environment's packages (about 160 MB, deleted again), and
a process of its own runs the tests that concern Triton. OUT (docs/triton-versions.json) gets what each version passed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.4.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")
TESTS = {
    "compiled": ("tests/kernels/test_triton_compile.py", "tests/kernels/test_triton_launches.py"),
    "PTX executed": (
        "tests/kernels/test_backend_matrix.py",
        "tests/lora/test_lora_ptx.py",
        "-k",
        "triton and ptx or lora_ptx",
    ),
    "launched by the host": ("tests/kernels/test_triton_host.py",),
}


def run(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)


def _look(version: str, folder: str) -> dict[str, Any]:
    """What a version passes."""
    installed = run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, f"triton=={version}")
    if installed.returncode:
        return {"not installed": installed.stderr.strip().splitlines()[-1:]}
    env = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
    found: dict[str, Any] = {}
    for what, selection in TESTS.items():
        begin = time.monotonic()
        # Warnings of versions that the project does not pin are no failures. Plain assertions, since pytest's rewriting
        # of them ended with "AST constructor recursion depth mismatch" after a failure within a kernel.
        options = ("-q", "-W", "default", "-rfE", "--assert=plain")
        tests = run(sys.executable, "-m", "pytest", *options, *selection, env=env)
        counts = {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|skipped|error)", tests.stdout)}
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+.*?)(?: - .*)?$", tests.stdout, re.MULTILINE)
        found[what] = {**counts, "seconds": round(time.monotonic() - begin)}
        if failed or tests.returncode:
            found[what]["which"] = failed or tests.stdout.splitlines()[-3:]
        sys.stderr.write(f"{version} {what} {found[what]}\n")
    return found


def main(out: Path, versions: tuple[str, ...]) -> None:
    import torch

    record = json.loads(out.read_text()) if out.exists() else {}
    record["python"], record["torch"] = sys.version.split()[0], torch.__version__
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            record.setdefault("triton", {})[version] = _look(version, folder)
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(Path(arguments[0]) if arguments else ROOT / "docs" / "triton-versions.json", tuple(arguments[1:]) or VERSIONS)
