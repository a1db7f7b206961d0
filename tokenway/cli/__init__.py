"""The tokenway command.

What must come before anything else is imported is here: signals are held back from a process that serves, for
imports take their time, and gRPC's one setting is made, for gRPC reads its environment when first imported.
"""

import os
import signal
import sys

SERVING = ("serve", "worker", "metadata-center")
"""Verbs that run until they are stopped, and to which SIGHUP means "reload" or nothing."""


def hold_signals_back() -> None:
    """Keep SIGHUP, SIGUSR1 and SIGUSR2 until there are handlers: a process without one ends by them.

    What serves unblocks them then, and what came meanwhile comes. Processes started meanwhile inherit it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})


if any(word in SERVING for word in sys.argv[1:2]):
    hold_signals_back()

os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
"""gRPC's event-engine listener hands each message through one thread more; without it the bare servicer
takes a seventh less CPU (docs/adr/0007)."""
