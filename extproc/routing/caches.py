"""What each endpoint has of a prompt in its cache, by the best view there is of each.

Rules:
    1. Three views. `announced`: the engine's own KV events. `history`: what was routed there before, bounded
       by the cache's size. `running`: prompts of requests in flight there, cached or about to be.
    2. An endpoint whose KV events are complete speaks for itself, any other is judged by history. Between
       the two, where what an engine holds from before we listened is unknown, the longer match speaks. This
       is settled at each decision, per endpoint: it is not configured and nothing has to be undone.
    3. A running prompt counts where it reaches a block of ours beyond the view of that endpoint; less than
       that is the error of counting tokens by bytes.
    4. Estimates are in prompt tokens. `matched` counts blocks of ours where history alone speaks (AIGW's
       ratio), and tokens as soon as an engine does, those in slower media for less.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np

from extproc.routing.keeping import one_view
from extproc.values.decisions import CacheSource
from extproc.values.requests import InferenceRequest
from metadata_center.history.running_blocks import RunningBlocks
from metadata_center.history.seen_prefixes import SeenPrefixes
from metadata_center.store import PrefixStore
from metadata_center.types import MANY_ROWS, EndpointKey, value


@value
class EventMatch:
    """What engines announced to have of one prompt.

    Attributes:
        tokens: Usable cached prompt tokens per row; None for an endpoint that does not announce.
        worth: The same hits as so many tokens in GPU memory; slower media count less.
        is_complete: All that each row's engine holds was announced; if not, history may know more.
        block_tokens: Tokens per block of each row's engine; 0 where `tokens` is None.
        prompt_tokens: The prompt's tokens, counted better than by its bytes; more than any of `tokens`.
    """

    tokens: Sequence[int | None]
    worth: Sequence[float]
    is_complete: Sequence[bool]
    block_tokens: Sequence[int]
    prompt_tokens: int


class EventView(Protocol):
    """Caches as engines report them by KV events."""

    def match(
        self,
        request: InferenceRequest,
        model: str,
        lora: str | None,
        keys: tuple[EndpointKey, ...],
        tokens_per_byte: float,
    ) -> EventMatch | None:
        """What they have of a prompt; None if that is known of none of `keys`, or not for this request."""
        ...


@value
class Estimate:
    """What is believed cached of one prompt, one value per row.

    Attributes:
        prompt_tokens: Length of the prompt.
        cached_tokens: 0..prompt_tokens - 1.
        matched: 0..num_units.
        num_units: What the prompt has of the units of `matched`, see Rule 4.
        views: Where each depth comes from.
    """

    prompt_tokens: int
    cached_tokens: Sequence[int]
    matched: Sequence[int]
    num_units: int
    views: Sequence[CacheSource]


@dataclass(slots=True)
class Caches:
    """The views of one worker.

    Attributes:
        history: Blocks by routing history.
        running: Blocks of requests in flight.
        events: Caches by KV events, if any may be known.
        seen: What was sent from here, whether or not an engine still has it.
    """

    history: PrefixStore
    running: RunningBlocks = field(default_factory=RunningBlocks)
    events: EventView | None = None
    seen: SeenPrefixes = field(default_factory=SeenPrefixes)

    def forget(self, keys: Iterable[EndpointKey]) -> None:
        """They left the configuration: by routing history they have nothing, and nothing runs there."""
        for key in keys:
            self.history.remove(key)
            self.running.forget(key)

    def estimate(
        self,
        request: InferenceRequest,
        model: str,
        lora: str | None,
        blocks: Sequence[int],
        block_bytes: int,
        prompt_tokens: int,
        keys: tuple[EndpointKey, ...],
    ) -> Estimate:
        """Ask every view.

        Args:
            request: Whose prompt.
            model: Served model.
            lora: Its adapter, if any.
            blocks: The prompt's blocks, head first.
            block_bytes: Bytes per block.
            prompt_tokens: As far as known, >= 1.
            keys: Endpoints.
        """
        matched = self.history.match(blocks, keys)
        running = self.running.match(blocks, keys)
        by_events = None
        prompt_bytes = request.prompt_bytes
        if self.events is not None and prompt_bytes:
            tokens_per_byte = prompt_tokens / prompt_bytes
            by_events = self.events.match(request, model, lora, keys, tokens_per_byte)
        if by_events is None:
            views = deepen(matched, running)
            cached = tokens_of(matched, block_bytes, prompt_bytes, prompt_tokens)
            return Estimate(prompt_tokens, cached, matched, len(blocks), views)
        spoke = [CacheSource.HISTORY] * len(keys)
        prompt_tokens = by_events.prompt_tokens
        cached = tokens_of(matched, block_bytes, prompt_bytes, prompt_tokens)
        cached, worth = list(cached), list(cached)
        one_block = block_bytes * prompt_tokens // prompt_bytes
        for row, tokens in enumerate(by_events.tokens):
            if tokens is None or (not by_events.is_complete[row] and cached[row] >= tokens + one_block):
                continue
            cached[row] = tokens
            worth[row] = round(by_events.worth[row])
            spoke[row] = CacheSource.ANNOUNCED
        running_tokens = tokens_of(running, block_bytes, prompt_bytes, prompt_tokens)
        for row, tokens in enumerate(running_tokens):
            unit = by_events.block_tokens[row] or 1
            tokens -= tokens % unit
            if tokens >= cached[row] + one_block:
                cached[row] = worth[row] = tokens
                spoke[row] = CacheSource.RUNNING
        return Estimate(prompt_tokens, cached, worth, prompt_tokens, spoke)


def deepen(matched: list[int] | array[int], running: Sequence[int]) -> Sequence[CacheSource]:
    """Write into `matched` what runs beyond it; returns whether history or that spoke for each row."""
    count = len(matched)
    if count >= MANY_ROWS and isinstance(matched, array) and isinstance(running, array):
        depths, in_use = np.frombuffer(matched, np.int64), np.frombuffer(running, np.int64)
        rows = (in_use > depths).nonzero()[0]
        if not rows.size:
            return one_view(CacheSource.HISTORY, count)
        depths[rows] = in_use[rows]
        views = [CacheSource.HISTORY] * count
        for row in rows.tolist():
            views[row] = CacheSource.RUNNING
        return views
    views = [CacheSource.HISTORY] * count
    if any(running):
        for row, depth in enumerate(running):
            if depth > matched[row]:
                matched[row] = depth
                views[row] = CacheSource.RUNNING
    return views


def tokens_of(
    matched: Sequence[int], block_bytes: int, prompt_bytes: int, prompt_tokens: int
) -> Sequence[int]:
    """Prompt tokens in matched blocks: their share of the bytes, at least one token recomputed."""
    most, block_tokens = prompt_tokens - 1, block_bytes * prompt_tokens
    if len(matched) < MANY_ROWS:
        if not any(matched):
            return [0] * len(matched)
        return [min(most, blocks * block_tokens // prompt_bytes) if blocks else 0 for blocks in matched]
    depths = np.array(matched, np.int64)
    rows = depths.nonzero()[0]
    if not rows.size:
        return _nothing(len(matched))
    depths[rows] = np.minimum(most, depths[rows] * block_tokens // prompt_bytes)
    return array("q", depths.tobytes())


@lru_cache(maxsize=64)
def _nothing(rows: int) -> array[int]:
    """Kept once for all decisions; not to be changed."""
    return array("q", bytes(8 * rows))
