"""What a first token shows: the prefill is done, the prompt cached, the endpoint alive, and its pace."""

from __future__ import annotations

from collections.abc import Callable

from extproc.choosing.teaching import Teaching
from extproc.health.states import Transition
from extproc.health.tracker import HealthTracker
from extproc.routing.cache_history import CacheHistory
from extproc.routing.rivals import Rivals
from extproc.routing.running import RunningRequests
from metadata_center.types import RequestId


class FirstTokens:
    """Passes it to each owner that it concerns.

    Args:
        running: Releases the prefill.
        health: Which endpoints may be chosen.
        history: What was routed where.
        teaching: Teaches the predictor.
        rivals: Rules of other gateways that are compared.
        on_transition: Called when it changed an endpoint's health.
    """

    def __init__(
        self,
        running: RunningRequests,
        health: HealthTracker,
        history: CacheHistory,
        teaching: Teaching,
        rivals: Rivals,
        on_transition: Callable[[Transition], None],
    ) -> None:
        self._running = running
        self._health = health
        self._history = history
        self._teaching = teaching
        self._rivals = rivals
        self._on_transition = on_transition

    def take(self, request_id: RequestId, now_s: float, *, late: bool) -> None:
        """The first token of a request passes now; see `RunningRequests.first_token`."""
        request = self._running.first_token(request_id, now_s, late=late)
        if request is None:
            return
        for transition in self._health.alive(request.endpoint, request.served_model, now_s):
            self._on_transition(transition)
        self._history.record(request)
        self._teaching.first_token(request, now_s - request.decided_s)
        self._rivals.first_token(request_id, now_s)
