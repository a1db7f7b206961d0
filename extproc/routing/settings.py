"""What the configuration says about requests as such, as the request path takes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from extproc.values.pool_policies import PoolPolicies


@dataclass(frozen=True, slots=True)
class HoldSettings:
    """Bounds on requests that wait here for an endpoint with room.

    Attributes:
        max_requests: Most of them per model route and worker, >= 1.
        max_s: Longest, > 0.
        is_fair: Fairness ids have their turns.
        refuses: One beyond the bounds is refused; else it is sent.
    """

    max_requests: int = 1000
    max_s: float = 50.0
    is_fair: bool = True
    refuses: bool = False


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """What the configuration says about requests as such.

    Attributes:
        first_chunk: The first chunk of streams is seen; else prefill ends when it is predicted to.
        timeout_s: Bound on an answer that is not streamed.
        first_byte_timeout_s: Bound on the response headers of a stream, per attempt.
        block_bytes: Prompt bytes per cache block.
        usage_injection: Ask engines for usage on every stream.
        max_body_bytes: Larger bodies are refused.
        debug_token: Operators send it to learn the decision id; None switches that off.
        retry_after_s: For answers that no endpoint is available.
        hold: Requests of `least_completion` may wait for room; None sends each at once.
        policies: What a source of endpoints says of requests: models that are to be others.
    """

    first_chunk: bool = True
    timeout_s: float = 600.0
    first_byte_timeout_s: float = 60.0
    block_bytes: int = 512
    usage_injection: bool = False
    max_body_bytes: int = 32 * 1024 * 1024
    debug_token: str | None = None
    retry_after_s: int = 1
    hold: HoldSettings | None = None
    policies: PoolPolicies = field(default_factory=PoolPolicies)
