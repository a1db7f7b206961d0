"""What engines announce as tokens, known as text: which endpoint holds the longest start of a prompt.

Rules:
    1. An engine's token ids become bytes through its model's vocabulary when they are announced. A prompt is
       then matched as bytes, and no tokenizer runs for it but over what is in doubt (see `matching`).
    2. What is announced is stored and removed by the rules of `storing` and `removing`; its holders, by
       those of `holders`.
    3. A cleared or removed replica loses its holders at once and in O(1). Its bits are swept from the runs
       a few at a time, by `sweep` and at each `apply`, and given to others only after that.
    4. Memory is bounded by `max_blocks` and `max_blocks_per_replica`.
    5. A wrong entry costs time, never correctness. No event raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

from metadata_center.cache_map.holders import Holders, Replica
from metadata_center.cache_map.matching import match
from metadata_center.cache_map.removing import remove
from metadata_center.cache_map.storing import Storing
from metadata_center.cache_map.tree import Tree
from metadata_center.cache_map.values import CacheMapStats, Counts, Matches, Verify
from metadata_center.kv_events.events import Batch, BlockRemoved, BlockStored
from metadata_center.load.counters import MAX_ENDPOINTS
from metadata_center.types import EndpointKey

_SWEEP_RUNS: Final = 16  # per batch: at most 16 * 64 names deleted, about a millisecond


class CacheMap:
    """Blocks of all replicas, by their text.

    Args:
        max_blocks: Most blocks stored; about 100 bytes each.
        max_blocks_per_replica: Most blocks one replica is credited with.
        max_replicas: Most replicas attached.
        max_doubts: Most blocks in doubt whose tokens are kept (about 33 bytes and 4 for each token); of
            further ones only the number of tokens is compared.
        slow_weight: What a token in a slower medium is worth beside one in GPU memory, 0..1.
    """

    def __init__(
        self,
        max_blocks: int = 20_000_000,
        max_blocks_per_replica: int = 4_000_000,
        *,
        max_replicas: int = MAX_ENDPOINTS,
        max_doubts: int = 1_000_000,
        slow_weight: float = 0.5,
    ) -> None:
        if not 0.0 <= slow_weight <= 1.0:
            raise ValueError("slow_weight is not within 0..1")
        self._slow_weight = slow_weight
        self._counts = Counts()
        self._tree = Tree(self._counts)
        self._holders = Holders(self._tree, max_replicas, max_blocks_per_replica, self._counts)
        self._storing = Storing(self._tree, self._holders, max_blocks, max_doubts, self._counts)

    @property
    def stats(self) -> CacheMapStats:
        """Sizes and counts. O(replicas)."""
        replicas = self._holders.replicas
        return CacheMapStats(
            **asdict(self._counts),
            replicas=len(replicas),
            stored=self._tree.stored,
            held=sum(replica.blocks for replica in replicas),
            runs=self._tree.size,
            sweeping=self._holders.gone.bit_count() // 2,
        )

    def attach(self, endpoint: EndpointKey, rank: int, model: str, vocabulary: Sequence[bytes]) -> Replica:
        """Follow one replica from now on; one that was followed already starts over.

        Args:
            endpoint: Its address.
            rank: Its data-parallel rank.
            model: Name in the `root` of its prompts.
            vocabulary: Token id to bytes, empty for ids that stand for no text. Replicas of one model
                that are given the same object share its memory and what they announce.

        Raises:
            CapacityError: `max_replicas` are attached; nothing was changed.
        """
        return self._holders.attach(endpoint, rank, model, vocabulary)

    def remove(self, endpoint: EndpointKey) -> None:
        """Forget all ranks of `endpoint`; their handles are void. O(ranks)."""
        self._holders.remove(endpoint)

    def clear(self, replica: Replica) -> None:
        """`replica` holds nothing now: its engine lost its cache, or restarted. O(1)."""
        self._holders.clear(replica)

    def sweep(self, max_runs: int) -> bool:
        """Take away what cleared and removed replicas held, from up to `max_runs` runs.

        Returns:
            True if there is more to sweep.
        """
        return self._holders.sweep(max_runs)

    def apply(self, replica: Replica, batch: Batch) -> None:
        """Take over what one engine step did, event by event. Never raises."""
        if not replica.attached:
            return
        for event in batch.events:
            if type(event) is BlockStored:
                self._storing.store(replica, event)
            elif type(event) is BlockRemoved:
                remove(self._tree, self._counts, replica, event)
            else:
                self._holders.clear(replica)
        if self._holders.gone:
            self._holders.sweep(_SWEEP_RUNS)

    def match(
        self, root: int, text: bytes, keys: tuple[EndpointKey, ...], verify: Verify | None = None
    ) -> Matches:
        """How much of a prompt each endpoint holds.

        O(b / RUN_BLOCKS + n) for b blocks held and n endpoints. Passing the same tuple object again saves
        looking its endpoints up.

        Args:
            root: From `metadata_center.roots.root`: the model, adapter and salt of the request.
            text: All of the prompt, as the engine tokenizes it.
            keys: Endpoints, distinct; one that is unknown matches nothing. Of an endpoint with several
                ranks the best counts.
            verify: Tells tokens of `text`; None takes equal text for equal tokens.
        """
        holders = self._holders
        group = holders.groups.get(id(keys)) or holders.group(keys)
        return match(self._tree.roots, group, root, text, verify, self._slow_weight, self._counts)
