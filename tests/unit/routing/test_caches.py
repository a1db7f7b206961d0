"""What is believed cached: each endpoint by its best view, and which view that is."""

from __future__ import annotations

from collections.abc import Sequence

from extproc.request.blocks import block_hashes
from extproc.routing.caches import Caches, Estimate, EventMatch
from extproc.values.decisions import CacheSource
from extproc.values.requests import InferenceRequest, Operation
from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.types import EndpointKey

BLOCK_BYTES = 64
KEYS = tuple(EndpointKey(f"10.0.0.{i}:8000") for i in range(3))
PROMPT = bytes(range(256)) * 4  # 16 blocks, taken to be 256 tokens
BLOCKS = block_hashes(PROMPT, 0, BLOCK_BYTES)


class Engines:
    """Engines that announce what the test says."""

    def __init__(
        self, tokens: Sequence[int | None], prompt_tokens: int = 256, *, is_complete: bool = True
    ) -> None:
        self._by_events = EventMatch(
            tokens,
            [count or 0 for count in tokens],
            [is_complete] * len(tokens),
            [0 if count is None else 32 for count in tokens],
            prompt_tokens,
        )

    def match(
        self,
        request: InferenceRequest,
        model: str,
        lora: str | None,
        keys: tuple[EndpointKey, ...],
        tokens_per_byte: float,
    ) -> EventMatch | None:
        """As given."""
        return self._by_events


def caches(events: Engines | None = None) -> Caches:
    """Views that know nothing but what engines announce."""
    return Caches(PrefixIndex(1_000, 1_000), events=events)


def estimate(views: Caches) -> Estimate:
    """What is believed of `PROMPT`."""
    request = InferenceRequest(Operation.CHAT, "m", True, PROMPT, None, None, None, {})
    return views.estimate(request, "m", None, BLOCKS, BLOCK_BYTES, 256, KEYS)


def test_without_announcements_history_speaks_in_blocks() -> None:
    """AIGW's ratio: matched blocks of all blocks; tokens are the bytes' share, one is always recomputed."""
    views = caches()
    views.history.record(KEYS[0], BLOCKS[:4])
    views.history.record(KEYS[1], BLOCKS)
    believed = estimate(views)
    assert (believed.matched, believed.num_units) == ([4, 16, 0], 16)
    assert believed.cached_tokens == [64, 255, 0]
    assert believed.views == [CacheSource.HISTORY] * 3


def test_a_running_prompt_counts_where_history_knows_less() -> None:
    """A request in flight has its blocks there, or will have before the next one starts."""
    views = caches()
    views.history.record(KEYS[0], BLOCKS[:4])
    views.running.add(KEYS[0], BLOCKS[:2])
    views.running.add(KEYS[1], BLOCKS[:8])
    believed = estimate(views)
    assert believed.matched == [4, 8, 0]
    assert believed.views == [CacheSource.HISTORY, CacheSource.RUNNING, CacheSource.HISTORY]


def test_an_engine_that_announces_speaks_for_itself() -> None:
    """History is asked only for the others; the unit is a token then."""
    views = caches(Engines([96, None, 0]))
    for key in KEYS:
        views.history.record(key, BLOCKS)
    believed = estimate(views)
    assert believed.cached_tokens == believed.matched == [96, 255, 0]
    assert believed.num_units == believed.prompt_tokens == 256
    assert believed.views == [CacheSource.ANNOUNCED, CacheSource.HISTORY, CacheSource.ANNOUNCED]


def test_a_running_prompt_outdoes_an_announcement_by_a_block_or_not_at_all() -> None:
    """Counted by bytes it is inexact, so that a smaller lead says nothing; whole engine blocks alone hit."""
    views = caches(Engines([0, 192, None]))
    views.running.add(KEYS[0], BLOCKS[:11])  # 176 tokens, of which 160 are whole blocks of 32
    views.running.add(KEYS[1], BLOCKS[:12])  # 192: no news
    believed = estimate(views)
    assert believed.cached_tokens == [160, 192, 0]
    assert believed.views == [CacheSource.RUNNING, CacheSource.ANNOUNCED, CacheSource.HISTORY]


def test_the_better_count_of_the_prompt_is_taken_over() -> None:
    """An engine's blocks count tokens exactly; history's share follows."""
    views = caches(Engines([None, 480, None], prompt_tokens=512))
    views.history.record(KEYS[0], BLOCKS[:8])
    believed = estimate(views)
    assert believed.prompt_tokens == 512
    assert believed.cached_tokens == [256, 480, 0]


def test_where_announcements_are_incomplete_the_longer_match_speaks() -> None:
    """An engine may hold from before we listened what only history knows."""
    views = caches(Engines([32, 128, 0], is_complete=False))
    views.history.record(KEYS[0], BLOCKS[:8])
    views.history.record(KEYS[1], BLOCKS[:8])
    believed = estimate(views)
    assert believed.cached_tokens == [128, 128, 0]
    assert believed.views == [CacheSource.HISTORY, CacheSource.ANNOUNCED, CacheSource.ANNOUNCED]
