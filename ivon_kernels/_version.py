"""The version, where every room can read it: that of the installed package, which ``pyproject.toml`` has."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("ivon-kernels")
except PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"
