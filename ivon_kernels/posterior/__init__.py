"""The trained posterior, put to work: saved beside the adapter, sampled, predicted with, pruned, tempered.

:class:`Posterior` comes from ``optimizer.posterior(model)`` or ``Posterior.load(folder)``. Its methods ``predict``,
``generate``, ``generate_averaged``, ``leave_one_out`` and ``sensitivity`` are the functions of these names here:
``posterior.predict(model, inputs)`` is ``predict(posterior, model, inputs)``. As functions they take any
:class:`Gaussians`.

Scores, :func:`report` and the pictures of :mod:`ivon_kernels.report.plots` need ``pip install ivon-kernels[report]``.
"""

from ivon_kernels.gaussians.gaussian import Gaussian
from ivon_kernels.gaussians.gaussians import Gaussians
from ivon_kernels.posterior.file import PosteriorFileError
from ivon_kernels.posterior.merging import merge
from ivon_kernels.posterior.posterior import Posterior
from ivon_kernels.posterior.sweeps import Sweep, sweep_pruning, sweep_temperature
from ivon_kernels.predict.abstaining import Threshold
from ivon_kernels.predict.conformal import ConformalSets
from ivon_kernels.predict.generation import AveragedGeneration, generate, generate_averaged
from ivon_kernels.predict.left_out import leave_one_out, sensitivity
from ivon_kernels.predict.metrics import Scores, evaluate
from ivon_kernels.predict.prediction import Prediction, predict
from ivon_kernels.predict.scoring import choices, class_logits, encode_choices, next_token
from ivon_kernels.predict.temperature import fit_temperature, scale
from ivon_kernels.report.labels import report_labels
from ivon_kernels.report.page import report

__all__ = [
    "AveragedGeneration",
    "ConformalSets",
    "Gaussian",
    "Gaussians",
    "Posterior",
    "PosteriorFileError",
    "Prediction",
    "Scores",
    "Sweep",
    "Threshold",
    "choices",
    "class_logits",
    "encode_choices",
    "evaluate",
    "fit_temperature",
    "generate",
    "generate_averaged",
    "leave_one_out",
    "merge",
    "next_token",
    "predict",
    "report",
    "report_labels",
    "scale",
    "sensitivity",
    "sweep_pruning",
    "sweep_temperature",
]
