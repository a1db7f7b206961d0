"""All that is predicted, by model and endpoint group. One owner, one thread.

Rules:
    1. Predicting changes nothing: an unknown key is answered from the prior and leaves no trace.
    2. At most `max_keys` keys (and as many models' token ratios) are kept; learning of one more drops the one
       least recently learned.
    3. An observation counts wholly or, if a value is out of range, not at all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TypeVar

from extproc.predicting.calibration import Calibration, CalibrationSummary
from extproc.predicting.prices import Prices
from extproc.predicting.tokens import TokensPerByte
from extproc.predicting.tpot import SegmentedTpotModel
from extproc.predicting.traffic import Traffic
from extproc.predicting.ttft import Backlog, TtftModel

ModelKey = tuple[str, str]
"""(model name as the engine knows it, endpoint group): endpoints of a group are equal hardware."""

_MAX_KEYS = 1024
"""Key bound; a key is about 20 kB when its calibration windows are full, so 20 MB in all."""

_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True)
class KeyCalibration:
    """How good one key's predictions are; None where no prediction met its outcome yet."""

    ttft: CalibrationSummary | None
    tpot: CalibrationSummary | None


class _Models:
    """What is kept per key."""

    __slots__ = ("prices", "tpot", "tpot_calibration", "ttft", "ttft_calibration")

    def __init__(self, tpot_thresholds: Sequence[int]) -> None:
        self.ttft = TtftModel()
        self.tpot = SegmentedTpotModel(tpot_thresholds)
        self.ttft_calibration = Calibration()
        self.tpot_calibration = Calibration()
        self.reprice()

    def reprice(self) -> None:
        """Take over what the models have learned."""
        self.prices = Prices(self.ttft.prices_s, self.tpot.prices_s, self.tpot.thresholds)

    def calibration(self) -> KeyCalibration:
        return KeyCalibration(self.ttft_calibration.summary(), self.tpot_calibration.summary())


class Predictor:
    """Predicts TTFT, TPOT and prompt tokens, and learns from outcomes.

    Args:
        max_keys: Keys and models kept, each, >= 1.
        tpot_thresholds: Batch sizes at which TPOT is learned afresh; see `SegmentedTpotModel`.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(self, *, max_keys: int = _MAX_KEYS, tpot_thresholds: Sequence[int] = ()) -> None:
        if max_keys < 1:
            raise ValueError("max_keys must be >= 1")
        self._max_keys = max_keys
        self._tpot_thresholds = tuple(tpot_thresholds)
        self._untrained = _Models(self._tpot_thresholds)
        self._untrained_tokens = TokensPerByte()
        self._models: OrderedDict[ModelKey, _Models] = OrderedDict()
        self._tokens: OrderedDict[str, TokensPerByte] = OrderedDict()
        self._traffic: OrderedDict[ModelKey, Traffic] = OrderedDict()

    def __len__(self) -> int:
        """Keys that something was learned of."""
        return len(self._models)

    def prices(self, key: ModelKey) -> Prices:
        """What predicts for `key` right now; unlike the models behind it, it does not change."""
        return self._models.get(key, self._untrained).prices

    def row_prices(self, model: str, groups: Sequence[str]) -> tuple[Prices, ...]:
        """`prices` of several endpoint groups of a model, in their order."""
        return tuple(self.prices((model, group)) for group in groups)

    def prompt_tokens(self, model: str, prompt_bytes: int) -> int:
        """Return the expected tokens of a prompt of that many bytes, 0 only for an empty one."""
        return self._tokens.get(model, self._untrained_tokens).estimate(prompt_bytes)

    def traffic(self, key: ModelKey) -> Traffic:
        """What is asked of a group of endpoints: kept and shown the traffic by its caller."""
        traffic = self._traffic.get(key) or Traffic()
        self._keep(self._traffic, key, traffic)
        return traffic

    def observe_ttft(
        self,
        key: ModelKey,
        backlog: Backlog,
        *,
        uncached: int,
        cached: int,
        predicted_s: float | None,
        actual_s: float,
        weight: float = 1.0,
        teaches: bool = True,
    ) -> None:
        """Pair a prediction with its outcome, then learn the outcome.

        Args:
            key: Which model on which endpoint group.
            backlog: Of the endpoint when the request was sent.
            uncached: Tokens that were prefilled, >= 0.
            cached: Tokens that were in the cache, >= 0.
            predicted_s: What was predicted for the chosen endpoint, seconds; None if nothing was.
            actual_s: Observed TTFT, seconds, > 0.
            weight: Relative capacity of the endpoint, > 0.
            teaches: False if the request waited for more than prefill: that says nothing of its prices.

        Raises:
            ValueError: A value is out of range or not finite. Nothing is changed.
        """
        _require_finite(predicted_s)
        models = self._models.get(key) or _Models(self._tpot_thresholds)
        if teaches:
            models.ttft.learn(
                backlog, uncached or 1, cached, actual_s * weight
            )  # an engine computes one token
            models.reprice()
        if predicted_s is not None:
            models.ttft_calibration.observe(predicted_s, actual_s)
        self._keep(self._models, key, models)

    def observe_tpot(
        self,
        key: ModelKey,
        *,
        batch: float,
        context: float,
        predicted_s: float | None,
        actual_s: float,
        weight: float = 1.0,
    ) -> None:
        """Pair a prediction with its outcome, then learn the outcome.

        Args:
            key: Which model on which endpoint group.
            batch: Requests running at the endpoint, this one included, >= 0.
            context: KV tokens in use there, >= 0.
            predicted_s: What was predicted, seconds; None if nothing was.
            actual_s: Observed mean time per output token, seconds, > 0.
            weight: Relative capacity of the endpoint, > 0.

        Raises:
            ValueError: A value is out of range or not finite. Nothing is changed.
        """
        _require_finite(predicted_s)
        models = self._models.get(key) or _Models(self._tpot_thresholds)
        models.tpot.learn(batch, context, actual_s * weight)
        models.reprice()
        if predicted_s is not None:
            models.tpot_calibration.observe(predicted_s, actual_s)
        self._keep(self._models, key, models)

    def observe_usage(self, model: str, prompt_bytes: int, prompt_tokens: int) -> None:
        """Learn from reported usage.

        Raises:
            ValueError: A count is not > 0. Nothing is changed.
        """
        tokens = self._tokens.get(model) or TokensPerByte()
        tokens.learn(prompt_bytes, prompt_tokens)
        self._keep(self._tokens, model, tokens)

    def calibration(self, key: ModelKey) -> KeyCalibration:
        """Return how good the predictions for `key` have been."""
        return self._models.get(key, self._untrained).calibration()

    def calibrations(self) -> Iterator[tuple[ModelKey, KeyCalibration]]:
        """Iterate over all keys, least recently learned first, for metrics."""
        return ((key, models.calibration()) for key, models in tuple(self._models.items()))

    def token_ratios(self) -> Iterator[tuple[str, float]]:
        """Iterate over (model, tokens per byte), least recently learned first, for metrics."""
        return ((model, tokens.ratio) for model, tokens in tuple(self._tokens.items()))

    def _keep(self, entries: OrderedDict[_K, _V], key: _K, entry: _V) -> None:
        entries[key] = entry
        entries.move_to_end(key)
        if len(entries) > self._max_keys:
            entries.popitem(last=False)


def _require_finite(predicted_s: float | None) -> None:
    if predicted_s is not None and not isfinite(predicted_s):
        raise ValueError("predicted_s must be finite or None")
