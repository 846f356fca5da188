"""What the command line has: ``main`` runs it, and ends what a user can mend in one sentence.

Exit codes: 0; 1 where ``doctor`` found something wrong; 2 for what cannot be done, with a sentence; 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from ivon_kernels.commands import convert, demo, doctor, posterior

__all__ = ["main"]

NAME = "ivon-kernels"
# Of click, or of the copy of click that newer versions of typer bring, which has no public name.
_UsageError: Any = typer.BadParameter.__bases__[0]
_REFUSALS = (ValueError, OSError, ModuleNotFoundError)

app = typer.Typer(
    help="IVON for PyTorch: what works on this machine, a demo, and posteriors on the command line.",
    epilog="Without a command: the table of backends.",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.callback(invoke_without_command=True)(doctor.table_unless_invoked)
app.command()(doctor.backends)
app.command()(doctor.doctor)
app.command()(demo.demo)
app.command()(convert.convert)
app.add_typer(posterior.app, name="posterior")


def main(arguments: Sequence[str] | None = None, program: str = NAME) -> None:
    """Run a command.

    Args:
        arguments: Its words; None takes those of the process.
        program: What messages call it.

    Raises:
        SystemExit: Unless the exit code is 0.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = typer.main.get_command(app).main(given, prog_name=program, standalone_mode=False)
    except _UsageError as error:
        context = getattr(error, "ctx", None)
        where = program if context is None else context.command_path
        code = _refuse(f"{where}: {error.format_message()}")
    except _REFUSALS as error:
        code = _refuse(str(error))
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    if code:
        raise SystemExit(code)


def _refuse(message: str) -> int:
    typer.echo(f"Error: {' '.join(message.split())}", err=True)
    return 2
