"""Reading records of the speed suite, and refusing pairs that say nothing about each other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import UserError

SCHEMA = 1
Key = tuple[str, str, str, str]  # workload, dtype, contender, quantity
_FIELDS = ("workload", "dtype", "contender", "ours", "quantity", "unit", "p50", "rounds", "ratios", "baseline", "error")


@dataclass(frozen=True)
class Record:
    """One `speed.json`."""

    path: Path
    content: dict[str, Any]
    measurements: dict[Key, dict[str, Any]]

    @property
    def versions(self) -> dict[str, str | None]:
        """Versions of the packages."""
        return dict(self.content.get("environment", {}).get("versions", {}))

    @property
    def commit(self) -> str:
        """The commit that was measured."""
        return str(self.content.get("environment", {}).get("commit") or "unknown commit")


def read(path: Path) -> Record:
    """Reads a record.

    Raises:
        UserError: The file is missing, is no record of the suite, or is one of another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or "schema" not in content:
        raise UserError(f"{path} is no record of the speed suite; `python -m benchmarks speed` writes one, speed.json")
    if content["schema"] != SCHEMA:
        raise UserError(f"{path} has schema {content['schema']}, this version compares schema {SCHEMA}; measure again")
    measurements: dict[Key, dict[str, Any]] = {}
    for m in content.get("measurements", ()):
        if missing := [field for field in _FIELDS if field not in m]:
            raise UserError(f"{path}: a measurement without {', '.join(missing)}: {m.get('contender', m)}")
        key = (m["workload"], m["dtype"], m["contender"], m["quantity"])
        if key in measurements:
            raise UserError(f"{path} has two measurements of {', '.join(key)}")
        measurements[key] = m
    return Record(path, content, measurements)


def refuse_unlike(old: Record, new: Record) -> None:
    """Refuses two records whose figures differ for other reasons than the code.

    Raises:
        UserError: Another device, processor or number of threads, or no measurement in common.
    """
    before, after = _machine(old), _machine(new)
    for what, was in before.items():
        now = after[what]
        if was != now:
            raise UserError(f"other machine or settings: {what} is {was!r} in {old.path} and {now!r} in {new.path}")
    if not old.measurements.keys() & new.measurements.keys():
        raise UserError(f"{old.path} and {new.path} have no measurement in common")


def _machine(record: Record) -> dict[str, Any]:
    """What must be equal. Drivers, systems and packages may differ: they are a reason to compare."""
    device, environment = record.content.get("device", {}), record.content.get("environment", {})
    return {
        "device": device.get("name"),
        "kind of device": device.get("kind"),
        "processor": environment.get("processor"),
        "cores": environment.get("cores"),
        "threads": device.get("threads"),
        "dry run": bool(record.content.get("settings", {}).get("dry_run")),
    }
