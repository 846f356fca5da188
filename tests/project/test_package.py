"""The package: what source distribution and wheels hold, with and without a compiler, and when CUDA is built.

What the native library exports; one version; the same sources make the same files.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from filelock import FileLock

import ivon_kernels
from ivon_kernels import available_backends
from ivon_kernels._native import build_info, find_library
from ivon_kernels.commands import doctor

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = re.compile(r"ivon_kernels/_native/libivon_(cpu|host|cuda)\.(so|dylib)")
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
AT_A_TIME = {"SOURCE_DATE_EPOCH": "315619200"}
BUILD = ("--no-build-isolation", "--no-deps", "--no-index")


def _run(*command: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Runs a command to its end and returns its output; a failure shows it."""
    result = subprocess.run(
        list(map(str, command)), env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, f"{command} exited with {result.returncode}:\n{result.stdout}"
    return result.stdout


def _build(directory: Path, extra_env: Mapping[str, str], source: Path = ROOT) -> Path:
    """Builds the wheel in `directory`, once for all pytest-xdist workers, and unpacks it there as `site`."""
    directory.mkdir(exist_ok=True)
    site = directory / "site"
    with FileLock(directory / "lock"):
        if not site.exists():
            pip = (sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check")
            options = (*BUILD, "-C", f"build-dir={directory / 'build'}")
            env = {**os.environ, **AT_A_TIME, **extra_env}
            env.pop("IVON_KERNELS_CUDA", None)
            _run(*pip, "wheel", *options, "--wheel-dir", directory, source, env=env)
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
    directory = shared_tmp / "wheel"
    nvcc = directory / "tools" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(f"#!/bin/sh\ntouch {directory / 'nvcc_was_called'}\nexit 1\n")
    nvcc.chmod(0o755)
    return _build(directory, {"PATH": f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}", "CUDACXX": str(nvcc)})


@pytest.fixture(scope="session")
def built_without_compiler(shared_tmp: Path) -> Path:
    """The wheel as built where there is no C++ compiler, and its contents under `site`."""
    return _build(shared_tmp / "wheel_without_compiler", NO_COMPILER)


@pytest.fixture(scope="session")
def sdist(shared_tmp: Path) -> Path:
    """The source distribution."""
    directory = shared_tmp / "sdist"
    directory.mkdir(exist_ok=True)
    with FileLock(directory / "lock"):
        if not list(directory.glob("*.tar.gz")):
            command = (sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", directory, ROOT)
            _run(*command, env={**os.environ, **AT_A_TIME})
    (found,) = directory.glob("*.tar.gz")
    return found


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
SCRIPT = "import runpy; sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
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
def test_the_wheel_brings_the_command(built: Path) -> None:
    script = built / "site" / "bin" / "ivon-kernels"
    said = _run(sys.executable, "-I", "-c", PREFER_WHEEL + SCRIPT, built / "site", script, "--help", cwd=built / "site")
    assert "doctor" in said and "posterior" in said


@pytest.mark.slow
def test_installed_wheel_has_the_cpu_backend(built: Path) -> None:
    backends, library = json.loads(_python(built / "site", BACKENDS))
    assert backends["cpu"] is None
    assert library.startswith(str(built / "site"))
    table = _python(built / "site", MAIN)
    assert re.search(r"^cpu +yes +SIMD \w+ \(built: ", table, re.MULTILINE), table
    assert re.search(r"^cuda +no +it was not asked for when the package was built", table, re.MULTILINE), table


def test_this_installation_has_a_cuda_library_where_there_is_an_nvcc() -> None:
    """Whether it can be used is another matter, which a GPU decides."""
    reason = build_info()["cuda"]
    if reason is None:
        assert find_library("cuda") is not None
    else:
        assert shutil.which("nvcc") is None or (os.environ.get("CI") != "true" and "not asked for" in reason), reason
        assert available_backends()["cuda"] == reason


# ---- when CUDA is built ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_nvcc_that_lies_around_is_left_alone(built: Path) -> None:
    assert not (built / "nvcc_was_called").exists()
    assert "IVON_KERNELS_CUDA=ON" in json.loads((built / "build" / "build_info.json").read_text())["cuda"]


def test_the_test_command_asks_for_cuda_where_there_is_an_nvcc() -> None:
    command = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- test-command -->")[1].splitlines()[2]
    assert " IVON_KERNELS_CUDA=AUTO .venv/bin/pip install " in command


def _configure(folder: Path, *options: str) -> tuple[int, str]:
    """CMake's exit code and output, without compilers."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake on the PATH")
    command = ["cmake", "-S", str(ROOT), "-B", str(folder), *options]
    env = {**os.environ, **NO_COMPILER, "CUDACXX": "/nonexistent/nvcc"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, " ".join(done.stdout.split())


@pytest.mark.slow
def test_cuda_that_cannot_be_built_is_an_error_only_if_it_was_asked_for(tmp_path: Path) -> None:
    code, said = _configure(tmp_path / "on", "-DIVON_KERNELS_CUDA=ON")
    assert code != 0 and "IVON_KERNELS_CUDA=ON asks for the cuda backend: nvcc needs a C++ compiler" in said
    code, said = _configure(tmp_path / "auto", "-DIVON_KERNELS_CUDA=AUTO")
    assert code == 0 and "the cuda backend will be missing: nvcc needs a C++ compiler" in said
    code, said = _configure(tmp_path / "maybe", "-DIVON_KERNELS_CUDA=maybe")
    assert code != 0 and "IVON_KERNELS_CUDA must be ON, AUTO or OFF, not 'maybe'" in said


@pytest.mark.slow
def test_the_environment_asks_for_cuda(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        *BUILD,
        "-C",
        f"build-dir={tmp_path / 'build'}",
        "-w",
        tmp_path,
        ROOT,
    ]
    env = {**os.environ, **NO_COMPILER, "IVON_KERNELS_CUDA": "ON"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode != 0 and "asks for the cuda backend" in " ".join(done.stdout.split())


# ---- the source distribution -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_source_distribution_is_what_builds_the_package(sdist: Path) -> None:
    assert sdist.stat().st_size < 400_000
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        metadata = archive.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/PKG-INFO")
        assert metadata is not None
        described = metadata.read().decode()
    tracked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}
    tracked |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "ivon_kernels").rglob("*.py")}
    top = {"CHANGELOG.md", "CITATION.cff", "CMakeLists.txt", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
    assert names == {*tracked, *top, "ivon_kernels/py.typed"}
    # A page on a package index has no files beside it.
    targets = re.findall(r"\]\(([^)]+)\)", described)
    assert len(targets) > 20 and all(target.startswith(("https://", "#")) for target in targets)


@pytest.mark.slow
def test_the_same_sources_make_the_same_files(
    sdist: Path, built_without_compiler: Path, shared_tmp: Path, tmp_path: Path
) -> None:
    """A wheel out of the source distribution is the checkout's. (With libraries, too: tried by hand.)"""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    again = _build(shared_tmp / "wheel_of_sdist", NO_COMPILER, unpacked)
    (first,), (second,) = (folder.glob("*.whl") for folder in (built_without_compiler, again))
    assert first.name == second.name and first.read_bytes() == second.read_bytes()


# ---- without a compiler ----------------------------------------------------------------------------------------------


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


def test_the_extras_are_what_the_messages_say() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra, packages in doctor._EXTRAS.items():
        name = extra.removeprefix("'ivon-kernels[").removesuffix("]'")
        found = re.search(rf"^{name} = \[(.*)\]$", text, re.MULTILINE)
        assert found and set(re.findall(r'"([\w-]+)', found[1])) == set(packages), extra
    assert '\nall = ["ivon-kernels[hf,lightning,report]"]\n' in text


def test_version_is_the_same_everywhere() -> None:
    version = re.escape(ivon_kernels.__version__)
    assert importlib.metadata.version("ivon-kernels") == ivon_kernels.__version__
    for path, pattern in {
        "pyproject.toml": rf'^version = "{version}"$',
        "CITATION.cff": rf"^version: {version}$",
        "CHANGELOG.md": rf"^## \[{version}\]",
    }.items():
        assert re.search(pattern, (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), path
