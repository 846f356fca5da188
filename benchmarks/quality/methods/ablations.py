"""What might make IVON better, each by itself on top of `for_lora`: rows of one table, whatever comes of them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.quality.method import Hyper, Job
from benchmarks.quality.methods.ivon import ForLora
from ivon_kernels import IVON
from ivon_kernels.hyperparameters import GROUP_KEYS
from ivon_kernels.training.recipe import HESS

_NARROWER = 4.0  # the ess at the end over that at the begin: half of sigma
_BURN_IN = 0.5  # of the steps, before the average of the mean begins
_EVERY = 8  # steps between two looks at the prior
_GAMMA = 955.0  # the ess over the root of the number of examples, of `for_lora` on the 128 sentences of newspapers


class Annealed(ForLora):
    """Sigma falls to half of what it begins with: the ess grows with every step."""

    def watch(self, job: Job, found: IVON) -> Callable[[int], None]:
        def narrow(step: int) -> None:
            for group in found.param_groups:
                group["ess"] *= _NARROWER ** (1 / job.steps)

        return narrow


class Averaged(ForLora):
    """The mean is the average of the means of the second half of the run."""

    def watch(self, job: Job, found: IVON) -> Callable[[int], None]:
        total, first = torch.zeros_like(job.weights()), int(_BURN_IN * job.steps)

        def average(step: int) -> None:
            if step > first:
                total.add_(job.weights())
            if step == job.steps:
                job.write(total / (step - first))

        return average


class Matrices(ForLora):
    """Every matrix has a prior of its own: weight decay by empirical Bayes, in closed form, every few steps.

    The variance of the prior is the mean over the matrix of ``mean^2 + sigma^2``, what maximizes the evidence bound for
    ``N(0, 1 / (ess weight_decay))``. As the weight decay is also a part of the posterior's precision, each matrix gets
    a sigma of its own.
    """

    def optimizer(self, job: Job, hyper: Hyper) -> IVON:
        groups = [
            {**{key: group[key] for key in GROUP_KEYS}, "params": [param]}
            for group in super().optimizer(job, hyper).param_groups
            for param in group["params"]
        ]
        return IVON(groups, groups[0]["lr"], groups[0]["ess"], weight_decay=0.0, seed=job.seed)

    def watch(self, job: Job, found: IVON) -> Callable[[int], None]:
        def refit(step: int) -> None:
            if step % _EVERY:
                return
            for group in found.param_groups:
                (param,), ess = group["params"], group["ess"]
                state = found.state[param]
                variance = 1 / (ess * (state["hess"] + group["weight_decay"]))
                group["weight_decay"] = 1 / (ess * (state["mean"].square() + variance).mean().item())

        return refit


class Root(ForLora):
    """The ess is one multiple of the root of the number of examples, the one that `for_lora` has on newspapers."""

    def optimizer(self, job: Job, hyper: Hyper) -> IVON:
        ess = _GAMMA * len(job.training_set) ** 0.5
        return super().optimizer(job, {**hyper, "ess": ess, "hess_init": HESS})


_BAYES = "empirical Bayes for the prior of each matrix: MacKay, Neural Computation 4, 1992"
_SWA = "Izmailov et al., UAI 2018, arXiv 1803.05407"

METHODS = (
    Annealed("ivon_annealed", "IVON for_lora, sigma halved on the way", "benchmarks/quality/README.md", ablation=True),
    Averaged("ivon_averaged", "IVON for_lora, mean averaged over the second half", _SWA, ablation=True),
    Root("ivon_root", "IVON for_lora, ess = 955 sqrt(examples)", "benchmarks/quality/README.md", ablation=True),
    Matrices("ivon_matrices", "IVON for_lora, a sigma per matrix", _BAYES, ablation=True),
)
