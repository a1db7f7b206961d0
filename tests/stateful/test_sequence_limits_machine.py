"""Limits on sequences as they are learned, under any order of traffic, readings, lies and restarts."""

from __future__ import annotations

from collections import deque
from typing import Final

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from extproc.choosing.max_num_seqs import FORGET_READINGS, LimitSource, Reading, SequenceLimits
from extproc.choosing.replacements import SURE_REPLACEMENTS
from metadata_center.types import EndpointKey

KEYS: Final = tuple(EndpointKey(name) for name in "abc")
LIE: Final = 1 << 20

keys = st.sampled_from(KEYS)


class Served:
    """An engine: first come, first served, with room for `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.waiting: deque[float] = deque()
        self.decoding = 0
        self.most = 0
        self.has_lied = False


class SequenceLimitsMachine(RuleBasedStateMachine):
    """Three engines, started alike at first, each restarted with whatever limit."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = SequenceLimits()
        self.engines = {key: Served(4) for key in KEYS}
        self.now_s = 0.0
        for key in KEYS:
            self.limits.configure(key, "alike")

    def tick(self) -> float:
        """No two events are at one time."""
        self.now_s += 1.0
        return self.now_s

    @rule(key=keys, count=st.integers(1, 3))
    def send(self, key: EndpointKey, count: int) -> None:
        """Requests come and wait."""
        self.engines[key].waiting.extend(self.tick() for _ in range(count))

    @rule(key=keys)
    def begin(self, key: EndpointKey) -> None:
        """A first token, if there is room for one more."""
        engine = self.engines[key]
        if engine.waiting and engine.decoding < engine.limit:
            engine.decoding += 1
            engine.most = max(engine.most, engine.decoding)
            self.limits.first_token(key, engine.decoding, engine.waiting.popleft(), self.tick(), 0.5)

    @rule(key=keys)
    def end(self, key: EndpointKey) -> None:
        """An answer is whole."""
        engine = self.engines[key]
        if engine.decoding:
            engine.decoding -= 1
            self.limits.ended(key, engine.decoding, self.tick())

    @rule(key=keys, is_lie=st.booleans())
    def read(self, key: EndpointKey, is_lie: bool) -> None:
        """Its metrics: true, or of a number that never was."""
        engine = self.engines[key]
        engine.has_lied |= is_lie
        waiting = len(engine.waiting) if engine.decoding == engine.limit and not is_lie else 0
        self.limits.observe(key, Reading(0, LIE if is_lie else engine.decoding, waiting, 0.5, self.now_s))

    @rule(key=keys, limit=st.integers(1, 6))
    def restart(self, key: EndpointKey, limit: int) -> None:
        """Another process, with another limit."""
        self.engines[key] = Served(limit)
        self.limits.restarted(key)
        assert self.limits.limit(key)[1] in (LimitSource.UNKNOWN, LimitSource.ALIKE)

    @rule(key=keys)
    def rush(self, key: EndpointKey) -> None:
        """Many wait for long: the limit is known then, unless a lie still hides it."""
        engine = self.engines[key]
        self.send(key, engine.limit + SURE_REPLACEMENTS)
        while engine.decoding < engine.limit:
            self.begin(key)
        for _ in range(SURE_REPLACEMENTS):
            self.end(key)
            self.begin(key)
        if engine.has_lied:
            for _ in range(2 * FORGET_READINGS):
                self.limits.observe(key, Reading(0, engine.limit, 1, 0.5))
        limit, source = self.limits.limit(key)
        assert limit == engine.limit
        assert source in (LimitSource.LEARNED, LimitSource.FIRST_TOKENS)

    @invariant()
    def none_is_below_what_its_process_showed(self) -> None:
        """Nor above what it has room for, where it is from its own first tokens."""
        for key, engine in self.engines.items():
            limit, source = self.limits.limit(key)
            if source is LimitSource.FIRST_TOKENS:
                assert engine.most <= limit <= engine.limit
            assert limit < LIE


TestSequenceLimits = SequenceLimitsMachine.TestCase
TestSequenceLimits.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
