"""Encodes kinds of cluster for Envoy and ends: `python -m extproc.server.envoys.encoding_process`.

Rules:
    1. Imports at once what takes long, then reads its question, JSON of closed types, from standard input to
       its end; no question is none to answer.
    2. The answer, on standard output, is a list of their bytes in the same order.
"""

from __future__ import annotations

import sys

import msgspec

from extproc.xds.cluster_encoding import encode
from extproc.xds.cluster_kinds import ClusterKind
from metadata_center import signals


def main() -> None:
    """Answer standard input."""
    signals.ignore()  # they are meant for the gateway, which ends us with it
    encode(ClusterKind())  # the library's classes get ready while the gateway reads its configuration
    question = sys.stdin.buffer.read()
    if question:
        kinds = msgspec.json.decode(question, type=list[ClusterKind])
        sys.stdout.buffer.write(msgspec.json.encode([encode(kind) for kind in kinds]))


if __name__ == "__main__":
    main()
