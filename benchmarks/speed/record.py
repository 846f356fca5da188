"""The record of a run: `speed.json`. Everything that is shown, and every comparison of two runs, is made from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
FILE = "speed.json"


def write_json(path: Path, record: dict[str, Any]) -> None:
    """The record that a figure needs to exist."""
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Measurement:
    """One quantity of one contender on one workload; `workload`, `dtype`, `contender` and `quantity` name it."""

    part: str  # of the suite: what was run together replaces what was measured before
    workload: str
    dtype: str
    contender: str
    ours: bool
    quantity: str
    unit: str
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    rounds: Sequence[float] = ()  # the median of each round
    baseline: str | None = None
    ratios: Sequence[float] | None = None  # own median over the baseline's, round by round
    ratio: float | None = None  # their median
    bytes_per_element: int | None = None  # that must move
    gbps: float | None = None
    copy_share: float | None = None  # of the bandwidth of a copy
    peak_bytes_per_element: float | None = None  # of memory, with weights, gradients and state
    error: str | None = None  # why it was not measured

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What it is a measurement of."""
        return self.workload, self.dtype, self.contender, self.quantity


@dataclass
class Record:
    """All measurements of a device, and what they were made with."""

    device: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # of each part
    workloads: dict[str, dict[str, Any]] = field(default_factory=dict)  # title, tensors and elements by name
    targets: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)  # part, what, why
    copy_gbps: dict[str, float] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)

    @property
    def dry_run(self) -> bool:
        """Whether its figures mean nothing."""
        return bool(self.settings.get("dry_run"))

    def find(self, workload: str, dtype: str, contender: str, quantity: str) -> Measurement | None:
        """A measurement that did not fail."""
        key = (workload, dtype, contender, quantity)
        return next((m for m in self.measurements if m.key == key and m.error is None), None)

    def of(self, workload: str, dtype: str, quantity: str | None = None) -> list[Measurement]:
        """The measurements of one workload that did not fail."""
        return [
            m
            for m in self.measurements
            if (m.workload, m.dtype) == (workload, dtype) and m.error is None and quantity in (None, m.quantity)
        ]

    def pairs(self) -> list[tuple[str, str]]:
        """Workloads and dtypes, in their order."""
        return list(dict.fromkeys((m.workload, m.dtype) for m in self.measurements))

    def replace_part(
        self, part: str, measurements: Iterable[Measurement], left_out: Iterable[tuple[str, str]] = ()
    ) -> None:
        """What a part measured, in place of what it had measured before.

        Args:
            part: Its name.
            measurements: All of its measurements.
            left_out: What it did not measure, and why.
        """
        self.measurements = [m for m in self.measurements if m.part != part] + list(measurements)
        self.left_out = [row for row in self.left_out if row["part"] != part]
        self.left_out += [{"part": part, "what": what, "why": why} for what, why in left_out]

    def write(self, out: Path) -> None:
        """As `speed.json`."""
        write_json(out / FILE, {"schema": SCHEMA, **asdict(self)})


def read(out: Path) -> Record | None:
    """The record in a folder, or None if there is none of this schema."""
    path = out / FILE
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if found.pop("schema", None) != SCHEMA:
        return None
    return Record(**{**found, "measurements": [Measurement(**m) for m in found["measurements"]]})
