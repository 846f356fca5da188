"""`python -m ivon_kernels`: which backends work on this machine, which do not and why, and the versions in play.

`python -m ivon_kernels demo` shows what IVON is good for.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

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


def _print_backends() -> None:
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


def _print_demo(seeds: int, steps: int, picture: Path) -> None:
    """Runs the demo and prints its table, its conclusion, and where its picture is or why there is none.

    Raises:
        ModuleNotFoundError: Without scikit-learn or torchmetrics.
    """
    from ivon_kernels import demo  # what the table of backends does not need

    start = time.perf_counter()
    result = demo.run(seeds, steps)
    print(
        f"{demo.EXAMPLES} handwritten digits to learn from, {demo.WRONG:.0%} of them with a wrong label; {steps} "
        f"steps, {seeds} {'runs' if seeds > 1 else 'run'}, {time.perf_counter() - start:.0f} s.\n"
        f"AdamW's learning rate, its best of {len(demo.RATES)} on {demo.VALIDATION} other digits: "
        f"{', '.join(f'{rate:g}' for rate in result.rates)}. IVON took it over.\n"
        f"Scaled: with a temperature, from these other digits too.\n"
    )
    print("\n".join(result.table()))
    print(f"\n{result.conclusion()}\n")
    try:
        result.draw(picture)
    except ModuleNotFoundError as error:
        print(f"No picture: {error}")
    else:
        print(f"Confidence against accuracy, all runs together: {picture}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence instead of the usage."""
        self.exit(2, f"Error: {self.prog}: {message}\n")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text}")
    return int(text)


def main(arguments: Sequence[str] = ()) -> None:
    """Runs a command; what is no command, or cannot be run, ends in one sentence and exit code 2."""
    parser = _Parser(prog="python -m ivon_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("backends", help="the table; what no command does, too")
    text = (
        "AdamW against IVON on handwritten digits with wrong labels: a table, a picture and a sentence in half a minute"
    )
    demo = commands.add_parser("demo", help=text, description=text)
    demo.add_argument("--seeds", type=_count, default=3, help="runs (default: %(default)s)")
    demo.add_argument("--steps", type=_count, default=600, help="optimizer steps of each (default: %(default)s)")
    demo.add_argument(
        "--picture", type=Path, default=Path("ivon-demo.png"), help="where to write it (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    if given.command != "demo":
        _print_backends()
        return
    try:
        _print_demo(given.seeds, given.steps, given.picture)
    except (ModuleNotFoundError, OSError) as error:
        demo.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
