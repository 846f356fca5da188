"""The sharding benchmark: what it measures of tiny shards, what it writes, and that it names a rank that fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import UserError, sharding
from benchmarks.ranks import world
from benchmarks.speed.workloads import Workload

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "sharding" / "sharding.json"


@pytest.mark.slow
def test_what_is_measured() -> None:
    turns: list[None] = []
    rows = sharding._measure(Workload("tiny", "tiny", ((8, 4), (6, 2))), (1, 2), 2, lambda: turns.append(None))
    assert [(row["optimizer"], row["ranks"]) for row in rows] == [(o, n) for o in sharding.OPTIMIZERS for n in (1, 2)]
    assert all(row["ms"] > 0 and row["share"] > 0 for row in rows)
    assert {row["share"] for row in rows if row["ranks"] == 1} == {1.0}
    assert len(turns) == 2 * len(rows)


@pytest.mark.slow
def test_a_rank_that_fails_is_named() -> None:
    with pytest.raises(UserError, match=r"rank 0 of 1 failed: RuntimeError: "), world(1, [(-1, 2)]):
        pass


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(RECORD.read_text())
    found = {row["workload"]: [r for r in record["rows"] if r["workload"] == row["workload"]] for row in record["rows"]}
    monkeypatch.setattr(sharding, "_measure", lambda workload, *rest: found[workload.title])
    sharding.run(worlds=(1, 2, 4), rounds=record["rounds"], out=tmp_path)
    written = json.loads((tmp_path / "sharding.json").read_text())
    assert {**written, "environment": None} == {**record, "environment": None}
    assert (tmp_path / "sharding.png").stat().st_size > 5000
    assert capsys.readouterr().out.count("IVON: train() + step()") == 6
