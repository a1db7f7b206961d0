"""Requests from their charge to their end: charged, remembered, and counted as running where they are served.

Rules:
    1. One entry per decided request, removed at its end or when its lease expires; bounded by the load table.
    2. What is charged is released once, and what is counted as running is taken out once: what comes later
       finds nothing.
    3. The blocks of a completed request count as running for `LINGER_S` more: its engine has them, and under
       load announces them later than it answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from extproc.observing.recorder import Recorder
from extproc.routing.engines import Engines
from extproc.values.inflight import Inflight
from metadata_center.history.radix_tree import Run
from metadata_center.history.running_blocks import RunningBlocks
from metadata_center.store import LoadStore
from metadata_center.types import EndpointKey, RequestId

LINGER_S: Final = 1.0
"""A busy engine's announcement was seen to lag by 0.1 s, and its blocks to be evicted in many seconds."""

MAX_LINGERING: Final = 16_384
"""A second's worth of what a worker can serve, ten times over; beyond it the oldest linger no longer."""


class RunningRequests:
    """One worker's.

    Args:
        load: Which endpoint is charged for what; charged by scheduling.
        blocks: Prompts that run, by endpoint.
        engines: Know what each endpoint is at.
        recorder: Counts leases that expire.
        freed: Called when room was freed at an endpoint.
        on_prefilled: Called with a request whose prefill is taken to be over, for it is due.
        on_lost: Called with a request whose lease expired, after its release.
    """

    def __init__(
        self,
        load: LoadStore,
        blocks: RunningBlocks,
        engines: Engines,
        recorder: Recorder,
        freed: Callable[[], None],
        on_prefilled: Callable[[Inflight], None],
        on_lost: Callable[[Inflight, float], None],
    ) -> None:
        self._load = load
        self._blocks = blocks
        self._engines = engines
        self._recorder = recorder
        self._freed = freed
        self._on_prefilled = on_prefilled
        self._on_lost = on_lost
        self._by_id: dict[RequestId, Inflight] = {}
        self._lingering: deque[tuple[float, EndpointKey, Run]] = deque()

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Inflight]:
        return iter(self._by_id.values())

    def get(self, request_id: RequestId) -> Inflight | None:
        """The request, or None if it ended or was never ours."""
        return self._by_id.get(request_id)

    def advance(self, now_s: float) -> None:
        """Release what time has released: predicted prefills, lost requests. Cheap when nothing is due."""
        lingering = self._lingering
        while lingering and (lingering[0][0] <= now_s or len(lingering) > MAX_LINGERING):
            _, endpoint, run = lingering.popleft()
            self._blocks.remove(endpoint, run)
        expired = self._load.advance(now_s)
        for request_id in expired.prefills:
            request = self._by_id.get(request_id)
            if request is not None:
                self._prefill_ended(request.endpoint, now_s)
                self._on_prefilled(request)
        if expired.requests:
            self._recorder.leases_expired(len(expired.requests))
            for request_id in expired.requests:
                request = self.finish(request_id, now_s, completed=False)
                if request is not None:
                    self._on_lost(request, now_s)

    def begin(self, request_id: RequestId, request: Inflight) -> None:
        """A request was decided and charged."""
        self._by_id[request_id] = request
        request.running = self._blocks.add(request.endpoint, request.blocks)

    def reassigned(self, request_id: RequestId, at: EndpointKey) -> None:
        """Compare-and-set gave a decided request another endpoint, before Envoy got the first."""
        request = self._by_id.get(request_id)
        if request is not None:
            self._move(request, at)
            request.record.placed = at

    def moved(self, request_id: RequestId, to: EndpointKey, now_s: float) -> None:
        """A proxy sends it to another endpoint after all, or again to the same."""
        request = self._by_id.get(request_id)
        if request is not None and request.endpoint != to:
            self._load.move(request_id, to, now_s)
            self._move(request, to)
            self._freed()

    def alive(self, request_id: RequestId, now_s: float) -> None:
        """It still runs: its lease begins anew."""
        self._load.refresh(request_id, now_s)

    def first_token(self, request_id: RequestId, now_s: float, *, late: bool) -> Inflight | None:
        """The first token passes now: its prefill is done.

        Args:
            request_id: Whose.
            now_s: Monotonic time.
            late: Other bytes of the body came before it (keep-alive comments): Envoy's time of the first
                body byte is not that of the token.

        Returns:
            The request; None if it is not one of ours, or had its first token before.
        """
        request = self._by_id.get(request_id)
        if request is None or request.first_token_s is not None:
            return None
        request.first_token_s = now_s
        request.first_byte_is_token = not late
        self._prefill_ended(request.endpoint, now_s)
        self._load.release_prefill(request_id)
        decoding = self._load.decoding(request.endpoint)
        self._engines.first_token(request.endpoint, decoding, request.decided_s, now_s, request.prefill_s)
        return request

    def release(self, request_id: RequestId, now_s: float) -> Inflight | None:
        """It is over, whatever that means: nothing is charged for it any more. It is to be finished next.

        An end that comes before the decision leaves a tombstone, which voids the late charge.
        """
        self._load.release(request_id, now_s)
        return self._by_id.get(request_id)

    def finish(self, request_id: RequestId, now_s: float, *, completed: bool) -> Inflight | None:
        """It is forgotten: what was remembered of it; None if nothing is."""
        request = self._by_id.pop(request_id, None)
        if request is not None and request.first_token_s is None:
            self._prefill_ended(request.endpoint, now_s)
        else:
            if request is not None:
                decoding = self._load.decoding(request.endpoint)
                self._engines.sequence_ended(request.endpoint, decoding, now_s)
            self._freed()
        if request is not None and request.running is not None:
            run, request.running = request.running, None
            if completed:
                self._lingering.append((now_s + LINGER_S, request.endpoint, run))
            else:
                self._blocks.remove(request.endpoint, run)
        return request

    def _move(self, request: Inflight, to: EndpointKey) -> None:
        if request.running is not None:
            self._blocks.remove(request.endpoint, request.running)
            request.running = self._blocks.add(to, request.blocks)
        request.endpoint = to

    def _prefill_ended(self, endpoint: EndpointKey, now_s: float) -> None:
        """A prefill is over at an endpoint, or taken to be: the next one begins."""
        self._load.prefill_turned(endpoint, now_s)
        self._freed()
