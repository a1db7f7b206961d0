"""Command lines for other processes of ours."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
"""Where our packages are imported from: a source tree or an installation's site-packages."""


def python_module(name: str, *words: str) -> list[str]:
    """The command that runs a module of ours under this Python.

    Python would put the working directory before all else that is imported, and a file there may be called
    as anything; only in the source tree itself, which need not be installed, it is the place to look.
    """
    unsafe = Path.cwd() == ROOT
    return [sys.executable, *(() if unsafe else ("-P",)), "-m", name, *words]
