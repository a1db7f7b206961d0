"""All that is predicted, by model and endpoint group. One owner, one thread.

Rules:
    1. Predicting changes nothing: an unknown key is answered from the prior and leaves no trace.
    2. At most `max_keys` keys (and as many models' token ratios) are kept; learning of one more drops the one
       least recently learned.
    3. An observation counts wholly or, if a value is out of range, not at all.
    4. One that says which endpoint it is from counts as far as the others of its group agree (`agreement`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import TypeVar

from extproc.predicting.agreement import Agreement
from extproc.predicting.calibration import Calibration, CalibrationSummary
from extproc.predicting.sums import plain_sum
from extproc.predicting.tokens import LEAST_RATIO, MOST_RATIO, TokensPerByte
from extproc.predicting.tpot import SegmentedTpotModel
from extproc.predicting.traffic import Traffic
from extproc.predicting.ttft import Backlog, TtftModel
from extproc.values.by_kind import ByKind, Kinds
from extproc.values.prices import Prices
from metadata_center.types import MANY_ROWS

ModelKey = tuple[str, str]
"""(model name as the engine knows it, endpoint group): endpoints of a group are equal hardware."""

_MAX_KEYS = 1024
"""Key bound; a key is about 20 kB when its calibration windows are full, so 20 MB in all."""

TIMES_FACTOR = 4.0
"""Times of one endpoint count as within this of what the group's others take. Observations scatter by 0.25 of
what is expected (`priced_terms`), so honest ones are as good as never cut."""

_LEAST_S = 1e-6

_TOKENS_FACTOR = 2.0
"""The same of tokens per byte. Endpoints differ by what their clients write, and text does by two."""

_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True)
class KeyCalibration:
    """How good one key's predictions are; None where no prediction met its outcome yet."""

    ttft: CalibrationSummary | None
    tpot: CalibrationSummary | None


