"""Every policy that is compared, by its name: the rivals, and the product's own as the replayer runs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from extproc.choosing.rivals import registry
from extproc.choosing.rivals.registry import LATE, RIVALS, Rule
from extproc.choosing.stateful import StatefulPolicy
from tokenway.simulator.policies.ours import LateCompletion, LeastCompletion
from tokenway.simulator.policies.product import Product

OWN: Final[Mapping[str, Rule]] = {
    "inference_lb": Rule(Product),
    "prefix_cache": Rule(Product, {"algorithm": "prefix_cache"}),
    "least_completion": Rule(LeastCompletion),
    "late_completion": Rule(LateCompletion),
}
"""The product's own."""

REGISTRY: Final[Mapping[str, Rule]] = {**RIVALS, **LATE, **OWN}
"""Rivals first."""


def make(spec: str) -> StatefulPolicy:
    """A fresh policy, see `extproc.choosing.rivals.registry.make`."""
    return registry.make(spec, REGISTRY)
