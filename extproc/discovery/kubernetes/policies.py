"""InferenceObjective and InferenceModelRewrite objects → what is said of the requests of a pool.

Rules:
    1. An object counts for the pool that its `poolRef` names, in its own namespace.
    2. Of two objects with one name, in the group of llm-d and in the one before, llm-d's counts.

Source: llm-d router, apix/v1alpha2; gateway-api-inference-extension before v1.6, apix/v1alpha2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from extproc.discovery.kubernetes.fields import Object, int_of, list_at, mapping_at, text_at
from extproc.values.pool_policies import ModelRewrite, PoolPolicies

MAX_RULES = 64
MAX_TARGETS = 16
MAX_REWRITES = 1024
"""Of all objects of a pool together."""

_MAX_PRIORITY = 2**31 - 1
_MAX_WEIGHT = 1_000_000


@dataclass(frozen=True, slots=True)
class Objective:
    """What is kept of an InferenceObjective.

    Attributes:
        pool: That it is about.
        priority: Of its requests.
    """

    pool: str
    priority: int


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What is kept of an InferenceModelRewrite.

    Attributes:
        pool: That it is about.
        created: When, as the API writes it.
        rules: In its order, a rule of several models as several.
    """

    pool: str
    created: str
    rules: tuple[ModelRewrite, ...]


def read_objective(said: Object) -> Objective | None:
    """What is kept of an objective; None if it names no pool."""
    pool = text_at(said, "spec", "poolRef", "name")
    priority = int_of(mapping_at(said, "spec").get("priority"), -_MAX_PRIORITY - 1, _MAX_PRIORITY)
    return Objective(pool, priority or 0) if pool else None


def read_rewrite(said: Object) -> Rewrite | None:
    """What is kept of a rewrite; None if it names no pool. Rules without a target are left out."""
    pool = text_at(said, "spec", "poolRef", "name")
    if not pool:
        return None
    rules: list[ModelRewrite] = []
    for rule in list_at(said, "spec", "rules")[:MAX_RULES]:
        targets = tuple(_targets(rule))
        if targets:
            rules += [ModelRewrite(model, targets) for model in _models(rule)]
    return Rewrite(pool, text_at(said, "metadata", "creationTimestamp"), tuple(rules))


def policies_of(
    pool: str,
    objectives: Iterable[Mapping[str, Objective]],
    rewrites: Iterable[Mapping[str, Rewrite]],
) -> PoolPolicies:
    """What is said of a pool.

    Args:
        pool: Its name.
        objectives: By name, the group that goes first first.
        rewrites: Likewise.
    """
    priorities: dict[str, int] = {}
    for of_group in objectives:
        for name, objective in sorted(of_group.items()):
            if objective.pool == pool:
                priorities.setdefault(name, objective.priority)
    by_name: dict[str, Rewrite] = {}
    for of_rewrites in rewrites:
        for name, rewrite in of_rewrites.items():
            if rewrite.pool == pool:
                by_name.setdefault(name, rewrite)
    oldest_first = sorted(by_name.items(), key=lambda item: (item[1].created, item[0]))
    rules = [rule for _, rewrite in oldest_first for rule in rewrite.rules]
    rules.sort(key=lambda rule: not rule.model)
    return PoolPolicies(priorities, tuple(rules[:MAX_REWRITES]))


def _models(rule: object) -> list[str]:
    """Models that a rule is about; it is about any if it names none."""
    matches = list_at(rule, "matches")[:MAX_TARGETS]
    if not matches:
        return [""]
    return [
        model
        for match in matches
        if text_at(match, "model", "type") in ("", "Exact") and (model := text_at(match, "model", "value"))
    ]


def _targets(rule: object) -> Iterable[tuple[str, int]]:
    for target in list_at(rule, "targets")[:MAX_TARGETS]:
        name = text_at(target, "modelRewrite")
        said = mapping_at(target).get("weight")
        weight = 1 if said is None else int_of(said, 1, _MAX_WEIGHT)
        if name and weight is not None:
            yield name, weight
