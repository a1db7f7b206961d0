"""One publisher's numbered batches, put in order and made whole by replays.

Rules:
    1. What is delivered between two `Clear` is a gapless run of one publisher's batches. What applies it
       in order, and forgets all of it at `Clear`, never mixes two lives of an engine.
    2. Live batches arrive in order or not at all. Hence a live number that does not exceed the newest live
       one is a restart, and one above the next to deliver is a loss.
    3. Numbers start at 0 in each life, and only that distinguishes lives. So a replay that continues a run is
       asked from its last batch, the anchor: if it comes back byte for byte (it holds the engine's clock in
       microseconds) the publisher is the same; if another one or none comes, the engine was restarted.
    4. While a replay runs, live batches are held back, bounded; what does not fit is one more gap. A doubt
       that comes up meanwhile drops them: only a replay asked for after it shows whose they are.
    5. A replay that stalls or leaves out batches is repeated as long as each brings something new: vLLM's
       ROUTER drops what its peer is too slow for. If they bring nothing, the run is lost: `Clear`, and the
       view is incomplete for the rest of the engine's life.
    6. A replay that is not answered loses the run that it was to continue or to verify. It is tried again
       later, from 0; that attempt, if it fails, costs nothing.
    7. One restart goes unseen: with nothing to raise a doubt (no connection of its own, no `verify`), if the
       new life's first live batch has exactly the number that was due.

Payloads are opaque here. Nothing is delivered twice between two `Clear`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Final

MAX_HELD_BATCHES: Final = 2_048
"""Held back during a replay, which takes well below a second; vLLM steps some hundred times in one."""

MAX_HELD_BYTES: Final = 16 * 1024 * 1024
"""All held payloads together; four of the largest that are decoded."""

REPLAY_TIMEOUT_S: Final = 5.0
"""Silence after which a replay is given up; vLLM 0.32 answered 643 batches within 60 ms."""

RETRY_S: Final = 30.0
"""Between a replay that was not answered and the next: vLLM takes about that long to start. It doubles."""

MAX_RETRY_S: Final = 600.0
"""Where it stops doubling: each attempt delays live batches by `REPLAY_TIMEOUT_S`."""


_MAX_STALLED: Final = 2
"""Replays in a row that may bring nothing while batches are missing: one may race with the subscription."""


class SyncState(Enum):
    """What the view of a publisher's cache is worth."""

    SILENT = "silent"
    """Nothing was ever heard of it."""
    REPLAYING = "replaying"
    """Waiting for a replay; the view is behind."""
    IN_SYNC = "in_sync"
    """Everything since the engine's start is known."""
    INCOMPLETE = "incomplete"
    """Some older batches are missing: blocks that are cached may be unknown, but none known is made up."""


