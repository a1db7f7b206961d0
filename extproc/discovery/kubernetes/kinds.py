"""What is listed and watched: kinds of objects, and collections of them in the API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

LLM_D: Final = "llm-d.ai"
INFERENCE: Final = "inference.networking.k8s.io"
FORMER_INFERENCE: Final = "inference.networking.x-k8s.io"
"""The group of InferencePool before v1, and of what llm-d has in a group of its own since."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of object.

    Attributes:
        group: Of the API; empty for the core.
        version: Of the group.
        plural: As paths have it.
        is_optional: Clusters without it, or without leave to read it, are served all the same.
    """

    group: str
    version: str
    plural: str
    is_optional: bool = False

    def __str__(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


PODS: Final = Kind("", "v1", "pods")
SLICES: Final = Kind("discovery.k8s.io", "v1", "endpointslices")
POOLS: Final[Mapping[str, Kind]] = {
    INFERENCE: Kind(INFERENCE, "v1", "inferencepools"),
    FORMER_INFERENCE: Kind(FORMER_INFERENCE, "v1alpha2", "inferencepools"),
}
"""By the group that is configured."""

OBJECTIVES: Final = tuple(
    Kind(group, "v1alpha2", "inferenceobjectives", is_optional=True) for group in (LLM_D, FORMER_INFERENCE)
)
"""Of two that have one name the first counts."""

REWRITES: Final = tuple(
    Kind(group, "v1alpha2", "inferencemodelrewrites", is_optional=True) for group in (LLM_D, FORMER_INFERENCE)
)
"""Likewise."""


@dataclass(frozen=True, slots=True)
class Collection:
    """Objects of one kind in one namespace.

    Attributes:
        kind: Of what.
        namespace: Where.
        labels: That all of them have, sorted; empty for any.
        name: Of the only one; None for any.
    """

    kind: Kind
    namespace: str
    labels: tuple[tuple[str, str], ...] = ()
    name: str | None = None

    def __str__(self) -> str:
        chosen = ",".join(f"{key}={value}" for key, value in self.labels) or self.name or ""
        return f"{self.namespace}/{self.kind}" + (f"?{chosen}" if chosen else "")

    @property
    def path(self) -> str:
        """In the API."""
        kind = self.kind
        root = f"/apis/{kind.group}/{kind.version}" if kind.group else f"/api/{kind.version}"
        return f"{root}/namespaces/{self.namespace}/{kind.plural}"

    @property
    def query(self) -> dict[str, str]:
        """What a request for it says beside its path."""
        query = {}
        if self.labels:
            query["labelSelector"] = ",".join(f"{key}={value}" for key, value in self.labels)
        if self.name is not None:
            query["fieldSelector"] = f"metadata.name={self.name}"
        return query


def collection_of_labels(kind: Kind, namespace: str, labels: Mapping[str, str]) -> Collection:
    """Those that have these labels."""
    return Collection(kind, namespace, tuple(sorted(labels.items())))
