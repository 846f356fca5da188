"""What was promised, held against what was measured: one row for each target.

Each target is the worst of its cases. On a GPU a case of ours takes the faster backend, as `backend=None` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.speed import host, model, steps
from benchmarks.speed.contender import BASELINE, IVON_OPT, bytes_per_element
from benchmarks.speed.peers import ONE_LAUNCH, PLAIN
from benchmarks.speed.record import Record
from benchmarks.speed.workloads import DTYPES


class Target(NamedTuple):
    """A bound for a figure, a column of :func:`figures`, in the rows that a query finds there."""

    name: str
    query: str
    bound: float
    figure: str = "ratio"
    at_least: bool = False


_CPU = f"kind == 'cpu' and dtype == 'float32' and mode == '{PLAIN}' and quantity =="
_GPU = f"kind == 'cuda' and mode == '{PLAIN}' and quantity =="
_ONE = f"kind == 'cuda' and mode == '{ONE_LAUNCH}' and quantity == 'kernel'"
_LLAMA = "'step' and workload == 'llama-2-7b-r8-qv'"
_ADAPTERS = "workload.str.startswith('llama-2-7b')"
_WIDE = "GPU, 40M and above: bandwidth / copy"
_HUGE = f"{_ONE} and dtype == 'float32' and tensors == 1 and elements >= 100_000_000"
_TRAINING = f"{_GPU} '{model.WHOLE}'"
_FAST = "GPU, one launch / fused AdamW, float32, 100M and 1B"
_LORA = "GPU, 7B LoRA training step"
_HOST = "contender == '{}' and workload == '{}-tiny' and quantity == '{}'"

TARGETS = (
    Target("CPU, Llama-2-7B r=8: ivon-opt / sample + step", f"{_CPU} {_LLAMA}", 10, "ivon_opt", at_least=True),
    Target("CPU, Llama-2-7B r=8: sample + step / fused AdamW", f"{_CPU} {_LLAMA}", 3),
    Target("CPU, Llama-2-7B r=8: one pass / fused AdamW", f"{_CPU} {_LLAMA}".replace(PLAIN, ONE_LAUNCH), 2.3),
    Target("CPU, 128 tensors of 16x64: sample + step / fused AdamW", f"{_CPU} 'step' and workload == '128-tiny'", 0.7),
    Target("CPU, 450 tensors of 16x64: sample + step / fused AdamW", f"{_CPU} 'step' and workload == '450-tiny'", 0.7),
    Target("CPU: bytes of state per float32 element", f"{_CPU} '{steps.STATE}'", 16, "p50"),
    Target("CPU: growth of the resident set in a step, MiB", f"{_CPU} '{steps.GROWTH}'", 1, "mebibytes"),
    Target("CPU: time of one tensor against that of a tenth of it", f"{_CPU} 'step'", 11, "over_a_tenth"),
    Target(f"{_WIDE}, sample + step", f"{_GPU} 'kernel' and elements >= 39_000_000", 0.88, "copy_share", at_least=True),
    Target(f"{_WIDE}, one launch", f"{_ONE} and elements >= 39_000_000", 0.88, "copy_share", at_least=True),
    Target("GPU, LoRA: wall time sample + step / fused AdamW", f"{_GPU} 'step' and {_ADAPTERS}", 1.2),
    Target("GPU, 128 tensors: wall time sample + step / fused AdamW", f"{_GPU} 'step' and tensors == 128", 1),
    Target("GPU, Llama-2-7B r=8: wall time ivon-opt / sample + step", f"{_GPU} {_LLAMA}", 20, "ivon_opt", True),
    Target(f"{_FAST}: kernel time", _HUGE, 1.15),
    Target(f"{_FAST}: its bytes at the copy's speed", _HUGE, 1.15, "over_adamw_bytes"),
    Target(f"{_LORA}: IVON / fused AdamW", _TRAINING, 1.01),
    Target(f"{_LORA}: peak bytes over AdamW's per LoRA element", _TRAINING, 16, "extra_peak"),
    *(
        Target(f"host, {n} tensors: us of {what}, {state} gradients", _HOST.format(contender, n, quantity), most, "p50")
        for contender, what in ((host.PATH, "addresses + arguments + launch"), (host.WHOLE, "train() + step()"))
        for n, most in ((128, 30), (450, 100))
        for quantity, state in ((host.SAME, "same"), (host.FRESH, "fresh"))
    ),
)


def figures(record: Record) -> pd.DataFrame:
    """What was measured, of several backends the fastest, with `kind`, `mode` and `place`, and the figures of targets.

    - `ivon_opt`: ivon-opt's time over the row's, both as multiples of the baseline of the same round
    - `over_a_tenth`: time of one tensor over that of one with a tenth of its elements, where that is not in the caches
    - `over_adamw_bytes`: time over that in which the copy moves fused AdamW's bytes
    - `extra_peak`: peak memory per element over the baseline's
    """
    rows = record.measured().assign(kind=record.device.get("kind"))
    named = rows.contender.str.extract(r"^ivon_kernels (?P<backend>\w+), (?P<mode>.*)$")
    rows["backend"], rows["mode"] = named.backend.fillna(""), named["mode"].fillna(rows.contender)
    case = ["workload", "dtype", "quantity"]
    rows = rows.sort_values("p50", kind="stable").drop_duplicates([*case, "mode"])

    def beside(contender: str, column: str) -> pd.Series:
        """A contender's figure in each row's case."""
        other = rows[rows.contender == contender].set_index(case)[column]
        return rows[case].join(other.rename("other"), on=case).other

    rows["ivon_opt"] = beside(IVON_OPT, "ratio") / rows.ratio
    rows["extra_peak"] = rows.peak_bytes_per_element - beside(BASELINE, "peak_bytes_per_element")
    adamw = rows.dtype.map({name: bytes_per_element(("adamw",), dtype) for name, dtype in DTYPES.items()})
    rows["over_adamw_bytes"] = rows.bytes_per_element / adamw / rows.copy_share
    rows["mebibytes"] = rows.p50 / 2**20
    sizes = ["dtype", "quantity", "contender", "elements"]
    flat = rows[(rows.tensors == 1) & (rows.elements >= 4_000_000)]
    tenth = flat.assign(elements=flat.elements * 10).set_index(sizes).p50.rename("tenth")
    rows["over_a_tenth"] = flat.p50 / flat.join(tenth, on=sizes).tenth
    rows["place"] = [
        ", ".join([row.workload, *[row.dtype] * (row.part == steps.PART), *[row.backend] * (row.kind == "cuda")])
        for row in rows.itertuples()
    ]
    return rows


def judge(target: Target, cases: Mapping[str, float]) -> dict[str, Any]:
    """The worst of a target's cases, by place, against its bound, for the record; no cases: not measured."""
    judged = {"name": target.name, "bound": float(target.bound), "at_least": target.at_least}
    worst = (min if target.at_least else max)(cases, key=cases.__getitem__, default=None)
    if worst is None:
        return {**judged, "measured": None, "where": "", "met": False, "margin": None, "verdict": "not measured"}
    measured = float(cases[worst])
    margin = round((measured / target.bound - 1) * (1 if target.at_least else -1), 4)
    verdict = f"{'met' if margin >= 0 else 'missed'} by {abs(margin):.1%}"
    return {**judged, "measured": measured, "where": worst, "met": margin >= 0, "margin": margin, "verdict": verdict}


def targets(record: Record) -> list[dict[str, Any]]:
    """All of them: those of the other kind of device are not measured."""
    rows = figures(record)
    return [judge(t, rows.query(t.query).set_index("place")[t.figure].dropna().to_dict()) for t in TARGETS]
