"""What a request says for itself where it may have to wait, and how it waits."""

from __future__ import annotations

from extproc.choosing.deciding import Claim, WaitForRoom
from extproc.choosing.holding import HoldQueue
from extproc.choosing.limits import limit_s_of
from extproc.routing.parsing import ParsedRequest
from extproc.values.decisions import Hold
from extproc.values.headers import SLO_TTFT_HEADER
from metadata_center.types import value


@value
class Queued:
    """A request that waits.

    Attributes:
        ticket: Its name in the queue; older requests have lower ones.
        queue: Where it waits.
        later: What was decided.
    """

    ticket: int
    queue: HoldQueue
    later: WaitForRoom

    @property
    def hold(self) -> Hold:
        """The same for the record."""
        later = self.later
        wait = later.wait
        return Hold(
            later.reason, later.endpoint, wait.at_once_s, wait.yields_s > 0.0, wait.lag_s, later.elsewhere_s
        )


class Claims:
    """Gives out the tickets of one worker, in the order in which they first come."""

    def __init__(self) -> None:
        self._tickets = 0

    def of(self, parsed: ParsedRequest, before: Queued | None, *, is_fair: bool) -> Claim:
        """The claim of a request; one that waits already keeps its ticket.

        Args:
            parsed: The request.
            before: How it waited until now.
            is_fair: Fairness ids have their turns.
        """
        limit_s = limit_s_of(parsed.headers.headers.get(SLO_TTFT_HEADER))
        standing = parsed.headers.standing
        priority = 0 if standing is None else standing.priority
        fairness_id = standing.fairness_id if is_fair and standing is not None else None
        if before is not None:
            return Claim(before.ticket, parsed.received_s, limit_s, before.later, priority, fairness_id)
        self._tickets += 1
        return Claim(self._tickets, parsed.received_s, limit_s, None, priority, fairness_id)
