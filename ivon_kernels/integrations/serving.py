"""Predictions averaged over adapters that a server holds: samples of a posterior behind an OpenAI-compatible endpoint.

``posterior.export(folder)`` writes the adapters. The client needs nothing of the server but ``POST /v1/completions``
with token ids as the prompt, ``echo`` and ``logprobs``, as vLLM has it, and nothing but Python's standard library
itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from ivon_kernels.posterior.exporting import MANIFEST
from ivon_kernels.predict.prediction import Prediction

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SampleClient", "ServerError"]


class ServerError(RuntimeError):
    """The server refused a request, or answered something else than log-probabilities."""


class SampleClient:
    """Asks every adapter, and averages probabilities.

    Args:
        url: Of the server, up to and with ``/v1``.
        models: Names under which it serves the samples.
        key: Sent as a bearer token.
        timeout: Of a request, in seconds.

    Raises:
        ValueError: If there is no model, or the URL is neither http nor https.
    """

    def __init__(self, url: str, models: Sequence[str], *, key: str | None = None, timeout: float = 60.0) -> None:
        if isinstance(models, str) or not models:
            raise ValueError(f"models must be names of served adapters, got {models!r}")
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {url!r}")
        self.url, self.models = url.rstrip("/"), tuple(models)
        self._key, self._timeout = key, timeout

    @classmethod
    def of_export(cls, url: str, folder: str | Path, *, key: str | None = None, timeout: float = 60.0) -> Self:
        """For the samples in a folder of ``posterior.export``, served by their names there; without any, the mean."""
        manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
        samples = [adapter["name"] for adapter in manifest["adapters"] if adapter["sample"] is not None]
        return cls(url, samples or ["mean"], key=key, timeout=timeout)

    def predict(self, batch: Mapping[str, Tensor], *, normalize: bool = False) -> Prediction:
        """Choose between answers, as ``posterior.predict(model, batch, score=choices())`` does with a model at hand.

        Args:
            batch: What :func:`~ivon_kernels.posterior.encode_choices` makes: `input_ids`, `attention_mask` and
                `answer_mask`, ``[N, C, T]``, and perhaps `labels`.
            normalize: As of :func:`~ivon_kernels.posterior.choices`.

        Raises:
            ServerError: As :meth:`log_probabilities`.
        """
        rows, count, _ = batch["input_ids"].shape
        real, answer = (batch[name].bool().flatten(0, 1).cpu() for name in ("attention_mask", "answer_mask"))
        asked = answer.any(1).nonzero().flatten().tolist()  # an answer without tokens is none
        ids = batch["input_ids"].flatten(0, 1).cpu()
        found = self.log_probabilities([ids[i][real[i]].tolist() for i in asked])
        logits = torch.full((len(self.models), rows * count), -math.inf, dtype=torch.float64, device="cpu")
        for sample, sequences in enumerate(found):
            for i, sequence in zip(asked, sequences, strict=True):
                values = torch.tensor(sequence, dtype=torch.float64, device="cpu")[answer[i][real[i]]]
                logits[sample, i] = values.mean() if normalize else values.sum()
        probabilities = logits.view(-1, rows, count).softmax(2)
        return Prediction.from_samples(probabilities, batch.get("labels"))

    def log_probabilities(self, sequences: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        """The log-probability of each token after those before it, in nats.

        Args:
            sequences: Token ids, ``N`` lists.

        Returns:
            For each sample and sequence a list of its length, with nan for the first token.

        Raises:
            ServerError: If the server refuses, or its answer has no log-probabilities of the prompts' tokens.
        """
        with ThreadPoolExecutor(len(self.models)) as pool:
            return list(pool.map(lambda model: self._ask(model, sequences), self.models))

    def _ask(self, model: str, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        # One token is generated, and dropped: not every server takes 0.
        body = {
            "model": model,
            "prompt": [list(sequence) for sequence in sequences],
            "echo": True,
            "logprobs": 1,
            "max_tokens": 1,
            "temperature": 0,
        }
        answer = self._post("/completions", body)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            found = [
                [math.nan, *map(float, choice["logprobs"]["token_logprobs"][1 : len(sequence)])]
                for choice, sequence in zip(choices, sequences, strict=True)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(
                f"{self.url} returned no log-probabilities of the prompt ({error}): it must support echo"
            ) from None
        if any(len(row) != len(sequence) for row, sequence in zip(found, sequences, strict=True)):
            raise ServerError(f"{self.url} returned log-probabilities of other tokens than those of the prompt")
        return found

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urlopen(request, timeout=self._timeout) as response:
                answer: dict[str, Any] = json.load(response)
        except HTTPError as error:
            said = error.read().decode(errors="replace")
            raise ServerError(f"{self.url} refused {body['model']!r}: HTTP {error.code}, {said:.200}") from None
        return answer
