"""Time to first token of one model on one group of equal endpoints: the one model that decides and is shown.

Rules:
    1. A first token comes after the prefill ahead on the endpoint and the request's own. Prefill of u
       uncached tokens after c cached ones costs u tokens and u*(c + u/2) pairs of (token, earlier token);
       while it lasts, each engine step also carries the decodes that run there. All of it is one sum of
       priced terms.
    2. Cached tokens are not free: they are tokenized and hashed.
    3. Counts are of thousands of tokens inside, of tokens at every function's edge. An endpoint of weight w
       takes a w-th of the time; prices are those of weight 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Final

from extproc.predicting.priced_terms import CEILING_S, PricedTerms
from extproc.predicting.sums import plain_sum
from metadata_center.types import value

TOKENS: Final = 1_000.0
"""Unit of the prices."""

STEP_TOKENS: Final = 2048
"""Prompt tokens of one full engine step: both calibrations of the prior prices used vLLM's 2,048, and engines
do not announce theirs. Only the share of decodes in a step's time depends on it, and that is learned."""

FLOOR_S: Final = 0.001
"""No engine answers within a millisecond: the quickest step published for an 8B model on H100 is 5 ms."""


@dataclass(frozen=True, slots=True)
class TtftPrices:
    """What TTFT is made of before anything was observed: an 8B bf16 model on one H100 under vLLM.

    Attributes:
        base_s: A request with nothing to prefill: 5..10 ms of API server and 1 ms of step (BLIS fits of
            7..8B on H100 have 2.5..10.3 ms before the queue).
        token_s: Per 1,000 uncached tokens. Three independent sources agree on 0.020..0.026 ms per token
            (BLIS fits on vLLM, Vidur kernel profiles, LLMServingSim layer profiles).
        pair_s: Per 1,000 uncached times 1,000 earlier tokens: 1.3e-6 ms per pair, attention FLOPs of 8B at
            40 % of H100's peak.
        cached_s: Per 1,000 cached tokens: tokenising and hashing them, 0.0005 ms each; Preble's fits have
            0.0002..0.004 ms per token of total length.
        sequence_s: Per decode in one step; see `extproc.predicting.tpot`.
        context_s: Per 1,000 tokens of context in one step; see `extproc.predicting.tpot`.
    """

    base_s: float = 0.010
    token_s: float = 0.022
    pair_s: float = 0.0013
    cached_s: float = 0.0005
    sequence_s: float = 0.00001
    context_s: float = 0.00006


@value
class Backlog:
    """What is on one endpoint before the request.

    Attributes:
        prefilling: Requests without first token.
        prefill_tokens: Their uncached tokens.
        prompt_tokens: Their prompt tokens, cached ones included.
        decoding: Requests that are being answered.
        context_tokens: KV tokens that those read in each step.
    """

    prefilling: int
    prefill_tokens: int
    prompt_tokens: int
    decoding: int
    context_tokens: float


IDLE: Final = Backlog(0, 0, 0, 0, 0.0)
"""An endpoint without requests."""


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

    def predict(self, backlog: Backlog, uncached_tokens: int, cached_tokens: int) -> float:
        """Return the expected TTFT in seconds, finite and > 0; see `learn` for the arguments."""
        prices_s = self._terms.prices_s
        return total_s(
            *times_s(prices_s, backlog, uncached_tokens, cached_tokens), beside_s(prices_s, backlog)
        )

    def learn(self, backlog: Backlog, uncached_tokens: int, cached_tokens: int, ttft_s: float) -> None:
        """Learn from one request that prefill alone kept waiting.

        Args:
            backlog: Of its endpoint when it was sent.
            uncached_tokens: Of its prompt, >= 1.
            cached_tokens: Of its prompt, >= 0.
            ttft_s: Sent to first token, seconds, finite and > 0; times its endpoint's weight.

        Raises:
            ValueError: A value is out of its range. The model is unchanged.
        """
        tokens = backlog.prefill_tokens + uncached_tokens
        pairs = _pairs_ahead(backlog) + uncached_tokens * (cached_tokens + uncached_tokens / 2)
        steps = tokens / step_tokens(backlog.decoding) + 1.0  # see `beside_s`
        self._terms.learn(
            (
                1.0,
                tokens / TOKENS,
                pairs / (TOKENS * TOKENS),
                cached_tokens / TOKENS,
                steps * backlog.decoding,
                steps * backlog.context_tokens / TOKENS,
            ),
            ttft_s,
        )


def times_s(
    prices_s: Sequence[float], backlog: Backlog, uncached_tokens: int, cached_tokens: int
) -> tuple[float, float]:
    """Seconds of prefill ahead, and of the request's own, at weight 1."""
    base, _, pair, cached, _, _ = prices_s
    per_token = _per_token_s(prices_s, backlog)
    per_pair = pair / (TOKENS * TOKENS)
    wait_s = backlog.prefill_tokens * per_token + _pairs_ahead(backlog) * per_pair
    pairs = uncached_tokens * (cached_tokens + uncached_tokens / 2)
    own_s = base + cached_tokens * (cached / TOKENS)
    return wait_s, own_s + uncached_tokens * per_token + pairs * per_pair


def beside_s(prices_s: Sequence[float], backlog: Backlog) -> float:
    """Seconds that the decodes of one engine step take, at weight 1.

    Each first token waits for about one such step more than its share of the steps of prefill: half of the
    step that runs when the request comes, and half of the one that its prefill ends in.
    """
    return prices_s[4] * backlog.decoding + prices_s[5] * backlog.context_tokens / TOKENS


def total_s(*parts_s: float) -> float:
    """The parts of one TTFT together, between the floor and the ceiling of a prediction."""
    return max(FLOOR_S, min(CEILING_S, plain_sum(parts_s)))


def step_s(prices_s: Sequence[float], backlog: Backlog) -> float:
    """Seconds of a step full of prompt tokens beside the decodes of `backlog`, at weight 1."""
    return STEP_TOKENS * _per_token_s(prices_s, backlog)


def step_tokens(decoding: int) -> float:
    """Prompt tokens that a step has room for beside so many decodes."""
    return float(max(STEP_TOKENS // 8, STEP_TOKENS - decoding))


def _per_token_s(prices_s: Sequence[float], backlog: Backlog) -> float:
    """Seconds per prompt token, its share of the decodes in its step included."""
    return prices_s[1] / TOKENS + beside_s(prices_s, backlog) / step_tokens(backlog.decoding)


def _pairs_ahead(backlog: Backlog) -> float:
    """Pairs of (token, earlier token) in the prefill ahead, as if its requests were alike."""
    if not backlog.prefilling:
        return 0.0
    tokens = backlog.prefill_tokens
    cached = max(0, backlog.prompt_tokens - tokens)
    return tokens * (cached + tokens / 2) / backlog.prefilling
