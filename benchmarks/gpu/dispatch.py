"""Which of our backends was the faster one: what `backend=None` should take."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.measure import Comparison


def dispatch_table(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    """For each workload, dtype and mode the backend with the shortest step (wall time, host included), and by how much.

    Returns:
        One row per workload, dtype and mode: `backend` (None if none was measured), `wall_ms` and `kernel_ms` of each,
        and `margin`: the slowest's wall time over the fastest's.
    """
    table = []
    for comparison in comparisons:
        for mode in ("plain", "one launch"):
            rows = {row.backend: row for row in comparison.rows if row.mode == mode and row.backend is not None}
            wall = {name: row.wall.p50 for name, row in rows.items() if row.wall is not None}
            kernel = {name: row.kernel.p50 for name, row in rows.items() if row.kernel is not None}
            table.append(
                {
                    "workload": comparison.workload,
                    "tensors": comparison.tensors,
                    "elements": comparison.elements,
                    "dtype": comparison.dtype,
                    "mode": mode,
                    "backend": min(wall, key=wall.__getitem__) if wall else None,
                    "margin": max(wall.values()) / min(wall.values()) if len(wall) > 1 else None,
                    "wall_ms": wall,
                    "kernel_ms": kernel,
                }
            )
    return table
