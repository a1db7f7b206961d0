"""The models: by what rules they are served, and how an endpoint is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from extproc.choosing.rivals.registry import make
from extproc.config.sections.fields import ClusterName, HeaderName, HeaderValue, Labels, Name, Section
from extproc.request.rules import Backend
from extproc.values.balancing import Algorithm, LoadBalancing

_LB = LoadBalancing()

_AIGW_KEYS = {
    "load_aware_enable",
    "cache_aware_enable",
    "candidate_percent",
    "request_load_weight",
    "prefill_load_weight",
    "cache_ratio_weight",
}
"""They say something about `inference_lb` alone, but for the first two, which `prefix_cache` has as well."""

_MISSPELT = "cache_radio_weight"
"""AIGW's spelling of `cache_ratio_weight` in its wire schema; accepted so that its files can be kept."""

Weight = Annotated[float, Field(ge=0)]


def _lower_names(headers: Mapping[str, str]) -> Mapping[str, str]:
    lowered = {name.lower(): value for name, value in headers.items()}
    if len(lowered) < len(headers):
        raise PydanticCustomError(
            "header_twice", "two header names differ in letter case only; accepted: distinct names"
        )
    return lowered


class RuleSection(Section):
    """One way to serve a model."""

    cluster: ClusterName
    """Cluster in clusters_file that serves it."""
    backend: Annotated[Backend, Field(strict=False)] = Backend.VLLM
    """Engine behind the cluster."""
    headers: Annotated[Mapping[HeaderName, HeaderValue], AfterValidator(_lower_names)] = Field(
        default_factory=dict
    )
    """Request headers that must all have exactly these values; none makes this the default rule."""
    subset: Labels = Field(default_factory=dict)
    """Labels an endpoint must carry to be chosen."""
    weight: int = Field(default=1, ge=0, le=1_000_000)
    """Share of traffic among equally specific rules; 0 switches the rule off."""
    lora: Name | None = None
    """LoRA adapter that answers."""
    model: Name | None = None
    """Name of the model at the engine, if it differs from the client's."""
    route_name: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """Shown in decision records."""
    endpoint_group: Name | None = None
    """Endpoints that perform alike share one latency model; null means the cluster."""


def _add_misspelling(schema: dict[str, Any]) -> None:
    schema["properties"][_MISSPELT] = {
        **schema["properties"]["cache_ratio_weight"],
        "deprecated": True,
        "description": "AIGW's spelling of cache_ratio_weight; give one of the two.",
    }


class LoadBalancingSection(Section):
    """How one model's endpoints are chosen. Names and defaults follow AIGW's `LBConfig`; not `algorithm`."""

    model_config = ConfigDict(json_schema_extra=_add_misspelling)
    other_spellings = frozenset({_MISSPELT})

    algorithm: Annotated[Algorithm, Field(strict=False)] = _LB.algorithm
    """The policy; where it is left out and one of the keys of AIGW's score below is not, inference_lb."""
    load_aware_enable: bool = _LB.load_aware_enable
    """False leaves in-flight requests and prefill out of the score."""
    cache_aware_enable: bool = _LB.cache_aware_enable
    """False leaves the prefix match out of the score."""
    candidate_percent: int = Field(default=_LB.candidate_percent, ge=0, le=100)
    """The pick is uniform among this share of the best endpoints, at least one."""
    request_load_weight: Weight = _LB.request_load_weight
    """Weight of in-flight requests."""
    prefill_load_weight: Weight = _LB.prefill_load_weight
    """Weight of pending prefill."""
    cache_ratio_weight: Weight = Field(
        default=_LB.cache_ratio_weight, validation_alias=AliasChoices("cache_ratio_weight", _MISSPELT)
    )
    """Weight of the cache hit ratio."""
    fallbacks: int = Field(default=_LB.fallbacks, ge=0, le=8)
    """Further endpoints named to Envoy: the first that is there gets the one retry before the first byte."""
    rival: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """A rule of another gateway (docs/policies.md) that has the last word, to compare it on live traffic, as
    name or name:parameter=value; with it nothing waits here."""

    @field_validator("rival")
    @classmethod
    def _is_known(cls, rule: str | None) -> str | None:
        if rule is not None:
            try:
                make(rule)
            except ValueError as error:
                raise PydanticCustomError("rival", "{reason}", {"reason": str(error)}) from None
        return rule

    def settings(self) -> LoadBalancing:
        """The values as the policies take them."""
        values = self.model_dump()
        if "algorithm" not in self.model_fields_set and self.model_fields_set & _AIGW_KEYS:
            values["algorithm"] = Algorithm.INFERENCE_LB
        return LoadBalancing(**values)


class Model(Section):
    """A model that clients can ask for."""

    aliases: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Other names clients may use; distinct over all models, and not `*`."""
    rules: Annotated[tuple[RuleSection, ...], Field(strict=False, min_length=1)]
    """Where it is served: the matching rule with the most headers wins."""
    load_balancing: LoadBalancingSection = LoadBalancingSection()
    """How an endpoint is chosen."""
    tokenizer: Annotated[str, Field(min_length=1, max_length=4_096)] | None = None
    """Folder of tokenizer.json and chat template, relative to this file; null leaves it to history."""
    chat_template_kwargs: Mapping[Name, Any] = Field(default_factory=dict)
    """Template variables that the engines were started with (vLLM --default-chat-template-kwargs)."""

    @field_validator("rules")
    @classmethod
    def _one_is_on(cls, rules: tuple[RuleSection, ...]) -> tuple[RuleSection, ...]:
        if all(rule.weight == 0 for rule in rules):
            raise PydanticCustomError(
                "all_off", "every rule has weight 0; accepted: at least one rule above 0"
            )
        return rules
