"""FSDP2, HSDP and tensor parallelism: local shards, the noise of the unsharded tensor, and so the same trajectory.

Every rank sees the same data where bits are compared: the average of 2 or 4 equal gradients is exact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.fsdp_checkpoints import (
    full_state_dict,
    load_checkpoint,
    refusals,
    save_checkpoint,
    saved_under_a_sample,
    take_over,
)
from tests.support.fsdp_training import (
    accumulated,
    collectives_in_a_step,
    converted,
    monte_carlo,
    one_bad_shard,
    partial_gradient,
    plain,
    sample_after_evaluation,
    saved_beside_the_model,
    scaled,
    swapped,
    trained,
)
from tests.support.helpers import assert_same, relative_error, slow_but
from tests.support.ranks import Ranks

STEPS = 4
# A gradient is a mean over 8 rows behind three sums of at most 8 products, which parts of the batch add up in another
# order: 32 roundings of 2^-24 of the greatest terms at most, in each of 4 steps, and again through the weights that
# they moved.
ROUNDING = 2 * 4 * 32 * 2**-24
COMPILED = ("cpu", "cuda")  # the host decides whether to step, or the device


@pytest.mark.parametrize(
    ("kind", "world"),
    [("FSDP2", 1), ("FSDP2", 2), ("FSDP2", 4), ("HSDP", 4), ("mixed", 2), ("columns", 2), ("columns", 4)],
)
def test_the_trajectory_is_that_of_one_process(ranks: Ranks, kind: str, world: int) -> None:
    sampled, state = plain(STEPS, "cpu")
    for seen, left in ranks.run(world, trained, kind, STEPS, "cpu", True, None):
        for mine, theirs in zip(sampled, seen, strict=True):
            assert_same(mine, theirs)
        assert_same(state, left)


@pytest.mark.parametrize("name", slow_but(["reference", "cuda", "triton"], "reference", "cuda"))
def test_every_backend_trains_shards(ranks: Ranks, name: str) -> None:
    steps, kind = (1, "columns") if name == "triton" else (STEPS, "FSDP2")
    sampled, state = plain(steps, "cpu")
    for seen, left in ranks.run(2, trained, kind, steps, name, True, None):
        for mine, theirs in zip(sampled, seen, strict=True):
            assert_same(mine, theirs)
        assert_same(state, left)


@pytest.mark.parametrize(
    ("kind", "world", "clip"), [("FSDP2", 4, None), ("FSDP2", 2, 0.01), ("HSDP", 4, None), ("tensor parallel", 4, None)]
)
def test_shared_data(ranks: Ranks, kind: str, world: int, clip: float | None) -> None:
    """Each rank has a part of the batch (under tensor parallelism a part of the sums), which rounds differently."""
    same = kind == "tensor parallel"
    (_, state), first = plain(STEPS, "cpu", clip=clip), plain(1, "cpu")[0]
    for seen, left in ranks.run(world, trained, kind, STEPS, "cpu", same, clip):
        assert_same(first[0], seen[0])  # the noise has the same bits
        for key, value in state.items():
            assert relative_error(left[key], value) < ROUNDING, key


def test_the_ranks_agree(ranks: Ranks) -> None:
    first, *others = ranks.run(4, trained, "FSDP2", STEPS, "cpu", False, None)
    for other in others:
        assert_same(first[1], other[1])


def test_gathered_weights_are_gathered_anew(ranks: Ranks) -> None:
    for seen in ranks.run(2, sample_after_evaluation, "cpu"):
        assert all(seen), seen


@pytest.mark.parametrize("micro", [2, 4])
def test_accumulation_without_communication(ranks: Ranks, micro: int) -> None:
    expected = accumulated("plain", micro, "cpu")
    for left in ranks.run(2, accumulated, "FSDP2", micro, "cpu"):
        for key, value in expected.items():
            assert relative_error(left[key], value) < ROUNDING, key


def test_several_samples_of_which_one_is_replayed(ranks: Ranks) -> None:
    expected = monte_carlo("plain", "cpu")
    for left in ranks.run(2, monte_carlo, "FSDP2", "cpu"):
        assert_same(expected, left)


@pytest.mark.parametrize("backend", COMPILED)
def test_grad_scaler_skips_on_every_rank(ranks: Ranks, backend: str) -> None:
    expected, skipped, scale = scaled("plain", "cpu", None)
    assert skipped == 1 and scale == 2.0**7
    for left, count, reached in ranks.run(2, scaled, "FSDP2", backend, 1):
        assert_same(expected, left)
        assert (count, reached) == (skipped, scale)


@pytest.mark.parametrize("backend", COMPILED)
def test_a_bad_shard_skips_the_step_on_every_rank(ranks: Ranks, backend: str) -> None:
    for before, after, skipped, message in ranks.run(2, one_bad_shard, backend, "skip"):
        assert_same(before, after)
        assert skipped == 1 and message == ""


@pytest.mark.parametrize("backend", COMPILED)
def test_a_bad_shard_is_an_error_where_it_is(ranks: Ranks, backend: str) -> None:
    messages = [message for *_, message in ranks.run(2, one_bad_shard, backend, "raise")]
    assert "gradient of first.weight holds inf or nan" in messages[0] and messages[1] == ""


def test_a_step_does_not_communicate(ranks: Ranks) -> None:
    assert ranks.run(2, collectives_in_a_step, "cpu") == [0, 0]


@pytest.mark.parametrize(
    ("trained_before", "first"), [(0, "state dict"), (2, "state dict"), (2, "evaluation"), (2, "training")]
)
def test_parameters_that_accelerate_exchanges_for_shards(ranks: Ranks, trained_before: int, first: str) -> None:
    for left in ranks.run(2, swapped, trained_before, first, "cpu"):
        assert_same(plain(4, "cpu")[1], left)


def test_a_sharded_model_that_changes_its_dtype_is_followed(ranks: Ranks) -> None:
    expected = converted("plain", "cpu")
    assert expected["first.weight"].dtype == torch.bfloat16
    for left in ranks.run(2, converted, "FSDP2", "cpu"):
        assert_same(expected, left)


def test_a_gradient_that_is_not_summed_yet(ranks: Ranks) -> None:
    for distributed, single in ranks.run(2, partial_gradient, "cpu"):
        assert torch.equal(distributed, single) and not torch.equal(single, torch.arange(6.0))


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_on_four(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("checkpoint") / "step-3")
    return folder, ranks.run(4, save_checkpoint, folder, "FSDP2", 3, "cpu")[0]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), [("FSDP2", 2), ("FSDP2", 1), ("HSDP", 4), ("plain", 1), ("columns", 2)])
def test_a_checkpoint_of_four_ranks(
    ranks: Ranks, saved_on_four: tuple[str, dict[str, Any]], kind: str, world: int
) -> None:
    """torch.distributed.checkpoint brings it to any other number of ranks; training goes on as if uninterrupted."""
    folder, saved = saved_on_four
    uninterrupted = plain(5, "cpu")[1]
    for loaded, continued in ranks.run(world, load_checkpoint, folder, kind, 3, 2, "cpu"):
        assert_same(saved, loaded)
        assert_same(uninterrupted, continued)


def test_a_checkpoint_of_one_process_is_loaded_on_two(ranks: Ranks, tmp_path: Path) -> None:
    saved = ranks.run(1, save_checkpoint, str(tmp_path / "plain"), "plain", 3, "cpu")[0]
    for loaded, continued in ranks.run(2, load_checkpoint, str(tmp_path / "plain"), "FSDP2", 3, 2, "cpu"):
        assert_same(saved, loaded)
        assert_same(plain(5, "cpu")[1], continued)


def test_the_full_state_dict(ranks: Ranks) -> None:
    state = plain(3, "cpu")[1]
    full = ranks.run(2, full_state_dict, "FSDP2", "cpu")[0]["state"]
    for name, entry in full.items():
        for key, value in entry.items():
            assert torch.equal(value, state[f"{name}.{key}"]), (name, key)


def test_a_plain_optimizers_state_dict_is_cut_into_shards(ranks: Ranks) -> None:
    from ivon_kernels import IVON
    from tests.support.fsdp_training import OPTIONS, build, steps

    model = build()
    optimizer = IVON(model.named_parameters(), backend="cpu", **OPTIONS)
    steps(model, optimizer, 3)
    for left in ranks.run(2, take_over, optimizer.state_dict(), dict(model.state_dict()), "FSDP2", "cpu"):
        assert_same(plain(5, "cpu")[1], left)


@pytest.mark.parametrize("when", ["after forward", "after backward"])
def test_a_save_under_a_sample_writes_the_mean(ranks: Ranks, when: str) -> None:
    for mean, found in ranks.run(2, saved_under_a_sample, "cpu", when):
        assert_same(mean, found)


def test_the_posterior_beside_a_saved_model_is_gathered(ranks: Ranks, tmp_path: Path) -> None:
    from ivon_kernels.posterior import Posterior

    found = ranks.run(2, saved_beside_the_model, str(tmp_path))[0]
    saved = Posterior.load(tmp_path)
    assert all(torch.equal(saved[name].mean, found[f"{name}.mean"]) for name in saved) and len(saved) == 6


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals(ranks: Ranks) -> None:
    for found in ranks.run(4, refusals):
        assert "IVON does not support Partial(sum); use Shard(0)" in found["partial"]
        assert "IVON does not support shards of two inner dimensions" in found["inner"]
        assert "IVON does not support _StridedShard" in found["strided"]
        assert "sync=True draws other noise on every rank" in found["sync"]
        assert "none of the optimizer's 6 parameters has had a gradient" in found["early"]
        assert "built after fully_shard()" in found["early"]
        assert "FSDP1" in found["FSDP1"] and "use torch.distributed.fsdp.fully_shard" in found["FSDP1"]
