"""Posterior samples stacked in one forward pass, against a pass for each and one at the mean: time and peak memory."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import torch
from matplotlib import pyplot as plt
from rich.console import Console
from torch import Tensor

from benchmarks import UserError
from benchmarks.environment import environment
from benchmarks.finetune.model import add_lora, load_model
from benchmarks.memory import PeakMemory, return_freed_memory
from benchmarks.speed.clock import clock
from benchmarks.speed.contender import Step
from benchmarks.speed.measure import Row, progress, take_turns, timing
from benchmarks.speed.record import write_json
from benchmarks.speed.report import BASELINE_COLOR, OUR_COLOR, PEER_COLOR, form, save, show, targets_table, written
from benchmarks.speed.targets import Target, judge
from ivon_kernels import IVON, lora
from ivon_kernels.posterior import Posterior

SEPARATE, STACKED, MEAN = "separate passes", "stacked in one pass", "one pass at the mean"
WAYS = {SEPARATE: BASELINE_COLOR, STACKED: OUR_COLOR, MEAN: PEER_COLOR}
_MEGABYTE = 2**20
# How far stacked probabilities may be from separate ones, root mean square, in units of what is estimated: the spread
# of the samples. float32 leaves rounding orders of magnitude below it; that of 16 bits is not small beside sigma.
_TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.3, torch.float16: 0.1}


@dataclass(frozen=True)
class Options:
    """What to measure; see the command's help."""

    model: str | None
    device: str
    samples: int
    batches: Sequence[int]
    tokens: int
    rank: int
    rounds: int
    threads: int
    memory: bool


# ---- what is timed ---------------------------------------------------------------------------------------------------


@dataclass
class Setup:
    """A model in eval mode with an adapter, its posterior, and the numbers of the samples."""

    model: peft.PeftModel
    posterior: Posterior
    samples: tuple[int, ...]

    @property
    def base(self) -> list[Tensor]:
        """The parameters of the model without its adapter."""
        return [param for name, param in self.model.named_parameters() if "lora_" not in name]

    def stack(self) -> lora.Stack:
        """The samples stacked in the model, until they are removed."""
        return lora.stack(self.model, self.posterior, self.samples)

    def logits(self, way: str, tokens: Tensor, stack: lora.Stack | None) -> Tensor:
        """Logits of the last token ``[samples, batch, vocabulary]``; at the mean of one sample."""
        if stack is not None:
            stacked: Tensor = stack.split(self._run(stack.repeat(tokens)))
            return stacked
        if way == MEAN:
            return self._run(tokens)[None]
        outputs = []
        for sample in self.samples:
            with self.posterior.sampled(self.model, sample):
                outputs.append(self._run(tokens))
        return torch.stack(outputs)

    def _run(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits


def prepare(model: peft.PeftModel, samples: int) -> Setup:
    """Gives an adapter random weights and a posterior around them.

    Sigma is 0.01, about what IVON finds in the main job; times do not depend on the values.
    """
    model.eval()
    generator = torch.Generator().manual_seed(0)
    trainable = [param for param in model.parameters() if param.requires_grad]
    with torch.no_grad():
        for param in trainable:
            param.add_(0.02 * torch.randn(param.shape, generator=generator).to(param))
    posterior = IVON(trainable, lr=0.1, ess=1e4, hess_init=1.0, weight_decay=1e-6, seed=0).posterior(model)
    return Setup(model, posterior, tuple(range(samples)))


def token_batch(setup: Setup, batch: int, tokens: int) -> Tensor:
    """Random tokens, the same every time."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, setup.model.config.vocab_size, (batch, tokens), generator=generator).to(setup.model.device)


@torch.inference_mode()
def check(setup: Setup, tokens: Tensor) -> float:
    """Root mean square difference of stacked from separate probabilities, in samples' spreads; UserError if large."""
    expected = setup.logits(SEPARATE, tokens, None).double().softmax(-1)
    with setup.stack() as stack:
        found = setup.logits(STACKED, tokens, stack).double().softmax(-1)
    spread = (expected - expected.mean(0)).square().mean().sqrt()
    difference = float((found - expected).square().mean().sqrt() / spread) if len(setup.samples) > 1 else 0.0
    if not difference <= _TOLERANCE[setup.base[0].dtype]:
        raise UserError(
            f"stacked probabilities differ from those of separate passes by {difference:.2g} of the samples' spread, "
            f"more than rounding in {setup.base[0].dtype}: no time is worth reporting"
        )
    return difference


# ---- what is measured ------------------------------------------------------------------------------------------------


def run(options: Options, out: Path) -> None:
    """Measures, prints the tables, and writes `stacking.json` and `stacking.png` to `out`."""
    torch.set_num_threads(options.threads)
    console, device = Console(), clock(options.device, dry_run=False)
    with console.status("Loading the model"):
        base, _ = load_model(options.model, device=device.device, in_8bit=False)
        setup = prepare(add_lora(base, seed=0, rank=options.rank), options.samples)
    with progress(console) as bar:
        turns = len(WAYS) * ((options.rounds + 1) * len(options.batches) + options.memory)
        task = bar.add_task("checking", total=turns)
        difference = check(setup, token_batch(setup, min(options.batches), options.tokens))
        rows: list[dict[str, Any]] = []
        for batch in options.batches:
            bar.update(task, description=f"batch of {batch}")
            rows += compare(setup, batch, options.tokens, options.rounds, lambda: bar.advance(task))
        if options.memory:
            bar.update(task, description="memory")
            peaks = peak_memory(setup, options, lambda: bar.advance(task))
            rows = [{**row, "peak_bytes": peaks[row["name"]][row["batch"]]} for row in rows]
    with setup.stack() as stack:
        adapter_bytes, base_bytes = stack.nbytes, sum(param.nbytes for param in setup.base)
    record = {
        **asdict(options),
        "model": options.model or "SmolLM2-135M-Instruct",
        "dtype": str(setup.base[0].dtype),
        "rows": rows,
        "stacking_ms": device.wall_ms(Step(lambda: setup.stack().remove()), 1)[0],
        "base_bytes": base_bytes,
        "adapter_bytes": adapter_bytes,
        "difference_in_spreads": difference,
        "targets": _targets(rows, adapter_bytes / base_bytes, options),
        "load_average": os.getloadavg()[0],
        "environment": environment(("torch", "ivon-kernels", "transformers", "peft")),
    }
    print_tables(console, record)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "stacking.json", record)
    plot(out / "stacking.png", record)
    console.print(f"Record and plot: {out / 'stacking.json'}, {out / 'stacking.png'}")


