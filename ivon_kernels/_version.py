"""The version, where every room can read it; ``pyproject.toml`` has it too, and a test compares them."""

__version__ = "0.1.0"
