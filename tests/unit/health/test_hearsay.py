"""What other workers saw, and what becomes of it here."""

from __future__ import annotations

from array import array

import pytest

from extproc.choosing.lines import OtherLines
from extproc.health.settings import HealthSettings
from extproc.health.tracker import HealthTracker
from extproc.routing.homes import Homes
from extproc.server.exchanging.hearsay import Hearsay
from extproc.values.endpoints import Endpoint
from metadata_center.addresses import Address
from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.sharing.messages import RESPONSES_MARK
from metadata_center.types import EndpointKey
from tests.unit.ended import GROUP

A, GONE = EndpointKey("10.0.0.1:1"), EndpointKey("10.0.0.2:1")
BLOCKS = [2**64 - 2, 7, 2**63]


class Heard:
    """A worker that knows A alone."""

    def __init__(self) -> None:
        self.index, self.homes = PrefixIndex(100, 100), Homes()
        health = HealthTracker(HealthSettings())
        health.update({A: [Endpoint(A, GROUP, Address("10.0.0.1", 1))]})
        self.hearsay = Hearsay(self.homes, self.index, health, OtherLines(), lambda: 0.0, lambda: None)


@pytest.fixture
def heard() -> Heard:
    """Nothing was heard yet."""
    return Heard()


def test_blocks_of_another_worker_are_kept_in_8_bytes_each(heard: Heard) -> None:
    """They come as integers, and are recorded as the worker's own are."""
    heard.hearsay.cached(A, BLOCKS)
    assert heard.index.match(BLOCKS, (A,)) == [3]
    (run,) = heard.index._tree.root.children.values()
    assert run.blocks == array("Q", BLOCKS)


def test_blocks_at_an_endpoint_that_left_are_not_recorded(heard: Heard) -> None:
    """The other worker may not have heard of it yet."""
    heard.hearsay.cached(GONE, BLOCKS)
    assert heard.index.total == 0


def test_where_a_response_lives_is_no_block(heard: Heard) -> None:
    """A chain that begins with the mark goes to the table of homes alone."""
    heard.hearsay.cached(A, [RESPONSES_MARK, 7])
    assert (heard.homes.find(7, 0.0), heard.index.total) == (A, 0)
