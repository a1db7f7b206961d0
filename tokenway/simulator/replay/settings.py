"""How a run is done: what gateways can know, and what is measured."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tokenway.simulator.replay.caches import ViewKind


class Spread(StrEnum):
    """How requests come to gateways."""

    ROUND_ROBIN = "round_robin"
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Everything that a run depends on beside trace, fleet, policy and seed.

    Attributes:
        speed: Factor on the arrival rate, > 0.
        gateways: How many share the fleet, >= 1.
        spread: Which of them a request comes to.
        push_delay_s: How late a gateway learns what another did, >= 0.
        view: How caches are seen.
        event_lag_s: From the end of an engine's step to its cache events at the gateways, >= 0.
        event_loss: Share of engine steps whose cache events never arrive, 0..1.
        metric_age_s: Interval of scraping; metrics are up to that old. 0 reads the engine itself.
        first_token: Gateways see the first token; else prefill is taken to end when it is predicted to.
        router_block_tokens: Largest block of a router. The product's 512 bytes are about 128 tokens.
        token_error: Standard deviation of the logarithm of bytes per token, from request to request; a
            router knows bytes. 0: lengths are known exactly.
        max_hold_s: Longest that a gateway holds a request before it is refused, > 0.
        max_held: Most requests that a gateway holds.
        abandon_after_s: When an impatient client leaves that has no first token yet, > 0.
        abandon_share: Share of clients that are impatient, 0..1.
        retries: How often a refused client comes again, >= 0.
        warmup_s: What arrives before does not count in any figure.
        duration_s: What would arrive later does not come; None for no such end.
    """

    speed: float = 1.0
    gateways: int = 1
    spread: Spread = Spread.ROUND_ROBIN
    push_delay_s: float = 0.05
    view: ViewKind = ViewKind.EVENTS_PENDING
    event_lag_s: float = 0.05
    event_loss: float = 0.0
    metric_age_s: float = 0.1
    first_token: bool = True
    router_block_tokens: int = 128
    token_error: float = 0.1
    max_hold_s: float = 60.0
    max_held: int = 1000
    abandon_after_s: float = 10.0
    abandon_share: float = 0.0
    retries: int = 0
    warmup_s: float = 0.0
    duration_s: float | None = None

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: One is out of its range.
        """
        if self.speed <= 0.0 or self.max_hold_s <= 0.0 or self.gateways < 1 or self.max_held < 0:
            raise ValueError("speed, gateways and max_hold_s must be positive, max_held not negative")
        delays = (self.push_delay_s, self.event_lag_s, self.metric_age_s, self.token_error, self.warmup_s)
        if min(delays) < 0.0 or self.router_block_tokens < 1:
            raise ValueError("a delay, an age or an error is negative, or a router's block is empty")
        shares = (self.abandon_share, self.event_loss)
        if self.abandon_after_s <= 0.0 or self.retries < 0 or min(shares) < 0.0 or max(shares) > 1.0:
            raise ValueError("abandon_after_s must be positive, shares in 0..1, retries not negative")
