"""What ``from ivon_kernels import ...`` gives, and what ``import ivon_kernels`` leaves alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ivon_kernels
from ivon_kernels.integrations import transformers
from ivon_kernels.posterior import Posterior

ELSEWHERE = """
import sys
import ivon_kernels
heavy = {"transformers", "accelerate", "peft", "matplotlib", "rich", "typer", "ivon_kernels.posterior"}
loaded = heavy & set(sys.modules)
assert not loaded, loaded
assert {"IVON", "Posterior", "use_ivon"} <= set(dir(ivon_kernels))

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "accelerate":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from ivon_kernels import *
assert Posterior.__name__ == "Posterior" and IVON is ivon_kernels.IVON and "use_ivon" not in globals()
try:
    from ivon_kernels import use_ivon
except ModuleNotFoundError as error:
    print(error)
"""


def test_the_short_names_are_those_of_the_rooms() -> None:
    from ivon_kernels import IVON, use_ivon
    from ivon_kernels import Posterior as short

    assert short is Posterior and use_ivon is transformers.use_ivon
    assert IVON.__name__ in ivon_kernels.__all__ and set(ivon_kernels.__all__) <= set(dir(ivon_kernels))


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ivon_kernels' has no attribute 'Posteriors'"):
        ivon_kernels.Posteriors  # noqa: B018
    assert not hasattr(ivon_kernels, "use_ivons")


@pytest.mark.slow
def test_nothing_heavy_is_imported_and_a_missing_package_is_one_sentence() -> None:
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "use_ivon needs accelerate, which is not installed: pip install 'ivon-kernels[hf]'\n"
