"""Fixtures and settings for every test file."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything asks whether backend triton can be had

import pytest
import torch
from hypothesis import settings

from ivon_kernels import available_backends, backends
from ivon_kernels.backends.triton_launch import interpreted
from tests.support import cuda_emulator
from tests.support.ranks import Ranks

interpreted()  # decides it for good: a test may change the variable later

# The suite gives the same verdict every time; HYPOTHESIS_PROFILE=explore looks further, with fresh examples.
settings.register_profile("suite", deadline=None, max_examples=40, derandomize=True, database=None, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=2000, database=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

# Triton's interpreter takes about 0.3 s for a step of two small tensors, so backend triton runs this part of the front
# end's tests: one or two of each promise. Its kernels are compared with the reference in files of their own.
ON_TRITON = frozenset(
    [
        "test_one_step_equals_the_equations",
        "test_sample_in_step_leaves_the_next_sample",
        "test_a_block_after_a_loop_with_sample_in_step",
        "test_a_raising_block_is_no_sample_for_step",
        "test_discard_samples_forgets_the_unfinished_step",
        "test_the_sample_survives_eval_before_step",
        "test_a_parameter_in_some_blocks_only_averages_over_all_samples",
        "test_a_parameter_that_joins_late_is_debiased_by_its_own_count",
        "test_empty_groups_and_empty_parameters",
        "test_non_finite_gradients_without_names_tell_the_position",
        "test_non_finite_in_an_earlier_sample_is_noticed",
        "test_nonfinite_gradients_can_be_let_through",
        "test_the_step_after_an_error_is_as_if_it_had_not_been",
        "test_huge_finite_gradients_are_no_error",
        "test_a_skipped_step_changes_nothing_and_redraws_nothing",
        "test_found_inf_and_grad_scale_as_attributes",
        "test_found_inf_with_nan_gradients_is_no_error",
        "test_saving_inside_a_sample_saves_the_mean",
        "test_loading_inside_a_sample_leaves_the_mean",
        "test_deepcopy_of_model_and_optimizer_together_keeps_them_together",
        "test_an_edit_is_not_lost_at_other_moments",
        "test_mixed_dtypes_train_as_if_alone",
        "test_scalar_parameters",
        "test_in_place_writes_bump_the_version_counter",
        "test_poisoned_state_is_never_read_outside_its_view",
        "test_a_parameter_set_to_new_data_starts_from_it",
        "test_a_parameter_that_changed_its_dtype",
        "test_a_parameter_whose_storage_moved_is_followed",
        "test_a_parameter_whose_strides_changed_in_place_is_followed",
        "test_evaluation_samples_are_replayable_by_index",
        "test_evaluation_samples_may_be_nested",
        "test_backends_names_what_runs",
        "test_the_seed_decides_the_trajectory",
        "test_diagnostics_change_nothing_and_need_no_step",
    ]
)
ALL_BACKENDS = ("reference", "cpu", "cuda", "triton")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests of the front end that backend triton does not run."""

    def left_out(item: pytest.Item) -> bool:
        params = getattr(getattr(item, "callspec", None), "params", {})
        return params.get("backend") == "triton" and getattr(item, "originalname", "") not in ON_TRITON

    config.hook.pytest_deselected(items=[item for item in items if left_out(item)])
    items[:] = [item for item in items if not left_out(item)]


@pytest.fixture(params=ALL_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend, on CPU tensors: ``cuda`` is its emulator, ``triton`` runs under its interpreter.

    One that is missing is skipped with its reason.
    """
    name = str(request.param)
    if name == "cuda":
        if cuda_emulator.COMPILER is None:
            pytest.skip("the emulator of backend cuda needs a C++ compiler")
        monkeypatch.setitem(backends._BACKENDS, "cuda", cuda_emulator.emulator())
    reason = available_backends()[name]
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    return name


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes that run a function as the ranks of a process group: ``ranks.run(world_size, function, *args)``."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Before the fixtures of modules, whose results tests compare: a matrix product's rounding depends on it."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """The same global seed for every test, and one thread again after one that took more."""
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)
