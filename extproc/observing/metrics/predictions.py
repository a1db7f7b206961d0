"""Series of predictions and actual values: errors of single requests, and how good models are now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from extproc.observing.metrics.family import Family, MetricType, Values, doubling
from extproc.predicting.predictor import KeyCalibration, ModelKey

# A prediction off by 10 ms does not change a choice; one off by a minute is a different engine.
_ERROR_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_RELATIVE_BUCKETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
# 16 tokens is vLLM's default block; 131,072 a long context.
_CACHED_ERROR_BUCKETS = (0.0, *doubling(16.0, 14))

USAGE_UNKNOWN = Family(
    "tokenway_usage_unknown_total",
    MetricType.COUNTER,
    "Completed answers whose token usage is unknown, so that nothing was learned from it: `absent` where the "
    "engine gave none, or neither within 16 KiB of its end nor of its beginning; `encoded` where the answer "
    "was compressed.",
    ("model", "reason"),
)
TTFT_ERROR = Family(
    "tokenway_ttft_prediction_error_seconds",
    MetricType.HISTOGRAM,
    "Distance between predicted and actual time to first token; `side` says whether the token came `early` "
    "or `late`.",
    ("model", "side"),
    _ERROR_BUCKETS,
)
TTFT_RELATIVE_ERROR = Family(
    "tokenway_ttft_prediction_relative_error_ratio",
    MetricType.HISTOGRAM,
    "The same distance divided by the actual time to first token.",
    ("model", "side"),
    _RELATIVE_BUCKETS,
)
CACHED_TOKENS_ERROR = Family(
    "tokenway_cached_tokens_error_tokens",
    MetricType.HISTOGRAM,
    "Distance between the cached tokens expected and those the engine reported; `side` is `over` if the "
    "engine had fewer than expected, else `under`.",
    ("model", "side"),
    _CACHED_ERROR_BUCKETS,
)
PREDICTION_RELATIVE_ERROR = Family(
    "tokenway_prediction_median_relative_error_ratio",
    MetricType.GAUGE,
    "Median distance between predicted and actual, over the actual, of the last 256 predictions; `target` is "
    "`ttft` or `tpot`, `group` the endpoint group that shares the model.",
    ("model", "group", "target"),
)
PREDICTION_BIAS = Family(
    "tokenway_prediction_bias_seconds",
    MetricType.GAUGE,
    "Decayed mean of predicted minus actual: above zero the predictor is too pessimistic.",
    ("model", "group", "target"),
)
PREDICTION_BELOW = Family(
    "tokenway_prediction_actual_below_ratio",
    MetricType.GAUGE,
    "Share of actuals that came in below their prediction; 0.5 is a calibrated median.",
    ("model", "group", "target"),
)
TOKENS_PER_BYTE = Family(
    "tokenway_tokens_per_byte_ratio",
    MetricType.GAUGE,
    "Learned tokens per prompt byte; the estimate behind every token count before the engine's own.",
    ("model",),
)

ERROR_FAMILIES: tuple[Family, ...] = (
    USAGE_UNKNOWN,
    TTFT_ERROR,
    TTFT_RELATIVE_ERROR,
    CACHED_TOKENS_ERROR,
)
"""Counted at the end of a request."""

MODEL_FAMILIES: tuple[Family, ...] = (
    PREDICTION_RELATIVE_ERROR,
    PREDICTION_BIAS,
    PREDICTION_BELOW,
    TOKENS_PER_BYTE,
)
"""Read from the models when scraped."""


def values(
    models: frozenset[str],
    tokens_per_byte: Mapping[str, float],
    calibrations: Iterable[tuple[ModelKey, KeyCalibration]],
) -> Values:
    """The series of what is learned, of the models that are configured.

    Args:
        models: Those whose series are shown.
        tokens_per_byte: Learned ratio by model.
        calibrations: How good predictions have been, by model and endpoint group.
    """
    errors: dict[tuple[str, ...], float] = {}
    biases: dict[tuple[str, ...], float] = {}
    shares_below: dict[tuple[str, ...], float] = {}
    for (model, group), calibration in calibrations:
        for target, summary in (("ttft", calibration.ttft), ("tpot", calibration.tpot)):
            if summary is not None and model in models:
                labels = (model, group, target)
                errors[labels] = summary.median_relative_error_ratio
                biases[labels] = summary.mean_error_s
                shares_below[labels] = summary.below_ratio
    return {
        TOKENS_PER_BYTE: {(model,): ratio for model, ratio in tokens_per_byte.items() if model in models},
        PREDICTION_RELATIVE_ERROR: errors,
        PREDICTION_BIAS: biases,
        PREDICTION_BELOW: shares_below,
    }
