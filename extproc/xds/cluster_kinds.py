"""What a cluster is besides its names, and the bytes that tell Envoy so.

Rules:
    1. The library that makes them takes 10 MiB and most of a second until it is ready, and kinds are few: a
       process that ends then can make them (`server/envoys/cluster_encoder.py`), and they are learnt here.
    2. A kind that nobody made bytes of before is encoded here after all: the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class UpstreamTls:
    """TLS to the engines of a cluster.

    Attributes:
        ca_file: At Envoy: the CA that signed the engines' certificates.
        server_name: In those certificates; also sent as SNI.
        cert_file: To show to the engines, or None.
        key_file: Its private key.
        contents: Of the files, in short: Envoy reads them again for a cluster that is another by this alone.
    """

    ca_file: str
    server_name: str
    cert_file: str | None = None
    key_file: str | None = None
    contents: str = ""


@dataclass(frozen=True, slots=True)
class ClusterKind:
    """What clusters have in common that differ in nothing but their names.

    Attributes:
        tls: To their engines; None for clear text.
        max_open_requests: Bound on requests that one endpoint has at a time; None for no bound.
    """

    tls: UpstreamTls | None = None
    max_open_requests: int | None = None


_MAX_KINDS: Final = 4096
"""Beyond so many, those that no configuration wants any more are forgotten."""


class ClusterKinds:
    """The kinds whose bytes are known.

    Args:
        encode: For one that is not.
    """

    def __init__(self, encode: Callable[[ClusterKind], bytes]) -> None:
        self._encode = encode
        self._known: dict[ClusterKind, bytes] = {}

    def missing(self, kinds: Iterable[ClusterKind]) -> list[ClusterKind]:
        """Those of them that are not known."""
        return [kind for kind in kinds if kind not in self._known]

    def learn(self, known: Mapping[ClusterKind, bytes], wanted: Collection[ClusterKind]) -> None:
        """Keep the bytes of these kinds; `wanted` is what may not be forgotten for it."""
        if len(self._known) > _MAX_KINDS:
            self._known = {kind: body for kind, body in self._known.items() if kind in wanted}
        self._known.update(known)

    def encoded(self, kind: ClusterKind) -> bytes:
        """The bytes of a kind: `envoy.config.cluster.v3.Cluster` without its name and its service's."""
        known = self._known.get(kind)
        if known is None:
            known = self._known[kind] = self._encode(kind)
        return known