def _targets(rows: list[dict[str, Any]], share: float, options: Options) -> list[dict[str, Any]]:
    ratios = {f"batch {row['batch']}": row["ratio"] for row in rows if row["name"] == STACKED}
    first = {name: ratio for name, ratio in ratios.items() if name == "batch 1"}
    batches = ", ".join(map(str, options.batches))
    return [
        judge(Target(f"batch 1 of {options.tokens} tokens: stacked / separate passes", "", 0.6), first),
        judge(Target(f"batches of {batches}: the largest such ratio", "", 1.0), ratios),
        judge(Target("memory of the stacked adapters in % of the base", "", 1.0), {"": 100 * share}),
    ]


@torch.inference_mode()
def compare(setup: Setup, batch: int, tokens: int, rounds: int, after: Callable[[], None]) -> list[dict[str, Any]]:
    """Times the three ways in turn, round after round; the first round is not counted, nor is stacking.

    A row is one way: milliseconds of all samples together, and their ratio to one pass for each sample.
    """
    inputs, device = token_batch(setup, batch, tokens), clock(setup.model.device.type, dry_run=False)
    rows = [Row(way) for way in WAYS]

    def turn(number: int, done: int) -> dict[str, list[float]]:
        way = rows[number].name
        with setup.stack() if way == STACKED else nullcontext() as stack:
            return {way: device.wall_ms(Step(lambda: setup.logits(way, inputs, stack)), 1)}

    take_turns(rows, turn, rounds + 1, after=after)
    if failed := [row for row in rows if row.error]:
        raise UserError(f"{failed[0].name}: {failed[0].error}")
    times = {row.name: row.times[row.name][1:] for row in rows}
    found = {way: timing(own, times[SEPARATE]) for way, own in times.items()}
    return [
        {"batch": batch, "name": way, "p20": t.p20, "p50": t.p50, "p80": t.p80, "ratio": t.ratio}
        for way, t in found.items()
    ]


