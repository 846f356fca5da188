"""Laplace-LoRA: Kronecker factors of the LoRA weights, and predictions of the linearised model.

laplace-torch computes the factors and their eigenvectors. What it does in all those directions is done here in those
that are kept: for SmolLM2-135M its predictions need factors of 67 times the adapter's size, and its Jacobians take
``batch * classes`` backward passes through the whole batch where ``classes - 1`` do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from benchmarks.finetune.data import Batch, EncodedExamples
from benchmarks.finetune.scorers import Scorer
from benchmarks.quality.method import Hyper, Job, Method, State, nll

INSTALL = "pip install --no-deps -r benchmarks/no-deps.txt"
RANK = 10  # eigenvectors kept of the larger Kronecker factor of a layer, as in the paper; of the smaller one all are
PRIOR_RANGE = (1e-4, 1e8)  # where the prior precision is looked for
BATCH = 8  # examples of a pass: of one length when the factors are computed, of any at prediction
LOGIT_SAMPLES = 10_000  # samples of an example's logits; the model is not run for them

Layers = dict[str, nn.Linear]  # LoRA's matrices that get a posterior, by name, in the model's order


@dataclass(frozen=True)
class Laplace(Method):
    """Laplace approximation around AdamW's adapter, Kronecker-factored, with the generalised Gauss-Newton matrix.

    For a matrix W of LoRA, of shape ``[out, in]``, the posterior precision is ``G x A + delta I``: A is the mean of the
    outer products of its inputs, G the sum of those of its output gradients, delta the prior precision that maximises
    the marginal likelihood. A prediction averages the softmax over samples of the logits' Gaussian
    ``N(f(x), J (G x A + delta I)^-1 J^T)`` (the paper's sections 3 and 4).
    """

    last_only: bool = False  # only the last layer with LoRA gets a posterior, below which no backward pass has to go

    def fit(self, job: Job, state: State, hyper: Hyper) -> State:
        return fit(job, lora_layers(job.model, self.last_only))

    def each(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        mean, covariance = self._moments(job, state, [hyper["prior_scale"]], examples)
        return probabilities(mean, covariance[0], job.seed)[None]

    def tune(self, job: Job, state: State, hyper: Hyper, validation: EncodedExamples) -> Hyper:
        # As the harness does, but with one run of the model for all the dials.
        mean, covariances = self._moments(job, state, [dial["prior_scale"] for dial in self.dials], validation)
        costs = [nll(probabilities(mean, covariance, job.seed), validation) for covariance in covariances]
        return self.dials[costs.index(min(costs))]

    def _moments(
        self, job: Job, state: State, scales: Sequence[float], examples: EncodedExamples
    ) -> tuple[Tensor, Tensor]:
        precisions = [scale * state["prior_precision"].item() for scale in scales]
        mean, covariances = moments(job, state, lora_layers(job.model, self.last_only), precisions, examples)
        if not self.last_only:
            job.passes += mean.numel() - len(mean)  # a backward pass through the whole model for every class but one
        return mean, covariances


def lora_layers(model: nn.Module, last_only: bool) -> Layers:
    """The matrices of the LoRA layers of `model`, or those of the last block that has any.

    The paper's last layer is the output layer, which has LoRA there. Here LoRA is in the attention blocks, so the last
    layer with LoRA is the last block, or the output layer of a model that has LoRA there too.
    """
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    if last_only:
        end = _block(adapted[-1][0])
        adapted = [(name, module) for name, module in adapted if _block(name) == end]
    parts = ("lora_A", "lora_B")
    return {f"{name}.{part}": getattr(module, part)["default"] for name, module in adapted for part in parts}


def _block(name: str) -> str:
    """Up to the first number: ``model.layers.3`` of ``model.layers.3.self_attn.q_proj``."""
    numbered = re.match(r".*?\.\d+(?=\.)", name)
    return numbered.group() if numbered else name


def fit(job: Job, layers: Layers) -> State:
    """The posterior precision, from the job's training set, float32.

    ``prior_precision [1]`` and, for every layer and for `side` in ``out`` and ``in``, the eigenvalues
    ``layer.side.values [k]`` and eigenvectors ``layer.side.vectors [width, k]`` of the factor.
    """
    try:
        from laplace import KronLaplace
        from laplace.curvature import CurvlinopsGGN
    except ImportError as error:
        raise RuntimeError(f"Laplace-LoRA needs laplace-torch ({error}); run: {INSTALL}") from error
    from scipy.optimize import minimize_scalar

    loader: Any = _EqualLengths(job)
    with only_trainable(job.model, layers):
        posterior = KronLaplace(_Classifier(job.scorer, layers), "classification", backend=CurvlinopsGGN)
        posterior.fit(loader)
    decomposed: Any = posterior.H
    state: State = {}
    for name, values, vectors in zip(layers, decomposed.eigenvalues, decomposed.eigenvectors, strict=True):
        small = min(len(value) for value in values)
        for side, value, vector in zip(("out", "in"), values, vectors, strict=True):
            kept = value.argsort(descending=True)[: max(small, RANK)]
            state[f"{name}.{side}.values"] = value[kept].clamp_min(0.0).float()
            state[f"{name}.{side}.vectors"] = vector[:, kept].float().contiguous()
    squares = sum(layer.weight.detach().double().square().sum().item() for layer in layers.values())
    eigenvalues = torch.cat([_eigenvalues(state, name) for name in layers])
    bounds = [math.log(limit) for limit in PRIOR_RANGE]
    found = minimize_scalar(lambda x: -log_evidence(math.exp(x), eigenvalues, squares), bounds=bounds, method="bounded")
    return state | {"prior_precision": torch.tensor([math.exp(found.x)])}


def log_evidence(precision: float, eigenvalues: Tensor, squares: float) -> float:
    """Logarithm of the marginal likelihood, up to what does not depend on the prior precision.

    The prior is N(0, 1 / precision). Eigenvalues are those of the curvature, float64 and not 0, `squares` the weights'.
    """
    return -0.5 * ((eigenvalues / precision).log1p().sum().item() + precision * squares)


def _eigenvalues(state: State, name: str) -> Tensor:
    """Those of a layer's ``G x A`` that are kept, float64."""
    return torch.outer(state[f"{name}.out.values"].double(), state[f"{name}.in.values"].double()).flatten()


class _Classifier(nn.Module):
    """Class logits of prompts of one length. Its parameters are those that get a posterior."""

    def __init__(self, scorer: Scorer, layers: Layers) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers.values())
        self._logits = scorer.logits

    def forward(self, input_ids: Tensor) -> Tensor:
        rows, tokens = len(input_ids), input_ids.shape[-1]
        return self._logits(input_ids, torch.full((rows,), tokens - 1, device=input_ids.device))


