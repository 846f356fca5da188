"""`python -m ivon_kernels`: which backends work on this machine, which do not and why, and the versions in play."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import torch

import ivon_kernels
from ivon_kernels import available_backends
from ivon_kernels._native import build_info
from ivon_kernels.backends import addresses as pointers
from ivon_kernels.backends import cpu


def _describe_cpu() -> str:
    """Returns the SIMD level in use, the threads and the build of the cpu backend, which must be available."""
    info = build_info()
    threads = f"{torch.get_num_threads()} threads" if info["openmp"] else "1 thread (built without OpenMP)"
    return f"SIMD {cpu.simd_level()} (built: {', '.join(info['simd_levels'])}); {threads}; {info['compiler']}"


def _describe_devices() -> str:
    """Returns the GPUs' names."""
    return ", ".join(dict.fromkeys(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))) or "no GPU"


def main(arguments: Sequence[str] = ()) -> None:
    """Prints the table. Arguments, of which there are none but --help, end in one sentence and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m ivon_kernels", description=__doc__, add_help=True)
    _, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.exit(2, f"Error: python -m ivon_kernels takes no arguments, got {' '.join(unknown)}\n")
    details = {"reference": "plain PyTorch, on any device", "cpu": ""}
    print(
        f"ivon_kernels {ivon_kernels.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.platform()}\n"
    )
    print(f"{'backend':<11}{'available':<11}")
    for name, reason in available_backends().items():
        if reason is None and name == "cpu":
            details[name] = _describe_cpu()
        elif reason is None and name != "reference":
            details[name] = _describe_devices()
        print(f"{name:<11}{'no' if reason else 'yes':<11}{reason or details[name]}")
    slower = pointers.unavailable()
    print(f"\ngradients' addresses are read in {'Python: ' + slower if slower else 'C'}")


if __name__ == "__main__":
    main(sys.argv[1:])
