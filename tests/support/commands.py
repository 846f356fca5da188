"""Commands of ``python -m benchmarks``, called in this process."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner, Result

from benchmarks.__main__ import app


def command(name: str, *arguments: Any, **options: Any) -> list[str]:
    """The command line; an option of None is left out, one of True is a flag."""
    named = {f"--{option.replace('_', '-')}": value for option, value in options.items() if value is not None}
    flags = [option if value is True else f"{option}={value}" for option, value in named.items()]
    return [name, *map(str, arguments), *flags]


def invoke(name: str, *arguments: Any, **options: Any) -> Result:
    """Runs a command."""
    return CliRunner().invoke(app, command(name, *arguments, **options))


def ended_well(result: Result) -> str:
    """What a command printed that ended well."""
    assert result.exit_code == 0, result.output
    return result.output


def refused(result: Result, sentence: str) -> None:
    """The command ended in one sentence, which begins so."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"Error: {sentence}")
    assert result.stderr.count("\n") == 1
