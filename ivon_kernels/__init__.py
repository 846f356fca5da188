"""Fused kernels for IVON: Bayesian finetuning at the cost of Adam.

``from ivon_kernels import IVON`` gives a `torch.optim` optimizer that trains a Gaussian posterior over the weights.
"""

from ivon_kernels import noise
from ivon_kernels._version import __version__
from ivon_kernels.backends import available_backends
from ivon_kernels.optimizer import IVON
from ivon_kernels.training.checks import NonFiniteGradientError

__all__ = ["IVON", "NonFiniteGradientError", "__version__", "available_backends", "noise"]
