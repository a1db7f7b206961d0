"""What operators say in Kubernetes of the requests of a pool, beside which endpoints it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from extproc.values.choices import Rng


@dataclass(frozen=True, slots=True)
class ModelRewrite:
    """Requests for one model are for others.

    Attributes:
        model: The client's name; empty means any.
        targets: Names in its place, each with its share of the requests, > 0; at least one.
    """

    model: str
    targets: tuple[tuple[str, int], ...]

    def target(self, rng: Rng) -> str:
        """The name for one request; draws only if there are several."""
        if len(self.targets) == 1:
            return self.targets[0][0]
        bounds = list(accumulate(share for _, share in self.targets))
        point = rng.random() * bounds[-1]
        return next(
            (name for (name, _), bound in zip(self.targets, bounds, strict=True) if point < bound),
            self.targets[-1][0],
        )


@dataclass(frozen=True, slots=True)
class PoolPolicies:
    """Of one pool.

    Attributes:
        priorities: By the name of an InferenceObjective; higher goes first, 0 is that of all others.
        rewrites: Those of a model before those of any; of equals the oldest first.
    """

    priorities: Mapping[str, int] = field(default_factory=dict)
    rewrites: tuple[ModelRewrite, ...] = ()

    def rewritten(self, model: str, rng: Rng) -> str | None:
        """The name in place of a model's; None if it stays."""
        found = next((one for one in self.rewrites if one.model in ("", model)), None)
        return None if found is None else found.target(rng)
