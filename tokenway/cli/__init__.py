"""The tokenway command.

What must come before anything else is imported is here: signals are held back from a process that serves, for
imports take their time, and gRPC's one setting is made, for gRPC reads its environment when first imported.
"""

import os
import sys
from types import TracebackType

from metadata_center import signals

SERVING = ("serve", "worker", "metadata-center")
"""Verbs that run until they are stopped, and to which SIGHUP means "reload" or nothing."""

_shown = sys.excepthook


def _show_unless_interrupted(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Ctrl-C while modules are imported needs no traceback; Python ends by the signal all the same."""
    if not issubclass(kind, KeyboardInterrupt):
        _shown(kind, error, traceback)


sys.excepthook = _show_unless_interrupted

if sys.argv[1:] and sys.argv[1] in SERVING:
    signals.hold_back()

os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
"""gRPC's event-engine listener hands each message through one thread more; without it the bare servicer
takes a seventh less CPU (docs/adr/0007)."""
