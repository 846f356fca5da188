"""The pool of ranks itself: it answers by rank, and neither a failure nor a hang of a rank stops the tests after it."""

from __future__ import annotations

import os
import signal
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.ranks import RankError, Ranks


def gathered(value: int) -> tuple[int, list[int], Tensor]:
    mine = torch.tensor([value + dist.get_rank()])
    everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return dist.get_rank(), [int(tensor) for tensor in everyone], torch.rand(3)


def fails_on_rank_1(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "raises":
            raise KeyError("the reason")
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hangs":
            time.sleep(1e6)
        if how == "warns":
            warnings.warn("the reason", stacklevel=1)
    dist.barrier()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_answers(ranks: Ranks, world_size: int) -> None:
    for value in (10, 20):
        answers = ranks.run(world_size, gathered, value)
        assert [rank for rank, _, _ in answers] == list(range(world_size))
        assert all(everyone == list(range(value, value + world_size)) for _, everyone, _ in answers)
        assert all(
            torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(0))) for *_, drawn in answers
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", r"rank 1 of 2:\n(.*\n)*KeyError: 'the reason'"),
        ("warns", r"rank 1 of 2:\n(.*\n)*UserWarning: the reason"),
        ("dies", "rank 1 of 2:\nthe process died"),
        ("hangs", "did not answer in time"),
    ],
)
def test_a_failing_rank_is_reported_and_the_pool_goes_on(ranks: Ranks, how: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=message):
        ranks.run(2, fails_on_rank_1, how, seconds=3.0 if how == "hangs" else 120.0)
    assert time.monotonic() - start < 25.0, "the other rank waited for the failed one"
    assert [rank for rank, _, _ in ranks.run(2, gathered, 0)] == [0, 1]
