"""Predictions averaged over samples of the posterior, and how much of their uncertainty the samples disagree about."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from ivon_kernels.facts import as_html, as_line
from ivon_kernels.gaussians.gaussians import Gaussians
from ivon_kernels.lora import CannotStackError
from ivon_kernels.predict.abstaining import By, Threshold, certainty_of, find_threshold
from ivon_kernels.predict.batches import Labelled, bar, batches_of, cut, sample_numbers, split_labels, to_device
from ivon_kernels.predict.conformal import ConformalSets, Method, fit_sets
from ivon_kernels.predict.metrics import Scores, evaluate
from ivon_kernels.predict.passes import Sampler, device_of, evaluating
from ivon_kernels.predict.scoring import Score, class_logits
from ivon_kernels.predict.temperature import best_temperature, say_if_at_limit, scale

__all__ = ["PredictOptions", "Prediction", "entropy_of", "predict"]


IGNORED = -100
"""The label of an example that has none, as in torch's losses."""

_AGREEMENT = 0.01  # of the entropy: what samples that agree disagree about at most
_ENOUGH = 20  # examples to say so of
_said = False  # once in a process is enough


@dataclass(frozen=True, repr=False)
class Prediction:
    """Class probabilities of ``N`` examples, averaged over ``S`` samples of the posterior; tensors on the CPU.

    With the probabilities ``p_s`` under sample ``s`` and their average ``p``, the entropy of the prediction splits into
    (Houlsby et al., arXiv 1112.5745, equation 2; Depeweg et al., ICML 2018, arXiv 1710.07283, equation 3)

        H[p]  =  mean_s H[p_s]  +  mutual information
        total    aleatoric         epistemic

    The second term is what more training data would not remove; the third is what the samples disagree about.

    Attributes:
        probabilities: float64 ``[N, C]``.
        entropy: Entropy of `probabilities` in nats, float64 ``[N]``, from 0 to ``log C``.
        expected_entropy: Average over the samples of the entropy of each, in nats, float64 ``[N]``.
        mutual_information: Of the answer and the weights, in nats, float64 ``[N]``, from 0 to ``log S``. It is the
            difference of the two above; where rounding makes that negative (by some 1e-16), it is 0.
        labels: The right classes, int64 ``[N]``, where the batches had them; -100 for an example without one.
        sample_probabilities: float64 ``[S, N, C]``, where they were asked for.
    """

    probabilities: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    labels: Tensor | None = None
    sample_probabilities: Tensor | None = None

    @classmethod
    def from_samples(
        cls, sample_probabilities: Tensor, labels: Tensor | None = None, *, keep_samples: bool = True
    ) -> Prediction:
        """The prediction of ``S`` sets of probabilities, such as the members of an ensemble.

        Args:
            sample_probabilities: ``[S, N, C]``; each row is normalized.
            labels: Integers ``[N]``.
            keep_samples: Whether the prediction holds `sample_probabilities`.
        """
        p = sample_probabilities.detach().to("cpu", torch.float64)
        labels = None if labels is None else labels.to("cpu", torch.int64)
        return cls._split(p.mean(0), entropy_of(p).mean(0), labels, p if keep_samples else None)

    @classmethod
    def _split(
        cls, probabilities: Tensor, expected_entropy: Tensor, labels: Tensor | None, samples: Tensor | None
    ) -> Prediction:
        entropy = entropy_of(probabilities)
        mutual_information = (entropy - expected_entropy).clamp(min=0)
        return cls(probabilities, entropy, expected_entropy, mutual_information, labels, samples)

    @property
    def predicted(self) -> Tensor:
        """The most probable class, int64 ``[N]``."""
        return self.probabilities.argmax(1)

    @property
    def confidence(self) -> Tensor:
        """The probability of the most probable class, float64 ``[N]``."""
        return self.probabilities.amax(1)

    def scores(self, labels: Tensor | None = None, *, votes: Tensor | None = None) -> Scores:
        """How good the probabilities are: :func:`.evaluate`.

        Args:
            labels: The right classes, integers ``[N]``; None where the batches had them. Examples whose label is -100,
                as torch's losses ignore it, are left out.
            votes: ``[N, C]``, how many people chose each class of each example.

        Raises:
            ValueError: If there are no labels, or they do not fit.
            ModuleNotFoundError: If the extra `report` is not installed.
        """
        labels, known = self._right(labels, "scores compare with")
        if votes is not None and not known.all():
            votes = votes[known]
        return evaluate(self.probabilities[known], labels[known], votes)

    def fit_temperature(self, labels: Tensor | None = None) -> float:
        """The temperature for :meth:`scaled`, of a prediction of a validation split: :func:`.fit_temperature`.

        Args:
            labels: As for :meth:`scores`.

        Raises:
            ValueError: If there are no labels, or they do not fit.

        Warns:
            UserWarning: If it is the least or the largest that is given, as there.
        """
        labels, known = self._right(labels, "a temperature is fitted to")
        logs, labels = self.probabilities[known].log(), labels[known]
        found = best_temperature(logs, labels)
        say_if_at_limit(found, logs, labels, stacklevel=3)
        return found

    def certainty(self, by: By = "confidence") -> Tensor:
        """The larger, the surer: `confidence`, or minus `entropy` or `mutual_information`, float64 ``[N]``."""
        return certainty_of(by, self.confidence, self.entropy, self.mutual_information)

    def threshold(
        self, labels: Tensor | None = None, *, risk: float = 0.05, delta: float | None = 0.1, by: By = "confidence"
    ) -> Threshold:
        """From which certainty on to answer, of a prediction of a labelled split: :func:`.find_threshold`.

        ``str()`` of it says what it promises; :meth:`answered` applies it to another prediction.

        Args:
            labels: As for :meth:`scores`.
            risk: The share of wrong answers among those given, in (0, 1).
            delta: How likely that may fail, over the draw of the split. None: the share on the split itself is at most
                `risk`, and nothing is promised for other examples.
            by: What certainty is, see :meth:`certainty`.

        Raises:
            ValueError: If there are no labels, or an argument is out of range.
            ModuleNotFoundError: If the extra `report` is not installed.
        """
        labels, known = self._right(labels, "a threshold is found with")
        wrong = (self.predicted != labels)[known]
        return find_threshold(self.certainty(by)[known], wrong, by=by, risk=risk, delta=delta)

    def answered(self, threshold: Threshold) -> Tensor:
        """Which examples are sure enough to be answered, bool ``[N]``."""
        return self.certainty(threshold.by) > threshold.value

    def conformal(
        self, labels: Tensor | None = None, *, coverage: float = 0.9, method: Method = "split"
    ) -> ConformalSets:
        """Sets of classes that hold the right one that often, of a prediction of a labelled split: :func:`.fit_sets`.

        Args:
            labels: As for :meth:`scores`.
            coverage: How often, in (0, 1), for examples exchangeable with those of the split.
            method: `split`: the smallest sets on average; `aps`: sets that are never empty and grow with the doubt.

        Raises:
            ValueError: If there are no labels, or an argument is out of range.
        """
        labels, known = self._right(labels, "conformal sets are found with")
        return fit_sets(self.probabilities[known], labels[known], coverage=coverage, method=method)

    def _right(self, labels: Tensor | None, what: str) -> tuple[Tensor, Tensor]:
        """The right classes on the CPU, and which examples have one, bool ``[N]``."""
        labels = self.labels if labels is None else labels
        if labels is None:
            raise ValueError(f"{what} the right classes: give labels, or batches that hold them")
        labels = labels.cpu()
        if labels.shape != (len(self),):
            raise ValueError(f"labels must be one class for each of the {len(self)} examples, got {list(labels.shape)}")
        known = labels != IGNORED
        if not known.any():
            raise ValueError(f"{what} the right classes: every label is {IGNORED}, which stands for none")
        return labels, known

    def scaled(self, temperature: float) -> Tensor:
        """The averaged probabilities under temperature scaling, float64 ``[N, C]``: :func:`.scale`.

        Another prediction's :meth:`fit_temperature` gives the temperature. The parts of the entropy belong to the
        average as it was, and have no counterpart here.

        Raises:
            ValueError: If the temperature is not a finite number above 0.
        """
        return scale(self.probabilities.log(), temperature)

    def __len__(self) -> int:
        return len(self.probabilities)

    def __repr__(self) -> str:
        """Sizes, the parts of the entropy, and the accuracy where it is known."""
        return as_line(type(self).__name__, self._facts())

    def _repr_html_(self) -> str:
        return as_html(type(self).__name__, self._facts())

    def _facts(self) -> dict[str, str]:
        facts = {
            "examples": str(len(self)),
            "classes": str(self.probabilities.shape[-1]),
            "entropy": f"{self.entropy.mean():.3g} nats",
            "mutual information": f"{self.mutual_information.mean():.3g} nats",
        }
        if self.labels is not None and (known := self.labels != IGNORED).any():
            facts["accuracy"] = f"{(self.predicted == self.labels)[known].double().mean():.3f}"
        return facts


