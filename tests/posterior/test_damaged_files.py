"""Thousands of damaged posterior files and state dicts: none is accepted, none crashes, none changes anything."""

from __future__ import annotations

import copy
import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_kernels import IVON
from ivon_kernels.posterior import Posterior, PosteriorFileError
from ivon_kernels.posterior.file import FILE

AT_ONCE = 500
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))]  # 10,000 in all


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def optimizer_of(net: nn.Module) -> IVON:
    return IVON(net.named_parameters(), lr=0.1, ess=100.0, seed=1)


def trained() -> tuple[nn.Sequential, IVON]:
    net = network()
    optimizer = optimizer_of(net)
    for _ in range(2):
        optimizer.train()
        net(torch.ones(2, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    net, optimizer = trained()
    folder = tmp_path_factory.mktemp("whole")
    optimizer.posterior(net).save(folder)
    return (folder / FILE).read_bytes()


def damaged(content: bytes, random: Random) -> bytes:
    """Bits turned, pieces cut out, doubled, moved or zeroed, a header that says something else."""
    data = bytearray(content)
    begin = random.randrange(len(data))
    end = min(len(data), begin + random.choice((1, 2, 8, 64, 512)))
    kind = random.choice(("bit", "cut", "double", "zero", "end", "noise", "header", "length"))
    if kind == "bit":
        data[begin] ^= 1 << random.randrange(8)
    elif kind == "cut":
        del data[begin:end]
    elif kind == "double":
        data[begin:begin] = data[begin:end]
    elif kind == "zero":
        data[begin:end] = bytes(end - begin)
    elif kind == "end":
        del data[begin:]
    elif kind == "noise":
        data[begin:end] = random.randbytes(end - begin)
    elif kind == "length":
        data[:8] = struct.pack("<Q", random.choice((0, 1, len(data), 2**40, 2**63, random.randrange(len(data)))))
    else:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        part = header["__metadata__"] if random.random() < 0.7 else header[random.choice(sorted(header))]
        part[random.choice(sorted(part))] = random.choice(
            ("", "null", "[]", "{}", "1e999", "-1", '"x"', "0", "[[1, 2]]")
        )
        text = json.dumps(header).encode()
        data = bytearray(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return bytes(data)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_damaged_file_is_accepted(content: bytes, seed: int, tmp_path: Path) -> None:
    random = Random(seed)
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / FILE).write_bytes(content)
    whole = Posterior.load(tmp_path / "whole")
    for number in range(AT_ONCE):
        (tmp_path / FILE).write_bytes(damaged(content, random))
        loaded, refusal = attempt(lambda: Posterior.load(tmp_path))
        if loaded is None:
            assert str(tmp_path) in refusal, (seed, number)
        else:  # a damage that changes nothing: zeros where zeros were, blanks in the header
            assert same_posterior(loaded, whole), (seed, number)


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """What comes back, or the one sentence of the refusal; any other error is the test's."""
    try:
        return call(), ""
    except (PosteriorFileError, ValueError, TypeError) as error:
        return None, str(error) or "nothing is said"


def same_posterior(one: Posterior, other: Posterior) -> bool:
    return (
        one.seed == other.seed
        and list(one) == list(other)
        and all(
            torch.equal(a.mean, b.mean)
            and torch.equal(a.hess, b.hess)
            and (a.index, a.ess, a.weight_decay) == (b.index, b.ess, b.weight_decay)
            for a, b in zip(one.values(), other.values(), strict=True)
        )
    )


# ---- state dicts -----------------------------------------------------------------------------------------------------

_WRONG: tuple[Any, ...] = (
    *(None, "x", -1, 1.5, [], {}, object(), float("nan"), float("-inf")),
    *(
        torch.tensor(-1),
        torch.zeros(3, 3, 3),
        torch.full((4, 3), float("nan")),
        torch.zeros(4, 3, dtype=torch.complex64),
    ),
)


def spoil(saved: dict[str, Any], random: Random) -> None:
    """Something is deleted or replaced, anywhere."""
    place: Any = random.choice(
        [
            *(saved, saved["state"], saved["param_groups"]),
            *(random.choice(list(saved["state"].values())) for _ in range(6)),
            *(saved["param_groups"][0] for _ in range(4)),
        ]
    )
    keys = list(range(len(place))) if isinstance(place, list) else list(place)
    key = random.choice(keys)
    if random.random() < 0.3:
        del place[key]
    else:
        place[key] = random.choice(_WRONG)


def everything(net: nn.Module, optimizer: IVON) -> list[Any]:
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
    return [*groups, *(p.detach().clone() for p in net.parameters()), *state]


def equal(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_no_damaged_state_dict_is_accepted(seed: int) -> None:
    random = Random(seed)
    saved = trained()[1].state_dict()
    net = network()
    optimizer = optimizer_of(net)
    before = everything(net, optimizer)
    for number in range(AT_ONCE):
        broken = copy.deepcopy(saved)
        spoil(broken, random)
        _, refusal = attempt(functools.partial(optimizer.load_state_dict, broken))
        if refusal:
            assert refusal != "nothing is said" and equal(everything(net, optimizer), before), (seed, number, refusal)
        else:
            # What is left is whole: an entry that is missing starts anew, as in torch, and others' keys are others'.
            accepted = optimizer.state_dict()
            for i, entry in accepted["state"].items():
                if i in broken["state"]:
                    assert all(torch.equal(entry[key], saved["state"][i][key]) for key in entry), (seed, number)
            net = network()
            optimizer = optimizer_of(net)
