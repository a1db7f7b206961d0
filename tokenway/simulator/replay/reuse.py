"""What could have been found cached: one cache of the whole fleet that forgets nothing.

Rules:
    1. A prompt counts from when it was sent, an answer from when it ended. Nothing is ever dropped, and a
       prefix that is still being computed counts as there: no fleet finds more.
    2. As in an engine, whole engine blocks alone are found, and never the last token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class EverSeen:
    """Engine blocks that were ever sent anywhere.

    Keys are chained and consecutive within an id of the trace, so an id's number of known blocks says it all.

    Args:
        per_id: Engine blocks per id of the trace, >= 1.
        block_size: Tokens per engine block.
    """

    def __init__(self, per_id: int, block_size: int) -> None:
        self._per_id = per_id
        self._block_size = block_size
        self._known: dict[int, int] = {}

    def found_tokens(self, keys: Sequence[int], prompt_tokens: int) -> int:
        """Leading tokens of a prompt that are known.

        Args:
            keys: Of its engine blocks, and of its answer's.
            prompt_tokens: Its length.
        """
        per_id, known = self._per_id, self._known
        ids = range(0, len(keys), per_id)
        # Prefixes are closed: if an id is known, so is all before it.
        whole = bisect_left(ids, True, key=lambda at: known.get(keys[at] // per_id, 0) < per_id)
        blocks = whole * per_id
        if whole < len(ids):
            blocks += known.get(keys[ids[whole]] // per_id, 0)
        return min(blocks, len(keys), (prompt_tokens - 1) // self._block_size) * self._block_size

    def add(self, keys: Sequence[int]) -> None:
        """These blocks were sent, or made."""
        per_id, known = self._per_id, self._known
        for at in range(0, len(keys), per_id):
            key = keys[at] // per_id
            known[key] = max(known.get(key, 0), min(per_id, len(keys) - at))
