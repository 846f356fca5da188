"""On a GPU: samples of a posterior have the CPU's bits, and stacked ones are those of separate passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from ivon_kernels import IVON, lora
from ivon_kernels.posterior import Posterior

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from tests.support.tiny_llm import IVON_OPTIONS, lora_llama, same

if TYPE_CHECKING:
    from peft import PeftModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    # PEFT calls what transformers is renaming.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
TOKENS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


def trained(dtype: torch.dtype) -> tuple[PeftModel, Posterior]:
    """A model after one step on the CPU."""
    model = lora_llama().to(dtype)
    optimizer = IVON([p for p in model.parameters() if p.requires_grad], **IVON_OPTIONS)
    with optimizer.sampled_params(train=True):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    return model, optimizer.posterior(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_have_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    model, posterior = trained(dtype)
    with posterior.sampled(model, 4):
        expected = {name: param.detach().clone() for name, param in posterior.parameters_of(model).items()}
    model.cuda()
    for moved in (posterior, posterior.to("cuda")):
        with moved.sampled(model, 4):
            assert same({name: param.cpu() for name, param in moved.parameters_of(model).items()}, expected)


def test_stacked_samples_are_those_of_separate_passes() -> None:
    model, posterior = trained(torch.float32)
    model.double()
    expected = []
    for sample in (0, 3):
        with posterior.sampled(model, sample), torch.no_grad():
            expected.append(model(input_ids=TOKENS).logits)
    model.float().cuda()
    with torch.no_grad(), lora.stack(model, posterior.to("cuda"), [0, 3]) as stack:
        found = stack.split(model(input_ids=stack.repeat(TOKENS.cuda())).logits)
    # A model of one layer of width 16: some tens of float32 roundings one after the other.
    torch.testing.assert_close(found.cpu().double(), torch.stack(expected), rtol=1e-4, atol=1e-5)
