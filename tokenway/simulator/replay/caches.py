"""What a gateway believes each engine has cached: by its own history, or by the engines' events.

Rules:
    1. Blocks are a router's: chained keys, head first. An engine's cache, its KV events and a history are
       all closed under ancestry, and so are their unions; hence a match may be bisected.
    2. Nothing here looks at an engine: a view learns from calls, made when the news comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.types import EndpointKey


class ViewKind(StrEnum):
    """The cache views there are.

    HISTORY records a prompt when it is sent, as most routers do. HISTORY_CONFIRMED is the product's: recorded
    when its first token comes (or its end, where first tokens are not seen), corrected by reported misses.
    EVENTS is what engines announced. EVENTS_PENDING adds the prompts on their way that engines cannot have
    announced yet.
    """

    HISTORY = "history"
    HISTORY_CONFIRMED = "history-confirmed"
    EVENTS = "events"
    EVENTS_PENDING = "events+pending"


class CacheView(Protocol):
    """What one gateway believes."""

    def match(self, blocks: Sequence[int]) -> list[int]:
        """Leading blocks per row."""
        ...

    def sent(self, request_id: int, row: int, blocks: Sequence[int]) -> None:
        """A request is on its way to `row`, by this gateway or, as it was reported, by another."""
        ...

    def prefilled(self, request_id: int) -> None:
        """Its prompt is known to be computed."""
        ...

    def settled(self, request_id: int, missing: bool) -> None:
        """Whatever its engine had to announce of its prompt has arrived, or never will.

        Args:
            request_id: Which.
            missing: The engine reported clearly fewer cached tokens than were believed.
        """
        ...


class History:
    """The product's own index: the last prompts sent to each endpoint, as many as its cache holds.

    Args:
        keys: The endpoints.
        capacities: Blocks each of them holds.
        confirmed: Record a prompt when it was computed rather than when it is sent.
    """

    def __init__(self, keys: tuple[EndpointKey, ...], capacities: Sequence[int], *, confirmed: bool) -> None:
        self._keys = keys
        self._confirmed = confirmed
        self._index = PrefixIndex(0, max(capacities))
        for key, capacity in zip(keys, capacities, strict=True):
            self._index.set_capacity(key, capacity)
        self._open: dict[int, tuple[int, Sequence[int]]] = {}
        self._prior: dict[int, tuple[int, int]] = {}

    def match(self, blocks: Sequence[int]) -> list[int]:
        """Leading blocks per row."""
        return list(self._index.match(blocks, self._keys))

    def sent(self, request_id: int, row: int, blocks: Sequence[int]) -> None:
        """Note or record the prompt."""
        self._open[request_id] = (row, blocks)
        if not self._confirmed:
            self._record(request_id)

    def prefilled(self, request_id: int) -> None:
        """Record the prompt if that waited."""
        if self._confirmed:
            self._record(request_id)

    def settled(self, request_id: int, missing: bool) -> None:
        """Forget what the engine must have evicted before it missed this prompt's blocks.

        Only where prompts are recorded when computed: else a miss may mean that the one before was still
        being computed, and nothing was evicted.
        """
        self._open.pop(request_id, None)
        row, prior = self._prior.pop(request_id, (0, 0))
        if missing and prior and self._confirmed:
            self._index.forget_older(self._keys[row], prior)

    def _record(self, request_id: int) -> None:
        opened = self._open.pop(request_id, None)
        if opened is not None:
            row, blocks = opened
            self._prior[request_id] = (row, self._index.record(self._keys[row], blocks))


class EventBlocks:
    """Blocks as the engines' events report them; one for all gateways, for they all hear the same."""

    def __init__(self, rows: int) -> None:
        self._copies: list[dict[int, int]] = [{} for _ in range(rows)]

    def stored(self, row: int, blocks: Sequence[int]) -> None:
        """An engine announced blocks."""
        copies = self._copies[row]
        for block in blocks:
            copies[block] = copies.get(block, 0) + 1

    def removed(self, row: int, blocks: Sequence[int]) -> list[int]:
        """An engine dropped copies; returns the blocks of which none is left.

        Blocks whose announcement was lost are passed over.
        """
        copies = self._copies[row]
        gone = []
        for block in blocks:
            left = copies.get(block, 0) - 1
            if left > 0:
                copies[block] = left
            elif left == 0:
                del copies[block]
                gone.append(block)
        return gone

    def row(self, row: int) -> dict[int, int]:
        """Blocks of one engine, each with its number of copies; read only."""
        return self._copies[row]


class Events:
    """Announced blocks and, if asked to, those of prompts on their way.

    Args:
        event_blocks: What the engines reported.
        rows: Endpoints.
        pending: Count a prompt as cached from its sending on.
    """

    def __init__(self, event_blocks: EventBlocks, rows: int, *, pending: bool) -> None:
        self._rows = [event_blocks.row(row) for row in range(rows)]
        self._pending: list[dict[int, int]] = [{} for _ in range(rows)]
        self._keep = pending
        self._open: dict[int, tuple[int, Sequence[int]]] = {}

    def match(self, blocks: Sequence[int]) -> list[int]:
        """Leading blocks per row."""
        return [
            _leading(blocks, known, pending) for known, pending in zip(self._rows, self._pending, strict=True)
        ]

    def sent(self, request_id: int, row: int, blocks: Sequence[int]) -> None:
        """Count the prompt in."""
        if not self._keep:
            return
        self._open[request_id] = (row, blocks)
        pending = self._pending[row]
        for block in blocks:
            pending[block] = pending.get(block, 0) + 1

    def prefilled(self, request_id: int) -> None:
        """Nothing: the events are still on their way."""

    def settled(self, request_id: int, missing: bool) -> None:  # noqa: ARG002 - events need no correction
        """Count the prompt out."""
        row, blocks = self._open.pop(request_id, (0, ()))
        pending = self._pending[row]
        for block in blocks:
            left = pending[block] - 1
            if left:
                pending[block] = left
            else:
                del pending[block]


def _leading(blocks: Sequence[int], known: dict[int, int], pending: dict[int, int]) -> int:
    low, high = 0, len(blocks)
    if not blocks or (blocks[0] not in known and blocks[0] not in pending):
        return 0
    while low < high:
        middle = (low + high) // 2
        block = blocks[middle]
        if block in known or block in pending:
            low = middle + 1
        else:
            high = middle
    return low
