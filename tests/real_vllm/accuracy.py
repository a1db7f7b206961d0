"""How well a gateway foresaw what its engines then reported: cached tokens and time to first token.

Rules:
    1. Everything is read from decision records as the gateway's admin port gives them.
    2. A request counts if one attempt served it and its engine reported usage; all others are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles
from typing import Any, Final

LEAST_EQUAL_RATIO: Final = 0.95
"""Share of requests whose cached tokens must be foreseen exactly once the gateway reads KV events."""


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What was expected of the endpoint that answered, and what it did.

    Attributes:
        request_id: The decision's.
        model: As the client named it.
        prompt_tokens: As the engine counted.
        predicted_cached_tokens: By the decision.
        cached_tokens: As the engine reported.
        predicted_ttft_s: By the decision.
        ttft_s: As the gateway measured it; None if the answer was not streamed.
    """

    request_id: str
    model: str
    prompt_tokens: int
    predicted_cached_tokens: int
    cached_tokens: int
    predicted_ttft_s: float | None
    ttft_s: float | None


def foreseen(records: Iterable[Mapping[str, Any]]) -> list[Foreseen]:
    """What the records of `/explain` say, of those that count."""
    rows = []
    for record in records:
        outcome = record["outcome"]
        if outcome is None or outcome["attempts"] != 1 or outcome["predicted_cached_tokens"] is None:
            continue
        if outcome["prompt_tokens"] is None or outcome["cached_tokens"] is None:
            continue
        rows.append(
            Foreseen(
                request_id=record["request_id"],
                model=record["model"],
                prompt_tokens=outcome["prompt_tokens"],
                predicted_cached_tokens=outcome["predicted_cached_tokens"],
                cached_tokens=outcome["cached_tokens"],
                predicted_ttft_s=outcome["predicted_ttft_s"],
                ttft_s=outcome["ttft_s"],
            )
        )
    return rows


def equal_ratio(rows: Sequence[Foreseen]) -> float:
    """Share of requests whose cached tokens were foreseen to the token; 0 for no requests."""
    return sum(row.predicted_cached_tokens == row.cached_tokens for row in rows) / max(1, len(rows))


def cached_summary(rows: Sequence[Foreseen]) -> dict[str, Any]:
    """Predicted against reported cached tokens, over all requests and over those with a hit."""
    hits = [row for row in rows if row.cached_tokens or row.predicted_cached_tokens]
    errors = [row.predicted_cached_tokens - row.cached_tokens for row in rows]
    return {
        "requests": len(rows),
        "equal_ratio": round(equal_ratio(rows), 4),
        "hits": len(hits),
        "equal_ratio_of_hits": round(equal_ratio(hits), 4),
        "over": sum(error > 0 for error in errors),
        "under": sum(error < 0 for error in errors),
        "mean_absolute_error_tokens": round(fmean(map(abs, errors)), 1) if errors else None,
    }


def ttft_summary(rows: Sequence[Foreseen]) -> dict[str, Any]:
    """Predicted against measured time to first token; relative errors are shares of the measured time."""
    pairs = [(row.predicted_ttft_s, row.ttft_s) for row in rows if row.ttft_s and row.predicted_ttft_s]
    if len(pairs) < 2:
        return {"requests": len(pairs)}
    relative = [abs(predicted - actual) / actual for predicted, actual in pairs]
    return {
        "requests": len(pairs),
        "actual_median_ms": round(1e3 * median(actual for _, actual in pairs), 1),
        "predicted_median_ms": round(1e3 * median(predicted for predicted, _ in pairs), 1),
        "bias_ms": round(1e3 * fmean(predicted - actual for predicted, actual in pairs), 1),
        "median_relative_error": round(median(relative), 3),
        "p90_relative_error": round(quantiles(relative, n=10, method="inclusive")[-1], 3),
    }
