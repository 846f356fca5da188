"""Every training example as if it had been left out of the training, from the posterior and gradients alone.

The memory-perturbation equation (Nickl et al., NeurIPS 2023, arXiv 2310.19273; with IVON: Shen et al., ICML 2024, arXiv
2402.17641) says how a Gaussian posterior's mean ``m`` moves when the loss ``l_i`` of one example goes: by one Newton
step with the posterior's variances,

    m_without - m  =  S grad l_i,        S = diag(sigma^2) = diag(1 / (ess (h + d)))

For logits ``f = f(m) [C]`` with Jacobian ``J [C, P]``, and with ``g = df l_i = p - onehot(y)``, ``Lambda = d^2f l_i =
diag(p) - p p^T`` and ``V = J S J^T [C, C]``,

    first order           f_without - f  =  V g
    with the leverage     f_without - f  =  (I - V Lambda)^-1 V g

where the second takes the example's own curvature out of the posterior, too: ``J (S^-1 - J^T Lambda J)^-1 J^T g``.

How ess enters. The mean of ``N`` examples minimises ``ess (1/N sum_j l_j + d/2 |theta|^2)`` whatever ess is; without
example ``i`` it minimises the same less ``ess/N l_i``. Where ``h`` is the curvature of ``1/N sum_j l_j``, the Newton
step of that is ``(ess/N) grad l_i / (ess (h + d))``: ess cancels, and the variances that count are ``sigma^2 ess/N = 1
/ (N (h + d))``. They are the posterior's own where ``ess = N``, that of Bayes; those of a tempered one (``ess = tau
N``) are ``tau`` times too small, and ``num_data = N`` puts that right. But where ``h`` has not been learned, ``1 / (N
(h + d))`` says nothing: recipes for finetuning choose ess and ``hess_init`` for the sigma that they give, and sigma is
then all that is known of how far a weight may go. So the default takes the variances as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ivon_kernels.gaussians.gaussians import Gaussians
from ivon_kernels.predict.batches import bar, batches_of, cut, sample_numbers, split_labels, to_device
from ivon_kernels.predict.influence import Influence
from ivon_kernels.predict.metrics import checked_labels
from ivon_kernels.predict.passes import device_of, evaluating
from ivon_kernels.predict.prediction import IGNORED, Prediction, predict
from ivon_kernels.predict.scoring import Score, class_logits

__all__ = ["leave_one_out", "leverage", "sensitivity", "shift_without"]

T = TypeVar("T")


def shift_without(covariance: Tensor, gradient: Tensor, curvature: Tensor | None = None) -> Tensor:
    """How outputs move when their example is left out: ``(I - V Lambda)^-1 V g``, or ``V g`` without `curvature`.

    With the full covariance of a model that is linear in its weights, and losses that are quadratic in the outputs,
    the first is exact: linear regression (``l = (f - y)^2 / 2``, ``g = f - y``, ``Lambda = 1``) and ridge, for any
    design if ``V`` is of the whole matrix, and with the diagonal one where the inputs are orthogonal.

    Args:
        covariance: ``V``, ``[N, K, K]``: of the outputs, under the posterior of all examples.
        gradient: ``g``, ``[N, K]``: of each example's loss by its outputs.
        curvature: ``Lambda``, ``[N, K, K]``: the second derivative.

    Returns:
        ``[N, K]``.
    """
    first = covariance @ gradient[..., None]
    if curvature is not None:
        eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        first = torch.linalg.solve(eye - covariance @ curvature, first)
    return first.squeeze(-1)


def leverage(covariance: Tensor, curvature: Tensor) -> Tensor:
    """How much of the precision that an example's outputs have is its own: the largest eigenvalue of ``V Lambda``.

    Args:
        covariance: ``V``, ``[N, K, K]``.
        curvature: ``Lambda``, ``[N, K, K]``.

    Returns:
        ``[N]``, in [0, 1) under the covariance of a convex problem.
    """
    found: Tensor = torch.linalg.eigvals(covariance @ curvature).real.amax(-1)
    return found


class _Row(NamedTuple):
    """One training example at the mean."""

    logits: Tensor  # float64 [C]
    covariance: Tensor  # float64 [C, C]: V


def leave_one_out(
    posterior: Gaussians,
    model: nn.Module,
    inputs: Any,
    *,
    samples: int | Sequence[int] = 10,
    num_data: float | None = None,
    corrected: bool = False,
    score: Score = class_logits,
    stacked: bool | None = None,
    max_rows: int = 128,
    keep_samples: bool = False,
    progress: bool | None = None,
    device: torch.device | str | None = None,
    adapter: str | None = None,
) -> Prediction:
    """Predict every training example as if it had been left out of the training.

    This function is the method ``Posterior.leave_one_out`` too. Nothing is trained again, and no example is held back:
    the equations, and how ess enters, are at the top of this module. The logits of each sample move like those of the
    mean, because the posterior without an example is, to first order, the same Gaussian around another mean.

    A temperature can be fitted to what comes back, without a validation split::

        temperature = posterior.leave_one_out(model, training_loader).fit_temperature()
        posterior.predict(model, loader).scaled(temperature)

    Not after :meth:`ivon_kernels.IVON.for_lora`: its sigma is chosen for the noise, examples seem to have moved the
    model less than they have, and the temperature is far too low (docs/wrong-labels.md has the measurement).

    Exact, with the leverage and ``num_data``, is linear and ridge regression with orthogonal inputs
    (:func:`shift_without`); for logistic regression it is one Newton step. The posterior's variances are those of each
    weight by itself: what several weights have in common is counted for each, so that in networks the order of the
    examples is more to be trusted than how far each moves (docs/posterior.md has both, against refitting).

    Time: for each example a pass with one row at the mean and ``C - 1`` backward passes for ``C`` classes, beside the
    passes of :func:`~ivon_kernels.posterior.predict`. Memory: ``C - 1`` gradients of all weights of the posterior, and
    what one row of the model needs for a backward pass; it does not grow with the number of examples but for
    ``N (S C + C^2)`` numbers.

    Args:
        posterior: What was trained on these examples.
        model: The model that it was trained in, or loaded for.
        inputs: The training examples with their labels, as for ``predict``. They are read once; a loader that shuffles
            gives the prediction in the order in which it shuffled. An example with the label -100 was not trained on,
            and does not move.
        samples: As for ``predict``: how many are averaged, or their numbers; 0 is the mean alone.
        num_data: How many examples the posterior was trained on, where its Hessian was learned: makes the result
            independent of ess and of ``tempered``. None takes the variances as they are (at the top of this module).
        corrected: Whether an example's own curvature is taken out of the posterior, too: with the leverage.
        score: As for ``predict``: what gives the logits. They need a gradient.
        stacked: As there.
        max_rows: As there.
        keep_samples: As there.
        progress: As there.
        device: As there.
        adapter: As there.

    Returns:
        The prediction, with labels, in the order of `inputs`.

    Raises:
        TypeError, ValueError: As for ``predict``; if there are no labels; if `corrected` is asked for and an example
            has more curvature than the whole posterior.
    """
    numbers = sample_numbers(samples)
    predictions: list[Prediction] = []
    rows: list[_Row] = []
    influence = Influence(posterior, model, num_data=num_data, adapter=adapter)
    batches, total = batches_of(inputs)
    with bar("leave one out", total, progress) as shown:
        for batch in batches:
            # A list of one: a batch that is a list would be taken for a list of batches.
            predicted = predict(
                posterior,
                model,
                [batch],
                samples=numbers or 0,
                score=score,
                stacked=stacked,
                max_rows=max_rows,
                keep_samples=True,
                progress=False,
                device=device,
                adapter=adapter,
                advise=False,
            )
            predictions.append(predicted)
            rows += _at_mean(influence, model, batch, score, device, _logits_and_covariance)
            shown.update()
    return _moved(predictions, rows, corrected, keep_samples)


def sensitivity(
    posterior: Gaussians,
    model: nn.Module,
    inputs: Any,
    *,
    num_data: float | None = None,
    score: Score = class_logits,
    progress: bool | None = None,
    device: torch.device | str | None = None,
    adapter: str | None = None,
) -> Tensor:
    """How much each training example has moved the posterior: the loss that it would have had more, if left out.

    This function is the method ``Posterior.sensitivity`` too. To first order the loss of an example rises by

        grad l_i^T S grad l_i  =  g^T V g        (at the top of this module), in nats

    when it is left out; with the variances as they are, that is the squared distance, in sigmas, by which the mean
    moves then. It is large where an example taught the model what no other did: a wrong label, an outlier, a rare case.

    Time: a pass with one row and one backward pass for each example; memory: one gradient.

    Args:
        posterior: As for :func:`leave_one_out`, and so are the other arguments.
        model: As there.
        inputs: As there.
        num_data: As there.
        score: As there.
        progress: As there.
        device: As there.
        adapter: As there.

    Returns:
        float64 ``[N]`` on the CPU, in the order of `inputs`; 0 for an example without a label.

    Raises:
        TypeError, ValueError: As there.
    """
    influence = Influence(posterior, model, num_data=num_data, adapter=adapter)
    found: list[Tensor] = []
    batches, total = batches_of(inputs)
    with bar("sensitivity", total, progress) as shown:
        for batch in batches:
            found += _at_mean(influence, model, batch, score, device, _squared_gradient)
            shown.update()
    if not found:
        raise ValueError("inputs has no batches; an iterator can be used once only")
    return torch.stack(found)


def _at_mean(
    influence: Influence,
    model: nn.Module,
    batch: Any,
    score: Score,
    device: torch.device | str | None,
    look: Callable[[Influence, Tensor, int], T],
) -> list[T]:
    """What `look` finds in the logits and the label of each row of a batch, at the mean of the posterior."""
    where = torch.device(device) if device is not None else device_of(model)
    found = []
    with evaluating(model), influence.at_mean():
        for row in cut(split_labels(batch), 1):
            if row.labels is None:
                raise ValueError("an example that is left out needs its label: give batches with labels")
            logits = score(model, to_device(row.inputs, where))
            if logits.dim() != 2 or len(logits) != 1 or not logits.requires_grad:
                raise ValueError(
                    f"score must return logits [rows, classes] with a gradient by the weights, got "
                    f"{list(logits.shape)} for one row{'' if logits.requires_grad else ' without one'}"
                )
            label = int(row.labels)
            if label != IGNORED:
                checked_labels(row.labels, *logits.shape)
            found.append(look(influence, logits[0] if logits.itemsize >= 4 else logits[0].float(), label))
    return found


def _logits_and_covariance(influence: Influence, logits: Tensor, label: int) -> _Row:
    # The softmax sees differences alone: those to the largest, which is finite, save one backward pass.
    shown = logits.detach().cpu().double()
    largest = int(shown.argmax())
    others = [c for c, value in enumerate(shown.tolist()) if value > -torch.inf and c != largest]
    covariance = torch.zeros(len(shown), len(shown), dtype=torch.float64, device="cpu")
    if label != IGNORED:
        place = torch.tensor(others, dtype=torch.int64, device="cpu")
        covariance[place[:, None], place] = influence.covariance(logits[others] - logits[largest])
    return _Row(shown, covariance)


def _squared_gradient(influence: Influence, logits: Tensor, label: int) -> Tensor:
    if label == IGNORED:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    loss = -logits.log_softmax(0)[label]
    return influence.covariance(loss[None])[0, 0]


def _moved(predictions: list[Prediction], rows: list[_Row], corrected: bool, keep_samples: bool) -> Prediction:
    """The predictions of all batches, with the logits of each sample moved by what leaving each example out does."""
    if not rows:
        raise ValueError("inputs has no batches; an iterator can be used once only")
    labels = torch.cat([predicted.labels for predicted in predictions if predicted.labels is not None])
    p = torch.stack([row.logits for row in rows]).softmax(1)
    covariance = torch.stack([row.covariance for row in rows])
    gradient = p - nn.functional.one_hot(labels.clamp(min=0), p.shape[1])
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    if corrected and (most := leverage(covariance, curvature)).max() >= 1:
        raise ValueError(
            f"{int((most >= 1).sum())} of {len(p)} examples have more curvature than the whole posterior (a leverage "
            f"of up to {most.max():.3g}): its variances are too large to correct for; leave corrected out"
        )
    shift = shift_without(covariance, gradient, curvature if corrected else None)
    kept = [predicted.sample_probabilities for predicted in predictions if predicted.sample_probabilities is not None]
    samples = torch.cat(kept, dim=1)
    moved = (samples.log() + shift).softmax(2)
    return Prediction.from_samples(moved, labels, keep_samples=keep_samples)
