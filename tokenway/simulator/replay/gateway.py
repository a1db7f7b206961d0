"""One gateway of a run: its ledger, its cache view, its predictor, and the policy that it asks.

Rules:
    1. A gateway sees what a production one sees: bytes instead of tokens, scraped metrics, its own charges at
       once and others' when pushed.
    2. The policy is asked with columns that are true at that moment of the gateway's knowledge; it is charged
       for at once, before anything else is decided.
    3. With no first-token signal a prefill is taken off at its predicted end, as the product does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from extproc.choosing.stateful import Decision, FleetView, PolicyRequest, Sent, StatefulPolicy
from extproc.predicting.predictor import Predictor
from extproc.predicting.ttft import IDLE, Backlog, times_s
from metadata_center.types import EndpointKey
from tokenway.simulator.replay.caches import CacheView
from tokenway.simulator.replay.draws import Draws
from tokenway.simulator.replay.ledger import Change, GatewayLedger
from tokenway.simulator.replay.trace import TraceRequest

PREFILL_DUE_FACTOR: Final = 1.2
"""The product's `extproc.routing.charging.PREFILL_DUE_FACTOR`."""

PREFILL_DUE_FLOOR_S: Final = 0.1
"""The product's `extproc.routing.charging.PREFILL_DUE_FLOOR_S`."""

_CACHED_TOLERANCE_TOKENS: Final = 128
"""The product's `extproc.routing.cache_history.CACHED_TOLERANCE_TOKENS`."""

_MODEL: Final = "model"


@dataclass(slots=True, eq=False)
class Live:
    """A request between its arrival and its end.

    Attributes:
        index: In the trace.
        source: The truth.
        request: What the gateway knows.
        gateway: Index of its gateway.
        keys: Of its engine blocks.
        prompt_bytes: Length of the prompt in bytes.
        block_size: Tokens per router block, as estimated.
        sent: Once it is on its way.
        backlog: Of its endpoint when it was sent, as the ledger had it.
        admitted_s: When its engine began with it, or None.
        cached_tokens: Found in the engine's cache; known at admission.
        best_tokens: What the best of all engines had cached when it was sent.
        available_tokens: What was ever computed of its prompt anywhere when it was sent.
        came_s: When it came for the first time.
        tries: How often it came.
        held_since_s: Since when it is held, or None.
        held_s: How long it was held before.
        is_over: Answered, refused for good, or abandoned.
        is_abandoned: Its client left.
        first_s: When its first token came, or None.
        decisions: How often the policy was asked.
        decision_s: How long it thought altogether, by the caller's clock.
    """

    index: int
    source: TraceRequest
    request: PolicyRequest
    gateway: int
    keys: list[int]
    prompt_bytes: int
    block_size: int
    sent: Sent | None = None
    backlog: Backlog = field(default_factory=lambda: IDLE)
    admitted_s: float | None = None
    cached_tokens: int = 0
    best_tokens: int = 0
    available_tokens: int = 0
    came_s: float = 0.0
    tries: int = 1
    held_since_s: float | None = None
    held_s: float = 0.0
    is_over: bool = False
    is_abandoned: bool = False
    first_s: float | None = None
    decisions: int = 0
    decision_s: float = 0.0

    @property
    def foreseen_tokens(self) -> int:
        """Tokens of the prompt that were expected to be cached where it went; 0 if it did not."""
        if self.sent is None:
            return 0
        share = self.sent.matched_tokens / self.request.prompt_tokens
        return round(share * self.source.prompt_tokens)


@dataclass(slots=True)
class Held:
    """A request that waits at its gateway."""

    live: Live
    rank: float
    timer_s: float

    @property
    def order(self) -> tuple[float, int]:
        """See `extproc.choosing.holding.Waiting`."""
        return self.rank, self.live.index

    @property
    def until_s(self) -> float:
        """See `extproc.choosing.holding.Waiting`."""
        return self.timer_s

    @property
    def queue(self) -> object:
        """See `extproc.choosing.holding.Waiting`; a gateway of a replay has one queue."""
        return None


@dataclass(frozen=True, slots=True)
class FleetFacts:
    """What is configured, one row per endpoint."""

    keys: tuple[EndpointKey, ...]
    groups: tuple[str, ...]
    weights: tuple[float, ...]
    kv_tokens: tuple[int, ...]


@dataclass(slots=True)
class Scrape:
    """The last metrics read, one row per endpoint; shared by all gateways and written in place."""

    waiting: list[int]
    running: list[int]
    kv_usage: list[float]
    scraped_s: list[float]
    computed_tokens: list[int]


