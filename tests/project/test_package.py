"""The package: what a wheel holds with and without a compiler, what the native library exports, one version."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from filelock import FileLock

import ivon_kernels
from ivon_kernels import available_backends
from ivon_kernels._native import build_info, find_library

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = re.compile(r"ivon_kernels/_native/libivon_(cpu|host|cuda)\.(so|dylib)")
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}


def _run(*command: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Runs a command to its end and returns its output; a failure shows it."""
    result = subprocess.run(
        list(map(str, command)), env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, f"{command} exited with {result.returncode}:\n{result.stdout}"
    return result.stdout


def _build(directory: Path, extra_env: Mapping[str, str]) -> Path:
    """Builds the wheel in `directory`, once for all pytest-xdist workers, and unpacks it there as `site`."""
    directory.mkdir(exist_ok=True)
    site = directory / "site"
    with FileLock(directory / "lock"):
        if not site.exists():
            pip = (sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check")
            # The cuda library takes a minute, and tests/kernels/test_cuda_compile.py compiles it.
            settings = ("-C", f"build-dir={directory / 'build'}", "-C", "cmake.define.IVON_KERNELS_CUDA=OFF")
            options = ("--no-build-isolation", "--no-deps", "--no-index", *settings)
            _run(*pip, "wheel", *options, "--wheel-dir", directory, ROOT, env={**os.environ, **extra_env})
            (wheel,) = directory.glob("*.whl")
            _run(*pip, "install", "--no-deps", "--no-index", "--target", site, wheel)
    return directory


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that all workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def built(shared_tmp: Path) -> Path:
    """The wheel as built on this machine, and its contents under `site`."""
    if not any(map(shutil.which, ("c++", "g++", "clang++", os.environ.get("CXX", "c++")))):
        pytest.skip("no C++ compiler on this machine")
    return _build(shared_tmp / "wheel", {})


@pytest.fixture(scope="session")
def built_without_compiler(shared_tmp: Path) -> Path:
    """The wheel as built where there is no C++ compiler, and its contents under `site`."""
    return _build(shared_tmp / "wheel_without_compiler", NO_COMPILER)


# Puts the unpacked wheel in front of an installed ivon_kernels, also of an editable one, which is found by a finder.
PREFER_WHEEL = """
import sys
sys.path.insert(0, sys.argv[1])
sys.meta_path = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
"""
BACKENDS = """
import json
import ivon_kernels
from ivon_kernels._native import find_library
assert ivon_kernels.__file__.startswith(sys.argv[1]), ivon_kernels.__file__
print(json.dumps([ivon_kernels.available_backends(), str(find_library("cpu"))]))
"""
MAIN = "import runpy; del sys.argv[1]; runpy.run_module('ivon_kernels', run_name='__main__')"


def _python(site: Path, code: str) -> str:
    """Runs code that imports ivon_kernels from `site`, away from the checkout."""
    return _run(sys.executable, "-I", "-c", PREFER_WHEEL + code, site, cwd=site)


@pytest.mark.slow
def test_wheel_serves_every_python_and_holds_the_package_only(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert "-py3-none-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(match[1] for match in map(LIBRARY.fullmatch, names) if match) == ["cpu", "host"]
    assert "ivon_kernels/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].removesuffix(".dist-info") for name in names} == {
        "ivon_kernels",
        f"ivon_kernels-{ivon_kernels.__version__}",
    }


@pytest.mark.slow
def test_installed_wheel_has_the_cpu_backend(built: Path) -> None:
    backends, library = json.loads(_python(built / "site", BACKENDS))
    assert backends["cpu"] is None
    assert library.startswith(str(built / "site"))
    table = _python(built / "site", MAIN)
    assert re.search(r"^cpu +yes +SIMD \w+ \(built: ", table, re.MULTILINE), table
    assert re.search(r"^cuda +no +it was switched off when the package was built", table, re.MULTILINE), table


def test_this_installation_has_a_cuda_library_where_there_is_an_nvcc() -> None:
    """Whether it can be used is another matter, which a GPU decides."""
    reason = build_info()["cuda"]
    if reason is None:
        assert find_library("cuda") is not None
    else:
        assert shutil.which("nvcc") is None or os.environ.get("IVON_KERNELS_CUDA") == "OFF", reason
        assert available_backends()["cuda"] == reason


@pytest.mark.slow
def test_install_without_a_compiler_succeeds_and_says_what_is_missing(built_without_compiler: Path) -> None:
    (wheel,) = built_without_compiler.glob("*.whl")
    assert not any(LIBRARY.fullmatch(name) for name in zipfile.ZipFile(wheel).namelist())
    backends, library = json.loads(_python(built_without_compiler / "site", BACKENDS))
    assert backends["reference"] is None
    assert "no working C++ compiler was found" in backends["cpu"]
    assert library == "None"
    table = _python(built_without_compiler / "site", MAIN)
    assert re.search(r"^cpu +no +no working C\+\+ compiler was found", table, re.MULTILINE), table


def _binutils(tool: str) -> str:
    """Returns a tool of binutils; skips where this machine has none, or no ELF files to read with it."""
    if not sys.platform.startswith("linux") or shutil.which(tool) is None:
        pytest.skip(f"needs Linux and {tool}")
    return tool


def _library(built: Path, name: str) -> Path:
    return built / "site" / "ivon_kernels" / "_native" / f"libivon_{name}.so"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "host"])
def test_library_exports_the_c_abi_only(built: Path, name: str) -> None:
    symbols = _run(_binutils("nm"), "--dynamic", "--defined-only", "--format=posix", _library(built, name)).splitlines()
    names = [line.split()[0] for line in symbols]
    assert f"ivon_{name}_abi" in names
    assert [symbol for symbol in names if not symbol.startswith(f"ivon_{name}_")] == []


@pytest.mark.slow
def test_no_function_is_shared_between_simd_levels(built: Path) -> None:
    """The linker keeps one copy of a function that several objects hold, compiled for any of the levels.

    AVX-512 code could then run on a machine without AVX-512, so no two objects may hold the same function.
    """
    objects = list((built / "build" / "CMakeFiles").glob("ivon_cpu*.dir/csrc/cpu/*.o"))
    levels = json.loads((built / "build" / "build_info.json").read_text())["simd_levels"]
    assert len(objects) == 2 * len(levels) + 1  # kernels.cpp and lora.cpp of each level, and dispatch.cpp
    holders = Counter(
        line.split()[0]
        for path in objects
        for line in _run(_binutils("nm"), "--defined-only", "--extern-only", "--format=posix", path).splitlines()
    )
    assert holders
    assert [name for name, count in holders.items() if count > 1] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "host"])
def test_library_needs_neither_torch_nor_python(built: Path, name: str) -> None:
    """The host library takes CPython's functions from the interpreter that loads it."""
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", _run(_binutils("readelf"), "--dynamic", _library(built, name)))
    allowed = re.compile(r"lib(c|m|gomp|omp|stdc\+\+|gcc_s|pthread)\.so.*|ld-linux.*")
    assert needed or name == "host"
    assert [name for name in needed if not allowed.fullmatch(name)] == []


def test_version_is_the_same_everywhere() -> None:
    version = re.escape(ivon_kernels.__version__)
    assert importlib.metadata.version("ivon-kernels") == ivon_kernels.__version__
    for path, pattern in {
        "pyproject.toml": rf'^version = "{version}"$',
        "CITATION.cff": rf"^version: {version}$",
        "CHANGELOG.md": rf"^## \[{version}\]",
    }.items():
        assert re.search(pattern, (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), path
