"""An installed wheel, in an environment with nothing but what it depends on: `python check_wheel.py LIBRARY...`.

The libraries (cpu, host, cuda) have to be in it. Then a small network is trained, its posterior saved, loaded and
sampled, and the command looks at both. What needs a further package has to say so in one sentence.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import ivon_kernels
from ivon_kernels import IVON, Posterior
from ivon_kernels._native import find_library, missing_reason


def command(*arguments: str | Path) -> str:
    """Run the console script that was installed beside this interpreter, and return what it says."""
    script = Path(sys.executable).parent / "ivon-kernels"
    done = subprocess.run([script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done
    return done.stdout


def main() -> None:
    """Run every check; the first that fails raises."""
    assert "site-packages" in Path(ivon_kernels.__file__).parts, ivon_kernels.__file__
    assert importlib.metadata.version("ivon-kernels") == ivon_kernels.__version__
    for name in sys.argv[1:]:
        assert find_library(name) is not None, f"{name}: {missing_reason(name)}"
    print(command("doctor"))  # which ends with 1 if a backend is wrong

    model = nn.Linear(8, 3)
    optimizer = IVON(model.parameters(), lr=0.1, ess=100.0, seed=1)
    inputs, labels = torch.randn(64, 8), torch.randint(3, (64,))
    for _ in range(5):
        optimizer.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        optimizer.posterior(model).save(folder)
        posterior = Posterior.load(folder)
        assert posterior.predict(model, inputs, samples=4).probabilities.shape == (64, 3)
        assert f"weights  {posterior.numel}" in command("posterior", "info", folder)
    try:
        from ivon_kernels import use_ivon  # noqa: F401
    except ModuleNotFoundError as missing:
        if "pip install 'ivon-kernels[hf]'" not in str(missing):
            raise


main()
