"""Griffe: docstrings are written for any reader of the source, with roles and literal blocks; a page wants Markdown.

``:class:`Name``` becomes a link to what `Name` is where it is written, if the site has it, and ``::`` before a block
goes, which Markdown knows by its indentation.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|exc|func|meth|mod):`(?P<hidden>~?\.?)(?P<name>[^`]+)`")
_LITERAL = re.compile(r"^(?P<text>.*?)(?P<colons>::)$", re.MULTILINE)


class Markdown(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Walk through what the package defines itself."""
        self._rewrite(pkg)

    def _rewrite(self, found: griffe.Object | griffe.Alias) -> None:
        if found.is_alias:
            return
        if found.docstring is not None:
            text = _ROLE.sub(lambda match: _link(found, match), found.docstring.value)
            found.docstring.value = _LITERAL.sub(lambda match: match["text"] and f"{match['text']}:", text)
        for member in found.members.values():
            self._rewrite(member)


def _link(found: griffe.Object | griffe.Alias, match: re.Match[str]) -> str:
    """The name as code, and a link where what it stands for is on a page."""
    name = match["name"]
    shown = name.rpartition(".")[2] if match["hidden"] else name
    first, _, rest = name.partition(".")
    try:
        target = found.resolve(first) + (f".{rest}" if rest else "")
    except griffe.NameResolutionError:
        target = name
    return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'