@dataclass(frozen=True, slots=True)
class Deliver:
    """Apply this batch."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Clear:
    """Forget all that was delivered."""


@dataclass(frozen=True, slots=True)
class AskReplay:
    """Ask for all batches from number `start`; abandon the replay that runs, if any."""

    start: int


Effect = Deliver | Clear | AskReplay


@dataclass(slots=True)
class SequenceStats:
    """Counts since the start.

    Attributes:
        delivered: Batches.
        duplicates: Live batches that a replay had brought already.
        gaps: Times that live batches were missing.
        restarts: Times that a publisher was found to be another.
        losses: Times that a run was given up.
        replays: Asked for.
    """

    delivered: int = 0
    duplicates: int = 0
    gaps: int = 0
    restarts: int = 0
    losses: int = 0
    replays: int = 0


@dataclass(slots=True)
class _Replay:
    start: int
    anchored: bool
    in_doubt: bool
    deadline_s: float
    begun: bool = False
    progress: bool = False
    has_hole: bool = False


class Sequencer:
    """The state of one publisher. All methods return what to do, in order.

    Args:
        can_replay: False if there is no replay endpoint: each gap then loses the run.
        replay_timeout_s: Longest silence during a replay, seconds > 0.
        retry_s: From a replay that was not answered to the next, seconds > 0; doubles up to `MAX_RETRY_S`.
        max_held_batches: Live batches held back during a replay.
        max_held_bytes: Bytes of their payloads.
    """

    def __init__(
        self,
        *,
        can_replay: bool,
        replay_timeout_s: float = REPLAY_TIMEOUT_S,
        retry_s: float = RETRY_S,
        max_held_batches: int = MAX_HELD_BATCHES,
        max_held_bytes: int = MAX_HELD_BYTES,
    ) -> None:
        self._can_replay = can_replay
        self._replay_timeout_s = replay_timeout_s
        self._retry_s = retry_s
        self._max_held_batches = max_held_batches
        self._max_held_bytes = max_held_bytes
        self._expected = 0
        self._anchor: bytes | None = None  # payload number _expected - 1 of this life, None if there is none
        self._newest_live = -1
        self._held: deque[tuple[int, bytes]] = deque()
        self._held_bytes = 0
        self._replay: _Replay | None = None
        self._retry_at_s: float | None = None
        self._stalled = 0
        self._unanswered = 0
        self._is_in_doubt = False  # what is held came after a doubt that the running replay cannot dispel
        self._is_dirty = False  # something was delivered since the last Clear
        self._settled = SyncState.SILENT
        self.stats = SequenceStats()

    @property
    def state(self) -> SyncState:
        """What the view is worth now."""
        return self._settled if self._replay is None else SyncState.REPLAYING

    @property
    def expected(self) -> int:
        """Number of the next batch to deliver."""
        return self._expected

    def verify(self, now_s: float) -> list[Effect]:
        """On first contact, and whenever something suggests a restart, such as a new connection: ask.

        Args:
            now_s: Monotonic seconds, as everywhere here.
        """
        if not self._can_replay:
            return []
        if self._replay is not None:
            # Its answer and what is held may be from before the restart; the next replay brings both again.
            self._is_in_doubt = True
            self._drop_held()
            return []
        return self._ask(now_s, in_doubt=self._is_dirty)

    def receive(self, sequence: int, payload: bytes, now_s: float) -> list[Effect]:
        """A live batch came."""
        effects: list[Effect] = []
        if sequence <= self._newest_live:
            self._drop_held()
            self._restart(effects)
        self._newest_live = sequence
        if self._replay is not None:
            self._hold(sequence, payload)
            return effects
        if sequence == self._expected:
            self._deliver(sequence, payload, effects)
            if self._settled is SyncState.SILENT:
                self._settled = SyncState.IN_SYNC  # number 0: there was nothing before it
                self._retry_at_s = None
            return effects
        if self._can_replay and self._retry_at_s is None:
            # Below the expected one it is a duplicate, or a restart after which this is the first live batch.
            self.stats.gaps += sequence > self._expected
            self._hold(sequence, payload)
            return effects + self._ask(now_s)
        self.stats.gaps += 1
        self._lose(effects)
        self._deliver(sequence, payload, effects)
        return effects

    def replayed(self, sequence: int, payload: bytes, now_s: float) -> list[Effect]:
        """A batch of the replay that was last asked for came."""
        replay = self._replay
        if replay is None or sequence < replay.start:
            return []
        replay.deadline_s = now_s + self._replay_timeout_s
        self._unanswered = 0
        effects: list[Effect] = []
        if replay.begun:
            if sequence == self._expected and not replay.has_hole:
                replay.progress = True
                self._deliver(sequence, payload, effects)
            else:
                replay.has_hole |= sequence > self._expected
            return effects
        replay.begun = True
        if replay.anchored and sequence == replay.start:
            if payload == self._anchor:
                return effects
            self._restart(effects)
            return effects + self._ask(now_s)
        # A first contact, a rebuild, or a buffer that no longer reaches back to the anchor.
        if replay.anchored:
            self._lose(effects)
        else:
            self._clear(effects)
            self._settled = SyncState.IN_SYNC if sequence == 0 else SyncState.INCOMPLETE
        replay.progress = True
        self._deliver(sequence, payload, effects)
        return effects

    def replay_ended(self, now_s: float) -> list[Effect]:
        """The replay that was last asked for is over."""
        replay = self._replay
        if replay is None:
            return []
        self._replay = None
        self._unanswered = 0
        effects: list[Effect] = []
        if not replay.begun:
            if replay.anchored:
                self._restart(effects)
                return effects + self._ask(now_s)
            self._clear(effects)
            self._expected, self._anchor = 0, None
            self._settled = SyncState.IN_SYNC
        self._stalled = 0 if replay.progress else self._stalled + 1
        if replay.has_hole:
            if self._stalled < _MAX_STALLED:
                return effects + self._ask(now_s)
            self._lose(effects)
        return self._release(effects, now_s)

    def advance(self, now_s: float) -> list[Effect]:
        """Give up what is overdue; call about once a second."""
        replay = self._replay
        if replay is not None and now_s >= replay.deadline_s:
            if replay.progress:
                return self._ask(now_s)
            self._replay = None
            self._retry_at_s = now_s + min(self._retry_s * 2**self._unanswered, MAX_RETRY_S)
            self._unanswered = min(self._unanswered + 1, 16)
            effects: list[Effect] = []
            if replay.anchored or replay.in_doubt:
                self._lose(effects)
            return self._release(effects, now_s)
        if self._retry_at_s is not None and now_s >= self._retry_at_s:
            return self._ask(now_s)
        return []

    def spoiled(self) -> None:
        """What a delivered batch removed could not be read, so it is unknown: the caller cleared."""
        self.stats.losses += 1
        self._settled = SyncState.INCOMPLETE

    def lacking(self) -> None:
        """Blocks that a delivered batch named could not be read: cached, and unknown."""
        self._settled = SyncState.INCOMPLETE

    def _ask(self, now_s: float, *, in_doubt: bool = False) -> list[Effect]:
        """From the anchor; from 0 if there is none, or if the last replay was not answered.

        In doubt, as when it continues from the anchor, the run does not outlive a replay without an answer.
        """
        anchored = self._anchor is not None and self._retry_at_s is None
        start = self._expected - 1 if anchored else 0
        self._retry_at_s = None
        self._replay = _Replay(start, anchored, in_doubt, now_s + self._replay_timeout_s)
        self.stats.replays += 1
        return [AskReplay(start)]

    def _deliver(self, sequence: int, payload: bytes, effects: list[Effect]) -> None:
        effects.append(Deliver(payload))
        self._expected, self._anchor = sequence + 1, payload
        self._is_dirty = True
        self.stats.delivered += 1

    def _hold(self, sequence: int, payload: bytes) -> None:
        if (
            len(self._held) < self._max_held_batches
            and self._held_bytes + len(payload) <= self._max_held_bytes
        ):
            self._held.append((sequence, payload))
            self._held_bytes += len(payload)

    def _release(self, effects: list[Effect], now_s: float) -> list[Effect]:
        """Deliver what was held, up to the first gap that another replay may fill."""
        if self._is_in_doubt:
            self._is_in_doubt = False
            if self._retry_at_s is None:
                return effects + self._ask(now_s, in_doubt=True)
            if self._is_dirty or self._held:
                self._lose(effects)
        while self._held:
            sequence, payload = self._held[0]
            if sequence > self._expected:
                if self._retry_at_s is None and self._stalled < _MAX_STALLED:
                    return effects + self._ask(now_s)
                self._lose(effects)
            if sequence >= self._expected:
                self._deliver(sequence, payload, effects)
            else:
                self.stats.duplicates += 1
            self._held.popleft()
            self._held_bytes -= len(payload)
        self._stalled = 0
        return effects

    def _drop_held(self) -> None:
        self._held.clear()
        self._held_bytes = 0

    def _restart(self, effects: list[Effect]) -> None:
        """Another life of the engine: nothing known of the last one counts.

        What is held is taken to be of the new one.
        """
        self.stats.restarts += 1
        self._clear(effects)
        self._expected, self._anchor = 0, None
        self._is_in_doubt = False
        self._newest_live = self._held[-1][0] if self._held else -1
        self._replay = self._retry_at_s = None
        self._stalled = 0
        self._settled = SyncState.SILENT

    def _lose(self, effects: list[Effect]) -> None:
        self.stats.losses += 1
        self._clear(effects)
        self._settled = SyncState.INCOMPLETE

    def _clear(self, effects: list[Effect]) -> None:
        if self._is_dirty:
            effects.append(Clear())
            self._is_dirty = False
