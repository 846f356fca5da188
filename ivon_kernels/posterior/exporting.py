"""The mean and some samples as ordinary PEFT adapters in one folder, for servers that hold several adapters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ivon_kernels.gaussians.gaussians import Gaussians
from ivon_kernels.posterior import file
from ivon_kernels.predict.batches import sample_numbers

__all__ = ["MANIFEST", "export"]

MANIFEST = "ivon_samples.json"
_FORMAT = "ivon_samples 1"


def export(posterior: Gaussians, source: Path | None, target: Path, samples: int | Sequence[int]) -> Path:
    """See :meth:`ivon_kernels.posterior.Posterior.export`; `source` is where the adapter was saved."""
    if source is None:
        raise ValueError("this posterior has no folder yet: say whose adapter its samples belong to (source=...)")
    config = source / "adapter_config.json"
    if not config.is_file():
        raise ValueError(f"{source} holds no PEFT adapter (adapter_config.json): sample_adapter() writes whole models")
    base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    numbers = sample_numbers(samples)
    file.write_weights(posterior.mean, posterior.origin, source, target / "mean")
    for number in numbers:
        file.save_sample(posterior, number, source, target / f"sample_{number}")
    adapters: list[dict[str, str | int | None]] = [{"name": "mean", "path": "mean", "sample": None}]
    adapters += [{"name": f"sample_{n}", "path": f"sample_{n}", "sample": n} for n in numbers]
    for adapter in adapters:
        adapter["base_model_name"] = base
    manifest = {"format": _FORMAT, "base_model_name": base, "seed": posterior.seed, "adapters": adapters}
    path = target / MANIFEST
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return path
