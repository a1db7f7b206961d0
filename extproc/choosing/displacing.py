"""What a prompt displaces from the cache of the engine that computes it, in seconds of prefill of its own.

Rules:
    1. An engine whose cache is full evicts a token for each that it computes. Some of those are asked for
       again: they are computed once more, which evicts others in turn.
    2. How many is learned by counting. Of all prompt tokens that are computed, a share was computed before by
       any engine. So in the mean a computed token has that share of one computed once more, and this in turn,
       and so on: `share / (1 - share)` in all.
    3. Where caches hold all that is asked for twice, and where nothing is, the share is 0 and so the price.
    4. What another engine still has counts as well, up to as much as was evicted. A conversation that moves
       is computed once more by a choice and by no eviction, and leaves a copy behind that keeps others out
       until it is evicted; where nothing is evicted, a copy costs nobody anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from extproc.predicting.traffic import Traffic
from extproc.values.choices import Snapshot
from metadata_center.history.seen_prefixes import SeenPrefixes

MOST_RECOMPUTED: Final = 0.5
"""Share that is believed at most: a computed token evicts one, so a second of prefill displaces one."""


def displaced(recomputed_ratio: float) -> float:
    """Seconds of later prefill that a second of prefill displaces, 0..1; see Rule 2 for the ratio."""
    ratio = min(MOST_RECOMPUTED, recomputed_ratio)
    return ratio / (1.0 - ratio)


def teach_recomputed(
    traffic: Traffic, seen: SeenPrefixes, blocks: Sequence[int], snapshot: Snapshot, row: int
) -> None:
    """Learn of a request that was placed how much of its prompt is computed once more.

    Args:
        traffic: Of its kind; learns.
        seen: What was sent before; remembers its prompt.
        blocks: Of the prompt.
        snapshot: What the decision looked at.
        row: Where the request goes.
    """
    if not blocks:
        return
    tokens, cached, most = snapshot.prompt_tokens, snapshot.cached_tokens[row], max(snapshot.cached_tokens)
    seen_tokens = min(tokens, seen.see(blocks) * tokens // len(blocks))
    traffic.computed(tokens - cached, max(0, seen_tokens - most), most - cached)
