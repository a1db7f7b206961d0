"""Signals that end a process which has no handler for them, though none of ours is to end by them.

Rules:
    1. What serves holds them back from its first line until it has handlers, and again when those go.
    2. A process that is started meanwhile inherits that, and releases them as it has handlers of its own.
    3. A helper process is started with the signals held back that it will ignore: it imports first.
    4. Nothing is imported here but the library's own: this comes before all other imports.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

SURVIVED: Final = frozenset({signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})


def hold_back() -> set[int]:
    """Keep those that come until `release`; the mask that was in force before."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, SURVIVED)


def release() -> None:
    """Handlers are there: what was held back comes now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SURVIVED)


IGNORED: Final = SURVIVED | {signal.SIGINT}
"""By a helper process, which its gateway ends: also SIGINT, which a terminal sends to all."""


@contextmanager
def kept_from_helper() -> Iterator[None]:
    """A helper process that is started in the block gets none of these before it calls `ignore`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore() -> None:
    """For a helper process."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
