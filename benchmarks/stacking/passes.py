"""What is timed: three ways to the logits of the last token from several posterior samples, or from the mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor

from benchmarks import UserError
from ivon_kernels import IVON, lora
from ivon_kernels.posterior import Posterior

SEPARATE, STACKED, MEAN = "separate passes", "stacked in one pass", "one pass at the mean"
WAYS = (SEPARATE, STACKED, MEAN)

# How far stacked probabilities may be from separate ones, root mean square, in units of what is estimated: the spread
# of the samples. float32 leaves rounding orders of magnitude below it; that of 16 bits is not small beside sigma.
_TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.3, torch.float16: 0.1}


@dataclass
class Setup:
    """A model in eval mode with an adapter, its posterior, and the numbers of the samples."""

    model: peft.PeftModel
    posterior: Posterior
    samples: tuple[int, ...]

    @property
    def config(self) -> Any:
        """Of the base model."""
        return self.model.get_base_model().config

    @property
    def dtype(self) -> torch.dtype:
        """Of the base model."""
        return next(param.dtype for name, param in self.model.named_parameters() if "lora_" not in name)

    @property
    def base_bytes(self) -> int:
        """Memory of the model without its adapter."""
        return sum(param.nbytes for name, param in self.model.named_parameters() if "lora_" not in name)

    @property
    def adapter_bytes(self) -> int:
        """What stacking allocates."""
        with lora.stack(self.model, self.posterior, self.samples) as stack:
            nbytes = stack.nbytes
            stack.remove()
        return nbytes

    def step(self, way: str, tokens: Tensor) -> Callable[[lora.Stack | None], Tensor]:
        """A function that computes logits ``[samples, batch, vocabulary]`` (of the mean: one sample).

        It takes the stack, for :data:`STACKED`: see :meth:`stacked`.
        """

        def separate(_: lora.Stack | None) -> Tensor:
            outputs = []
            for sample in self.samples:
                with self.posterior.sampled(self.model, sample):
                    outputs.append(self._logits(tokens))
            return torch.stack(outputs)

        def stacked(stack: lora.Stack | None) -> Tensor:
            assert stack is not None
            result: Tensor = stack.split(self._logits(stack.repeat(tokens)))
            return result

        return {SEPARATE: separate, STACKED: stacked, MEAN: lambda _: self._logits(tokens)[None]}[way]

    def stacked(self) -> lora.Stack:
        """The samples stacked in the model, for the length of a block."""
        return lora.stack(self.model, self.posterior, self.samples)

    def _logits(self, tokens: Tensor) -> Tensor:
        output: Any = self.model(input_ids=tokens, use_cache=False, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1]
        return logits


def prepare(model: peft.PeftModel, samples: int) -> Setup:
    """Give an adapter random weights and a posterior around them.

    Sigma is 0.01, about what IVON finds in the main job; times do not depend on the values.
    """
    model.eval()
    generator = torch.Generator().manual_seed(0)
    trainable = [param for param in model.parameters() if param.requires_grad]
    with torch.no_grad():
        for param in trainable:
            param.add_(0.02 * torch.randn(param.shape, generator=generator).to(param))
    posterior = IVON(trainable, lr=0.1, ess=1e4, hess_init=1.0, weight_decay=1e-6, seed=0).posterior(model)
    return Setup(model, posterior, tuple(range(samples)))


def token_batch(setup: Setup, batch: int, tokens: int) -> Tensor:
    """Random tokens, the same every time."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, setup.config.vocab_size, (batch, tokens), generator=generator).to(setup.model.device)


@torch.inference_mode()
def check(setup: Setup, tokens: Tensor) -> float:
    """See that stacked probabilities are those of separate passes.

    Returns:
        Root mean square of their difference, in units of the samples' spread.

    Raises:
        UserError: If it is more than rounding.
    """
    expected = setup.step(SEPARATE, tokens)(None).double().softmax(-1)
    with setup.stacked() as stack:
        found = setup.step(STACKED, tokens)(stack).double().softmax(-1)
    spread = (expected - expected.mean(0)).square().mean().sqrt()
    difference = float((found - expected).square().mean().sqrt() / spread) if len(setup.samples) > 1 else 0.0
    if not difference <= _TOLERANCE[setup.dtype]:
        raise UserError(
            f"stacked probabilities differ from those of separate passes by {difference:.2g} of the samples' spread, "
            f"more than rounding in {setup.dtype}: no time is worth reporting"
        )
    return difference
