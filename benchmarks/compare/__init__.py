"""Two records of the speed suite: what got slower beyond the noise (``python -m benchmarks compare``)."""
