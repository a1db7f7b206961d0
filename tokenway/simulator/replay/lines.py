"""News of who waits at each gateway of a run, on its way to the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from extproc.choosing.holding import POLL_S
from metadata_center.types import Waiter
from tokenway.simulator.replay.agenda import Agenda
from tokenway.simulator.replay.gateway import ReplayGateway


class LineNews:
    """Takes it there.

    As the product does: told when it changes and again every `POLL_S` while any waits, heard after the delay,
    and places as ages, so that those that wait elsewhere seem to stand later by the delay.

    Args:
        agenda: Of the run.
        gateways: All of them.
        delay_s: Until it is heard.
    """

    def __init__(self, agenda: Agenda, gateways: Sequence[ReplayGateway], delay_s: float) -> None:
        self._agenda = agenda
        self._gateways: Final = gateways
        self._delay_s = delay_s
        self._told: list[Sequence[Waiter]] = [() for _ in gateways]
        self._again_s = [0.0] * len(gateways)

    def tell(self, now_s: float, gateway: ReplayGateway) -> None:
        """The others are to know who waits here, unless they do."""
        if len(self._gateways) == 1:
            return
        index, line = gateway.index, gateway.policy.line()
        if line == self._told[index] and (not line or now_s < self._again_s[index]):
            return
        self._told[index], self._again_s[index] = line, now_s + POLL_S
        later = [replace(each, rank=each.rank + self._delay_s) for each in line]
        for other in self._gateways:
            if other is not gateway:
                self._agenda.at(now_s + self._delay_s, self._heard, other, index, later)

    def _heard(self, now_s: float, gateway: ReplayGateway, teller: int, line: Sequence[Waiter]) -> None:
        gateway.policy.on_line(str(teller), line, now_s)