def entropy_of(probabilities: Tensor) -> Tensor:
    """``-sum p log p`` over the last dimension, in nats, with ``0 log 0 = 0``."""
    result: Tensor = torch.special.entr(probabilities).sum(-1)
    return result


class PredictOptions(TypedDict, total=False):
    """Options of :func:`predict`, which says what they are, for functions that pass them on."""

    samples: int | Sequence[int]
    score: Score
    stacked: bool | None
    max_rows: int
    device: torch.device | str | None
    adapter: str | None


def predict(
    posterior: Gaussians,
    model: nn.Module,
    inputs: Any,
    *,
    samples: int | Sequence[int] = 10,
    score: Score = class_logits,
    stacked: bool | None = None,
    max_rows: int = 128,
    keep_samples: bool = False,
    progress: bool | None = None,
    device: torch.device | str | None = None,
    adapter: str | None = None,
    advise: bool = True,
) -> Prediction:
    """Average the class probabilities of `inputs` over samples of the posterior.

    This function is the method ``Posterior.predict`` too: ``posterior.predict(model, inputs)`` is how it is usually
    called, and as a function it takes Gaussians that are no posterior with files.

    The model is in eval mode meanwhile; its modes and weights are as before afterwards, whatever happens.

    Args:
        posterior: Where the samples come from: a Posterior, or any other Gaussians.
        model: The model that it was trained in, or loaded for. It stays on its device.
        inputs: One batch or an iterable of batches, such as a DataLoader, which is read once, batch by batch. A batch
            is a tensor, a mapping of tensors, or a tuple or list ``(inputs, labels)``; ``labels`` in a mapping are the
            right classes too, ``[rows]``, and are not given to the model.
        samples: How many (samples 0, 1, ... of the posterior: the same numbers give the same samples anywhere), or the
            numbers of the samples; 0 is one pass at the mean.
        score: ``score(model, batch)`` gives the logits ``[rows, classes]`` of a batch without its labels. The default
            is for classification models; see :func:`~ivon_kernels.posterior.next_token` and
            :func:`~ivon_kernels.posterior.choices` for language models.
        stacked: Whether several samples go through the model in one pass (:func:`ivon_kernels.lora.stack`). None does
            so in LoRA models that allow it. The numbers are the same up to rounding.
        max_rows: The most rows of a pass: as many samples are stacked as fit, larger batches are cut. It bounds the
            memory.
        keep_samples: Whether the prediction also holds the probabilities of every sample.
        progress: Whether to show a progress bar over the batches; None does in a terminal, if there are several.
        device: Where the batches go; None is where the model's first parameter is.
        adapter: The PEFT adapter that has the posterior's weights; None: its own, else the active one.
        advise: Whether to warn, once in a process, where several samples agree so well that one pass at the mean would
            do: their mutual information is below 1% of the entropy, over at least 20 examples.

    Returns:
        The probabilities, in the order of `inputs`, and the parts of their uncertainty.

    Raises:
        TypeError, ValueError: For arguments and batches that do not fit, saying what to give.
    """
    numbers = sample_numbers(samples)
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    batches, total = batches_of(inputs)
    where = torch.device(device) if device is not None else device_of(model)
    parts: list[_Part] = []
    with (
        evaluating(model),
        Sampler(posterior, model, adapter=adapter, stacked=stacked, max_rows=max_rows) as sampler,
        bar("predict", total, progress) as shown,
    ):
        for batch in batches:
            for piece in cut(split_labels(batch), max_rows):
                piece = piece._replace(inputs=to_device(piece.inputs, where))
                run = functools.partial(_predict_piece, sampler, score, numbers, piece, keep_samples)
                parts.append(sampler.attempt(run))
            shown.update()
    found = _joined(parts)
    if advise and len(numbers) > 1 and len(found) >= _ENOUGH:
        _say_if_samples_agree(found, len(numbers))
    return found


