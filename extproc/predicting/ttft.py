"""Time to first token of one model on one group of equal endpoints.

Rules:
    1. Prefill of u uncached tokens after c cached ones costs u for the linear layers and u*(c + u/2) pairs
       for attention; so both quadratic terms are features: TTFT over [1, u, c, u*u, u*c, p].
    2. p, uncached tokens of other requests ahead on the endpoint, delays by about their own prefill.
    3. u, c and p are counts of thousands of tokens inside, of tokens at every function's edge.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from extproc.predicting.priced_terms import PricedTerms

_TOKENS = 1_000.0
"""Tokens per unit of u, c and p."""

FLOOR_S = 0.001
"""No engine answers within a millisecond: the quickest step published for an 8B model on H100 is 5 ms."""


@dataclass(frozen=True, slots=True)
class TtftPrices:
    """What TTFT is made of before anything was observed: an 8B bf16 model on one H100 under vLLM.

    Attributes:
        base_s: A request with nothing to prefill: 5..10 ms of API server and 1 ms of step (BLIS fits of
            7..8B on H100 have 2.5..10.3 ms before the queue).
        uncached_s: Per 1,000 uncached tokens. Three independent sources agree on 0.020..0.026 ms per token
            (BLIS fits on vLLM, Vidur kernel profiles, LLMServingSim layer profiles).
        cached_s: Per 1,000 cached tokens: tokenising and hashing them, 0.0005 ms each; Preble's fits have
            0.0002..0.004 ms per token of total length.
        uncached_pairs_s: Per (1,000 uncached tokens) squared: half of `cached_pairs_s`, for a token attends
            only to those before it.
        cached_pairs_s: Per 1,000 uncached times 1,000 cached tokens: 1.3e-6 ms per pair, attention FLOPs of
            8B at 40 % of H100's peak.
        pending_s: Per 1,000 uncached tokens of other requests ahead: as `uncached_s`.
    """

    base_s: float = 0.010
    uncached_s: float = 0.025
    cached_s: float = 0.0005
    uncached_pairs_s: float = 0.00065
    cached_pairs_s: float = 0.0013
    pending_s: float = 0.025


class TtftModel:
    """Predicts TTFT and learns from it.

    Args:
        prior: Prices to begin with; they need only be of the right proportions, the scale is learned first.
    """

    __slots__ = ("_terms",)

    def __init__(self, prior: TtftPrices = TtftPrices()) -> None:
        self._terms = PricedTerms(astuple(prior), floor_s=FLOOR_S)

    @property
    def prices_s(self) -> tuple[float, ...]:
        """The current prices in the order of `TtftPrices`."""
        return self._terms.prices_s

    @property
    def prices(self) -> TtftPrices:
        """The current prices."""
        return TtftPrices(*self._terms.prices_s)

    def predict(self, uncached_tokens: float, cached_tokens: float, pending_tokens: float) -> float:
        """Return the expected TTFT.

        Args:
            uncached_tokens: Prompt tokens to be prefilled, >= 0.
            cached_tokens: Prompt tokens in the cache, >= 0.
            pending_tokens: Uncached tokens of requests ahead, >= 0.

        Returns:
            Seconds, finite and > 0; never falling in any argument.
        """
        return self._terms.predict(terms(uncached_tokens, cached_tokens, pending_tokens))

    def learn(
        self, uncached_tokens: float, cached_tokens: float, pending_tokens: float, ttft_s: float
    ) -> None:
        """Learn from one request, with what was known of it when it was routed.

        Args:
            uncached_tokens: Prompt tokens believed not cached, finite, >= 0.
            cached_tokens: Prompt tokens believed cached, finite, >= 0.
            pending_tokens: Uncached tokens of other requests ahead, finite, >= 0.
            ttft_s: Request sent to first token, seconds, finite and > 0.

        Raises:
            ValueError: A value is out of its range. The model is unchanged.
        """
        self._terms.learn(terms(uncached_tokens, cached_tokens, pending_tokens), ttft_s)


def terms(uncached_tokens: float, cached_tokens: float, pending_tokens: float) -> tuple[float, ...]:
    """Return the features [1, u, c, u*u, u*c, p]."""
    u, c, p = uncached_tokens / _TOKENS, cached_tokens / _TOKENS, pending_tokens / _TOKENS
    return (1.0, u, c, u * u, u * c, p)
