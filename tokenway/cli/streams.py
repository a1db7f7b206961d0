"""Standard input, output and error as a process may find them: closed, full, of another encoding."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Final

_CLOSED: Final = {"stdin": "r", "stdout": "w", "stderr": "w"}
"""How each is opened that was closed, in the order of their descriptors."""


def prepare() -> None:
    """Let all three be used, whatever they are.

    What was closed leads nowhere: else the next socket or file that is opened would be it, and get our lines.
    What the encoding of a terminal lacks is written by its number.
    """
    for descriptor, (name, mode) in enumerate(_CLOSED.items()):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the least that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 - until the process ends
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def write_out() -> None:
    """Write what waits for standard output, so that what cannot be is found before Python's own end.

    Raises:
        OSError: Nobody reads it (`BrokenPipeError`), or its disk is full; what is left is dropped.
    """
    try:
        sys.stdout.flush()
    except OSError:
        give_up()
        raise


def give_up() -> None:
    """Have all that still goes to standard output lead nowhere."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
