"""A gateway's books: what it knows to be on each endpoint.

Rules:
    1. A charge is taken off exactly once, in two parts: the prefill at its end, the rest with the request.
    2. Columns equal the sum of all charges, own ones at once and others' as they were pushed.
    3. An engine begins the next prefill when one ends, and the first when it is sent: `since_s` is when.
"""

from __future__ import annotations

from dataclasses import dataclass

from extproc.predicting.ttft import Backlog
from metadata_center.types import value


@value
class Entry:
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


@dataclass(slots=True)
class _Charge:
    row: int
    prefill_tokens: int
    prompt_tokens: int
    prefilling: bool = True


class Books:
    """Columns over `rows` endpoints; read them, never write them."""

    def __init__(self, rows: int) -> None:
        self.requests = [0] * rows
        self.prefilling = [0] * rows
        self.prefill_tokens = [0] * rows
        self.prompt_tokens = [0] * rows
        self.context_tokens = [0] * rows
        self.since_s = [0.0] * rows
        self._charges: dict[int, _Charge] = {}

    def backlog(self, row: int) -> Backlog:
        """What is on one row before the next request, answers not counted: nobody knows their length."""
        prompts = self.prompt_tokens[row]
        return Backlog(
            self.prefilling[row],
            self.prefill_tokens[row],
            prompts,
            self.requests[row] - self.prefilling[row],
            float(self.context_tokens[row] - prompts),
        )

    def apply(self, entry: Entry, now_s: float) -> None:
        """Add one change."""
        row = entry.row
        if entry.prefilling < 0 or (entry.prefilling > 0 and not self.prefilling[row]):
            self.since_s[row] = now_s
        self.requests[row] += entry.requests
        self.prefilling[row] += entry.prefilling
        self.prefill_tokens[row] += entry.prefill_tokens
        self.prompt_tokens[row] += entry.prompt_tokens
        self.context_tokens[row] += entry.context_tokens

    def charge(
        self, request_id: int, row: int, prefill_tokens: int, prompt_tokens: int, now_s: float
    ) -> Entry:
        """Put a request on a row; returns what others are to be told."""
        self._charges[request_id] = _Charge(row, prefill_tokens, prompt_tokens)
        entry = Entry(row, 1, 1, prefill_tokens, prompt_tokens, prompt_tokens)
        self.apply(entry, now_s)
        return entry

    def prefilled(self, request_id: int, now_s: float) -> Entry | None:
        """The prefill is over, or taken to be; None if that was known."""
        charge = self._charges.get(request_id)
        if charge is None or not charge.prefilling:
            return None
        charge.prefilling = False
        entry = Entry(charge.row, 0, -1, -charge.prefill_tokens, -charge.prompt_tokens, 0)
        self.apply(entry, now_s)
        return entry

    def release(self, request_id: int, now_s: float) -> Entry:
        """The request is over; returns what others are to be told.

        Raises:
            KeyError: It is not charged.
        """
        charge = self._charges.pop(request_id)
        if charge.prefilling:
            entry = Entry(
                charge.row, -1, -1, -charge.prefill_tokens, -charge.prompt_tokens, -charge.prompt_tokens
            )
        else:
            entry = Entry(charge.row, -1, 0, 0, 0, -charge.prompt_tokens)
        self.apply(entry, now_s)
        return entry
