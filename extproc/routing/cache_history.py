"""Routing history as requests make it: recorded as prompts are cached, corrected as engines report.

Rules:
    1. A prompt is recorded once: at its first token, else when its prefill is due, else at its end.
    2. An engine that reports fewer cached tokens than believed has evicted: by LRU order all that is older
       than the missing blocks is gone as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from extproc.values.decisions import CacheSource
from extproc.values.endings import Ending
from extproc.values.inflight import Inflight
from metadata_center.store import PrefixStore
from metadata_center.types import EndpointKey

CACHED_TOLERANCE_TOKENS: Final = 128
"""Believed and reported cached tokens may differ by one block of each side: 512 bytes of ours are about 128
tokens, vLLM's largest usual block is 128 (its CPU default)."""


class CacheHistory:
    """Keeps the routing history of one worker; listens to endings.

    Args:
        history: Blocks by routing history.
        is_known: Is there still such an endpoint?
        share: Informs the other workers and gateways what an endpoint has cached.
    """

    def __init__(
        self,
        history: PrefixStore,
        is_known: Callable[[EndpointKey], bool],
        share: Callable[[EndpointKey, Sequence[int]], None],
    ) -> None:
        self._history = history
        self._is_known = is_known
        self._share = share

    def record(self, request: Inflight) -> None:
        """The request's prompt is in its endpoint's cache; once per request, unless the endpoint has left."""
        if request.prior_use is None and self._is_known(request.endpoint):
            request.prior_use = self._history.record(request.endpoint, request.blocks)
            self._share(request.endpoint, request.blocks)

    def ended(self, ending: Ending) -> None:
        """Record the prompt of what was answered, and believe what its engine said of its cache."""
        request = ending.request
        if request is None or not ending.is_answered:
            return
        if request.prior_use is None:
            self.record(request)
        outcome, record, row = ending.outcome, ending.record, ending.row
        believed, reported = outcome.predicted_cached_tokens, outcome.cached_tokens
        if row is None or believed is None or reported is None or not request.prior_use:
            return
        if record.views[row] != CacheSource.HISTORY:
            return
        if outcome.prompt_tokens:  # what was believed in estimated tokens, in those the engine counts
            believed = believed * outcome.prompt_tokens // record.prompt_tokens
        if believed - reported > CACHED_TOLERANCE_TOKENS:
            self._history.forget_older(request.endpoint, request.prior_use)
