"""Tables of docs/policies.md that other documents repeat: they are copied, not written by hand."""

from __future__ import annotations

import re
from typing import Final

from benchmarks.policies.stamps import ROOT

DOCUMENTS: Final = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
"""Those that repeat tables."""

_COPIED: Final = re.compile(r"(<!-- copied from docs/policies\.md: ([^\n]+) -->\n\n)((?:\|[^\n]*\n)*)")


def excerpts(document: str, tables: str) -> str:
    """A document with each table that it repeats as it is now.

    Such a table follows a comment of its own, `<!-- copied from docs/policies.md: HEADING -->`.

    Args:
        document: Text in Markdown.
        tables: All of docs/policies.md.

    Raises:
        ValueError: A comment names a heading that is not in `tables`, or has no table.
    """
    return _COPIED.sub(lambda found: found[1] + _table_of(tables, found[2]), document)


def _table_of(tables: str, heading: str) -> str:
    """The first table below a heading, each line with its end."""
    below = re.search(rf"^#+ {re.escape(heading)}\n((?:(?!#).*\n)*)", tables, re.MULTILINE)
    found = None if below is None else re.search(r"(?:^\|.*\n)+", below[1], re.MULTILINE)
    if found is None:
        raise ValueError(f"docs/policies.md has no table {heading!r}")
    return found[0]
