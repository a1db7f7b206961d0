"""The tokenway command.

gRPC reads its environment when it is first imported, so its one setting is made here, before anything else.
"""

import os

os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
"""gRPC's event-engine listener hands each message through one thread more; without it the bare servicer
takes a seventh less CPU (docs/adr/0007)."""
