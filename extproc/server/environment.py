"""Secrets, which come from the environment and from nowhere else; the configuration names the variables."""

from __future__ import annotations

import os


def secret(variable: str | None) -> str | None:
    """The value of a variable; None where none is named, or it is not set."""
    return None if variable is None else os.environ.get(variable)
