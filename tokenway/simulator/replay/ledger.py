"""A simulated gateway's ledger: what it knows to be on each endpoint.

Rules:
    1. A charge is taken off exactly once, in two parts: the prefill at its end, the rest with the request.
       That is `metadata_center.load.ledger`; here are its accounts.
    2. Columns equal the sum of all charges, own ones at once and others' as they were pushed.
    3. An engine begins the next prefill when one ends, and the first when it is sent: `since_s` is when.
"""

from __future__ import annotations

from math import inf
from typing import Any, Final

from extproc.predicting.ttft import Backlog
from metadata_center.load.ledger import Entry, Ledger, LedgerBounds
from metadata_center.types import value

_BOUNDS: Final = LedgerBounds(lease_s=inf, tombstone_s=0.0, max_tombstones=0, max_legs=1 << 30)
"""None: every request of a replay ends, in order, and a trace that fits into memory has fewer."""


@value
class Change:
    """One change of the columns.

    Attributes:
        row: Endpoint.
        requests: Change of the requests in flight.
        prefilling: Change of the requests without first token.
        prefill_tokens: Change of their uncached tokens.
        prompt_tokens: Change of their prompt tokens.
        context_tokens: Change of the prompt tokens of all requests.
    """

    row: int
    requests: int
    prefilling: int
    prefill_tokens: int
    prompt_tokens: int
    context_tokens: int


class _Columns:
    """Accounts that say how each entry of the ledger changes the columns."""

    def __init__(self) -> None:
        self.last: Change | None = None

    def place(self, row: int) -> int:
        """A row is its own place."""
        return row

    def put(self, entry: Entry[Any, Any, int]) -> None:
        """A request was sent."""
        prompt = entry.context_tokens
        self.last = Change(entry.place, 1, 1, entry.prefill_tokens, prompt, prompt)

    def take(self, entry: Entry[Any, Any, int]) -> None:
        """A request ended."""
        prompt = entry.context_tokens
        if entry.prefill_held:
            self.last = Change(entry.place, -1, -1, -entry.prefill_tokens, -prompt, -prompt)
        else:
            self.last = Change(entry.place, -1, 0, 0, 0, -prompt)

    def take_prefill(self, entry: Entry[Any, Any, int]) -> None:
        """A prefill ended."""
        self.last = Change(entry.place, 0, -1, -entry.prefill_tokens, -entry.context_tokens, 0)

    def take_last(self) -> Change:
        """What the ledger's last call changed; once."""
        change, self.last = self.last, None
        assert change is not None, "asked after a call that changed something"
        return change


class GatewayLedger:
    """Columns over `rows` endpoints; read them, never write them."""

    def __init__(self, rows: int) -> None:
        self.requests = [0] * rows
        self.prefilling = [0] * rows
        self.prefill_tokens = [0] * rows
        self.prompt_tokens = [0] * rows
        self.context_tokens = [0] * rows
        self.since_s = [0.0] * rows
        self._columns = _Columns()
        self._ledger: Ledger[int, int, int] = Ledger(self._columns, _BOUNDS)

    def backlog(self, row: int) -> Backlog:
        """What is on one row before the next request, answers not counted: their length is not known."""
        prompts = self.prompt_tokens[row]
        return Backlog(
            self.prefilling[row],
            self.prefill_tokens[row],
            prompts,
            self.requests[row] - self.prefilling[row],
            float(self.context_tokens[row] - prompts),
        )

    def apply(self, change: Change, now_s: float) -> None:
        """Add one change, of this gateway or another one."""
        row = change.row
        if change.prefilling < 0 or (change.prefilling > 0 and not self.prefilling[row]):
            self.since_s[row] = now_s
        self.requests[row] += change.requests
        self.prefilling[row] += change.prefilling
        self.prefill_tokens[row] += change.prefill_tokens
        self.prompt_tokens[row] += change.prompt_tokens
        self.context_tokens[row] += change.context_tokens

    def charge(
        self, request_id: int, row: int, prefill_tokens: int, prompt_tokens: int, now_s: float
    ) -> Change:
        """Put a request on a row; returns what others are to get.

        Raises:
            KeyError: It is charged already.
        """
        if not self._ledger.charge(request_id, row, prefill_tokens, prompt_tokens, now_s):
            raise KeyError(request_id)
        return self._last_change(now_s)

    def prefilled(self, request_id: int, now_s: float) -> Change | None:
        """The prefill is over, or taken to be; None if that was known."""
        return self._last_change(now_s) if self._ledger.release_prefill(request_id) else None

    def release(self, request_id: int, now_s: float) -> Change:
        """The request is over; returns what others are to get.

        Raises:
            KeyError: It is not charged.
        """
        if not self._ledger.release(request_id, now_s):
            raise KeyError(request_id)
        return self._last_change(now_s)

    def _last_change(self, now_s: float) -> Change:
        change = self._columns.take_last()
        self.apply(change, now_s)
        return change
