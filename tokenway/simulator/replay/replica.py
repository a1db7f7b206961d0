"""An engine whose state can be looked into, for readers that are allowed to: oracles and reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tokenway.simulator.engine.engine import Engine
from tokenway.simulator.engine.profile import EngineProfile

_STRIDE: Final = 8
"""A cache is closed under ancestry, so every eighth block says as much as all of them, within 128 tokens."""


@dataclass(frozen=True, slots=True)
class QueuedPrompt:
    """A prompt that is not computed yet.

    Attributes:
        known_tokens: Tokens to be in the KV cache before the next one is made.
        computed_tokens: Those that are, or that the cache holds now.
        output_tokens: Left to generate.
        ready_s: Not scheduled before.
    """

    known_tokens: int
    computed_tokens: int
    output_tokens: int
    ready_s: float


@dataclass(frozen=True, slots=True)
class TrueState:
    """An engine between two steps.

    Attributes:
        free_s: End of the step that runs now, or of the last one.
        queue: Prompts in the order of their turn; the first may be under way.
        under_way: The first of `queue` holds its blocks already.
        decodes: (context tokens, tokens left) of each decoding sequence.
        free_blocks: Blocks that no sequence holds.
    """

    free_s: float
    queue: tuple[QueuedPrompt, ...]
    under_way: bool
    decodes: tuple[tuple[int, int], ...]
    free_blocks: int


class Replica(Engine):
    """An engine with a window."""

    def __init__(self, profile: EngineProfile) -> None:
        super().__init__(profile)

    def true_state(self) -> TrueState:
        """All that decides when the next request would be answered."""
        queue = [QueuedPrompt(s.known, s.computed, s.left, s.ready_s) for s in self._prefilling]
        under_way = bool(queue)
        queue += [
            QueuedPrompt(s.known, self.cached_tokens(s.request.keys, s.known), s.left, s.ready_s)
            for s in self._waiting
        ]
        return TrueState(
            self._busy_until_s,
            tuple(queue),
            under_way,
            tuple((s.computed, s.left) for s in self._decoding),
            self.cache.num_unreferenced,
        )

    def cached_tokens(self, keys: Sequence[int], prompt_tokens: int) -> int:
        """Prompt tokens that the cache holds now, to the nearest `_STRIDE` blocks below.

        Args:
            keys: Of the prompt's blocks; more may follow.
            prompt_tokens: >= 1; the last one is always computed.
        """
        block_size = self.profile.block_size
        limit = (prompt_tokens - 1) // block_size // _STRIDE
        return len(self.cache.match(keys[_STRIDE - 1 :: _STRIDE], limit)) * _STRIDE * block_size
