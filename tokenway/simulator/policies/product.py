"""The product's own immediate rules, run unchanged: `extproc.choosing.choose` over a snapshot of the view."""

from __future__ import annotations

from extproc.choosing.choose import choose
from extproc.choosing.stateful import FleetView, StatefulPolicy
from extproc.values.balancing import Algorithm, LoadBalancing
from extproc.values.choices import Snapshot


class Product(StatefulPolicy):
    """One algorithm of the product.

    Args:
        algorithm: Its name in the configuration.
        candidate_percent: As in the configuration.
        request_load_weight: As in the configuration.
        prefill_load_weight: As in the configuration.
        cache_ratio_weight: As in the configuration.
    """

    __slots__ = ("_settings", "_turn")

    def __init__(
        self,
        *,
        algorithm: str = "inference_lb",
        candidate_percent: int = 5,
        request_load_weight: float = 1.0,
        prefill_load_weight: float = 3.0,
        cache_ratio_weight: float = 2.0,
    ) -> None:
        self._turn = -1
        self._settings = LoadBalancing(
            algorithm=Algorithm(algorithm),
            candidate_percent=candidate_percent,
            request_load_weight=request_load_weight,
            prefill_load_weight=prefill_load_weight,
            cache_ratio_weight=cache_ratio_weight,
            fallbacks=0,
        )

    def choose(self, view: FleetView) -> int:
        """What the product's decision would be."""
        self._turn += 1
        snapshot = Snapshot(
            keys=view.keys,
            requests=view.requests,
            prefill_tokens=view.prefill_tokens,
            context_tokens=view.context_tokens,
            matched_blocks=view.matched_blocks,
            num_blocks=len(view.request.blocks),
            weights=view.weights,
        )
        return choose(snapshot, self._settings, view.rng, self._turn).order[0]
