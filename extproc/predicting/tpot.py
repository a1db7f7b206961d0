"""Time per output token of one model on one group of equal endpoints.

Rules:
    1. A decode step reads the weights once and every running request's KV once: TPOT over
       [batch, context, 1], batch in requests, context in thousands of tokens.
    2. A segment is a range of batch sizes with its own model (engines change kernels with the batch): batch b
       is in segment i if thresholds[i-1] <= b < thresholds[i].
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from extproc.predicting.priced_terms import PricedTerms

TOKENS = 1_000.0
"""Tokens per unit of context."""

FLOOR_S = 0.0005
"""No decode step takes under half a millisecond; the floor of Dynamo's mocker is 1 ms per step, and
speculative decoding gives more than one token per step."""


@dataclass(frozen=True, slots=True)
class TpotPrices:
    """What TPOT is made of before anything was observed: an 8B bf16 model on one H100 under vLLM.

    With these 64 requests of 2,000 tokens decode at 17 ms per token, the recommended step model's figure.

    Attributes:
        sequence_s: Per request in the batch: 0.010..0.025 ms (BLIS fits of 7B: 0.005..0.027).
        context_s: Per 1,000 tokens of KV in use: 131,072 bytes per token at 3.35 TB/s, times 1.5 for what is
            not reached of the bandwidth.
        base_s: A step by itself, reading 16 GB of weights: 1 ms and 7 ms.
    """

    sequence_s: float = 0.00002
    context_s: float = 0.00006
    base_s: float = 0.008


class TpotModel:
    """Predicts TPOT and learns from it.

    Args:
        prior: Prices to begin with; they need only be of the right proportions.
    """

    __slots__ = ("_terms",)

    def __init__(self, prior: TpotPrices = TpotPrices()) -> None:
        self._terms = PricedTerms(astuple(prior), floor_s=FLOOR_S)

    @property
    def prices_s(self) -> tuple[float, ...]:
        """The current prices in the order of `TpotPrices`."""
        return self._terms.prices_s

    @property
    def prices(self) -> TpotPrices:
        """The current prices."""
        return TpotPrices(*self._terms.prices_s)

    def predict(self, batch: float, context_tokens: float) -> float:
        """Return the expected TPOT.

        Args:
            batch: Requests running, this one included, >= 0.
            context_tokens: KV tokens in use, >= 0.

        Returns:
            Seconds, finite and > 0.
        """
        return self._terms.predict(terms(batch, context_tokens))

    def learn(self, batch: float, context_tokens: float, tpot_s: float) -> None:
        """Learn from one request.

        Args:
            batch: Requests running at its endpoint, finite, >= 0.
            context_tokens: KV tokens in use there, finite, >= 0.
            tpot_s: Mean time between its output tokens, seconds, finite and > 0.

        Raises:
            ValueError: A value is out of its range. The model is unchanged.
        """
        self._terms.learn(terms(batch, context_tokens), tpot_s)


class SegmentedTpotModel:
    """One `TpotModel` per range of batch sizes; an untrained segment predicts by its prior.

    Args:
        thresholds: Batch sizes at which a new segment begins, increasing, > 0; none for a single segment.
        priors: Prices to begin with, one per segment; None for the default everywhere.

    Raises:
        ValueError: `thresholds` do not increase from above 0, or `priors` are not one per segment.
    """

    __slots__ = ("_models", "_thresholds")

    def __init__(self, thresholds: Sequence[int] = (), *, priors: Sequence[TpotPrices] | None = None) -> None:
        if any(low >= high for low, high in zip((0, *thresholds), thresholds, strict=False)):
            raise ValueError("thresholds must increase from above 0")
        if priors is None:
            priors = (TpotPrices(),) * (len(thresholds) + 1)
        if len(priors) != len(thresholds) + 1:
            raise ValueError("there must be one prior per segment")
        self._thresholds = tuple(thresholds)
        self._models = tuple(map(TpotModel, priors))

    @property
    def thresholds(self) -> tuple[int, ...]:
        """Batch sizes at which a new segment begins."""
        return self._thresholds

    @property
    def prices_s(self) -> tuple[tuple[float, ...], ...]:
        """The current prices of each segment."""
        return tuple(model.prices_s for model in self._models)

    def segment(self, batch: float) -> int:
        """Return the index of the segment that `batch` lies in."""
        return bisect_right(self._thresholds, batch)

    def predict(self, batch: float, context_tokens: float) -> float:
        """Return the expected TPOT in seconds; see `TpotModel.predict`."""
        return self._models[self.segment(batch)].predict(batch, context_tokens)

    def learn(self, batch: float, context_tokens: float, tpot_s: float) -> None:
        """Teach the segment of `batch`; see `TpotModel.learn`."""
        self._models[self.segment(batch)].learn(batch, context_tokens, tpot_s)


def terms(batch: float, context_tokens: float) -> tuple[float, ...]:
    """Return the features [batch, context, 1]."""
    return (batch, context_tokens / TOKENS, 1.0)
