"""The model ``ivon`` of lm-evaluation-harness: likelihoods averaged over samples of a posterior, and how calibrated.

Importing this registers the model; on the command line, where nobody imports it, it stands in for ``lm_eval``::

    python -m ivon_kernels.integrations.harness --model ivon \
        --model_args pretrained=BASE,posterior=ADAPTER,samples=10 --tasks arc_easy --batch_size 8
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ivon_kernels.extras import HF, needed_for
from ivon_kernels.posterior import Posterior, Scores, evaluate
from ivon_kernels.predict.batches import sample_numbers
from ivon_kernels.predict.passes import Sampler
from ivon_kernels.predict.scoring import accepted

with needed_for(__name__, HF):
    from peft import PeftModel

with needed_for(__name__, "lm_eval"):
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

__all__ = ["IVONLM", "calibration"]

_Request = tuple[Any, list[int], list[int]]  # what the harness caches it by, context, continuation


@register_model("ivon")
class IVONLM(HFLM):  # type: ignore[misc] # lm_eval has no types
    """HFLM with a posterior: ``p(continuation | context) = mean_s p_s(continuation | context)``.

    That is the likelihood of the whole continuation under each sample, then the average: several samples in one pass
    where the model allows it. What is generated comes from the mean.

    Args:
        pretrained: The base model; or a PeftModel that has the posterior's adapter already.
        posterior: Folder or repository with adapter and posterior (or a Posterior, where `pretrained` is a model).
        samples: How many; 0 is the mean.
        max_rows: The most rows of a pass, samples times `batch_size`.
        batch_size: Continuations at a time, a number.
        **options: Of the harness' model ``hf``.

    Raises:
        ValueError: For options that do not go together.
    """

    _model: Any  # HFLM's, a model of Transformers

    def __init__(
        self,
        pretrained: Any,
        posterior: Any,
        samples: int = 10,
        *,
        max_rows: int = 128,
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        if not str(batch_size).isdecimal():
            raise ValueError(f"batch_size must be a number for the model ivon, got {batch_size!r}")
        if "peft" in options:
            raise ValueError("the model ivon takes its adapter from posterior=..., not from peft=...")
        self.posterior = posterior if isinstance(posterior, Posterior) else Posterior.load(posterior)
        self.samples, self.max_rows = sample_numbers(samples), max_rows
        super().__init__(pretrained, batch_size=batch_size, **options)
        if isinstance(pretrained, str):
            # Not by HFLM's peft=..., which cuts the vocabulary down to the tokenizer's: that changes every probability.
            self._model = PeftModel.from_pretrained(self.model, str(self.posterior.folder)).eval()

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each request the log-likelihood of its continuation, and whether each token of it is the most probable.

        Args:
            requests: With token ids.
            disable_tqdm: As in HFLM, which shows a bar; this does not.
            override_bs: A batch size of the harness' own.
        """
        found: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        # Batches of about one length waste no padding; the longest first, so that memory runs out at once if it does.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        size = override_bs or int(self.batch_size)
        sampler = Sampler(self.posterior, self.model, adapter=None, stacked=None, max_rows=self.max_rows)
        with torch.no_grad(), sampler:
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                batch = _Batch([requests[i][1:] for i in chosen], self.max_length, self.device)
                for i, answer in zip(chosen, sampler.attempt(lambda: self._score(sampler, batch)), strict=True):  # noqa: B023 # called at once
                    found[i] = answer
                    if requests[i][0] is not None:  # a window of loglikelihood_rolling, which caches by itself
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return found

    def _score(self, sampler: Sampler, batch: _Batch) -> list[tuple[float, bool]]:
        likelihoods, tokens = [], []
        for passed in sampler.passes(self.samples, len(batch.ids)):
            logits = _run(sampler.model, passed.repeat(batch.inputs), batch.kept)
            log_p = logits.unflatten(0, (passed.samples, -1)).log_softmax(-1)
            each = log_p.gather(3, batch.targets.expand(passed.samples, -1, -1)[..., None])[..., 0]
            likelihoods.append(each.double().masked_fill(~batch.answer, 0).sum(2))
            tokens.append(log_p.exp().sum(0))
        every = torch.cat(likelihoods)
        averages: list[float] = (every.logsumexp(0) - math.log(len(every))).tolist()
        most = (sum(tokens[1:], tokens[0]).argmax(-1) == batch.targets) | ~batch.answer
        return list(zip(averages, most.all(1).tolist(), strict=True))


