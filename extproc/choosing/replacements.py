"""The limit on sequences from first tokens: a full engine begins with a request only as another ends.

Rules:
    1. A replacement is a first token that takes an engine back to the most sequences that were ever decoding
       there, after one of them ended, of a request that was waiting before that end. An engine with room
       would have begun with it at its own time: one more than the most, as likely as not.
    2. Nor is it one where prefill took most of the time since the first token before it, as foreseen: there
       prefill binds, and where prompts and answers are all of one size what decodes swings between the same
       two numbers for ever.
    3. `SURE_REPLACEMENTS` of them without one more in between make the most a limit; one more refutes it.
    4. What is counted is what the gateway charges, not what the engine says: it is known at each first token
       and needs no reading. Answers that show no first token (they are not streamed) are taken to decode
       when they are expected to, so beside many of them the most is seldom met again, and no limit is found.
    5. Several engines that were started alike show one limit: their replacements at the most of all count
       together. A small limit none of them shows alone: an engine says when its first tokens come.
"""

from __future__ import annotations

from typing import Final

from metadata_center.types import EndpointKey

SURE_REPLACEMENTS: Final = 8
"""Where an engine has room, each is chance, as a walk that stays at its highest point: six in a row were the
most seen where no engine was full. A full engine of 128 shows eight within two seconds."""

MOST_OF_ONE: Final = SURE_REPLACEMENTS // 2
"""That count towards a small limit which several show together."""

LEAST_ALONE: Final = 32
"""Engines are seldom started with less, and by less all others would stand idle; where one alone is
full, as with a prefix that many ask for, its number is worth having at once (docs/adr/0047)."""

MOST_PREFILL_RATIO: Final = 0.75
"""Of the time from one first token to the next, most that prefill took there: an engine that has had time to
begin, and a request that waited, was full."""


class Replacements:
    """What first tokens show of one limit on sequences, of one endpoint or of several alike.

    Args:
        most_of_one: Replacements of one endpoint that count if the limit is below `LEAST_ALONE`.
    """

    __slots__ = ("_count", "_full_until_s", "_last_s", "_most", "_most_of_one", "_of_each")

    def __init__(self, most_of_one: int = SURE_REPLACEMENTS) -> None:
        self._most_of_one = most_of_one
        self._of_each: dict[EndpointKey, int] = {}
        self._most = 0
        self._count = 0
        self._full_until_s: dict[EndpointKey, float] = {}
        self._last_s: dict[EndpointKey, float] = {}

    @property
    def limit(self) -> int:
        """Most sequences at once; 0 while it is unknown."""
        if self._count < SURE_REPLACEMENTS:
            return 0
        is_shown = self._most >= LEAST_ALONE or sum(self._of_each.values()) >= SURE_REPLACEMENTS
        return self._most if is_shown else 0

    def first_token(
        self, key: EndpointKey, decoding: int, sent_s: float, now_s: float, prefill_s: float
    ) -> bool:
        """The first token of a request came.

        Args:
            key: Of the endpoint that serves it.
            decoding: Requests that decode there now, this one included.
            sent_s: When the request was sent.
            now_s: When its first token came; both on the clock of `ended`.
            prefill_s: What the engine prefills for each first token that is seen here, in seconds, as it was
                foreseen of this one; infinite if that is not known.

        Returns:
            True if `limit` is another one than before.
        """
        began_s = max(sent_s, self._last_s.get(key, sent_s))
        self._last_s[key] = now_s
        if decoding > self._most:
            was_limit = self.limit > 0
            self._most, self._count = decoding, 0
            self._full_until_s.clear()
            self._of_each.clear()
            return was_limit
        has_replaced = decoding == self._most and sent_s < self._full_until_s.pop(key, sent_s)
        if has_replaced and prefill_s <= MOST_PREFILL_RATIO * (now_s - began_s):
            before = self.limit
            self._count += 1
            self._of_each[key] = min(self._most_of_one, self._of_each.get(key, 0) + 1)
            return self.limit != before
        return False

    def ended(self, key: EndpointKey, decoding: int, now_s: float) -> None:
        """A request that decoded is over.

        Args:
            key: Of the endpoint that served it.
            decoding: Requests that decode there now, without this one.
            now_s: When.
        """
        if decoding + 1 == self._most:
            self._full_until_s[key] = now_s

    def restarted(self, key: EndpointKey) -> None:
        """An endpoint is another process; it counts no more for it."""
        self._full_until_s.pop(key, None)
        self._last_s.pop(key, None)

    def forget(self, key: EndpointKey) -> None:
        """An endpoint is gone."""
        self.restarted(key)
        self._of_each.pop(key, None)
