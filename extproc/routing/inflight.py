"""The requests that a worker decided and that have not ended.

Rules:
    1. One entry per decided request, removed at its end or by the lease sweep; bounded by the load table.
    2. Nothing here is charged or released; that is the load table's business.
"""

from __future__ import annotations

from collections.abc import Iterator

from extproc.values.inflight import Inflight
from metadata_center.types import RequestId


class InflightTable:
    """Decided requests by id."""

    def __init__(self) -> None:
        self._by_id: dict[RequestId, Inflight] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Inflight]:
        return iter(self._by_id.values())

    def add(self, request_id: RequestId, inflight: Inflight) -> None:
        """Remember a decided request."""
        self._by_id[request_id] = inflight

    def get(self, request_id: RequestId) -> Inflight | None:
        """The request, or None if it ended or was never ours."""
        return self._by_id.get(request_id)

    def pop(self, request_id: RequestId) -> Inflight | None:
        """Forget a request."""
        return self._by_id.pop(request_id, None)
