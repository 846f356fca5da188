"""Benchmarks of ivon_kernels: ``python -m benchmarks`` lists them."""


class UserError(Exception):
    """A mistake in how a benchmark was called; its message is the one sentence that the user sees."""


class Interruption(Exception):
    """Ctrl-C ended a benchmark; its message says what was kept."""
