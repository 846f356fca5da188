"""The trained posterior, put to work: saved beside the adapter, sampled, predicted with, pruned, tempered.

:class:`Posterior` comes from ``optimizer.posterior(model)`` or ``Posterior.load(folder)``.
"""

from ivon_kernels.posterior.core import Posterior
from ivon_kernels.posterior.file import PosteriorFileError
from ivon_kernels.posterior.gaussian import Gaussian
from ivon_kernels.posterior.merging import merge

__all__ = ["Gaussian", "Posterior", "PosteriorFileError", "merge"]