class _EqualLengths:
    """The training set in batches without padding, which laplace-torch would take for inputs."""

    def __init__(self, job: Job) -> None:
        self.dataset = job.training_set
        self._guard = job.guard

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _, group in groupby(self.dataset.in_length_order(1), key=lambda batch: batch.input_ids.shape[-1]):
            rows = list(group)
            for start in range(0, len(rows), BATCH):
                self._guard.check()
                part = rows[start : start + BATCH]
                yield torch.cat([row.input_ids for row in part]), torch.cat([row.labels for row in part])


@contextmanager
def only_trainable(model: nn.Module, layers: Layers) -> Iterator[None]:
    """`model` in evaluation mode, with gradients to nothing but `layers`; as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    trained = [param for param in model.parameters() if param.requires_grad]
    model.eval()
    for param in trained:
        param.requires_grad_(False)
    try:
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for param in trained:
            param.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode


def moments(
    job: Job, state: State, layers: Layers, precisions: Sequence[float], examples: EncodedExamples
) -> tuple[Tensor, Tensor]:
    """The Gaussian of every example's logits, less the last class's: all prior precisions for the price of one.

    Means ``[examples, classes]`` and covariances ``[precisions, examples, classes, classes]``, float64, on the CPU.
    """
    order: list[int] = []
    means, covariances = [], []
    state = {name: tensor.to(job.device) for name, tensor in state.items()}
    with only_trainable(job.model, layers):
        for batch in job.batches(examples, BATCH):
            logits, jacobians = logits_and_jacobians(job, layers, batch)
            order += batch.index
            means.append(logits.double().cpu())
            terms = [_covariance(jacobian, state, name, precisions) for name, jacobian in jacobians.items()]
            covariances.append(nn.functional.pad(torch.stack(terms).sum(0), (0, 1, 0, 1)).cpu())
    back = torch.tensor(order).argsort()
    return torch.cat(means)[back], torch.cat(covariances, 1)[:, back]


def logits_and_jacobians(job: Job, layers: Layers, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits less the last class's ``[batch, classes]``, and their derivatives by every layer's weight.

    The softmax depends on these differences alone, and the last class's is 0: its derivative is left out, so that the
    derivatives are ``[batch, classes - 1, out, in]``. A layer's is the sum over the tokens of output gradient times
    input. One backward pass a class serves the whole batch, and padding adds nothing: the logits do not depend on it,
    so that its output gradients are 0.
    """
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        inputs[module], outputs[module] = arguments[0].detach(), output

    with ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(layer.register_forward_hook(keep))
        logits = job.scorer(batch)
    logits = logits - logits[:, -1:]
    needed = logits.shape[1] - 1
    targets = [outputs[layer] for layer in layers.values()]
    gradients = [torch.autograd.grad(logits[:, k].sum(), targets, retain_graph=k + 1 < needed) for k in range(needed)]
    jacobians = {
        name: torch.einsum("kbto,bti->bkoi", torch.stack(gradient).float(), inputs[layer].float())
        for (name, layer), gradient in zip(layers.items(), zip(*gradients, strict=True), strict=True)
    }
    return logits.detach(), jacobians


