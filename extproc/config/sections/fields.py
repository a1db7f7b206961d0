"""What sections are made of: the form of a section, and types of values that several have.

Rules:
    1. Models are frozen; an unknown key, a wrong type or a value out of range is an error.
    2. A key left out, or given as null, has its default: never 0, never empty by accident.
    3. Attribute docstrings are the descriptions in the published JSON schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

DAY_S = 86_400
"""Upper bound of all times: what is longer is a mistake of unit."""

Name = Annotated[str, Field(min_length=1, max_length=256)]
"""AIGW bounds cluster and backend names to 1..256 as well."""

OWN_CLUSTERS = frozenset(
    ("tokenway-extproc", "tokenway-als", "tokenway-xds", "tokenway-none", "tokenway-nobody")
)
"""Names that envoy/bootstrap.yaml takes: Envoy would send requests for such a cluster to Tokenway itself."""

MODEL_ALIAS_PREFIX = "model:"
"""A cluster of this prefix and a model's name shares the endpoints of the cluster that serves it. While
Tokenway is away clients reach it by that name."""

TRIAL_PREFIX = "engine_tls:"
"""A cluster of this prefix and another's name asks Envoy whether it takes other TLS for that one."""

_XDSTP = "xdstp:"
"""Begins names of resources that Envoy looks for elsewhere; `*` it takes for all resources of a type."""


def _not_envoys(name: str) -> str:
    if name in OWN_CLUSTERS:
        raise PydanticCustomError(
            "own_cluster", "the name `{name}` is one of Envoy's own; accepted: any other", {"name": name}
        )
    if name.startswith(MODEL_ALIAS_PREFIX):
        raise PydanticCustomError(
            "alias", "`model:` begins the names of Envoy's clusters by model; accepted: any other beginning"
        )
    if name.startswith(TRIAL_PREFIX):
        raise PydanticCustomError(
            "trial", "`engine_tls:` begins the names of trials of TLS; accepted: any other beginning"
        )
    if name == "*" or name.startswith(_XDSTP):
        raise PydanticCustomError(
            "xds_name", "the name `{name}` means something else in xDS; accepted: any other", {"name": name}
        )
    return name


ClusterName = Annotated[Name, AfterValidator(_not_envoys)]
"""Of a cluster that a source lists; names that Envoy has for clusters of ours are refused."""

HeaderName = Annotated[
    str,
    Field(pattern=r"^:?[0-9A-Za-z!#$%&'*+.^_`|~-]+$", max_length=256, examples=["x-tier"]),
]
"""RFC 9110 token; a leading colon is for pseudo-headers such as `:authority`."""

HeaderValue = Annotated[str, Field(max_length=16_384)]
"""AIGW's bound on header values of a rule."""

FileName = Annotated[str, Field(min_length=1, max_length=4_096, examples=["/etc/tokenway/tls.pem"])]

AdminPath = Annotated[str, Field(pattern=r"^/[!-~]*$", max_length=1_024, examples=["/metrics"])]

EnvironmentVariable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", examples=["TOKENWAY_SECRET"])]

Seconds = Annotated[float, Field(gt=0, le=DAY_S)]

Labels = Mapping[Name, Annotated[str, Field(max_length=256)]]


def _lower(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.lower() for name in names)


HeaderNames = Annotated[tuple[HeaderName, ...], Field(strict=False), AfterValidator(_lower)]
"""In lower case, as HTTP/2 has them."""


class Section(BaseModel):
    """A mapping in the file.

    Attributes:
        other_spellings: Keys that are accepted beside the names of its fields.
    """

    other_spellings: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.model_fields.keys() | cls.other_spellings
        return {key: value for key, value in data.items() if value is not None or key not in known}
