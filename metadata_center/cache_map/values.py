"""What the cache map is asked and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from metadata_center.types import value


class Verify(Protocol):
    """How the engine's tokenizer cuts the prompt that is being matched."""

    def tokens_between(self, start_byte: int, end_byte: int, /) -> Sequence[int] | None:
        """Token ids that cover these bytes of the prompt; None if one of them lies inside a token."""


@value
class Matches:
    """What each endpoint holds of a prompt, from its start on; one value per key asked for.

    Attributes:
        blocks: Leading blocks held, in whatever medium.
        block_sizes: Tokens per block; 0 if nothing is known of the endpoint.
        tokens: Prompt tokens that the engine need not compute: of a prompt that is cached to its very end
            it still computes the last block.
        gpu_tokens: Those of them that lie in GPU memory.
        worth_tokens: The same hit as so many tokens in GPU memory: the rest counts `slow_weight`.
        counted_tokens: Tokens of the longest start that any of the endpoints holds: one number.
        counted_bytes: Its bytes; what is behind them may be counted by their ratio.
    """

    blocks: list[int]
    block_sizes: list[int]
    tokens: list[int]
    gpu_tokens: list[int]
    worth_tokens: list[float]
    counted_tokens: int
    counted_bytes: int


@dataclass(slots=True)
class Counts:
    """What was counted since the start: blocks, unless it says otherwise.

    Attributes:
        doubted: Whose tokens may not be how the tokenizer cuts their text, now.
        announced: Named in stored events that were looked at.
        removed: Named in removed events and found.
        orphans: Not stored because their parent is unknown.
        refused: Not stored for want of room.
        opaque: Not stored because they stand for no text: unknown token ids, images, malformed events.
        ignored: Named in events of other KV cache groups, or in slower media without being known.
        unmatched: Removed without having been held.
        asked: Calls of `Verify.tokens_between`.
        confirmed: Doubted blocks found right.
        refuted: Doubted blocks found wrong.
    """

    doubted: int = 0
    announced: int = 0
    removed: int = 0
    orphans: int = 0
    refused: int = 0
    opaque: int = 0
    ignored: int = 0
    unmatched: int = 0
    asked: int = 0
    confirmed: int = 0
    refuted: int = 0


@dataclass(slots=True)
class CacheMapStats(Counts):
    """Sizes, and the counts as they were with them.

    Attributes:
        replicas: Attached.
        stored: Blocks in the tree, and further names of them (engines that hash with another seed).
        held: Blocks held, summed over replicas and media.
        runs: Nodes of the tree.
        sweeping: Replicas cleared or removed whose blocks are not swept yet.
    """

    replicas: int = 0
    stored: int = 0
    held: int = 0
    runs: int = 0
    sweeping: int = 0
