"""``pytest benchmarks``: the speed suite's contenders through pytest-benchmark.

pyproject.toml keeps the plugin (``-p no:benchmark``) from every other call of pytest: beside pytest-xdist, under which
the tests run, its releases before 5.3 warn, and warnings are errors here. For this folder it is loaded by its module.
"""

from __future__ import annotations

import importlib.util

import pytest

_INSTALLED = importlib.util.find_spec("pytest_benchmark") is not None
pytest_plugins = ["pytest_benchmark.plugin"] if _INSTALLED else []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--full``."""
    parser.addoption("--full", action="store_true", help="benchmarks: all workloads, contenders and dtypes")


def pytest_configure(config: pytest.Config) -> None:
    """Refuses what would fail later, or measure nonsense."""
    if not _INSTALLED:
        raise pytest.UsageError("the benchmarks need the package pytest-benchmark; run: pip install pytest-benchmark")
    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        raise pytest.UsageError("benchmarks that run side by side measure each other; leave out -n")
