"""The histograms in which requests end."""

from __future__ import annotations

from collections.abc import Mapping

from extproc.observing.metrics.family import Family
from extproc.observing.metrics.predictions import CACHED_TOKENS_ERROR, TTFT_ERROR, TTFT_RELATIVE_ERROR
from extproc.observing.metrics.requests import (
    REQUEST_DURATION,
    TIME_PER_OUTPUT_TOKEN,
    TIME_TO_FIRST_TOKEN,
    TOKEN_USAGE,
)
from extproc.observing.metrics.series import Histograms
from extproc.values.outcomes import Ended, Outcome


class Ends:
    """The histograms one model and operation's requests end in, looked up once instead of per request.

    Args:
        of: All histograms, by family.
        model: A configured model, or `OTHER`.
        operation: What was asked for.
    """

    __slots__ = (
        "_cached",
        "_cached_over",
        "_cached_under",
        "_completed",
        "_durations",
        "_early",
        "_early_ratio",
        "_gen_ai",
        "_input",
        "_late",
        "_late_ratio",
        "_output",
        "_tpot",
        "_ttft",
    )

    def __init__(self, of: Mapping[Family, Histograms], model: str, operation: str) -> None:
        gen_ai = self._gen_ai = (model, operation)
        self._input = of[TOKEN_USAGE]["input", *gen_ai]
        self._output = of[TOKEN_USAGE]["output", *gen_ai]
        self._cached = of[TOKEN_USAGE]["cached", *gen_ai]
        self._durations = of[REQUEST_DURATION]
        self._completed = self._durations[*gen_ai, ""]
        self._ttft = of[TIME_TO_FIRST_TOKEN][gen_ai]
        self._tpot = of[TIME_PER_OUTPUT_TOKEN][gen_ai]
        self._early = of[TTFT_ERROR][model, "early"]
        self._late = of[TTFT_ERROR][model, "late"]
        self._early_ratio = of[TTFT_RELATIVE_ERROR][model, "early"]
        self._late_ratio = of[TTFT_RELATIVE_ERROR][model, "late"]
        self._cached_over = of[CACHED_TOKENS_ERROR][model, "over"]
        self._cached_under = of[CACHED_TOKENS_ERROR][model, "under"]

    def observe(self, outcome: Outcome, waited_s: float, tpot_s: float | None) -> None:
        """Count what one request took and what it shows about our predictions.

        Args:
            outcome: How it ended; if it did not complete, it says nothing about times but its own.
            waited_s: How long it waited before it was sent to the endpoint that answered.
            tpot_s: Mean time between its output tokens; None if that is not known.
        """
        prompt_tokens, completion_tokens = outcome.prompt_tokens, outcome.completion_tokens
        cached_tokens = outcome.cached_tokens
        if prompt_tokens is not None:
            self._input.observe(prompt_tokens)
        if completion_tokens is not None:
            self._output.observe(completion_tokens)
        if cached_tokens is not None:
            self._cached.observe(cached_tokens)
            expected_tokens = outcome.predicted_cached_tokens
            if expected_tokens is not None:
                if expected_tokens > cached_tokens:
                    self._cached_over.observe(expected_tokens - cached_tokens)
                else:
                    self._cached_under.observe(cached_tokens - expected_tokens)
        if outcome.ended is not Ended.COMPLETED:
            self._durations[*self._gen_ai, outcome.ended].observe(outcome.duration_s)
            return
        self._completed.observe(outcome.duration_s)
        ttft_s = outcome.ttft_s
        if ttft_s is None:
            return
        self._ttft.observe(waited_s + ttft_s)
        if tpot_s is not None:
            self._tpot.observe(tpot_s)
        predicted_s = outcome.predicted_ttft_s
        if predicted_s is not None and ttft_s > 0:
            if ttft_s < predicted_s:
                self._early.observe(predicted_s - ttft_s)
                self._early_ratio.observe((predicted_s - ttft_s) / ttft_s)
            else:
                self._late.observe(ttft_s - predicted_s)
                self._late_ratio.observe((ttft_s - predicted_s) / ttft_s)
