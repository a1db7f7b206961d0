"""A compiled wheel holds mypyc's runtime, so it has mypyc's licences beside its own."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path
from typing import Final

HOLDER: Final = "mypy"
"""The package that mypyc is a part of."""


def licences() -> list[Path]:
    """Files of the licences of what compiles; those of typeshed are not meant, nothing of it is in a wheel.

    Raises:
        FileNotFoundError: The package that compiles has none.
    """
    found = [
        Path(str(path.locate()))
        for path in distribution(HOLDER).files or ()
        if path.name == "LICENSE" and "typeshed" not in path.parts
    ]
    if not found:
        raise FileNotFoundError(f"{HOLDER} has no file LICENSE")
    return found
