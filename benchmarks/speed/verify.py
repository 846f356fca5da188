"""Correctness before speed: what is not right is not timed.

Ours must equal the `reference` backend bit for bit after two calls, with the sample, the mean and the state of all
tensors that the reference computes too: as many of them, spread over the list, as hold the clock's `reference_elements`
(of a flat tensor so many of its first elements, 2^20 at most; as many of its last must hold the sample that their mean,
their hess and the public noise give). Peers must change the weights in both steps and leave them finite; those that
compute AdamW's update must also stay within a stated distance of torch's. Checkpoints must hold, and give back, the
optimizer's tensors.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from benchmarks.speed.contender import LARGE_STEPS, STEP, Contender, Parameters, Recipe, Step, WrongError, reason
from benchmarks.speed.measure import Row
from benchmarks.speed.peers import ivon
from benchmarks.speed.workloads import Workload
from ivon_kernels import IVON, noise

STEPS = 2
PREFIX = 2**20  # at most so many elements of a flat tensor, and of a peer's tensors
_STATE = ("mean", "momentum", "hess")


class Verifier:
    """Knows what one workload's results must be; the reference computes about `reference_elements` of them as well."""

    def __init__(
        self,
        workload: Workload,
        dtype: torch.dtype,
        device: torch.device,
        reference_elements: int,
        recipe: Recipe = LARGE_STEPS,
    ) -> None:
        self.workload, self.dtype, self.device, self.recipe = workload, dtype, device, recipe
        # Numbers of tensors, evenly spread over the list with its first and last one.
        count = len(workload.shapes)
        wanted = max(min(count, int(reference_elements / workload.elements * count)), min(count, 2))
        self._kept = sorted({round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)})
        self._prefix = min(PREFIX, reference_elements)
        self._expected, self._adamw = cache(self._reference), cache(self._torch_adamw)

    def check(self, contender: Contender) -> str | None:
        """Why a contender must not be timed, or None."""
        try:
            (self._check_bits if contender.expected else self._check_peer)(contender)
        except Exception as error:  # a row of the table, not the end of the suite
            return f"{reason(error)}; not timed" if isinstance(error, WrongError) else reason(error)
        return None

    def rows(
        self,
        contenders: Sequence[Contender],
        unable: Callable[[Contender], str | None],
        clean: Callable[[], object] = gc.collect,
    ) -> list[Row]:
        """A row for each contender, with why it is not to be timed: it is `unable` to run, or wrong.

        `clean` gives memory back: an optimizer may refer to itself, and the next may need what it held.
        """
        rows = []
        for contender in contenders:
            row = Row(contender.name, contender.ours, unable(contender), False, contender.turns, (contender.quantity,))
            if row.error is None:
                row.error = self.check(contender)
                row.failed = row.error is not None
                clean()
            rows.append(row)
        return rows

    def _check_bits(self, contender: Contender) -> None:
        expected = self._expected(contender.expected)
        params = self.workload.parameters(self.dtype, self.device)
        step = contender.build(params, self.recipe)
        actual = self._results(step, params)
        if not all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)):
            raise WrongError("differs from the reference")
        if self.workload.is_flat and contender.quantity == STEP:
            self._check_tail(step.optimizer, params[0])

    def _reference(self, expected: str) -> list[Tensor]:
        workload = self.workload
        params = workload.parameters(self.dtype, self.device)
        if workload.is_flat:
            (param,) = params
            assert param.grad is not None
            params = [torch.nn.Parameter(param.detach()[: self._prefix].clone())]
            params[0].grad = param.grad[: self._prefix].clone()
        for number, param in enumerate(params):
            if number not in self._kept:  # a frozen parameter is left alone, and the others keep their numbers
                param.requires_grad_(False)
        return self._results(ivon("reference", expected)(params, self.recipe), params)

    def _results(self, step: Step, params: Parameters) -> list[Tensor]:
        """Sample and mean as the weights hold them, and the state, of what the reference computes."""
        for _ in range(STEPS):
            step()
        kept = [params[number] for number in self._kept]
        held = [] if step.tensors is None else step.tensors()
        further = [held[number] for number in self._kept if held]
        optimizer: IVON = step.optimizer
        optimizer.train()
        sample = [param.detach().clone() for param in kept]
        optimizer.eval()
        state = [optimizer.state[param][key] for param in kept for key in _STATE]
        results = [*further, *sample, *(param.detach() for param in kept), *state]
        return [value[: self._prefix] for value in results] if self.workload.is_flat else results

    def _check_tail(self, optimizer: IVON, param: torch.nn.Parameter) -> None:
        start = max(param.numel() - self._prefix, 0)
        optimizer.train()
        group, state = optimizer.param_groups[0], optimizer.state[param]
        mean, hess = state["mean"][start:], state["hess"][start:]
        eps = noise.normals(mean.numel(), seed=0, step=STEPS, start=start, device=param.device)
        expected = mean + eps / noise.sqrt((hess + group["weight_decay"]) * group["ess"])
        if not torch.equal(param.detach()[start:], expected.to(param.dtype)):
            raise WrongError("the sample of the last elements differs from mean and noise")

    def _check_peer(self, contender: Contender) -> None:
        """On the workload's first tensors: a peer's code is the same for all of them."""
        params = self._some_parameters()
        step = contender.build(params, self.recipe)
        if contender.quantity != STEP:
            step()
            step.check()
            return
        read = step.tensors or (lambda: [param.detach() for param in params])
        for number in range(1, STEPS + 1):
            before = [value.clone() for value in read()]
            step()
            if all(map(torch.equal, before, read())):
                raise WrongError(f"step {number} changed no weight")
            if not all(bool(value.isfinite().all()) for value in read()):
                raise WrongError(f"step {number} left weights that are not finite")
        if contender.like_adamw is not None:
            times = contender.like_adamw(torch.cat([v.flatten() for v in read()]), self._adamw(), self.recipe)
            if not times <= 1:
                raise WrongError(f"weights are {times:.2g} times as far from those of torch's AdamW as they may be")

    def _torch_adamw(self) -> Tensor:
        params = self._some_parameters()
        optimizer = torch.optim.AdamW(params, **self.recipe.adamw, foreach=False, fused=False)
        for _ in range(STEPS):
            optimizer.step()
        return torch.cat([param.detach().flatten() for param in params])

    def _some_parameters(self) -> Parameters:
        return self.workload.head(self._prefix).parameters(self.dtype, self.device)


def wrong(contenders: Sequence[Contender], rows: Sequence[Row]) -> dict[str, str]:
    """What of ours failed though it could run, with the reason."""
    names = [c.name if c.quantity == STEP else f"{c.name}: {c.quantity}" for c in contenders]
    return {name: row.error or "" for name, row in zip(names, rows, strict=True) if row.ours and row.failed}