def peak_memory(setup: Setup, options: Options, after: Callable[[], None]) -> dict[str, dict[int, int | None]]:
    """Peak bytes above the model's own by way and batch size, each way in a process of its own."""
    result = {}
    for way in WAYS:
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                peaks = pool.submit(peaks_of, way, setup.model.config, setup.base[0].dtype, options).result()
            except BrokenProcessPool as error:
                raise UserError(f"a process that measured memory ended: {error}") from error
        result[way] = dict(zip(options.batches, peaks, strict=True))
        after()
    return result


@torch.inference_mode()
def peaks_of(way: str, config: Any, dtype: torch.dtype, options: Options) -> list[int | None]:
    """Peak bytes of one way in this process, over what a model of this configuration and its posterior take.

    One figure for each batch size; None where the system does not tell.
    """
    import transformers

    torch.set_num_threads(options.threads)
    base: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    setup = prepare(add_lora(base.to(options.device), seed=0, rank=options.rank), options.samples)
    setup.logits(MEAN, token_batch(setup, 1, 2), None)  # what the libraries allocate once
    return_freed_memory()
    result = []
    with PeakMemory(setup.model.device) as peak:
        for batch in options.batches:
            inputs = token_batch(setup, batch, options.tokens)
            peak.restart()
            with setup.stack() if way == STACKED else nullcontext() as stack:
                setup.logits(way, inputs, stack)
            result.append(peak.so_far())
    return result


# ---- what is shown ---------------------------------------------------------------------------------------------------


def print_tables(console: Console, record: dict[str, Any]) -> None:
    """Time and memory of every batch size and way, and the targets."""
    rows = pd.DataFrame(record["rows"]).reindex(columns=["batch", "name", "p20", "p50", "p80", "ratio", "peak_bytes"])
    rows["megabytes"] = rows.peak_bytes / _MEGABYTE
    times = {f"{name} ms": (name, form(".1f")) for name in ("p20", "p50", "p80")}
    further = {"x separate": ("ratio", form(".2f")), "peak MB": ("megabytes", form(".0f"))}
    table = written(rows, {"": ("name", str), "batch": ("batch", str), **times, **further})
    title = f"{record['samples']} samples, {record['tokens']} tokens a sequence, {record['model']}"
    show(console, f"{title}, rank {record['rank']}", table)
    console.print(
        f"Stacked adapters: {record['adapter_bytes'] / _MEGABYTE:.2f} MB on a base of "
        f"{record['base_bytes'] / _MEGABYTE:.0f} MB; stacking and undoing it takes {record['stacking_ms']:.0f} ms. "
        f"Probabilities differ by {record['difference_in_spreads']:.1g} of the samples' spread from separate passes.\n"
    )
    show(console, "Targets", targets_table(record["targets"]), left=3)


def plot(path: Path, record: dict[str, Any]) -> None:
    """Time against separate passes, and peak memory, for every batch size."""
    rows = pd.DataFrame(record["rows"])
    title = f"{record['samples']} samples of {record['model']}"
    pictures = [(title, "ratio", "time / time of separate passes", "%.2f")]
    if "peak_bytes" in rows and rows.peak_bytes.notna().all():
        rows["peak"] = rows.peak_bytes / _MEGABYTE
        title = f"the model itself: {record['base_bytes'] / _MEGABYTE:.0f} MB"
        pictures.append((title, "peak", "peak memory above the model's own, MB", "%.0f"))
    size = (5.5 * len(pictures), 3.8)
    figure, grid = plt.subplots(1, len(pictures), figsize=size, layout="constrained", squeeze=False)
    for axis, (title, figures, label, text) in zip(grid[0], pictures, strict=True):
        bars = rows.pivot(index="batch", columns="name", values=figures)[list(WAYS)]
        bars.plot.bar(ax=axis, color=WAYS, width=0.8, rot=0, legend=False)
        for container in axis.containers:
            axis.bar_label(container, fmt=text, padding=2, fontsize=7)
        axis.set(xlabel="sequences in the batch", ylabel=label)
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(WAYS))
    grid[0][0].axhline(1.0, color=BASELINE_COLOR, linewidth=1, linestyle="--")
    save(figure, path, dpi=150)