def _covariance(jacobian: Tensor, state: State, name: str, precisions: Sequence[float]) -> Tensor:
    """What one layer adds to the logits' covariance, float64 ``[precisions, batch, classes - 1, classes - 1]``.

    With eigenvalues l_j and eigenvectors v_j that are kept of ``G x A``, the precision's inverse is
    ``I / delta - sum_j v_j v_j^T l_j / (delta (l_j + delta))`` (the paper's appendix, by Woodbury's identity).
    """
    kept = (state[f"{name}.out.vectors"].T @ jacobian @ state[f"{name}.in.vectors"]).flatten(2).double()
    eigenvalues = _eigenvalues(state, name)
    flat = jacobian.flatten(2).double()
    whole = flat @ flat.mT
    return torch.stack(
        [whole / delta - kept * (eigenvalues / (delta * (eigenvalues + delta))) @ kept.mT for delta in precisions]
    )


def probabilities(mean: Tensor, covariance: Tensor, seed: int) -> Tensor:
    """Mean softmax float64 ``[examples, classes]`` of Gaussian logits, over samples that `seed` decides."""
    noise = torch.randn(LOGIT_SAMPLES, mean.shape[1], generator=torch.Generator().manual_seed(seed), dtype=mean.dtype)
    values, vectors = torch.linalg.eigh(covariance)
    roots = vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2) @ vectors.mT
    return torch.stack([(m + noise @ root).softmax(1).mean(0) for m, root in zip(mean, roots, strict=True)])


_PAPER = "Yang et al., ICLR 2024, arXiv 2308.13111"
_SCALES = tuple({"prior_scale": value} for value in (1.0, 10.0, 0.1, 100.0))

METHODS = (
    Laplace("laplace_all", "Laplace-LoRA, all layers", _PAPER, base="adamw", dials=_SCALES),
    Laplace("laplace_last", "Laplace-LoRA, last layer", f"{_PAPER}: LLLA", base="adamw", dials=_SCALES, last_only=True),
)
