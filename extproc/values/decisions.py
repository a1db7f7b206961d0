"""What was decided for a request, with everything needed to make the decision again.

Rules:
    1. Columns of few rows are those that the decision made, which no code writes to afterwards; those of many
       are kept in arrays (`extproc.routing.keeping`).
    2. A record holds numbers, names and addresses; never prompt text, header values or keys.
    3. A record changes where its docstring says so, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from extproc.errors import Reason
from extproc.values.balancing import LoadBalancing
from extproc.values.choices import Choice, Snapshot
from extproc.values.outcomes import Outcome
from extproc.values.prices import Prices
from extproc.values.requests import Operation
from extproc.values.standing import Standing
from metadata_center.types import EndpointKey, RequestId, value


class CacheSource(StrEnum):
    """Which view spoke for an endpoint; an explain field and a metric label."""

    ANNOUNCED = "announced"
    HISTORY = "history"
    RUNNING = "running"


class HoldReason(StrEnum):
    """What the endpoint that suits a waiting request is short of; a metric label and an explain field."""

    PREFILL = "prefill"
    KV_CACHE = "kv_cache"
    MAX_NUM_SEQS = "max_num_seqs"


class HoldEnding(StrEnum):
    """How a wait ended; a metric label."""

    PLACED = "placed"
    REFUSED = "refused"
    GONE = "gone"
    FAILED = "failed"


@value
class WorkCount:
    """How often a request's work counts in its place in line, and why.

    Attributes:
        times: How often, >= 1.
        work_s: Its work where it has the least, in seconds of that endpoint.
        waiting_s: Work that waited then for time to prefill, here and elsewhere, in seconds per endpoint.
        mean_s: Work of the mean request of those lately that had to wait or came while others did, itself
            included.
        are_turns: Fairness ids were taking turns, so that work counted once.
    """

    times: float
    work_s: float
    waiting_s: float
    mean_s: float
    are_turns: bool


@value
class Hold:
    """How a request waited for an endpoint with room.

    What decided its order is that of when it was sent: of the lowest place that it had until then.

    Attributes:
        reason: What its endpoint was short of last.
        endpoint: The one that it waited for last.
        at_once_s: From its arrival to its first token, as foreseen on arrival had it been sent at once.
        bound_s: How long after its arrival it would have gone at the latest, by all bounds on waits.
        place_s: Its place in the line, in seconds after its arrival: `yields_s`, `lag_s` and its work, as
            often as it counted. Of two priorities the higher one goes first whatever their places.
        counted: How often its work counted.
        yields_s: How much later its place was because it could keep its limit on TTFT nowhere any more, and
            let those go first that could; 0 if it did not.
        lag_s: How much later its place was because others of its fairness id went before it; below 0, how
            much sooner, for other ids had had more.
        elsewhere_s: The most work, in seconds of its endpoint, that waited at other gateways and workers and
            went before it.
    """

    reason: HoldReason
    endpoint: EndpointKey
    at_once_s: float
    bound_s: float
    place_s: float
    counted: WorkCount
    yields_s: float = 0.0
    lag_s: float = 0.0
    elsewhere_s: float = 0.0


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
        placed: Where a rival, compare-and-set or a stored response put it, if that is not where it was
            chosen for.
        holder: The endpoint that holds the stored response the request builds on; it alone could serve it.
        views: Which view of the caches spoke for each candidate; empty for a rejected request.
        filtered: Endpoints of the cluster that were no candidates, with the reason.
        data_age_s: Age of each input at the decision, by name ("load", "health", ...).
        decision_us: From the whole body to the decision, in microseconds.
        held_s: How long the request waited here for an endpoint with room.
        hold: How it waited; None if it did not.
        rejected: Why the request was refused, or None.
        standing: Whose it is, where its gateway says so.
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
    prices: Sequence[Prices] = ()
    cached_tokens: Sequence[int] = ()
    views: Sequence[CacheSource] = ()
    placed: EndpointKey | None = None
    holder: EndpointKey | None = None
    filtered: tuple[tuple[EndpointKey, str], ...] = ()
    data_age_s: Mapping[str, float]
    decision_us: float = 0.0
    held_s: float = 0.0
    hold: Hold | None = None
    rejected: Reason | None = None
    standing: Standing | None = None
    outcome: Outcome | None = None

    @property
    def chosen(self) -> EndpointKey | None:
        """The endpoint named first to Envoy, None for a rejected request."""
        if self.placed is not None:
            return self.placed
        if self.snapshot is None or self.choice is None:
            return None
        return self.snapshot.keys[self.choice.order[0]]

    def row(self, endpoint: EndpointKey) -> int | None:
        """The candidate row of `endpoint`, None if it was no candidate."""
        snapshot, choice = self.snapshot, self.choice
        if snapshot is None:
            return None
        keys = snapshot.keys
        if choice is not None and keys[choice.order[0]] == endpoint:  # nearly always
            return choice.order[0]
        return keys.index(endpoint) if endpoint in keys else None
