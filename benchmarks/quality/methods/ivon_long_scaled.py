"""Temperature scaling of IVON with settings for many epochs, at the mean."""

from __future__ import annotations

from benchmarks.quality.methods.temperature import TemperatureScaling


class IvonLongScaled(TemperatureScaling):
    """One pass and one temperature, as for AdamW."""

    title = "IVON, many epochs: scaled mean"
    base = "ivon_long"
