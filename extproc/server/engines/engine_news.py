"""What probes learn of engines, and what an engine's return means, passed to the owners that it concerns."""

from __future__ import annotations

import logging

from extproc.choosing.max_num_seqs import LimitSource
from extproc.config.schema import Config
from extproc.health.facts import Occupancy
from extproc.health.states import HealthState, Transition
from extproc.predicting.predictor import Predictor
from extproc.predicting.tokens import TokensPerByte
from extproc.routing.engines import Engines
from extproc.server.engines.kv_event_follower import KvEventFollower
from metadata_center.store import PrefixStore
from metadata_center.types import EndpointKey

_log = logging.getLogger("tokenway.engines")


def capacity_blocks(kv_tokens: int, tokens_per_byte: float, config: Config) -> int:
    """How many of our blocks a KV cache of `kv_tokens` holds."""
    blocks = int(kv_tokens / tokens_per_byte / config.request.block_bytes)
    return min(config.cache.max_blocks_per_endpoint, max(1, blocks))


class EngineNews:
    """Passes on.

    Args:
        engines: What is known of engines beside their load.
        history: Blocks by routing history, bounded by each engine's cache.
        predictor: Knows the tokens per byte of the models served.
        kv_event_follower: Follows what engines announce.
        config: The one at the start.
    """

    def __init__(
        self,
        engines: Engines,
        history: PrefixStore,
        predictor: Predictor,
        kv_event_follower: KvEventFollower,
        config: Config,
    ) -> None:
        self._engines = engines
        self._history = history
        self._predictor = predictor
        self._kv_event_follower = kv_event_follower
        self._config = config

    def follow(self, config: Config) -> None:
        """See `applying.Apply`."""
        self._config = config

    def transition(self, transition: Transition) -> None:
        """Health changed: an engine that answers again may be another process."""
        if transition.after not in (HealthState.EJECTED, HealthState.NOT_READY):
            self._kv_event_follower.came_back(transition.key)
            self._engines.restarted(transition.key)

    def cache_config(self, key: EndpointKey, kv_tokens: int, _block_size: int) -> None:
        """An engine reported the size of its KV cache."""
        self._engines.observe_kv_tokens(key, kv_tokens)
        ratios = [ratio for _, ratio in self._predictor.token_ratios()]
        tokens_per_byte = sum(ratios) / len(ratios) if ratios else TokensPerByte().ratio
        self._history.set_capacity(key, capacity_blocks(kv_tokens, tokens_per_byte, self._config))

    def cache_cleared(self, key: EndpointKey) -> None:
        """An engine dropped all that it had cached."""
        self._history.clear(key)
        self._kv_event_follower.cleared(key)

    def occupancy(self, key: EndpointKey, occupancy: Occupancy) -> None:
        """An engine reported how full it is."""
        limit, source = self._engines.sequence_limit(key)
        self._engines.observe_occupancy(
            key,
            occupancy.running,
            occupancy.waiting,
            occupancy.kv_usage_ratio,
            occupancy.started_s,
            occupancy.prompt_tokens,
        )
        if source is LimitSource.CONFIGURED and occupancy.running > limit:
            _log.warning(
                "an engine runs more sequences than its configured max_num_seqs, which counts no more",
                extra={"endpoint": key, "running": occupancy.running, "max_num_seqs": limit},
            )
