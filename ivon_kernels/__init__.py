"""Fused kernels for IVON: Bayesian finetuning at the cost of Adam.

``from ivon_kernels import IVON`` gives a `torch.optim` optimizer that trains a Gaussian posterior over the weights,
``Posterior`` is what it has learned, and ``use_ivon`` puts it into a Trainer of Transformers or TRL.
"""

from typing import TYPE_CHECKING, Any

from ivon_kernels import noise
from ivon_kernels._version import __version__
from ivon_kernels.backends import available_backends
from ivon_kernels.extras import HF, needed_for
from ivon_kernels.optimizer import IVON
from ivon_kernels.training.checks import NonFiniteGradientError

if TYPE_CHECKING:
    from ivon_kernels.integrations.transformers import use_ivon as use_ivon
    from ivon_kernels.posterior import Posterior

# Without use_ivon: a star import looks up every name, and this one needs packages that may be missing.
__all__ = ["IVON", "NonFiniteGradientError", "Posterior", "__version__", "available_backends", "noise"]


def __getattr__(name: str) -> Any:
    """What takes long to import, or needs further packages, is imported when it is first asked for.

    Raises:
        ModuleNotFoundError: For `use_ivon` without Transformers and Accelerate, saying what to install.
    """
    if name == "Posterior":
        from ivon_kernels import posterior

        return posterior.Posterior
    if name == "use_ivon":
        with needed_for("use_ivon", HF):
            from ivon_kernels.integrations import transformers

        return transformers.use_ivon
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """With what was not imported yet."""
    return sorted({*globals(), "Posterior", "use_ivon"})
