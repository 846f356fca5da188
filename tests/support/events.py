"""What may be done to an optimizer and its parameters, in any order, and what holds throughout."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch import Tensor, nn

from ivon_kernels import IVON

OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 100.0, "hess_init": 0.5, "beta2": 0.9, "seed": 3}
numbers = st.integers(0, 7)


def parameter(number: int) -> nn.Parameter:
    """A matrix, or smaller ones."""
    shape = [(4, 4), (3,), (), (5, 1)][number % 4]
    return nn.Parameter(torch.full(shape, 1.0 + number))


def refused(call: Callable[[], None]) -> str:
    """The refusal's text, or nothing."""
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


class Events(RuleBasedStateMachine):
    """Keeps the means that there have to be, and which parameters have a gradient of which sample."""

    backend = "cpu"

    @initialize(count=st.integers(1, 4), fused=st.booleans())
    def start(self, count: int, fused: bool) -> None:
        self.options = {**OPTIONS, "backend": self.backend, "sample_in_step": fused}
        self.born = count
        self.params = [parameter(i) for i in range(count)]
        self.means = {p: p.detach().clone() for p in self.params}
        self.build()

    def build(self) -> None:
        self.optimizer = IVON(list(self.params), **self.options)
        self.saved: tuple[list[nn.Parameter], dict[str, Any]] | None = None
        self.over()

    def over(self) -> None:
        """No step is under way."""
        self.with_gradient: set[nn.Parameter] = set()
        self.in_sample: set[nn.Parameter] = set()
        for p in self.params:
            p.grad = None

    @property
    def group(self) -> list[nn.Parameter]:
        params: list[nn.Parameter] = self.optimizer.param_groups[0]["params"]
        return params

    def pick(self, number: int) -> nn.Parameter:
        return self.params[number % len(self.params)]

    def trained(self) -> set[nn.Parameter]:
        return {p for p in self.params if p.requires_grad}

    def drawn(self) -> None:
        self.in_sample = (self.in_sample & set(self.params)) | self.trained()

    # ---- what a training loop does -----------------------------------------------------------------------------------

    @rule()
    def train(self) -> None:
        if not self.trained() and not self.in_sample:
            with pytest.raises(RuntimeError, match="requires a gradient"):
                self.optimizer.train()
            return
        refusal = refused(self.optimizer.train)
        if self.in_sample and self.with_gradient - self.in_sample:
            self.lost(refusal)
            self.optimizer.discard_samples()
            self.over()
            return
        assert not refusal
        self.drawn()
        assert self.optimizer.holds_sample

    def lost(self, refusal: str) -> None:
        """A gradient that is none of the sample's was refused."""
        reasons = ("has a gradient, but was frozen or not yet in the optimizer", "while the weights held the mean")
        assert any(reason in refusal for reason in reasons), refusal

    @rule()
    def eval(self) -> None:
        self.optimizer.eval()
        self.at_the_mean()

    @precondition(lambda self: self.optimizer.holds_sample)
    @rule(mask=st.integers(1, 15))
    def backward(self, mask: int) -> None:
        chosen = [p for i, p in enumerate(self.params) if p.requires_grad and mask >> i & 1]
        if chosen:
            torch.stack([(p * p).sum() for p in chosen]).sum().backward()
            self.with_gradient |= set(chosen)

    @precondition(lambda self: not self.optimizer.holds_sample and not self.in_sample)
    @rule(fails=st.booleans(), mask=st.integers(1, 15))
    def block(self, fails: bool, mask: int) -> None:
        if not self.trained():
            return
        try:
            with self.optimizer.sampled_params(train=True):
                self.drawn()
                self.backward(mask)
                if fails:
                    raise KeyError
        except KeyError:
            self.over()
        self.at_the_mean()

    @rule(index=st.integers(0, 9), inside=st.booleans())
    def evaluate(self, index: int, inside: bool) -> None:
        before = [p.detach().clone() for p in self.params]
        held = self.optimizer.holds_sample
        with self.optimizer.sampled_params(sample=index):
            if inside:
                known = [p for p in self.params if p in self.optimizer.state]
                assert all(torch.equal(self.optimizer.mean_of(p), self.means[p]) for p in known)
        if held:
            assert all(map(torch.equal, before, self.params))
        else:
            self.at_the_mean()

    @rule()
    def step(self) -> None:
        lost = self.with_gradient - self.in_sample
        counts = {p: self.count(p) for p in self.params}
        if not self.in_sample or lost or not self.with_gradient:
            refusal = refused(self.optimizer.step)
            if not self.in_sample:
                assert "step() without a sample" in refusal
            elif lost:
                self.lost(refusal)
            else:  # no gradient: refused where none ever had one
                assert not refusal or "has had a gradient" in refusal, refusal
            self.optimizer.discard_samples()
            self.over()
            return
        self.optimizer.step()
        for p in self.params:
            took = p in self.with_gradient
            assert self.count(p) == counts[p] + took
            mean = self.optimizer.mean_of(p)
            assert took or torch.equal(mean, self.means[p])
            self.means[p] = mean.clone()
        fused = self.optimizer.holds_sample
        self.over()
        if fused:
            self.drawn()

    def count(self, p: nn.Parameter) -> int:
        return int(self.optimizer.state[p].get("step", 0)) if p in self.optimizer.state else 0

    @rule()
    def forget(self) -> None:
        self.optimizer.discard_samples()
        self.over()
        self.at_the_mean()

    # ---- what is done to the parameters ------------------------------------------------------------------------------

    @rule(number=numbers)
    def freeze(self, number: int) -> None:
        self.pick(number).requires_grad_(False)

    @rule(number=numbers)
    def unfreeze(self, number: int) -> None:
        self.pick(number).requires_grad_(True)

    def new(self) -> nn.Parameter:
        self.born += 1
        p = parameter(self.born)
        self.means[p] = p.detach().clone()
        return p

    @rule(number=numbers, whole=st.booleans())
    def replace(self, number: int, whole: bool) -> None:
        self.params[number % len(self.params)] = self.new()
        self.put(whole)

    @precondition(lambda self: len(self.params) < 4)
    @rule(whole=st.booleans())
    def append(self, whole: bool) -> None:
        self.params.append(self.new())
        self.put(whole)

    @precondition(lambda self: len(self.params) > 1)
    @rule(number=numbers, whole=st.booleans())
    def drop(self, number: int, whole: bool) -> None:
        del self.params[number % len(self.params)]
        self.put(whole)

    def put(self, whole: bool) -> None:
        if whole:
            self.optimizer.param_groups[0]["params"] = list(self.params)
        else:
            self.group[:] = self.params
        self.saved = None
        self.with_gradient &= set(self.params)

    @precondition(lambda self: not self.optimizer.holds_sample)
    @rule(number=numbers, value=st.sampled_from([-1.0, 0.5]))
    def edit(self, number: int, value: float) -> None:
        p = self.pick(number)
        with torch.no_grad():
            p.fill_(value)
        self.means[p] = p.detach().clone()

    @precondition(lambda self: not self.in_sample)
    @rule(number=numbers, what=st.sampled_from(["clone", "clear", "pop"]))
    def handle_state(self, number: int, what: str) -> None:
        p = self.pick(number)
        if p not in self.optimizer.state:
            return
        if what == "clone":
            self.optimizer.state[p] = {key: value.clone() for key, value in self.optimizer.state[p].items()}
        elif what == "clear":
            self.optimizer.state[p].clear()
        else:
            self.optimizer.state.pop(p)

    # ---- what is done to the optimizer -------------------------------------------------------------------------------

    @rule(built_before=st.booleans())
    def collect(self, built_before: bool) -> None:
        """It goes, with its sample in the weights or not, before or after the next one is built."""
        old, means = [self.optimizer], self.means
        del self.optimizer
        if built_before:
            self.build()
        old.clear()
        assert all(torch.equal(p, mean) for p, mean in means.items())
        if not built_before:
            self.build()

    @rule()
    def save(self) -> None:
        self.saved = list(self.params), copy.deepcopy(self.optimizer.state_dict())

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self) -> None:
        assert self.saved is not None
        params, state_dict = self.saved
        self.optimizer.load_state_dict(copy.deepcopy(state_dict))
        self.over()
        for i, p in enumerate(params):
            if i in state_dict["state"]:
                self.means[p] = state_dict["state"][i]["mean"].clone()

    @rule()
    def copied(self) -> None:
        found: list[Any] = []
        refusal = refused(lambda: found.extend(copy.deepcopy([self.params, self.optimizer, list(self.means.items())])))
        if refusal:
            assert "since this step's sample was drawn" in refusal
            return
        sampled = [p in self.in_sample for p in self.params]
        self.params, self.optimizer, means = found
        self.means = dict(means)
        self.saved = None
        twins = {id(p) for p in self.params}
        assert all(id(p) in twins for p in self.group)
        self.with_gradient = set()  # torch copies parameters without their gradients
        self.in_sample = {p for p, was in zip(self.params, sampled, strict=True) if was}

    @rule()
    def autocast(self) -> None:
        p = self.params[0]
        if p.ndim != 2 or not p.requires_grad or self.optimizer.holds_sample:
            return
        eye = torch.eye(p.shape[1])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for sample in (1, 2):
                with self.optimizer.sampled_params(sample=sample):
                    assert torch.equal(nn.functional.linear(eye, p), p.detach().bfloat16().t())
            assert torch.equal(nn.functional.linear(eye, p), self.means[p].bfloat16().t())

    # ---- what always holds -------------------------------------------------------------------------------------------

    def at_the_mean(self) -> None:
        assert not self.optimizer.holds_sample
        assert all(torch.equal(p, mean) for p, mean in self.means.items())

    @invariant()
    def the_means_are_kept(self) -> None:
        if not hasattr(self, "optimizer"):
            return
        for p in self.params:
            if p in self.optimizer.state:
                assert torch.equal(self.optimizer.mean_of(p), self.means[p])
        if not self.optimizer.holds_sample:
            self.at_the_mean()

    def teardown(self) -> None:
        if hasattr(self, "optimizer"):
            means: dict[Tensor, Tensor] = dict(self.means)
            del self.optimizer
            assert all(torch.equal(p, mean) for p, mean in means.items())