def _say_if_samples_agree(found: Prediction, samples: int) -> None:
    global _said
    entropy, disagreement = found.entropy.mean().item(), found.mutual_information.mean().item()
    if _said or not disagreement < _AGREEMENT * entropy:
        return
    _said = True
    warnings.warn(
        f"{samples} samples agree to {disagreement:.2g} of {entropy:.2g} nats: one pass at the mean (samples=0) is as "
        "good. For samples that disagree train with a larger sigma or a smaller ess, or predict with "
        "posterior.tempered(0.1), whose variances are ten times as large.",
        stacklevel=3,
    )


class _Part(NamedTuple):
    """The prediction of some rows."""

    probabilities: Tensor
    expected_entropy: Tensor
    labels: Tensor | None
    samples: Tensor | None


def _predict_piece(sampler: Sampler, score: Score, numbers: tuple[int, ...], batch: Labelled, keep: bool) -> _Part:
    """The average over the samples, which need not be in memory at once."""
    total = entropies = torch.zeros((), dtype=torch.float64, device="cpu")
    kept = []
    for passed in sampler.passes(numbers, batch.rows):
        # Not inference_mode: what a model caches in a pass (rotary tables, quantization states) has to stay fit for
        # training.
        with torch.no_grad():
            logits = score(sampler.model, passed.repeat(batch.inputs))
        p = _probabilities(logits, batch.rows, passed.samples)
        total, entropies = total + p.sum(0), entropies + entropy_of(p).sum(0)
        if keep:
            kept.append(p)
    count = max(1, len(numbers))
    return _Part(total / count, entropies / count, batch.labels, torch.cat(kept) if keep else None)


