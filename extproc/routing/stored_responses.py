"""Where stored responses and conversations come to live: with the endpoint that answers.

Rules:
    1. An answer names itself while it passes, so a response is found before it is whole; its end corrects the
       endpoint if a fallback served it.
    2. A conversation moves to the endpoint that answered its latest request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from extproc.observing.records import RecordRing
from extproc.routing.homes import Homes
from extproc.routing.running import RunningRequests
from extproc.values.endings import Ending
from metadata_center.sharing.messages import RESPONSES_MARK
from metadata_center.types import EndpointKey, RequestId


class StoredResponses:
    """Informs `Homes`, the other workers and the other gateways; listens to endings.

    Args:
        homes: Where stored responses live.
        running: Decided requests that have not ended.
        records: Recent decisions: a short answer's end may be reported before its head.
        share: Informs the other workers and gateways.
    """

    def __init__(
        self,
        homes: Homes,
        running: RunningRequests,
        records: RecordRing,
        share: Callable[[EndpointKey, Sequence[int]], None],
    ) -> None:
        self._homes = homes
        self._running = running
        self._records = records
        self._share = share

    def answer_named(self, request_id: RequestId, key: int, now_s: float) -> None:
        """The answer to a request is the response of that key: it lives where the request is served."""
        request = self._running.get(request_id)
        if request is not None:
            request.response = key
            self.settle(key, request.endpoint, now_s)
            return
        record = self._records.get(request_id)
        if record is not None and record.outcome is not None and record.outcome.endpoint is not None:
            self.settle(key, record.outcome.endpoint, now_s)

    def ended(self, ending: Ending) -> None:
        """What the request is answered with, and what it belongs to, lives where it was served."""
        request = ending.request
        if request is None:
            return
        if request.response is not None:
            self.settle(request.response, request.endpoint, ending.now_s)
        if request.conversation is not None and ending.is_answered:
            self.settle(request.conversation, request.endpoint, ending.now_s)

    def settle(self, key: int, endpoint: EndpointKey, now_s: float) -> None:
        """A response or a conversation lives there; the other workers and gateways are informed."""
        if self._homes.learn(key, endpoint, now_s):
            self._share(endpoint, [RESPONSES_MARK, key])
