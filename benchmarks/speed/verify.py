"""Correctness before speed: what is not right is not timed.

Ours must equal the `reference` backend bit for bit after two calls, with the sample, the mean and the state of all
tensors that the reference computes too: as many of them, spread over the list, as hold the clock's `reference_elements`
(of a flat tensor so many of its first elements, 2^20 at most; as many of its last must hold the sample that their mean,
their hess and the public noise give). Peers must change the weights in both steps and leave them finite; those that
compute AdamW's update must also stay within a stated distance of torch's. Checkpoints must hold, and give back, the
optimizer's tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.speed.contenders import ADAMW_ARGS, STEP, Contender, Parameters, Step, WrongError
from benchmarks.speed.workloads import Workload
from ivon_kernels import IVON, noise

STEPS = 2
PREFIX = 2**20  # at most so many elements of a flat tensor, and of a peer's tensors
_STATE = ("mean", "momentum", "hess")


def rounding(distances: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """The largest distance from AdamW's weights, and how large it may be for the same update in another order.

    In each of two steps the weight (about 1) and its update (a tenth of it) are rounded; in 16 bits the moments too.
    """
    return float(distances.max()), 8 * torch.finfo(dtype).eps


def similar(distances: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """The mean distance, and how large it may be: 5% of a step's update, beside rounding.

    For moments of 8 bits, and for another place of epsilon: both are far off where a gradient is tiny, and only there.
    """
    return float(distances.mean()), 0.05 * float(ADAMW_ARGS["lr"]) + torch.finfo(dtype).eps


def reason(error: Exception) -> str:
    """An exception as a row of the tables shows it."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, WrongError) else f"{type(error).__name__}: {text}"


class Verifier:
    """Knows what one workload's results must be."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device, reference_elements: int) -> None:
        self.workload, self.dtype, self.device = workload, dtype, device
        self._kept = _spread(workload, reference_elements)
        self._prefix = min(PREFIX, reference_elements)
        self._expected: dict[str, list[Tensor]] = {}
        self._adamw: list[Tensor] | None = None

    def check(self, contender: Contender) -> str | None:
        """Why a contender must not be timed, or None."""
        try:
            if contender.expected:
                self._check_bits(contender)
            else:
                self._check_peer(contender)
        except Exception as error:  # a row of the table, not the end of the suite
            return f"{reason(error)}; not timed" if isinstance(error, WrongError) else reason(error)
        return None

    # ---- ours --------------------------------------------------------------------------------------------------------

    def _check_bits(self, contender: Contender) -> None:
        if contender.expected not in self._expected:
            self._expected[contender.expected] = self._reference(contender.expected)
        params = self.workload.parameters(self.dtype, self.device)
        step = contender.build(params)
        actual = self._results(step, params)
        expected = self._expected[contender.expected]
        if not all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)):
            raise WrongError("differs from the reference")
        if self.workload.is_flat and contender.quantity == STEP:
            self._check_tail(step.optimizer, params[0])

    def _reference(self, expected: str) -> list[Tensor]:
        from benchmarks.speed.ours import REFERENCES

        params = self.workload.parameters(self.dtype, self.device)
        if self.workload.is_flat:
            (param,) = params
            assert param.grad is not None
            head = torch.nn.Parameter(param.detach()[: self._prefix].clone())
            head.grad = param.grad[: self._prefix].clone()
            params = [head]
        for number, param in enumerate(params):
            if number not in self._kept:  # a frozen parameter is left alone, and the others keep their numbers
                param.requires_grad_(False)
        return self._results(REFERENCES[expected](params), params)

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

    # ---- peers -------------------------------------------------------------------------------------------------------

    def _check_peer(self, contender: Contender) -> None:
        """On the workload's first tensors: a peer's code is the same for all of them."""
        params = self._some_parameters()
        step = contender.build(params)
        if contender.quantity != STEP:
            step()
            if step.check is not None:
                step.check()
            return
        read = step.tensors or (lambda: [param.detach() for param in params])
        for number in range(STEPS):
            before = [value.clone() for value in read()]
            step()
            after = read()
            if all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
                raise WrongError(f"step {number + 1} changed no weight")
            if not all(bool(value.isfinite().all()) for value in after):
                raise WrongError(f"step {number + 1} left weights that are not finite")
        if contender.like_adamw is not None:
            distances = self._distances(read())
            found, most = contender.like_adamw(distances, self.dtype)
            if not found <= most:
                raise WrongError(f"weights are {found:.2g} from those of torch's AdamW, more than {most:.2g}")

    def _distances(self, weights: list[Tensor]) -> Tensor:
        if self._adamw is None:
            params = self._some_parameters()
            optimizer = torch.optim.AdamW(params, **ADAMW_ARGS, foreach=False, fused=False)
            for _ in range(STEPS):
                optimizer.step()
            self._adamw = [param.detach() for param in params]
        pairs = zip(weights, self._adamw, strict=True)
        return torch.cat([(a.double() - b.double()).abs().flatten() for a, b in pairs])

    def _some_parameters(self) -> Parameters:
        shapes = self.workload.shapes
        if self.workload.is_flat:
            shapes = ((min(shapes[0][0], self._prefix),),)
        count, elements = 0, 0
        while count < len(shapes) and elements < self._prefix:
            elements += torch.Size(shapes[count]).numel()
            count += 1
        return Workload("", "", shapes[:count]).parameters(self.dtype, self.device)


def _spread(workload: Workload, most: int) -> list[int]:
    """Numbers of tensors, evenly spread over the list with its first and last one, of about `most` elements."""
    count = len(workload.shapes)
    wanted = max(min(count, int(most / workload.elements * count)), min(count, 2))
    return sorted({round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)})