def _probabilities(logits: Any, rows: int, samples: int) -> Tensor:
    """Of logits that must be ``[samples * rows, C]``; float64 ``[samples, rows, C]`` on the CPU."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"score must return logits [rows, classes] of at least two classes, got {got}")
    if logits.shape[0] != samples * rows:
        advice = "" if samples == 1 else f" ({samples} samples of {rows}); stacked=False gives it one sample at a time"
        kind = ValueError if samples == 1 else CannotStackError
        raise kind(f"score returned {logits.shape[0]} rows for a batch of {samples * rows}{advice}")
    p = logits.cpu().double().softmax(1).view(samples, rows, -1)
    if p.isnan().any():
        raise ValueError("score returned logits that are nan, or inf, or -inf in every class")
    return p


def _joined(parts: list[_Part]) -> Prediction:
    if not parts:
        raise ValueError("inputs has no batches; an iterator can be used once only")
    widths = {part.probabilities.shape[1] for part in parts}
    if len(widths) > 1:
        raise ValueError(f"the batches have different numbers of classes, {sorted(widths)}: predict them apart")
    labels = [part.labels for part in parts if part.labels is not None]
    if len(labels) not in (0, len(parts)):
        raise ValueError("some batches have labels and others have none")
    samples = [part.samples for part in parts if part.samples is not None]
    return Prediction._split(
        torch.cat([part.probabilities for part in parts]),
        torch.cat([part.expected_entropy for part in parts]),
        torch.cat(labels) if labels else None,
        torch.cat(samples, dim=1) if samples else None,
    )