_MASKS, _NUMBERS, _FLAGS = range(1, 16), range(8), (False, True)
# Every rule with what its arguments may be, and when it is legal: for walks that hypothesis does not steer.
_RULES: dict[str, dict[str, Sequence[Any]]] = {
    "train": {},
    "eval": {},
    "backward": {"mask": _MASKS},
    "block": {"fails": _FLAGS, "mask": _MASKS},
    "evaluate": {"index": range(10), "inside": _FLAGS},
    "step": {},
    "forget": {},
    "freeze": {"number": _NUMBERS},
    "unfreeze": {"number": _NUMBERS},
    "replace": {"number": _NUMBERS, "whole": _FLAGS},
    "append": {"whole": _FLAGS},
    "drop": {"number": _NUMBERS, "whole": _FLAGS},
    "edit": {"number": _NUMBERS, "value": (-1.0, 0.5)},
    "handle_state": {"number": _NUMBERS, "what": ("clone", "clear", "pop")},
    "collect": {"built_before": _FLAGS},
    "save": {},
    "load": {},
    "copied": {},
    "autocast": {},
}
_LEGAL: dict[str, Callable[[Events], bool]] = {
    "backward": lambda events: events.optimizer.holds_sample,
    "block": lambda events: not events.optimizer.holds_sample and not events.in_sample,
    "append": lambda events: len(events.params) < 4,
    "drop": lambda events: len(events.params) > 1,
    "edit": lambda events: not events.optimizer.holds_sample,
    "handle_state": lambda events: not events.in_sample,
    "load": lambda events: events.saved is not None,
}


def happen(events: Events, random: Random) -> None:
    """One random legal event."""
    name = random.choice([rule for rule in _RULES if rule not in _LEGAL or _LEGAL[rule](events)])
    getattr(events, name)(**{key: random.choice(values) for key, values in _RULES[name].items()})
    events.the_means_are_kept()
