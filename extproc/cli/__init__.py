"""The tokenway command.

gRPC reads its environment when it is first imported, so its one setting is made here, before anything else.
"""

import os

os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
"""gRPC's event-engine listener hands each message through one thread more; without it a request costs 13 %
less CPU (benchmarks/overhead.py, docs/adr/0007)."""
