"""What was decided for each recent request, and what became of it.

Rules:
    1. Creating a record copies nothing: it refers to the arrays the decision already made, which
       nobody writes to afterwards.
    2. A record holds numbers, names and addresses; never prompt text, header values or keys.
    3. A record changes once, when its outcome arrives; the ring never holds more than its size.
    4. No clock: the wall time is an argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from extproc.choosing.holding import HoldReason
from extproc.choosing.least_completion import expected_ttft_s
from extproc.choosing.settings import LoadBalancing
from extproc.choosing.snapshots import row_step_s
from extproc.errors import Reason
from extproc.predicting.prices import Prices
from extproc.values.choices import Choice, Snapshot
from extproc.values.requests import Operation
from metadata_center.types import EndpointKey, RequestId, value


class Ended(StrEnum):
    """How a request ended; a metric label, a log value and an explain field at once."""

    COMPLETED = "completed"
    CLIENT_ABORT = "client_abort"
    UPSTREAM_ERROR = "upstream_error"
    UPSTREAM_RESET = "upstream_reset"
    TIMEOUT = "timeout"
    REJECTED = "rejected"
    LEASE_EXPIRED = "lease_expired"


class HoldEnding(StrEnum):
    """How a wait ended; a metric label."""

    PLACED = "placed"
    REFUSED = "refused"
    GONE = "gone"
    FAILED = "failed"


@value
class Outcome:
    """What became of one request, as Envoy and the engine reported it.

    Attributes:
        ended: How it ended.
        duration_s: From Envoy's first byte of the request to its last byte of the answer.
        endpoint: Who answered, after any retries; None if nobody did.
        attempts: Upstream attempts, 0 for a rejected request.
        status: HTTP status the client saw, None if it saw none.
        ttft_s: Until the first response byte; None unless the answer was streamed, because only
            then is the first byte the first token.
        prompt_tokens: As the engine counted; None if it reported no usage.
        completion_tokens: As the engine counted, or None.
        cached_tokens: Prompt tokens the engine took from its prefix cache, or None.
        request_bytes: Received from the client.
        response_bytes: Sent to the client.
        predicted_ttft_s: What the decision expected of `endpoint`, or None.
        predicted_cached_tokens: What the decision expected `endpoint` to have cached, or None.
        response_flags: Envoy's short flags (`UC`, `DC`, ...).
        details: Envoy's `response_code_details`.
    """

    ended: Ended
    duration_s: float
    endpoint: EndpointKey | None = None
    attempts: int = 0
    status: int | None = None
    ttft_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    request_bytes: int = 0
    response_bytes: int = 0
    predicted_ttft_s: float | None = None
    predicted_cached_tokens: int | None = None
    response_flags: tuple[str, ...] = ()
    details: str = ""


@dataclass(slots=True, eq=False, kw_only=True)
class DecisionRecord:
    """One decision with everything needed to make it again.

    Mutable for `outcome`, `placed` and `held_s` alone; not frozen because frozen construction of this many
    fields costs three times as much, on the request path.

    Attributes:
        request_id: Envoy's id of the request.
        time_unix_s: Wall time of the decision.
        operation: Which API, None if the request was refused before that was known.
        model: The client's name for the model, "" if refused before that was known.
        upstream_model: The name sent to the engine, or None.
        lora: The adapter chosen, or None.
        cluster: The Envoy cluster, None if refused before one was chosen.
        route_name: The routing rule that matched, or None.
        settings: How endpoints were to be chosen, or None.
        stream: The client asked for server-sent events.
        prompt_bytes: Length of the canonical prompt.
        prompt_tokens: Estimated, exact when the client sent token ids.
        num_blocks: Blocks of the prompt, or its tokens where engines announce their caches.
        block_bytes: Prompt bytes per block.
        snapshot: What the decision looked at; None for a rejected request.
        choice: What it chose; None for a rejected request.
        draws: Random numbers the choice consumed, in order, each in [0, 1).
        turn: The round-robin turn given to the choice.
        prices: What predicted TPOT, one for all candidates or one each; empty for a rejected request.
        cached_tokens: Estimated cached prompt tokens, one per candidate; empty for a rejected request.
        placed: Where compare-and-set or a stored response put it, if that is not where it was chosen for.
        holder: The endpoint that holds the stored response the request builds on; it alone could serve it.
        views: Which view of the caches spoke for each candidate; empty for a rejected request.
        filtered: Endpoints of the cluster that were no candidates, with the reason.
        data_age_s: Age of each input at the decision, by name ("load", "health", ...).
        decision_us: From the whole body to the decision, in microseconds.
        held_s: How long the request waited here for an endpoint with room.
        held_for: What its endpoint was short of last; None if it did not wait.
        rejected: Why the request was refused, or None.
        outcome: What became of it; None while it runs.
    """

    request_id: RequestId
    time_unix_s: float
    operation: Operation | None = None
    model: str = ""
    upstream_model: str | None = None
    lora: str | None = None
    cluster: str | None = None
    route_name: str | None = None
    settings: LoadBalancing | None = None
    stream: bool = False
    prompt_bytes: int = 0
    prompt_tokens: int = 0
    num_blocks: int = 0
    block_bytes: int = 0
    snapshot: Snapshot | None = None
    choice: Choice | None = None
    draws: tuple[float, ...] = ()
    turn: int = 0
    prices: tuple[Prices, ...] = ()
    cached_tokens: Sequence[int] = ()
    views: Sequence[str] = ()
    placed: EndpointKey | None = None
    holder: EndpointKey | None = None
    filtered: tuple[tuple[EndpointKey, str], ...] = ()
    data_age_s: Mapping[str, float]
    decision_us: float = 0.0
    held_s: float = 0.0
    held_for: HoldReason | None = None
    rejected: Reason | None = None
    outcome: Outcome | None = None

    @property
    def chosen(self) -> EndpointKey | None:
        """The endpoint named first to Envoy, None for a rejected request."""
        if self.placed is not None:
            return self.placed
        if self.snapshot is None or self.choice is None:
            return None
        return self.snapshot.keys[self.choice.order[0]]

    def predicted_ttft_s(self, row: int) -> float | None:
        """What was expected of candidate `row`, in seconds; None for a rejected request."""
        return None if self.snapshot is None else expected_ttft_s(self.snapshot, row)

    def predicted_tpot_s(self, row: int) -> float | None:
        """What was expected of candidate `row`, in seconds; None for a rejected request."""
        snapshot = self.snapshot
        if snapshot is None:
            return None
        return snapshot.steps_s[row] if snapshot.steps_s else row_step_s(self.prices, snapshot, row)

    def row(self, endpoint: EndpointKey) -> int | None:
        """The candidate row of `endpoint`, None if it was no candidate."""
        if self.snapshot is None or endpoint not in self.snapshot.keys:
            return None
        return self.snapshot.keys.index(endpoint)


class RecordRing:
    """The most recent `size` records, found by request id or by age; every operation O(1), `last` O(n).

    A second record with an id already held (a client retry through the gateway) takes over the id;
    the older one stays until its turn to be overwritten.

    Args:
        size: Bound on records held; 0 holds none.

    Raises:
        ValueError: `size` is negative.
    """

    __slots__ = ("_by_id", "_next", "_slots")

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ValueError("size must be >= 0")
        self._slots: list[DecisionRecord | None] = [None] * size
        self._by_id: dict[RequestId, DecisionRecord] = {}
        self._next = 0

    def __len__(self) -> int:
        return min(self._next, len(self._slots))

    def add(self, record: DecisionRecord) -> None:
        """Hold `record`, letting go of the oldest one when full."""
        if not self._slots:
            return
        index = self._next % len(self._slots)
        oldest = self._slots[index]
        if oldest is not None and self._by_id.get(oldest.request_id) is oldest:
            del self._by_id[oldest.request_id]
        self._slots[index] = record
        self._by_id[record.request_id] = record
        self._next += 1

    def attach(self, request_id: RequestId, outcome: Outcome) -> DecisionRecord | None:
        """Give the record of `request_id` its outcome; None if it is no longer held."""
        record = self._by_id.get(request_id)
        if record is not None:
            record.outcome = outcome
        return record

    def get(self, request_id: RequestId) -> DecisionRecord | None:
        """The newest record of `request_id`, or None."""
        return self._by_id.get(request_id)

    def last(self, count: int) -> list[DecisionRecord]:
        """Up to `count` records, newest first."""
        first = self._next - min(count, len(self))
        held = (self._slots[index % len(self._slots)] for index in range(self._next - 1, first - 1, -1))
        return [record for record in held if record is not None]
