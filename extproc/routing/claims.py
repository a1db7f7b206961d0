"""What a request says for itself where it may have to wait, and how it waits."""

from __future__ import annotations

from extproc.choosing.deciding import Claim, WaitForRoom
from extproc.choosing.holding import HoldQueue, Place, after_arrival_s
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

    def hold(self, parsed: ParsedRequest, place: Place | None) -> Hold:
        """The same for the record.

        Args:
            parsed: The request.
            place: Where it stood when it was sent; None if that was as when it was last asked for.
        """
        later = self.later
        wait = later.wait
        last = wait if place is None else place
        return Hold(
            later.reason,
            later.endpoint,
            wait.at_once_s,
            later.latest_s - parsed.received_s,
            after_arrival_s(last.rank, parsed.received_s, _priority(parsed)),
            last.counted,
            last.yields_s,
            last.lag_s,
            later.elsewhere_s,
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
        standing, priority = parsed.headers.standing, _priority(parsed)
        fairness_id = standing.fairness_id if is_fair and standing is not None else None
        if before is not None:
            return Claim(before.ticket, parsed.received_s, limit_s, before.later, priority, fairness_id)
        self._tickets += 1
        return Claim(self._tickets, parsed.received_s, limit_s, None, priority, fairness_id)


def _priority(parsed: ParsedRequest) -> int:
    standing = parsed.headers.standing
    return 0 if standing is None else standing.priority
