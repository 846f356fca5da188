"""torch.compile of a whole training step: the optimizer's methods are graph breaks, and nothing is ever recompiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ivon_kernels import IVON

STEPS = 8
# Dynamo itself looks at .grad of tensors that are live across a graph break.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")]


def _training(kind: str, backend: str) -> tuple[Callable[[], Tensor], IVON, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = IVON(model.parameters(), 0.1, 100.0, seed=3, backend=backend)
    x, y = torch.randn(16, 6), torch.randint(0, 2, (16,))

    def loss_of_batch() -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def modes() -> Tensor:
        optimizer.train()
        loss = loss_of_batch()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def context() -> Tensor:
        with optimizer.sampled_params(train=True):
            loss = loss_of_batch()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = optimizer.step(loss_of_batch)
        return loss

    return {"modes": modes, "context": context, "closure": closure}[kind], optimizer, model


@pytest.mark.parametrize("kind", ["modes", "context", "closure"])
def test_compiled_training_step_equals_the_eager_one(backend: str, kind: str) -> None:
    """With a schedule, which changes lr at every step, and step counts that change all the time."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        step, optimizer, model = _training(kind, backend)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, STEPS)
        run = torch.compile(step, backend="aot_eager") if compiled else step
        losses = []
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(STEPS):
                losses.append(run().detach())
                schedule.step()
        state = [optimizer.state[p][key] for p in model.parameters() for key in ("mean", "hess")]
        results.append([*losses, *(p.detach() for p in model.parameters()), *state])
    for compiled_value, eager_value in zip(results[1], results[0], strict=True):
        assert torch.equal(compiled_value, eager_value)


def test_fullgraph_says_why_not(backend: str) -> None:
    torch._dynamo.reset()
    step, _, _ = _training("modes", backend)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"IVON\.train"):
        torch.compile(step, backend="aot_eager", fullgraph=True)()
