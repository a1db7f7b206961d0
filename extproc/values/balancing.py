"""Load-balancing settings of one model, with the defaults that apply to whatever is left unset."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Algorithm(StrEnum):
    """The policies a model may choose from."""

    INFERENCE_LB = "inference_lb"
    LEAST_COMPLETION = "least_completion"
    PREFIX_CACHE = "prefix_cache"
    LEAST_REQUEST = "least_request"
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class LoadBalancing:
    """How one model's endpoints are chosen. Names and defaults follow AIGW's `LBConfig`, but for `algorithm`.

    Attributes:
        algorithm: Which policy; only `inference_lb` looks at the three `*_weight` and at `candidate_percent`.
            Every policy looks at endpoints' weights.
        load_aware_enable: False leaves in-flight requests and prefill out of the score.
        cache_aware_enable: False leaves the prefix match out of the score.
        candidate_percent: The pick is uniform among this share of best endpoints, 0..100, at least one.
        request_load_weight: Weight of in-flight requests, >= 0.
        prefill_load_weight: Weight of pending prefill, >= 0.
        cache_ratio_weight: Weight of the cache hit ratio, >= 0.
        rival: A rule of another gateway that has the last word, to be compared on live traffic; see
            `extproc.choosing.rivals.registry.make`. None: `algorithm` has it.
        fallbacks: Further endpoints named to Envoy, in order, 0..8: the first that is there gets the one
            retry before the first byte, the others stand in for those that have just left.
    """

    algorithm: Algorithm = Algorithm.LEAST_COMPLETION
    load_aware_enable: bool = True
    cache_aware_enable: bool = True
    candidate_percent: int = 5
    request_load_weight: float = 1.0
    prefill_load_weight: float = 3.0
    cache_ratio_weight: float = 2.0
    fallbacks: int = 2
    rival: str | None = None
