"""Times side by side in one process, and peak memory in a process for each contender."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks.finetune.model import add_lora
from benchmarks.memory import forget_peak, resident, return_freed_memory
from benchmarks.speed.timing import Timing, timing
from benchmarks.stacking.contenders import CONTENDERS, SEPARATE, STACKED, Setup, prepare, token_batch


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.inference_mode()
def compare(setup: Setup, batch: int, tokens: int, rounds: int, tick: Callable[[], None]) -> list[Timing]:
    """Times the contenders in turn, round after round, so that a drift of the machine meets all of them.

    Stacking and undoing it is done outside the measured time: once for all batches of a data set.

    Args:
        setup: Model and posterior.
        batch: Sequences in the batch.
        tokens: Of each sequence.
        rounds: Turns of each contender, after one that is not counted.
        tick: Called after every turn.

    Returns:
        One row for each contender: milliseconds of all samples together; the ratio is to one pass for each sample.
    """
    inputs = token_batch(setup, batch, tokens)
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(rounds + 1):
        for name in CONTENDERS:
            step = setup.step(name, inputs)
            with setup.stacked() if name == STACKED else contextlib.nullcontext() as stack:
                _synchronize()
                begin = time.perf_counter()
                step(stack)
                _synchronize()
                elapsed = (time.perf_counter() - begin) * 1e3
            if number:
                times[name].append(elapsed)
                tick()
    separate = [[value] for value in times[SEPARATE]]
    return [timing(name, [[value] for value in own], separate) for name, own in times.items()]


def stacking_ms(setup: Setup) -> float:
    """Milliseconds to stack the samples in the model and to undo it."""
    begin = time.perf_counter()
    setup.stacked().remove()
    return (time.perf_counter() - begin) * 1e3


def peak_memory(
    setup: Setup, batches: Sequence[int], tokens: int, rank: int, threads: int, tick: Callable[[], None]
) -> dict[str, list[int | None]]:
    """Peak memory of each contender above the model's own, for each batch size.

    Every contender runs in a process of its own, on a model of the same configuration with random weights.

    Returns:
        Bytes for each batch size by contender; None where the system does not tell.
    """
    result: dict[str, list[int | None]] = {}
    for name in CONTENDERS:
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
            peaks = pool.submit(
                peaks_of,
                name,
                config=setup.config,
                dtype=setup.dtype,
                device=setup.model.device.type,
                rank=rank,
                samples=len(setup.samples),
                batches=batches,
                tokens=tokens,
                threads=threads,
            )
            result[name] = peaks.result()
        tick()
    return result


@torch.inference_mode()
def peaks_of(
    contender: str,
    *,
    config: Any,
    dtype: torch.dtype,
    device: str,
    rank: int,
    samples: int,
    batches: Sequence[int],
    tokens: int,
    threads: int,
) -> list[int | None]:
    """Peak bytes of one contender in this process, over what the model and its posterior take: see `peak_memory`."""
    import transformers

    torch.set_num_threads(threads)
    base: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    setup = prepare(add_lora(base.to(device), seed=0, rank=rank), samples)
    setup.step(CONTENDERS[-1], token_batch(setup, 1, 2))(None)  # what the libraries allocate once
    result: list[int | None] = []
    on_cuda = device == "cuda"
    return_freed_memory()
    try:
        before = torch.cuda.memory_allocated() if on_cuda else resident("VmRSS")
        for batch in batches:
            inputs = token_batch(setup, batch, tokens)
            if on_cuda:
                torch.cuda.reset_peak_memory_stats()
            else:
                forget_peak()
            with setup.stacked() if contender == STACKED else contextlib.nullcontext() as stack:
                setup.step(contender, inputs)(stack)
            peak = torch.cuda.max_memory_allocated() if on_cuda else resident("VmHWM")
            result.append(max(peak - before, 0))
    except OSError:
        return [None] * len(batches)
    return result
