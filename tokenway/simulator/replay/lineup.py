"""Which policies take part: rivals and the product's own by name, oracles, and views of their own.

Rules:
    1. `name:parameter=value` sets a parameter; `@view` behind it gives this one another cache view than the
       run's.
    2. `all`, `rivals`, `late` (rivals that let requests wait), `own` and `oracles` stand for groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from extproc.choosing.rivals.registry import LATE, RIVALS
from extproc.choosing.stateful import StatefulPolicy
from tokenway.simulator.policies import registry
from tokenway.simulator.replay.caches import ViewKind
from tokenway.simulator.replay.oracle import WORK, Oracle
from tokenway.simulator.replay.run import Truth


@dataclass(frozen=True, slots=True)
class Entrant:
    """One line of the comparison.

    Attributes:
        name: As it was asked for.
        spec: Name and parameters.
        view: Cache view of its own, or None for the run's.
    """

    name: str
    spec: str
    view: ViewKind | None = None

    def maker(self) -> Callable[[Truth], StatefulPolicy]:
        """What makes it, once per gateway.

        Raises:
            ValueError: Its name or a parameter is unknown.
        """
        name, _, rest = self.spec.partition(":")
        if name != "oracle":
            registry.make(self.spec)  # so that a wrong parameter fails before the run begins
            return lambda _: registry.make(self.spec)
        key, _, value = rest.partition("=")
        try:
            work = float(value or 0.0)
        except ValueError:
            work = -1.0
        if key not in ("", "work") or work < 0.0:
            raise ValueError(f"the oracle's one parameter is work, >= 0: {self.spec!r}")
        return lambda truth: Oracle(truth, work)


def parse_lineup(text: str) -> tuple[Entrant, ...]:
    """Entrants from a comma-separated list, each once, in its order.

    Raises:
        ValueError: A name, a parameter or a view is unknown.
    """
    groups = {
        "rivals": list(RIVALS),
        "late": list(LATE),
        "own": list(registry.OWN),
        "oracles": [f"oracle:work={work}" if work else "oracle" for work in WORK],
    }
    groups["all"] = [*groups["rivals"], *groups["late"], *groups["own"], *groups["oracles"]]
    entrants: dict[str, Entrant] = {}
    for part in text.split(","):
        asked, at, view = part.strip().partition("@")
        try:
            kind = ViewKind(view) if at else None
        except ValueError:
            raise ValueError(f"no view is called {view!r}; there are {', '.join(ViewKind)}") from None
        for spec in groups.get(asked, [asked]):
            entrant = Entrant(f"{spec}{at}{view}", spec, kind)
            entrant.maker()
            entrants[entrant.name] = entrant
    return tuple(entrants.values())