class ReplayGateway:
    """Knows, asks and charges.

    Args:
        index: Of this gateway.
        gateways: How many there are.
        facts: The fleet as configured.
        scrape: Read when deciding.
        view: What is believed of the caches.
        policy: Chooses.
        rng: For the policy's draws.
        clock: Real seconds, to time decisions.
        first_token: First tokens are seen.
    """

    def __init__(
        self,
        index: int,
        gateways: int,
        facts: FleetFacts,
        scrape: Scrape,
        view: CacheView,
        policy: StatefulPolicy,
        rng: Draws,
        clock: Callable[[], float],
        *,
        first_token: bool,
    ) -> None:
        self.index = index
        self.ledger = GatewayLedger(len(facts.keys))
        self.view = view
        self.policy = policy
        self.predictor = Predictor()
        self._gateways = gateways
        self._facts = facts
        self._scrape = scrape
        self._rng = rng
        self._clock = clock
        self._first_token = first_token

    def estimate(self, prompt_bytes: int) -> int:
        """Tokens of a prompt as far as this gateway can know."""
        return max(1, self.predictor.prompt_tokens(_MODEL, prompt_bytes))

    def decide(self, live: Live, now_s: float) -> Decision:
        """Ask the policy where `live` goes; changes nothing but the policy's own state."""
        facts, ledger, scrape = self._facts, self.ledger, self._scrape
        started = self._clock()
        decision = self.policy.choose(
            FleetView(
                now_s=now_s,
                rng=self._rng,
                request=live.request,
                gateways=self._gateways,
                block_size=live.block_size,
                keys=facts.keys,
                groups=facts.groups,
                weights=facts.weights,
                kv_tokens=facts.kv_tokens,
                requests=ledger.requests,
                prefilling=ledger.prefilling,
                prefill_tokens=ledger.prefill_tokens,
                prompt_tokens=ledger.prompt_tokens,
                context_tokens=ledger.context_tokens,
                waiting=scrape.waiting,
                running=scrape.running,
                kv_usage=scrape.kv_usage,
                scraped_s=scrape.scraped_s,
                matched_blocks=self.view.match(live.request.blocks),
                since_s=ledger.since_s,
                computed_tokens=scrape.computed_tokens,
            )
        )
        live.decision_s += self._clock() - started
        live.decisions += 1
        return decision

    def send(self, live: Live, row: int, now_s: float) -> tuple[Change, float | None]:
        """Charge `live` to `row`.

        Returns:
            What others are to get, and when its prefill is taken to end if nothing shows it.
        """
        request, ledger = live.request, self.ledger
        matched = self.view.match(request.blocks)[row]
        cached = min(matched * live.block_size, request.prompt_tokens - 1)
        live.sent = Sent(request, row, now_s, cached)
        uncached = request.prompt_tokens - cached
        due_s = None
        if not self._first_token:
            live.backlog = ledger.backlog(row)
            prices = self.predictor.prices((_MODEL, self._facts.groups[row]))
            wait_s, own_s = times_s(prices.ttft_prices_s, live.backlog, max(1, uncached), cached)
            ttft_s = (wait_s + own_s) / self._facts.weights[row]
            due_s = now_s + max(PREFILL_DUE_FLOOR_S, PREFILL_DUE_FACTOR * ttft_s)
        change = ledger.charge(request.request_id, row, uncached, request.prompt_tokens, now_s)
        self.view.sent(request.request_id, row, request.blocks)
        self.policy.on_sent(live.sent)
        return change, due_s

    def first_token(self, live: Live, now_s: float) -> Change | None:
        """The first token passed by; returns what others are to get."""
        assert live.sent is not None, "only what was sent is answered"
        change = self.ledger.prefilled(live.request.request_id, now_s)
        self.view.prefilled(live.request.request_id)
        self.policy.on_first_token(live.sent, now_s)
        return change

    def finished(self, live: Live, now_s: float) -> Change:
        """The request ended, answered or refused; returns what others are to get."""
        assert live.sent is not None, "only what was sent ends"
        change = self.ledger.release(live.request.request_id, now_s)
        answered = live.first_s is not None
        if answered:
            self.view.prefilled(live.request.request_id)
            self._learn(live, live.sent)
            self.policy.on_usage(live.sent, live.source.prompt_tokens, live.cached_tokens)
        self.policy.on_finished(live.sent, now_s, live.source.output_tokens if answered else 0)
        return change

    def _learn(self, live: Live, sent: Sent) -> None:
        """Learn what the answer's usage and timing show, as the product does."""
        source, predictor, group = live.source, self.predictor, self._facts.groups[sent.row]
        predictor.observe_usage(_MODEL, live.prompt_bytes, source.prompt_tokens)
        if self._first_token or live.first_s is None:
            return  # these predictions are not used then
        ttft_s = live.first_s - sent.sent_s
        predictor.observe_ttft(
            (_MODEL, group),
            live.backlog,
            uncached=source.prompt_tokens - live.cached_tokens,
            cached=live.cached_tokens,
            predicted_s=None,
            actual_s=ttft_s,
            weight=self._facts.weights[sent.row],
        )


def missed_cache(live: Live) -> bool:
    """The engine reported clearly fewer cached tokens than the gateway believed."""
    return (
        live.first_s is not None
        and live.sent is not None
        and live.sent.matched_tokens - live.cached_tokens > _CACHED_TOLERANCE_TOKENS
    )
