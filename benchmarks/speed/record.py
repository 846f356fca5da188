"""The record of a run: `speed.json`. Everything that is shown, and every comparison of two runs, is made from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import UserError

SCHEMA = 1
FILE = "speed.json"


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
    ratios: Sequence[float] = ()  # over the baseline's, round by round
    ratio: float | None = None  # their median
    baseline: str | None = None
    bytes_per_element: int | None = None  # that must move
    gbps: float | None = None
    copy_share: float | None = None  # of the bandwidth of a copy
    peak_bytes_per_element: float | None = None  # of memory, with weights, gradients and state
    error: str | None = None  # why it was not measured


KEY = ["workload", "dtype", "contender", "quantity"]
_FIELDS = (*KEY, "part", "ours", "unit")
_FIGURES = ["p20", "p50", "p80", "ratio", "bytes_per_element", "gbps", "copy_share", "peak_bytes_per_element"]


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
    path: Path | None = None  # where it was read

    @property
    def dry_run(self) -> bool:
        """Whether its figures mean nothing."""
        return bool(self.settings.get("dry_run"))

    def frame(self) -> pd.DataFrame:
        """The measurements as rows, with `tensors` and `elements` of their workloads where it is known."""
        rows = pd.DataFrame([vars(m) for m in self.measurements], columns=list(Measurement.__dataclass_fields__))
        about = pd.DataFrame(self.workloads.values(), list(self.workloads), ["tensors", "elements"]).astype(float)
        # Text as objects: a column of nothing but None would be of numbers, which cannot be joined to text.
        kinds = {name: float if name in _FIGURES else object for name in rows} | {"ours": bool}
        return rows.astype(kinds).join(about, on="workload")

    def measured(self, part: str | None = None) -> pd.DataFrame:
        """The rows that did not fail, of a part or of all."""
        rows = self.frame()
        return rows[rows.error.isna() & (True if part is None else rows.part == part)]

    def replace_part(
        self, part: str, measurements: Iterable[Measurement], left_out: Iterable[tuple[str, str]] = ()
    ) -> None:
        """What a part measured, and what it left out and why, in place of what it had measured before."""
        self.measurements = [m for m in self.measurements if m.part != part] + list(measurements)
        self.left_out = [row for row in self.left_out if row["part"] != part]
        self.left_out += [{"part": part, "what": what, "why": why} for what, why in left_out]

    def write(self, out: Path) -> None:
        """As `speed.json`, without the fields of a measurement that say nothing."""
        kept = [{key: value for key, value in vars(m).items() if value not in (None, ())} for m in self.measurements]
        content = {"schema": SCHEMA, **asdict(self), "measurements": kept}
        del content["path"]
        write_json(out / FILE, content)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """One line for each entry, and for each row of a list of rows; figures with eight digits."""
    rounded = json.loads(json.dumps(record), parse_float=lambda text: float(f"{float(text):.8g}"))
    lines = []
    for key, value in rounded.items():
        rows = isinstance(value, list) and value and isinstance(value[0], dict)
        text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n]" if rows else json.dumps(value)
        lines.append(f"{json.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def read(path: Path) -> Record:
    """Reads a record, a `speed.json`.

    Raises:
        UserError: The file is missing, is no record of the suite, or is one of another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or "schema" not in content:
        raise UserError(f"{path} is no record of the speed suite; `python -m benchmarks speed` writes one, {FILE}")
    if (schema := content.pop("schema")) != SCHEMA:
        raise UserError(f"{path} has schema {schema}, this version reads schema {SCHEMA}; measure again")
    rows = content.get("measurements", [])
    for row in rows:
        if missing := [name for name in _FIELDS if name not in row]:
            raise UserError(f"{path}: a measurement without {', '.join(missing)}: {row.get('contender', row)}")
        row["ratios"] = row.get("ratios") or ()  # where there is no baseline: null in older records
    return Record(**{"device": {}, **content, "measurements": [Measurement(**row) for row in rows], "path": path})
