"""The tokenway command.

What must come before anything else is imported is here: signals are held back from a process that serves, for
imports take their time, and gRPC's one setting is made, for gRPC reads its environment when first imported.
"""

import os
import sys

from metadata_center import signals

SERVING = ("serve", "worker", "metadata-center")
"""Verbs that run until they are stopped, and to which SIGHUP means "reload" or nothing."""

if sys.argv[1:] and sys.argv[1] in SERVING:
    signals.hold_back()

os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
"""gRPC's event-engine listener hands each message through one thread more; without it the bare servicer
takes a seventh less CPU (docs/adr/0007)."""
