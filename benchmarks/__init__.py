"""Benchmarks of ivon_kernels: ``python -m benchmarks finetune`` (quality) and ``python -m benchmarks speed``."""


class UserError(Exception):
    """A mistake in how a benchmark was called; its message is the one sentence that the user sees."""
