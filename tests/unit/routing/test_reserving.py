"""Choices put to compare-and-set: where they are charged, what Envoy gets, what the record says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from extproc.observing.explain import render, to_json
from extproc.routing.running import LINGER_S
from extproc.values.balancing import Algorithm, LoadBalancing
from extproc.values.deciding import Later, Now
from extproc.values.pending import Pending
from extproc.values.placements import Decision
from metadata_center.sharing.messages import Candidate
from metadata_center.types import EndpointKey, RequestId
from tests.conftest import Rig, build_rig, chat, endpoint, identities, request_line, result_of

pytestmark = pytest.mark.asyncio

KEYS = tuple(endpoint(number).key for number in range(3))


class Rendezvous:
    """Where gateways meet: answers with the place that the test wants, as the store does it."""

    def __init__(self) -> None:
        self.place: int | None = 0
        self.asked: list[tuple[RequestId, list[Candidate]]] = []
        self.rig: Rig | None = None

    def __call__(self, request_id: RequestId, candidates: Sequence[Candidate]) -> Pending[EndpointKey | None]:
        """The candidate of that rank; None for no answer in time."""
        self.asked.append((request_id, list(candidates)))
        pending: Pending[EndpointKey | None] = Pending()
        if self.place is None:
            pending.give(None)
            return pending
        place = candidates[self.place].endpoint
        assert self.rig is not None
        self.rig.scheduling.load.move(request_id, place, self.rig.clock())
        pending.give(place)
        return pending


@pytest.fixture
def rendezvous() -> Rendezvous:
    """A rendezvous with a rig that reserves there."""
    rendezvous = Rendezvous()
    rendezvous.rig = build_rig(
        load_balancing=LoadBalancing(algorithm=Algorithm.LEAST_REQUEST, fallbacks=2), reserve=rendezvous
    )
    return rendezvous


async def decided(rig: Rig, request_id: str = "r", **body: Any) -> list[EndpointKey]:
    """The endpoints that Envoy gets, in order."""
    deciding = rig.gateway.decide(request_line(request_id), chat("x" * 500, **body))
    assert isinstance(deciding, Later)
    assert deciding.patience_s is None
    made = await result_of(deciding.pending)
    assert isinstance(made, Decision)
    return identities(",".join(made.plan.endpoints))


async def test_a_confirmed_choice_stays(rendezvous: Rendezvous) -> None:
    """The first candidate is the choice, with what was believed before it was charged."""
    rig = rendezvous.rig
    assert rig is not None
    named = await decided(rig)
    ((request_id, candidates),) = rendezvous.asked
    record = rig.record()
    assert request_id == "r"
    assert [candidate.endpoint for candidate in candidates] == named
    assert {candidate.believed_requests for candidate in candidates} == {0}
    assert candidates[0].prefill_tokens == candidates[0].context_tokens == record.prompt_tokens
    assert record.placed is None
    assert rig.chosen() == named[0]


async def test_a_moved_choice_is_where_it_was_put(rendezvous: Rendezvous) -> None:
    """Envoy gets the other endpoint first, the ledger follows, and the record says both."""
    rig = rendezvous.rig
    assert rig is not None
    rendezvous.place = 1
    named = await decided(rig)
    candidates = [candidate.endpoint for candidate in rendezvous.asked[0][1]]
    assert named == [candidates[1], candidates[0], candidates[2]]
    assert rig.load(candidates[1])[0] == 1
    assert rig.load(candidates[0]) == (0, 0, 0)
    record = rig.record()
    assert record.snapshot is not None
    assert record.choice is not None
    assert record.snapshot.keys[record.choice.order[0]] == candidates[0]
    assert record.placed == record.chosen == candidates[1]
    page = render(to_json(record))
    assert f"placed     {candidates[1]}" in page
    assert "recomputed: same choice" in page
    rig.end(endpoint=candidates[1])
    assert all(rig.load(key) == (0, 0, 0) for key in KEYS)
    rig.clock.advance(LINGER_S)
    rig.scheduling.running.advance(rig.clock())
    assert len(rig.scheduling.caches.running) == 0
    assert rig.metric("tokenway_fallbacks_total", cluster="c") == 0


async def test_an_unconfirmed_choice_stays_where_it_is(rendezvous: Rendezvous) -> None:
    """Without an answer in time the charge is what it was."""
    rig = rendezvous.rig
    assert rig is not None
    rendezvous.place = None
    named = await decided(rig)
    assert rig.load(named[0])[0] == 1
    assert rig.record().placed is None


async def test_a_request_that_ended_before_is_not_put_to_anybody(rendezvous: Rendezvous) -> None:
    """Its charge is void; there is nothing to reserve."""
    rig = rendezvous.rig
    assert rig is not None
    rig.end("early", endpoint=None)
    assert isinstance(rig.gateway.decide(request_line("early"), chat()), Now)
    assert rendezvous.asked == []
    assert all(rig.load(key) == (0, 0, 0) for key in KEYS)
