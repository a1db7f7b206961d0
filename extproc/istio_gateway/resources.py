"""What the parts of a rendering share: names, the form of a resource, a rule's cluster as Istio reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from extproc.config.sections.istio import IstioGateway
from extproc.config.sections.models import RuleSection
from extproc.istio_gateway.text import Manifest
from extproc.values.endpoints import SUBSET_LABEL
from extproc.values.mesh_names import MeshName

NETWORKING: Final = "networking.istio.io/v1"

GATEWAY: Final = "tokenway"
"""Name of the Gateway and of what belongs to it."""

PINNED: Final = "tokenway-pinned"
DECIDED: Final = "tokenway-decided"
NOWHERE: Final = "tokenway-nowhere"
"""Names of routes that filters change."""


class RenderingError(ValueError):
    """What a configuration says has no form in Istio.

    Attributes:
        problems: One sentence each, with the setting.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Open:
    """A model that Envoy may serve alone.

    Attributes:
        names: Of the model, as clients know it.
        destination: Where its default rule goes.
    """

    names: tuple[str, ...]
    destination: MeshName


def fallback_name(number: int) -> str:
    """Name of the route of a model that Envoy may serve alone, by its place among them."""
    return f"tokenway-fallback-{number}"


def manifest(
    kind: str, name: str, gateway: IstioGateway, spec: Manifest, version: str = NETWORKING
) -> Manifest:
    """A resource of this kind and name beside the gateway."""
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": name, "namespace": gateway.namespace},
        "spec": spec,
    }


def service_of(name: str) -> MeshName | None:
    """A cluster's name as Istio has it; None for another: Istio takes a host without a dot for another."""
    found = MeshName.of(name)
    return found if found is not None and "." in found.host else None


def destination_of(rule: RuleSection) -> MeshName | None:
    """Where a rule goes; its subset if that is the only label it asks for."""
    destination = service_of(rule.cluster)
    if destination is None or destination.subset or set(rule.subset) != {SUBSET_LABEL}:
        return destination
    return replace(destination, subset=rule.subset[SUBSET_LABEL])
