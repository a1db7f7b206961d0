"""Per-endpoint load counters: one matrix, one row per worker process, one slot per endpoint.

Rules:
    1. A worker writes only its own row; a total is the sum over rows, so no write is ever lost.
    2. A slot is live while a worker claims it or any counter in it is not zero. Only a slot that is not
       live is given to another endpoint, so a slot held by a request never changes its owner.
    3. Names and claims change only under `slots_lock()`; reading totals and adding need no lock.
    4. Everything lies in one buffer of fixed size: memory is bounded by `num_bytes`.
    5. What other gateways count is added to totals and nothing else: no slot lives by it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from metadata_center.errors import CapacityError
from metadata_center.load.kinds import NUM_KINDS, PREFILL_REQUESTS
from metadata_center.load.ledger import Entry
from metadata_center.types import MANY_ROWS, EndpointKey

IntArray = NDArray[np.int64]

MAX_ENDPOINTS: Final = 4096
"""Endpoints of one gateway: four times the largest pool a decision is measured with (1,000 endpoints)."""

MAX_SLOTS: Final = 2 * MAX_ENDPOINTS
"""Slots of one gateway: all its endpoints may be replaced while requests still run on the former ones."""

KEY_BYTES: Final = 64
"""Longest key: a bracketed IPv6 address with a port is 47 bytes, the rest is room for a zone."""

_MAX_GROUPS: Final = 256  # slot tuples remembered: far more than a gateway has models
_NO_LOCK: Final = nullcontext()
_add_up: Any = np.add.reduce  # whose types in numpy 2.5 have none for arrays of integers


def num_bytes(workers: int, capacity: int) -> int:
    """Size of the buffer behind `workers` rows of `capacity` slots: rows, times, names, claims."""
    return capacity * (workers * (NUM_KINDS * 8 + 8 + 1) + KEY_BYTES)


class Counters:
    """What is in flight per endpoint, one number per kind of load: the accounts of a gateway's ledger.

    Args:
        workers: Rows; 1 for a gateway of one process.
        worker: The row this object writes, 0..workers-1; it starts at zero and claims nothing.
        capacity: Slots: endpoints that are there, and those that left with requests still running.
        buffer: Writable memory of `num_bytes(workers, capacity)` bytes, 8-byte aligned, zeroed when
            new; None allocates private memory.
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        worker: int = 0,
        capacity: int = MAX_SLOTS,
        buffer: memoryview | None = None,
    ) -> None:
        if not 0 <= worker < workers:
            raise ValueError(f"worker {worker} is not one of {workers} workers")
        memory = np.frombuffer(
            bytearray(num_bytes(workers, capacity)) if buffer is None else buffer, np.uint8
        )
        since_at = workers * NUM_KINDS * 8 * capacity
        names_at = since_at + workers * 8 * capacity
        claims_at = names_at + KEY_BYTES * capacity
        self._rows: IntArray = memory[:since_at].view(np.int64).reshape(workers, NUM_KINDS, capacity)
        self._since_s = memory[since_at:names_at].view(np.float64).reshape(workers, capacity)
        self._own_since_s: memoryview[float] = memoryview(self._since_s[worker])
        self._names = memory[names_at:claims_at].view(f"S{KEY_BYTES}")
        self._claims = memory[claims_at:].view(np.bool_).reshape(workers, capacity)
        self.capacity = capacity
        # `view[i] += 1` takes 0.08 us on a memoryview, 0.14 us on an array; a request does it a dozen times.
        (
            self._requests,
            self._prefill_requests,
            self._prefill_tokens,
            self._context_tokens,
            self._generated_tokens,
        ) = (memoryview(counts) for counts in self._rows[worker])
        self._decoding = [(memoryview(row[0]), memoryview(row[1])) for row in self._rows]
        self._own: IntArray = self._rows[worker]
        self._own_claims = self._claims[worker]
        self._slots: dict[EndpointKey, int] = {}
        self._used = 0  # own slots ever claimed lie below
        self._groups: dict[int, tuple[tuple[int, ...], NDArray[np.intp] | slice]] = {}
        self._others: IntArray | None = None
        self._others_of: Callable[[EndpointKey], Sequence[int]] | None = None
        self._rows[worker] = 0  # no lock: these are of nobody else, and a slot is only given up
        self._own_claims[:] = False

    def lock(self) -> AbstractContextManager[None]:
        """Make a read-choose-add atomic between workers; re-entrant; never hold it across an await.

        One process decides without awaiting and so needs none: this one costs nothing and does nothing.
        """
        return _NO_LOCK

    @property
    def unlocked(self) -> int:
        """Times that a block of `lock` ran though another worker kept the lock; a process alone has none."""
        return 0

    def slots_lock(self) -> AbstractContextManager[None]:
        """Keep other workers from giving out slots, which takes some 0.2 ms; not re-entrant.

        Raises:
            CapacityError: On entry: another worker keeps it.
        """
        return _NO_LOCK

    def place(self, key: EndpointKey) -> int:
        """The slot of `key`, claimed by this worker until `retain` leaves the key out.

        Raises:
            CapacityError: Every slot is live.
            ValueError: The key is empty, not ASCII or longer than `KEY_BYTES`.
        """
        found = self._slots.get(key)
        if found is None:
            self._claim((key,))
            found = self._slots[key]
        return found

    def slots(self, keys: Iterable[EndpointKey]) -> tuple[int, ...]:
        """Slots of `keys`; valid as long as `retain` is given each of them. Raises as `place` does."""
        asked, known = tuple(keys), self._slots
        new = [key for key in dict.fromkeys(asked) if key not in known]
        if new:
            self._claim(new)
        return tuple(known[key] for key in asked)

    def retain(self, keys: Collection[EndpointKey]) -> None:
        """Give up this worker's claim on every other endpoint; their slots die once they count zero."""
        gone = self._slots.keys() - set(keys)
        for key in gone:  # no lock: a claim is this worker's own
            self._own_claims[self._slots.pop(key)] = False

    def totals(self, slots: tuple[int, ...]) -> list[Sequence[int]]:
        """Counts of `slots` over all workers and others, shape (`NUM_KINDS`, n); many of them in arrays.

        Passing the same tuple object again saves translating it: 0.5 us for 3 slots, 3 us for 100.
        """
        group = self._groups.get(id(slots))
        index = self._group(slots) if group is None else group[1]
        rows, others = self._rows, self._others
        if isinstance(index, slice):
            totals = self._own[:, index] if len(rows) == 1 else _add_up(rows[:, :, index], axis=0)
            if others is not None:
                totals = totals + others[:, index]
        else:
            totals = self._own.take(index, axis=1) if len(rows) == 1 else _add_up(rows.take(index, 2), axis=0)
            if others is not None:
                totals = totals + others.take(index, axis=1)
        if len(slots) < MANY_ROWS:
            counts: list[Sequence[int]] = totals.tolist()
            return counts
        return [array("q", column.tobytes()) for column in totals]

    def of_all_workers(self) -> int:
        """Requests that count now at any endpoint, of all workers."""
        return int(self._rows[:, 0].sum())

    def decoding(self, key: EndpointKey) -> int:
        """Requests of an endpoint that are known to be prefilled, of all workers and others; 0 if unknown."""
        slot = self._slots.get(key)
        if slot is None:
            return 0
        count = 0
        for requests, prefills in self._decoding:
            count += requests[slot] - prefills[slot]
        if self._others is not None:
            count += int(self._others[0, slot] - self._others[1, slot])
        return count

    def prefilling(self, key: EndpointKey) -> int:
        """Requests of an endpoint that are not known to be prefilled, of all workers and others."""
        slot = self._slots.get(key)
        if slot is None:
            return 0
        count = sum(prefills[slot] for _, prefills in self._decoding)
        return count if self._others is None else count + int(self._others[PREFILL_REQUESTS, slot])

    def prefill_turned(self, key: EndpointKey, now_s: float) -> None:
        """At this endpoint a prefill ended, or came where there was none: the next one begins.

        Args:
            key: Which; ignored if it is unknown.
            now_s: Monotonic seconds, which all processes of a host have in common.
        """
        slot = self._slots.get(key)
        if slot is not None:
            self._own_since_s[slot] = now_s

    def prefill_since_s(self, slots: tuple[int, ...]) -> Sequence[float]:
        """When that was last, by any worker, shape (n,); 0 where it never was. Many of them in an array."""
        if len(slots) < MANY_ROWS and len(self._since_s) == 1:
            return list(map(self._own_since_s.__getitem__, slots))
        group = self._groups.get(id(slots))
        index = self._group(slots) if group is None else group[1]
        last = np.max(self._since_s[:, index], axis=0)
        since_s: list[float] = last.tolist()
        return since_s if len(slots) < MANY_ROWS else array("d", last.tobytes())

    def put(self, entry: Entry[Any, Any, int]) -> None:
        """Add all that a leg is charged to this worker's row."""
        slot = entry.place
        self._requests[slot] += 1
        if entry.prefill_held:
            self._prefill_requests[slot] += 1
            self._prefill_tokens[slot] += entry.prefill_tokens
        self._context_tokens[slot] += entry.context_tokens
        if entry.generated_tokens:
            self._generated_tokens[slot] += entry.generated_tokens

    def take(self, entry: Entry[Any, Any, int]) -> None:
        """Take all that a leg is still charged off this worker's row."""
        slot = entry.place
        self._requests[slot] -= 1
        if entry.prefill_held:
            self._prefill_requests[slot] -= 1
            self._prefill_tokens[slot] -= entry.prefill_tokens
        self._context_tokens[slot] -= entry.context_tokens
        if entry.generated_tokens:
            self._generated_tokens[slot] -= entry.generated_tokens

    def take_prefill(self, entry: Entry[Any, Any, int]) -> None:
        """Take a leg's prefill off this worker's row."""
        slot = entry.place
        self._prefill_requests[slot] -= 1
        self._prefill_tokens[slot] -= entry.prefill_tokens

    def own(self) -> IntArray:
        """This worker's row, a copy, shape (`NUM_KINDS`, u): all slots from u on are zero."""
        own: IntArray = self._own[:, : self._used].copy()
        return own

    def leave_out(self, own: IntArray, most: int) -> None:
        """Leave `most` endpoints with load in a row as `own` gives it: those that left go first."""
        if own.shape[1] <= most:
            return
        loaded = np.flatnonzero(own.any(axis=0))
        if loaded.size > most:
            here = self._own_claims[loaded]
            own[:, np.concatenate((loaded[here], loaded[~here]))[most:]] = 0

    def add_others(self, amounts_of: Callable[[EndpointKey], Sequence[int]]) -> None:
        """Add to all totals from now on what is counted outside of these rows.

        Args:
            amounts_of: Shape (`NUM_KINDS`,), >= 0; called when an endpoint is claimed, later changed by
                `set_others`.
        """
        self._others_of = amounts_of
        self._others = np.zeros((NUM_KINDS, self.capacity), np.int64)
        for key in self._slots:
            self.set_others(key, amounts_of(key))

    def set_others(self, key: EndpointKey, amounts: Sequence[int]) -> None:
        """What is counted on `key` outside of these rows, shape (`NUM_KINDS`,); ignored if it is unknown."""
        slot = self._slots.get(key)
        if slot is not None and self._others is not None:
            self._others[:, slot] = amounts

    def _group(self, slots: tuple[int, ...]) -> NDArray[np.intp] | slice:
        index: NDArray[np.intp] | slice = np.array(slots, np.intp)
        if len(slots) >= MANY_ROWS and slots == tuple(range(slots[0], slots[0] + len(slots))):
            index = slice(slots[0], slots[0] + len(slots))  # as most are, and no slot is looked up
        if len(self._groups) >= _MAX_GROUPS:
            self._groups.clear()
        self._groups[id(slots)] = slots, index  # the tuple is held, so that its id stays its own
        return index

    def _claim(self, keys: Sequence[EndpointKey]) -> None:
        names = [key.encode("ascii") for key in keys]
        for name in names:
            if not 0 < len(name) <= KEY_BYTES:
                raise ValueError(f"endpoint key of {len(name)} bytes; accepted: 1..{KEY_BYTES}")
        claimed: list[EndpointKey] = []
        try:
            with self.slots_lock():
                # A name counts only while its slot is live: one torn by a killed worker is never found.
                is_live = self._claims.any(axis=0) | self._rows.any(axis=(0, 1))
                live = np.flatnonzero(is_live)
                there = dict(zip(self._names[live].tolist(), live.tolist(), strict=True))
                free = iter(np.flatnonzero(~is_live).tolist())
                for key, name in zip(keys, names, strict=True):
                    slot = there.get(name)
                    if slot is None:
                        slot = next(free, None)
                        if slot is None:
                            raise CapacityError(f"all {self.capacity} endpoint slots are in use")
                        self._names[slot] = name
                    self._slots[key] = slot
                    self._own_claims[slot] = True
                    claimed.append(key)
        finally:
            for key in claimed:
                self._used = max(self._used, self._slots[key] + 1)
                if self._others_of is not None:
                    self.set_others(key, self._others_of(key))
