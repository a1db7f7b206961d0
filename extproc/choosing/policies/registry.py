"""Every policy by its name in the configuration: another one is another file and another line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from extproc.choosing.policies.inference_lb import InferenceLb
from extproc.choosing.policies.least_completion import LeastCompletion
from extproc.choosing.policies.least_request import LeastRequest
from extproc.choosing.policies.prefix_cache import PrefixCache
from extproc.choosing.policies.round_robin import RoundRobin
from extproc.choosing.policies.uniform import Uniform
from extproc.choosing.policy import Policy
from extproc.values.balancing import Algorithm

POLICIES: Final[Mapping[Algorithm, Policy]] = {
    Algorithm.INFERENCE_LB: InferenceLb(),
    Algorithm.LEAST_COMPLETION: LeastCompletion(),
    Algorithm.PREFIX_CACHE: PrefixCache(),
    Algorithm.LEAST_REQUEST: LeastRequest(),
    Algorithm.ROUND_ROBIN: RoundRobin(),
    Algorithm.RANDOM: Uniform(),
}
