"""What Envoy may serve while Tokenway does not answer: models open to all, where their rule says.

Rules:
    1. Never more than Tokenway would serve: a model whose rules all want headers is left out, and a rule with
       a subset of labels keeps it.
    2. A name that no model has is served by the rule of `*`. Envoy knows such names by what it does not find:
       each other name has a cluster, with no endpoints if Envoy may not serve it.
    3. Pure.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from extproc.config.schema import Config
from extproc.config.sections.fields import MODEL_ALIAS_PREFIX
from extproc.config.sections.models import Model, RuleSection
from extproc.values.endpoints import Endpoint
from extproc.values.requests import ANY_MODEL

OpenModels = Mapping[str, RuleSection]
"""The default rule of each model that has one, by model name and alias."""


def open_models(config: Config) -> OpenModels:
    """Of each model the first rule that is on and wants no headers; models without one are left out."""
    found: dict[str, RuleSection] = {}
    for model_name, model in config.models.items():
        rule = None if model_name == ANY_MODEL else _open_rule(model)
        if rule is not None:
            found.update(dict.fromkeys((model_name, *model.aliases), rule))
    return found


def open_models_and_any(config: Config) -> OpenModels:
    """Of `*` as well, by that name: for names that no model has."""
    rule = None if ANY_MODEL not in config.models else _open_rule(config.models[ANY_MODEL])
    return {**open_models(config), **({} if rule is None else {ANY_MODEL: rule})}


def closed_names(config: Config, open_now: Container[str]) -> frozenset[str]:
    """Names that `*` must not serve, though Envoy serves them not either; none where it does not serve `*`.

    Args:
        config: The configuration in force.
        open_now: Names that Envoy serves.
    """
    if ANY_MODEL not in open_now:
        return frozenset()
    names = (name for key, model in config.models.items() for name in (key, *model.aliases))
    return frozenset(name for name in names if name not in open_now)


def _open_rule(model: Model) -> RuleSection | None:
    return next((rule for rule in model.rules if rule.weight > 0 and not rule.headers), None)


def subset_pools(
    models: OpenModels, clusters: Mapping[str, Sequence[Endpoint]]
) -> dict[str, tuple[Endpoint, ...]]:
    """Assignments of their own for models whose rule takes a part of its cluster, by alias.

    A model whose cluster is not there has none.
    """
    return {
        MODEL_ALIAS_PREFIX + name: tuple(
            endpoint for endpoint in clusters[rule.cluster] if endpoint.carries(rule.subset)
        )
        for name, rule in models.items()
        if rule.subset and rule.cluster in clusters
    }