class _Batch:
    """Contexts and continuations as one tensor, padded on the right.

    Attributes:
        ids: int64 ``[rows, T]``, without the last token of each row, which predicts nothing that is asked for.
        inputs: Of the model.
        kept: At how many last positions logits are needed.
        targets: The token after each of these positions, ``[rows, kept]``.
        answer: Which of them are the continuation's.
    """

    def __init__(self, pairs: Sequence[Sequence[list[int]]], max_length: int, device: torch.device) -> None:
        rows = [(context + continuation)[-(max_length + 1) :] for context, continuation in pairs]
        length = max(map(len, rows))
        whole = torch.zeros(len(rows), length, dtype=torch.int64, device="cpu")
        mask, answer = torch.zeros_like(whole), torch.zeros_like(whole, dtype=torch.bool)
        for i, (row, (_, continuation)) in enumerate(zip(rows, pairs, strict=True)):
            whole[i, : len(row)] = torch.tensor(row, dtype=torch.int64, device="cpu")
            mask[i, : len(row)] = 1
            answer[i, max(1, len(row) - len(continuation)) : len(row)] = True
        first = int(answer.any(0).int().argmax())
        self.ids = whole[:, :-1].to(device)
        self.inputs = {"input_ids": self.ids, "attention_mask": mask[:, :-1].to(device)}
        self.kept = length - first
        self.targets, self.answer = whole[:, first:].to(device), answer[:, first:].to(device)


def _run(model: nn.Module, inputs: dict[str, Tensor], kept: int) -> Tensor:
    """Logits at the last `kept` positions, float32 ``[rows, kept, V]``."""
    options = accepted(model, logits_to_keep=kept, use_cache=False)
    logits: Tensor = model(**inputs, **options).logits
    return logits[:, -kept:].float()


def calibration(results: Mapping[str, Any]) -> dict[str, Scores]:
    """ECE, Brier and the other scores of each multiple-choice task, of any model of the harness.

    The probabilities are the continuations' likelihoods, normalized over a question's choices: what ``acc`` and
    ``brier_score`` judge.

    Args:
        results: What ``lm_eval.simple_evaluate(..., log_samples=True)`` returns.

    Returns:
        By task; tasks that are no multiple choice, or whose questions have several right answers, are left out.

    Raises:
        ValueError: If the results have no samples.
        ModuleNotFoundError: If the extra `report` is not installed.
    """
    if not results.get("samples"):
        raise ValueError("these results have no samples: simple_evaluate(..., log_samples=True) keeps them")
    kinds = {name: config.get("output_type") for name, config in results["configs"].items()}
    found = {}
    for task, samples in results["samples"].items():
        if kinds.get(task) == "multiple_choice" and (questions := list(_questions(samples))):
            width = max(len(logits) for logits, _ in questions)
            table = torch.full((len(questions), width), -math.inf, dtype=torch.float64, device="cpu")
            for row, (logits, _) in zip(table, questions, strict=True):
                row[: len(logits)] = torch.tensor(logits, dtype=torch.float64, device="cpu")
            labels = torch.tensor([label for _, label in questions], dtype=torch.int64, device="cpu")
            found[task] = evaluate(table.softmax(1), labels)
    return found


def _questions(samples: Sequence[Mapping[str, Any]]) -> Iterator[tuple[list[float], int]]:
    """Log-likelihoods of the choices of each question, and the number of the right one, where there is one."""
    for sample in samples:
        target, choices = sample["target"], [argument[1].strip() for argument in sample["arguments"]]
        label = choices.index(target.strip()) if isinstance(target, str) and target.strip() in choices else target
        if isinstance(label, int) and 0 <= label < len(choices):
            yield [float(answer[0]) for answer in sample["filtered_resps"]], label


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
