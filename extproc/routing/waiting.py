"""Requests that wait for an endpoint with room, and when each of them is scheduled again.

Rules:
    1. News of freed room starts a scheduling round: every request that waits is scheduled again in the order
       of rank, until one finds every endpoint closed for those behind it too. News that comes during a round
       starts another.
    2. Other workers and gateways free room without a word to us, and time does: while any request waits there
       is a round every `POLL_S`.
    3. A round yields to other work after every `ROUND_SLICE` requests, and rounds together take at most one
       part in `1 + REST` of the time, however many wait.
    4. Each request that waits is answered, refused or gone, once. One that is gone was never charged.
    5. A failure of one request is that request's alone.
    6. Other workers and gateways are told who waits here (`telling.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

from extproc.choosing.holding import POLL_S, SchedulingRound
from extproc.errors import RouterError
from extproc.observing.recorder import Recorder
from extproc.routing.claims import Queued
from extproc.routing.parsing import ParsedRequest
from extproc.routing.scheduling import Chosen
from extproc.routing.telling import LineTeller
from extproc.values.deciding import Deciding, Later, settle
from extproc.values.decisions import HoldEnding, HoldReason
from extproc.values.pending import Pending
from metadata_center.types import Waiter

D = TypeVar("D")
"""An answer."""

ROUND_SLICE: Final = 16
"""Scheduling takes some 0.2 ms: other requests wait 3 ms at most."""

REST: Final = 4.0
"""Rounds may take a fifth of the time of a core whose decisions are otherwise for new requests."""

MAX_HELD_BYTES: Final = 256 * 1024 * 1024
"""Of bodies that wait, parsed ones several times as large in memory; what comes beyond is scheduled at
once."""

_PATIENCE_S: Final = 1.0
"""Longer than the last wait: the answer is on its way by then."""


class Timer(Protocol):
    """A call that will be made; `asyncio.TimerHandle` satisfies it."""

    def cancel(self) -> None:
        """Not any more."""


class Loop(Protocol):
    """What of the event loop is needed."""

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Timer:
        """Call in so many seconds."""


@dataclass(slots=True)
class _Held:
    parsed: ParsedRequest
    queued: Queued
    answer: Pending[Any]
    num_bytes: int

    @property
    def order(self) -> tuple[float, int]:
        """See `extproc.choosing.holding.Waiting`."""
        return self.queued.later.wait.rank, self.queued.ticket

    @property
    def until_s(self) -> float:
        """See `extproc.choosing.holding.Waiting`."""
        return self.queued.later.wait.until_s

    @property
    def queue(self) -> object:
        """See `extproc.choosing.holding.Waiting`; one of before the last change is never found closed."""
        return self.queued.queue


class RequestQueue(Generic[D]):
    """Requests that wait in one worker, and their answers.

    Args:
        schedule: Schedules a request again, given how it waited; may raise `RouterError`.
        answer: Makes the answer of one that was charged, at once or later.
        metrics: Count each wait.
        loop: The running event loop.
        clock: Monotonic seconds.
        tell: Tells others who waits here; None where there are none.
    """

    def __init__(
        self,
        schedule: Callable[[ParsedRequest, Queued | None], Chosen | Queued],
        answer: Callable[[ParsedRequest, Chosen], Deciding[D]],
        metrics: Recorder,
        loop: Callable[[], Loop],
        clock: Callable[[], float],
        tell: Callable[[Sequence[Waiter]], None] | None = None,
    ) -> None:
        self._schedule = schedule
        self._answer = answer
        self._metrics = metrics
        self._loop = loop
        self._clock = clock
        self._held: dict[int, _Held] = {}
        self._num_bytes = 0
        self._is_open = True
        self._is_placing = False
        self._round: Iterator[None] | None = None
        self._again = False
        self._timer: Timer | None = None
        self._timer_s = 0.0
        self._rested_s = 0.0
        self._teller = None if tell is None else LineTeller(self._line, tell, loop, clock)

    def __len__(self) -> int:
        """How many."""
        return len(self._held)

    def takes(self, before: Queued | None) -> bool:
        """Whether a request may wait here: another one, or one that does."""
        return (
            self._is_open
            and not self._is_placing
            and (before is not None or self._num_bytes < MAX_HELD_BYTES)
        )

    def by_reason(self) -> dict[HoldReason, int]:
        """How many wait for what."""
        counts = dict.fromkeys(HoldReason, 0)
        for held in self._held.values():
            counts[held.queued.later.reason] += 1
        return counts

    def admit(self, parsed: ParsedRequest, queued: Queued) -> Later[D]:
        """Let a request wait; its answer, and how long Envoy has to wait for it."""
        answer: Pending[D] = Pending(lambda: self._left(held))
        held = _Held(
            parsed, queued, answer, len(parsed.request.prompt) + sum(map(len, parsed.new_body or ()))
        )
        self._held[queued.ticket] = held
        self._num_bytes += held.num_bytes
        self._metrics.held(parsed.route.model, queued.later.reason)
        now_s = self._clock()
        self._wake_at(now_s + POLL_S, now_s)
        self._changed()
        return Later(answer, queued.later.wait.until_s - now_s + _PATIENCE_S)

    def wake(self) -> None:
        """Room may have been freed."""
        if self._round is not None:
            self._again = True
        elif self._held:
            now_s = self._clock()
            self._wake_at(now_s, now_s)

    def place(self, clusters: AbstractSet[str]) -> None:
        """Schedule now, wherever it is best, what waits for these clusters, which go."""
        self._is_placing = True
        try:
            for held in sorted(self._held.values(), key=lambda each: each.order):
                if held.parsed.route.cluster in clusters:
                    self._retry(held)
        finally:
            self._is_placing = False

    def close(self) -> None:
        """Schedule every request now, wherever it is best, and let none wait from now on."""
        self._is_open = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._round = None
        for held in sorted(self._held.values(), key=lambda each: each.order):
            self._retry(held)
        if self._teller is not None:
            self._teller.now()

    def _line(self) -> list[Waiter]:
        return [held.queued.later.waiter() for held in self._held.values()]

    def _changed(self) -> None:
        if self._teller is not None:
            self._teller.changed()

    def _wake_at(self, due_s: float, now_s: float) -> None:
        """Have the next round begin then, unless one will earlier."""
        due_s = max(due_s, self._rested_s)
        if self._timer is not None:
            if self._timer_s <= due_s:
                return
            self._timer.cancel()
        self._timer_s = due_s
        self._timer = self._loop().call_later(max(0.0, due_s - now_s), self._go_on)

    def _go_on(self) -> None:
        """Begin a round, or do the next slice of it."""
        self._timer = None
        began_s = self._clock()
        if self._round is None:
            self._again = False
            self._round = self._slices()
        is_over = next(self._round, self) is self
        if not self._is_open:
            return
        now_s = self._clock()
        self._rested_s = now_s + REST * (now_s - began_s)
        if not is_over:
            self._wake_at(now_s, now_s)
            return
        self._round = None
        if self._held:
            self._wake_at(now_s if self._again else now_s + POLL_S, now_s)
            self._changed()

    def _slices(self) -> Iterator[None]:
        """One round; yields between slices."""
        tried, waiting = 0, SchedulingRound(self._held.values())
        while (held := waiting.next(self._clock())) is not None:
            if tried and tried % ROUND_SLICE == 0:
                yield
            tried += 1
            if self._retry(held) and held.queued.later.wait.closed:
                waiting.close(held.queue)

    def _retry(self, held: _Held) -> bool:
        """Schedule it again; True if it goes on waiting."""
        if held.answer.is_over:  # its client left during this round
            return False
        try:
            scheduled = self._schedule(held.parsed, held.queued)
            if isinstance(scheduled, Queued):
                held.queued = scheduled
                return True
            answer = self._answer(held.parsed, scheduled)
        except RouterError as error:
            self._end(held, HoldEnding.REFUSED)
            held.answer.fail(error)
        except Exception as error:  # a bug: this stream fails, and Envoy routes the request by itself
            self._end(held, HoldEnding.FAILED)
            held.answer.fail(error)
        else:
            self._end(held, HoldEnding.PLACED)
            settle(held.answer, answer)
        return False

    def _left(self, held: _Held) -> None:
        """The client is gone; if it was scheduled, its end is the access log's to report."""
        held.queued.queue.forget(held.queued.ticket)
        self._end(held, HoldEnding.GONE)

    def _end(self, held: _Held, ending: HoldEnding) -> None:
        del self._held[held.queued.ticket]
        self._changed()
        self._num_bytes -= held.num_bytes
        held_s = self._clock() - held.parsed.received_s
        self._metrics.hold_ended(held.parsed.route.model, ending, held_s)
