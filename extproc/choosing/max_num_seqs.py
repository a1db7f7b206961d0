"""How many sequences an engine runs at once: said by the operator, or learned, for no engine announces it.

Rules:
    1. An engine that is full by number runs the same number again and again while others wait, and never
       one more. So the limit is the most that was ever seen running, once it was seen `SURE_VISITS` times
       with others waiting and room in the KV cache. A reading is another visit if the engine was elsewhere
       since the last one, or has computed prompts since: one that is at a single long prompt stays too.
    2. Others waiting are no sign by themselves: they wait for the tokens of a step as well.
    3. One more running than the limit refutes it, whatever it is from.
    4. A largest number that the engine never came back to while it was full is forgotten after
       `FORGET_READINGS` readings with others waiting below it: it was said by mistake, or to be believed.
    5. First tokens show it as well, and sooner, see `extproc.choosing.replacements`. They count what this
       gateway knows of, so an engine that was read running more has no such limit.
    6. Engines of one cluster on the same hardware were most likely started alike: what they show is also
       taken together, and says what the limit is of those that did not show their own. A small one none
       shows alone: an engine that lies, or was started otherwise, would have all others stand idle. What was
       said by the operator goes first, then what an engine's own readings show, then its own first tokens.
    7. A limit that was lowered is not noticed: what an engine's own readings showed is forgotten when its
       process ends. That its counter of prompt tokens went back shows that too.

vLLM shows `--max-num-seqs` in no series and on no page that is on by default. SGLang has
`max_running_requests` in no series; its `/server_info` has it beside the whole command line, keys included,
and is not asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Final

from extproc.choosing.kept_columns import KeptColumns
from extproc.choosing.replacements import LEAST_ALONE, MOST_OF_ONE, Replacements
from metadata_center.types import EndpointKey, value

SURE_VISITS: Final = 3
"""Readings are seconds apart, so one says nothing of the next. With a number that is bound by something else,
three that all meet the largest yet were seen in none of 14 runs of seven workloads; two were in one."""

_MOST_VISITS_OF_ONE: Final = SURE_VISITS - 1
"""That count towards a small limit which several show together, see `replacements.LEAST_ALONE`."""

FORGET_READINGS: Final = 32
"""Two minutes of an engine that is busy all the time, at a reading each 4 s."""

FULL_CACHE_RATIO: Final = 0.9
"""Requests that wait beside a cache fuller than this may wait for its room: they say nothing of the limit."""


class LimitSource(StrEnum):
    """Where a limit is from."""

    UNKNOWN = "unknown"
    CONFIGURED = "configured"
    LEARNED = "learned"
    FIRST_TOKENS = "first_tokens"
    ALIKE = "alike"


_NONE: Final = (0, LimitSource.UNKNOWN)


@value
class Reading:
    """One look at an engine's metrics.

    Attributes:
        number: Counts up with each.
        running: Requests in its batch.
        waiting: Requests in its queue.
        kv_usage_ratio: Share of its KV cache that running requests hold, 0..1.
        prompt_tokens: Of all prompts computed since its process began; None if it does not say.
    """

    number: int
    running: int
    waiting: int
    kv_usage_ratio: float
    prompt_tokens: float | None = None


class SequenceLimit:
    """What readings show of one limit on sequences, of one endpoint or of several alike.

    Args:
        most_of_one: Visits of one endpoint that count if the limit is below `LEAST_ALONE`.
    """

    __slots__ = ("_at", "_below", "_most", "_most_below", "_most_of_one", "_of_each", "_visits")

    def __init__(self, most_of_one: int = SURE_VISITS) -> None:
        self._most_of_one = most_of_one
        self._of_each: dict[EndpointKey, int] = {}
        self._most = 0
        self._visits = 0
        self._at: dict[EndpointKey, float | None] = {}
        self._below = 0
        self._most_below = 0

    @property
    def limit(self) -> int:
        """Most sequences at once; 0 while it is unknown."""
        if self._visits < SURE_VISITS:
            return 0
        return self._most if self._most >= LEAST_ALONE or sum(self._of_each.values()) >= SURE_VISITS else 0

    @property
    def most(self) -> int:
        """Most that were seen running."""
        return self._most

    def observe(self, key: EndpointKey, reading: Reading) -> None:
        """Learn from one reading; the same reading twice is harmless.

        Args:
            key: Whose.
            reading: What it said.
        """
        running, prompts = reading.running, reading.prompt_tokens
        if running > self._most:
            self._most, self._visits, self._below, self._most_below = running, 0, 0, 0
            self._at.clear()
            self._of_each.clear()
        is_full = reading.waiting > 0 and reading.kv_usage_ratio < FULL_CACHE_RATIO
        if is_full and running == self._most:
            if key not in self._at or prompts != self._at[key]:
                self._visits += 1
                self._at[key] = prompts
                self._of_each[key] = min(self._most_of_one, self._of_each.get(key, 0) + 1)
            return
        self._at.pop(key, None)
        if is_full and not self._visits:
            self._below += 1
            self._most_below = max(self._most_below, running)
            if self._below >= FORGET_READINGS:
                self._most, self._below, self._most_below = self._most_below, 0, 0

    def restarted(self, key: EndpointKey) -> None:
        """An endpoint is another process, which counts no more for it."""
        self._at.pop(key, None)

    def forget(self, key: EndpointKey) -> None:
        """An endpoint is gone."""
        self._at.pop(key, None)
        self._of_each.pop(key, None)


class _Known:
    """What is known of one endpoint."""

    __slots__ = ("alike", "configured", "most", "own", "prompt_tokens", "replacements")

    def __init__(self) -> None:
        self.own = SequenceLimit()
        self.replacements = Replacements()
        self.alike: str | None = None
        self.configured = 0
        self.most = 0
        self.prompt_tokens: float | None = None


class _Alike:
    """What is known of endpoints that were started alike, taken together."""

    __slots__ = ("members", "readings", "replacements")

    def __init__(self) -> None:
        self.readings = SequenceLimit(_MOST_VISITS_OF_ONE)
        self.replacements = Replacements(MOST_OF_ONE)
        self.members: set[EndpointKey] = set()

    def restarted(self, key: EndpointKey) -> None:
        """An endpoint is another process."""
        self.readings.restarted(key)
        self.replacements.restarted(key)

    def forget(self, key: EndpointKey) -> None:
        """An endpoint is gone."""
        self.readings.forget(key)
        self.replacements.forget(key)


_NOBODY: Final = _Alike()


class SequenceLimits:
    """The limits of all endpoints; bounded by the endpoints that exist, see `forget`."""

    def __init__(self) -> None:
        self._known: dict[EndpointKey, _Known] = {}
        self._alike: dict[str, _Alike] = {}
        self._limits: dict[EndpointKey, tuple[int, LimitSource]] = {}
        self._columns = KeptColumns(lambda key: self.limit(key)[0])

    def configure(self, key: EndpointKey, alike: str | None, configured: int = 0) -> None:
        """What is said of an endpoint.

        Args:
            key: Which.
            alike: Endpoints with the same were started alike; None if that is not known.
            configured: Its limit as the operator says; 0 if not.
        """
        known = self._of(key)
        if known.alike != alike:
            self._leave(key, known)
            known.alike = alike
            if alike is not None:
                self._alike.setdefault(alike, _Alike()).members.add(key)
        if known.configured != configured:
            known.configured = configured
            known.most = known.own.most
        self._settle(key)

    def observe(self, key: EndpointKey, reading: Reading) -> None:
        """Learn from one reading of an engine's metrics."""
        known, tokens = self._of(key), reading.prompt_tokens
        if tokens is not None and known.prompt_tokens is not None and tokens < known.prompt_tokens:
            self.restarted(key)
        if tokens is not None:
            known.prompt_tokens = tokens
        known.most = max(known.most, reading.running)
        known.own.observe(key, reading)
        if known.alike is not None:
            together = self._alike[known.alike]
            before = together.readings.limit
            together.readings.observe(key, reading)
            if before != together.readings.limit:
                self._settle_all(together)
        self._settle(key)

    def first_token(
        self, key: EndpointKey, decoding: int, sent_s: float, now_s: float, prefill_s: float
    ) -> None:
        """Learn from a first token, see `Replacements.first_token`."""
        known = self._of(key)
        is_new = known.replacements.first_token(key, decoding, sent_s, now_s, prefill_s)
        if known.alike is not None:
            together = self._alike[known.alike]
            if together.replacements.first_token(key, decoding, sent_s, now_s, prefill_s):
                self._settle_all(together)
        if is_new:
            self._settle(key)

    def ended(self, key: EndpointKey, decoding: int, now_s: float) -> None:
        """A sequence is over, see `Replacements.ended`."""
        known = self._of(key)
        known.replacements.ended(key, decoding, now_s)
        if known.alike is not None:
            self._alike[known.alike].replacements.ended(key, decoding, now_s)

    def restarted(self, key: EndpointKey) -> None:
        """It may be another process, with another limit; what its like show is likely for it as well."""
        known = self._known.get(key)
        if known is not None:
            known.own, known.replacements = SequenceLimit(), Replacements()
            known.most, known.prompt_tokens = 0, None
            if known.alike is not None:
                self._alike[known.alike].restarted(key)
            self._settle(key)

    def forget(self, key: EndpointKey) -> None:
        """It is gone; a group without any is forgotten with its last."""
        known = self._known.pop(key, None)
        if known is not None:
            self._leave(key, known)
        self._limits.pop(key, None)
        self._columns.changed()

    def limit(self, key: EndpointKey) -> tuple[int, LimitSource]:
        """Most sequences at once, 0 while it is unknown, and where that is from."""
        return self._limits.get(key, _NONE)

    def column(self, keys: tuple[EndpointKey, ...]) -> Sequence[int]:
        """The limits of several, 0 where one is unknown; empty if all of all endpoints are."""
        return self._columns.of(keys) if self._limits else ()

    @property
    def keys(self) -> Iterable[EndpointKey]:
        """Endpoints that something is known of."""
        return self._known.keys()

    def _of(self, key: EndpointKey) -> _Known:
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _Known()
        return known

    def _leave(self, key: EndpointKey, known: _Known) -> None:
        if known.alike is not None:
            together = self._alike[known.alike]
            together.members.discard(key)
            together.forget(key)
            if not together.members:
                del self._alike[known.alike]

    def _settle_all(self, together: _Alike) -> None:
        for each in together.members:
            self._settle(each)

    def _settle(self, key: EndpointKey) -> None:
        """By Rules 3, 5 and 6."""
        known, before = self._known[key], self._limits.get(key, _NONE)
        together = _NOBODY if known.alike is None else self._alike[known.alike]
        found = _NONE
        if known.configured >= max(1, known.most):
            found = known.configured, LimitSource.CONFIGURED
        elif known.own.limit:
            found = known.own.limit, LimitSource.LEARNED
        elif known.replacements.limit >= max(1, known.own.most):
            found = known.replacements.limit, LimitSource.FIRST_TOKENS
        elif together.readings.limit >= max(1, known.most):
            found = together.readings.limit, LimitSource.ALIKE
        elif together.replacements.limit >= max(1, known.own.most):
            found = together.replacements.limit, LimitSource.ALIKE
        if found == before:
            return
        if found == _NONE:  # a compiled tuple has no identity
            del self._limits[key]
        else:
            self._limits[key] = found
        self._columns.changed()
