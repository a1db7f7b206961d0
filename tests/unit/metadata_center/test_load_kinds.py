"""The kinds of load: one table, and the public names that come from it."""

from __future__ import annotations

import pytest

from extproc.observing.metrics import endpoints
from metadata_center.load.kinds import KINDS, NOTHING, difference, of_charge, of_leg, of_prefill
from metadata_center.load.table import LoadView
from metadata_center.service.api import openapi_document
from metadata_center.sharing.messages import Row


def test_public_names_stay() -> None:
    """Operators' dashboards and AIGW's clients read these; so the order on the wire."""
    assert [(kind.name, kind.aigw, kind.metric) for kind in KINDS] == [
        ("requests", "queued_req_num", "tokenway_requests_in_flight"),
        ("prefill_requests", "prefill_req_num", ""),
        ("prefill_tokens", "prefill_tokens", "tokenway_prefill_tokens_pending"),
        ("context_tokens", "input_tokens", "tokenway_context_tokens"),
        ("generated_tokens", "generated_tokens", ""),
    ]


def test_each_kind_is_an_attribute_of_views_and_rows() -> None:
    """In the order of the table, so that amounts need no names."""
    names = tuple(kind.name for kind in KINDS)
    assert tuple(LoadView.__annotations__) == names
    assert Row.__struct_fields__ == ("endpoint", *names)
    view = LoadView(*([10 * number, 10 * number + 1] for number in range(len(KINDS))))
    assert view.amounts(1) == (1, 11, 21, 31, 41)


def test_each_kind_is_in_the_apis_that_show_load() -> None:
    """AIGW's answer has all of them; a scrape those with a series."""
    assert [family.name for family in endpoints.LOADS.values()] == [
        kind.metric for kind in KINDS if kind.metric
    ]
    loads = [
        schema
        for path in openapi_document()["paths"].values()
        for schema in _objects(path)
        if "updated_time" in schema
    ]
    assert loads
    for schema in loads:
        assert {kind.aigw for kind in KINDS} < schema.keys()


def _objects(node: object) -> list[dict[str, object]]:
    """The properties of all objects in a part of the document."""
    if isinstance(node, list):
        return [found for part in node for found in _objects(part)]
    if not isinstance(node, dict):
        return []
    own = [node["properties"]] if isinstance(node.get("properties"), dict) else []
    return [*own, *(found for part in node.values() for found in _objects(part))]


@pytest.mark.parametrize("prefill_held", [True, False])
def test_a_leg_counts_for_its_charge_less_what_has_ended(prefill_held: bool) -> None:
    """Its prefill may be over, and it may have generated."""
    charged = of_charge(3, 50)
    assert of_leg(3, 50, 0) == charged == (1, 1, 3, 50, 0)
    assert of_prefill(charged) == (0, 1, 3, 0, 0)
    expected = (1, 1, 3, 50, 8) if prefill_held else (1, 0, 0, 50, 8)
    assert of_leg(3, 50, 8, prefill_held=prefill_held) == expected
    assert difference(charged, charged) == NOTHING
