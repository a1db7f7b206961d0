"""An InferencePool object → which pods it has, on which ports; v1, and the form before it.

Source: gateway-api-inference-extension, api/v1 and apix/v1alpha2 `InferencePoolSpec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from extproc.discovery.kubernetes.fields import Object, labels_at, list_at, mapping_at, port_of
from extproc.discovery.kubernetes.pods import MAX_PORTS


@dataclass(frozen=True, slots=True)
class InferencePool:
    """What is kept of a pool.

    Attributes:
        labels: That its pods have; a pool without any has no pods.
        ports: Where each of them serves.
    """

    labels: Mapping[str, str]
    ports: tuple[int, ...]


def read_pool(said: Object) -> InferencePool:
    """What is kept of a pool."""
    labels = labels_at(said, "spec", "selector", "matchLabels")
    if not labels and "matchLabels" not in mapping_at(said, "spec", "selector"):
        labels = labels_at(said, "spec", "selector")
    numbers = [port_of(mapping_at(one).get("number")) for one in list_at(said, "spec", "targetPorts")]
    ports = tuple(dict.fromkeys(number for number in numbers if number is not None))[:MAX_PORTS]
    if not ports:
        former = port_of(mapping_at(said, "spec").get("targetPortNumber"))
        ports = () if former is None else (former,)
    return InferencePool(labels, ports)