class _Models:
    """What is kept per key."""

    __slots__ = (
        "prices",
        "tpot",
        "tpot_agreement",
        "tpot_calibration",
        "ttft",
        "ttft_agreement",
        "ttft_calibration",
    )

    def __init__(self, tpot_thresholds: Sequence[int]) -> None:
        self.ttft = TtftModel()
        self.tpot = SegmentedTpotModel(tpot_thresholds)
        self.ttft_calibration = Calibration()
        self.tpot_calibration = Calibration()
        self.ttft_agreement = Agreement(TIMES_FACTOR)
        self.tpot_agreement = Agreement(TIMES_FACTOR)
        self.reprice()

    def reprice(self) -> None:
        """Take over what the models have learned."""
        self.prices = Prices(self.ttft.prices_s, self.tpot.prices_s, self.tpot.thresholds)

    def believed_ttft_s(
        self, endpoint: str | None, backlog: Backlog, uncached: int, cached: int, actual_s: float
    ) -> float:
        """Rule 4; values out of range are left to the model to refuse."""
        if endpoint is None or not 0.0 < actual_s < inf or uncached < 0 or cached < 0:
            return actual_s
        expected_s = self.ttft.predict(backlog, uncached or 1, cached)
        if not 0.0 < expected_s < inf:
            return actual_s
        believed_s = self.ttft_agreement.believed(
            endpoint, actual_s, expected_s, _whole_s(self.ttft.prices_s)
        )
        if self.ttft_agreement.is_contradicted():
            self.ttft = TtftModel()
        return believed_s

    def believed_tpot_s(self, endpoint: str | None, batch: float, context: float, actual_s: float) -> float:
        """Rule 4; values out of range are left to the model to refuse."""
        if endpoint is None or not 0.0 < actual_s < inf or not 0.0 <= batch + context < inf:
            return actual_s
        expected_s = self.tpot.predict(batch, context)
        whole_s = _whole_s(self.tpot.prices_s[0])
        believed_s = self.tpot_agreement.believed(endpoint, actual_s, expected_s, whole_s)
        if self.tpot_agreement.is_contradicted():
            self.tpot = SegmentedTpotModel(self.tpot.thresholds)
        return believed_s

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
        self._agreements: OrderedDict[str, Agreement] = OrderedDict()
        self._kinds = Kinds()

    def __len__(self) -> int:
        """Keys that something was learned of."""
        return len(self._models)

    def prices(self, key: ModelKey) -> Prices:
        """What predicts for `key` right now; unlike the models behind it, it does not change."""
        return self._models.get(key, self._untrained).prices

    def row_prices(self, model: str, groups: Sequence[str]) -> Sequence[Prices]:
        """`prices` of several endpoint groups of a model, in their order; many of them by kind."""
        of, untrained = self._models.get, self._untrained
        if len(groups) < MANY_ROWS:
            return tuple([of((model, group), untrained).prices for group in groups])
        kinds, rows = self._kinds.of(groups)
        return ByKind(tuple([of((model, kind), untrained).prices for kind in kinds]), rows)

    def prompt_tokens(self, model: str, prompt_bytes: int) -> int:
        """Return the expected tokens of a prompt of that many bytes, 0 only for an empty one."""
        return self._tokens.get(model, self._untrained_tokens).estimate(prompt_bytes)

    def traffic(self, key: ModelKey) -> Traffic:
        """What is asked of a group of endpoints: kept and shown the traffic by its caller."""
        traffic = self._traffic.get(key)
        if traffic is None:
            traffic = Traffic()
            self._keep(self._traffic, key, traffic)
        else:
            self._traffic.move_to_end(key)
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
        endpoint: str | None = None,
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
            endpoint: Where (Rule 4); None believes it as it is.

        Raises:
            ValueError: A value is out of range or not finite. Nothing is changed.
        """
        _require_finite(predicted_s)
        models = self._models.get(key) or _Models(self._tpot_thresholds)
        if teaches:
            believed_s = models.believed_ttft_s(endpoint, backlog, uncached, cached, actual_s * weight)
            # An engine computes one token at least.
            models.ttft.learn(backlog, uncached or 1, cached, believed_s)
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
        endpoint: str | None = None,
    ) -> None:
        """Pair a prediction with its outcome, then learn the outcome.

        Args:
            key: Which model on which endpoint group.
            batch: Requests running at the endpoint, this one included, >= 0.
            context: KV tokens in use there, >= 0.
            predicted_s: What was predicted, seconds; None if nothing was.
            actual_s: Observed mean time per output token, seconds, > 0.
            weight: Relative capacity of the endpoint, > 0.
            endpoint: Where (Rule 4); None believes it as it is.

        Raises:
            ValueError: A value is out of range or not finite. Nothing is changed.
        """
        _require_finite(predicted_s)
        models = self._models.get(key) or _Models(self._tpot_thresholds)
        believed_s = models.believed_tpot_s(endpoint, batch, context, actual_s * weight)
        models.tpot.learn(batch, context, believed_s)
        models.reprice()
        if predicted_s is not None:
            models.tpot_calibration.observe(predicted_s, actual_s)
        self._keep(self._models, key, models)

    def observe_usage(
        self, model: str, prompt_bytes: int, prompt_tokens: int, endpoint: str | None = None
    ) -> None:
        """Learn from reported usage.

        Args:
            model: Whose vocabulary.
            prompt_bytes: Of the prompt, > 0.
            prompt_tokens: As reported, > 0.
            endpoint: Reported by (Rule 4); None believes it as it is.

        Raises:
            ValueError: A count is not > 0. Nothing is changed.
        """
        tokens = self._tokens.get(model) or TokensPerByte()
        if endpoint is not None and prompt_bytes > 0 and prompt_tokens > 0:
            ratio, usual = max(LEAST_RATIO, min(MOST_RATIO, prompt_tokens / prompt_bytes)), tokens.ratio
            agreement = self._agreements.get(model) or Agreement(_TOKENS_FACTOR)
            believed = agreement.believed(endpoint, ratio, usual, usual)
            if believed != ratio:
                prompt_tokens = max(1, round(believed * prompt_bytes))
            self._keep(self._agreements, model, agreement)
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


def _whole_s(prices_s: Sequence[float]) -> float:
    """How prices are as a whole: one unit of everything, > 0."""
    return max(_LEAST_S, plain_sum(prices_s))


def _require_finite(predicted_s: float | None) -> None:
    if predicted_s is not None and not isfinite(predicted_s):
        raise ValueError("predicted_s must be finite or None")
