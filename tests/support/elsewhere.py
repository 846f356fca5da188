"""What tests of the posterior ask of another process. They send these functions to the ranks' processes."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ivon_kernels.posterior import Posterior, next_token, predict
from tests.support import shake


@contextmanager
def _threads(count: int) -> Iterator[None]:
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(shake.THREADS)


def digest_of_a_draw(folder: Path, threads: int, backend: str) -> str:
    """Of the bits of every weight of sample 11."""
    with _threads(threads):
        weights = Posterior.load(folder).draw(11, backend=backend)
    return hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights.values())).hexdigest()


def drawn_and_predicted(folder: Path) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Sample 3 of the adapter's posterior in `folder`, and its predictions for three rows, stacked and one by one."""
    with _threads(2), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads what transformers is renaming
        from peft import PeftModel

        from tests.support.posterior_models import tokens
        from tests.support.tiny_llm import llama

        posterior = Posterior.load(folder)
        model = PeftModel.from_pretrained(llama(), folder)
        batch, score = {"input_ids": tokens(3, 5)}, next_token([4, 5, 9])
        found = [predict(posterior, model, batch, samples=4, score=score, stacked=s) for s in (True, False)]
        return posterior.draw(3), [prediction.probabilities for prediction in found]
