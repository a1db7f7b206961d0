"""The rivals by name, and policies from `name:parameter=value:parameter=value`.

Rules:
    1. A name stands for a class and the parameters it presets; any parameter can be given over that.
    2. `make` gives a fresh object each time: one per gateway and run, or per pool of a live gateway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature

from extproc.choosing.rivals.aibrix import AibrixPrefixCache
from extproc.choosing.rivals.aigw import Aigw
from extproc.choosing.rivals.chwbl import Chwbl
from extproc.choosing.rivals.dynamo import DynamoLinear
from extproc.choosing.rivals.dynamo_queue import DynamoQueue
from extproc.choosing.rivals.least_request import LeastRequest
from extproc.choosing.rivals.llmd_affinity import LlmdAffinity
from extproc.choosing.rivals.llmd_flow import LlmdFlow
from extproc.choosing.rivals.llmd_observed import LlmdObserved
from extproc.choosing.rivals.llmd_predicted import LlmdPredicted
from extproc.choosing.rivals.llmd_sticky import LlmdSticky
from extproc.choosing.rivals.llmd_weights import LlmdWeights
from extproc.choosing.rivals.lmetric import LMetric
from extproc.choosing.rivals.preble import Preble
from extproc.choosing.rivals.quartz import Quartz
from extproc.choosing.rivals.round_robin import RoundRobin
from extproc.choosing.rivals.sglang import SglangCacheAware
from extproc.choosing.rivals.smetric import SMetric
from extproc.choosing.rivals.smg_priority import SmgPriority
from extproc.choosing.rivals.uniform import Random
from extproc.choosing.rivals.vllm_dp import VllmDp
from extproc.choosing.stateful import StatefulPolicy

Value = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Rule:
    """What a name stands for.

    Attributes:
        make: Makes one, from keyword parameters.
        presets: Parameters that differ from its defaults.
    """

    make: Callable[..., StatefulPolicy]
    presets: Mapping[str, Value] = field(default_factory=dict)

    def parameters(self) -> dict[str, Value]:
        """Every parameter with the value it has under this name."""
        defaults = {
            name: parameter.default
            for name, parameter in signature(self.make).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        return {**defaults, **self.presets}


RIVALS: Mapping[str, Rule] = {
    "random": Rule(Random),
    "round_robin": Rule(RoundRobin),
    "least_request": Rule(LeastRequest),
    "vllm_dp": Rule(VllmDp),
    "aigw": Rule(Aigw),
    "aibrix_prefix_cache": Rule(AibrixPrefixCache),
    "aibrix_prefix_cache_own": Rule(AibrixPrefixCache, {"own": True}),
    "aibrix_manifest": Rule(AibrixPrefixCache, {"imbalance": 16, "sigmas": 2.0}),
    "aibrix_manifest_own": Rule(
        AibrixPrefixCache, {"own": True, "block_characters": 128, "imbalance": 16, "sigmas": 2.0}
    ),
    "llmd_weights": Rule(LlmdWeights),
    "llmd_weights_lru": Rule(LlmdWeights, {"no_hit_lru": 2.0}),
    "llmd_sticky": Rule(LlmdSticky),
    "llmd_affinity": Rule(LlmdAffinity),
    "llmd_observed": Rule(LlmdObserved),
    "llmd_predicted": Rule(LlmdPredicted),
    "sglang_cache_aware": Rule(SglangCacheAware),
    "sglang_cache_aware_own": Rule(SglangCacheAware, {"own": True}),
    "dynamo_linear": Rule(DynamoLinear),
    "dynamo_product": Rule(DynamoLinear, {"product": True}),
    "lmetric": Rule(LMetric),
    "smetric": Rule(SMetric),
    "preble_e2": Rule(Preble),
    "preble_e2_own": Rule(Preble, {"own": True}),
    "chwbl": Rule(Chwbl),
}
"""Those that decide at once, in the order of the literature, simple ones first."""

LATE: Mapping[str, Rule] = {
    "llmd_flow": Rule(LlmdFlow),
    "llmd_flow_sticky": Rule(LlmdFlow, {"sticky": True}),
    "dynamo_queue": Rule(DynamoQueue),
    "dynamo_queue_wspt": Rule(DynamoQueue, {"policy": "wspt"}),
    "smg_priority": Rule(SmgPriority),
    "quartz": Rule(Quartz),
}
"""Those that let requests wait at the gateway. The replayer alone runs them: `load_balancing.rival` asks a
rival once, after the product's own decision, and keeps nothing waiting on its behalf."""


def make(spec: str, rules: Mapping[str, Rule] = RIVALS) -> StatefulPolicy:
    """A fresh policy from `name` or `name:parameter=value:...`.

    Args:
        spec: Name and parameters.
        rules: What names stand for.

    Raises:
        ValueError: The name or a parameter is unknown, or a value is not of its kind.
    """
    name, *settings = spec.split(":")
    rule = rules.get(name)
    if rule is None:
        raise ValueError(f"no policy is called {name!r}; there are {', '.join(rules)}")
    parameters = rule.parameters()
    given: dict[str, Value] = dict(rule.presets)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in parameters:
            known = ", ".join(parameters) or "none"
            raise ValueError(f"{name} has no parameter {setting!r}; it has {known}")
        given[key] = _value(f"{name}:{key}", text, parameters[key])
    return rule.make(**given)


def _value(where: str, text: str, default: Value) -> Value:
    """`text` as the kind of value that `default` is."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text]
        return type(default)(text)
    except (KeyError, ValueError):
        raise ValueError(f"{where} cannot be {text!r}; it is {default!r} by default") from None
