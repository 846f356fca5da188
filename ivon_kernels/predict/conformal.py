"""Conformal sets: the classes that an example may have, with a promised chance that the right one is among them.

For examples that are exchangeable with a labelled split of ``n``, whatever the model is,

    P(label in set)  >=  coverage

over the draw of both; at most ``1 / (n + 1)`` more where no two scores are equal. Written here because no library fits:
MAPIE 1.6 wants a scikit-learn classifier, refuses `aps` for two classes and warns of a split that lacks a class; crepes
0.9 takes scores, which are most of the work, and brings pandas; TorchCP 1.2 brings torchvision and torch-geometric.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ivon_kernels.predict.metrics import checked

__all__ = ["ConformalSets", "Method", "fit_sets"]

Method = Literal["split", "aps"]
"""The smallest sets on average, or sets that grow where the model is unsure."""


@dataclass(frozen=True)
class ConformalSets:
    """What a labelled split says about which classes to keep.

    Attributes:
        method: `split` or `aps`.
        coverage: How often the right class shall be in the set.
        limit: Classes with a score up to it are in the set; inf where the split is too small for the coverage.
        examples: Of the split.
    """

    method: Method
    coverage: float
    limit: float
    examples: int

    def sets(self, probabilities: Tensor) -> Tensor:
        """Which classes are in the set of each example, bool ``[N, C]``.

        Args:
            probabilities: ``[N, C]``, made as those of the split were.

        Raises:
            ValueError: If they are no probabilities.
        """
        p, _ = checked(probabilities, torch.zeros(len(probabilities), dtype=torch.int64, device="cpu"))
        return _scores(p, self.method) <= self.limit


def fit_sets(probabilities: Tensor, labels: Tensor, *, coverage: float, method: Method) -> ConformalSets:
    """The limit for a coverage: the score at rank ``ceil((n + 1) coverage)`` of the right classes'.

    Args:
        probabilities: ``[n, C]``.
        labels: The right classes, integers ``[n]``.
        coverage: In (0, 1).
        method: The score of a class. `split`: 1 less its probability (Sadinle et al., 2019, arXiv 1609.00451). `aps`:
            the probability of all classes before it, in the order of their probability (Romano et al., NeurIPS 2020,
            arXiv 2006.02544, without its random number), so that the most probable class is always in the set.

    Raises:
        ValueError: If the coverage or the method is unknown, or the labels do not fit the probabilities.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must be between 0 and 1, got {coverage!r}")
    if method not in ("split", "aps"):
        raise ValueError(f"method must be 'split' or 'aps', got {method!r}")
    p, labels = checked(probabilities, labels)
    scores = _scores(p, method).gather(1, labels[:, None])[:, 0].sort().values
    rank = math.ceil((len(labels) + 1) * coverage - 1e-9)  # 0.1 + 0.2 is not 0.3
    limit = scores[rank - 1].item() if rank <= len(labels) else math.inf
    return ConformalSets(method, coverage, limit, len(labels))


def _scores(p: Tensor, method: Method) -> Tensor:
    """How badly each class fits, float64 ``[N, C]``."""
    if method == "split":
        return 1 - p
    ordered, order = torch.sort(p, dim=1, descending=True, stable=True)
    before = ordered.cumsum(1).roll(1, 1)
    before[:, 0] = 0
    return torch.empty_like(p).scatter_(1, order, before)
