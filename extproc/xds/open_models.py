"""What Envoy may serve while Tokenway does not answer: models open to all, where their rule says.

Rules:
    1. Never more than Tokenway would serve: a model whose rules all want headers is left out, and a rule with
       a subset of labels keeps it.
    2. Names that only `*` serves are left out: Envoy finds a model's cluster by its name.
    3. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from extproc.config.schema import Config
from extproc.config.sections.models import RuleSection
from extproc.values.endpoints import Endpoint
from extproc.values.requests import ANY_MODEL

MODEL_ALIAS_PREFIX = "model:"
"""A cluster of this prefix and a model's name shares the endpoints of the cluster that serves it."""

OpenModels = Mapping[str, RuleSection]
"""The default rule of each model that has one, by model name and alias."""


def open_models(config: Config) -> OpenModels:
    """Of each model the first rule that is on and wants no headers; models without one are left out."""
    found: dict[str, RuleSection] = {}
    for model_name, model in config.models.items():
        if model_name == ANY_MODEL:
            continue
        rule = next((rule for rule in model.rules if rule.weight > 0 and not rule.headers), None)
        if rule is not None:
            found.update(dict.fromkeys((model_name, *model.aliases), rule))
    return found


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
