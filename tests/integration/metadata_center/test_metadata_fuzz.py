"""The running metadata center against its own OpenAPI document: whatever fits it, whatever does not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from metadata_center.service.api import openapi_document
from metadata_center.service.cluster_loads import Limits
from metadata_center.service.http_server import HttpServer
from metadata_center.sharing.http_messages import (
    EVENTS_PATH,
    MESSAGE_TYPE,
    RESERVE_TYPE,
    encode_reserve,
)
from metadata_center.sharing.messages import (
    MAX_AMOUNT,
    Candidate,
    Reservation,
    Row,
    Update,
    encode,
    member_id,
)
from metadata_center.types import EndpointKey

EVENT = "/v1/replica/event"
"""What its body must hold depends on a header, which no OpenAPI schema says."""

DATA_CHECKS = [negative_data_rejection, positive_data_acceptance]
CHECKS = [
    *DATA_CHECKS,
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
]

NAMES = st.text("az09_.-", min_size=1, max_size=8)
AMOUNTS = st.integers(0, 9) | st.integers(0, MAX_AMOUNT)
ENDPOINTS = st.integers(1, 9).map(lambda host: EndpointKey(f"10.0.0.{host}:8000"))
UPDATES = st.builds(
    Update,
    st.builds(member_id, NAMES, st.integers(0, 3), NAMES),
    st.integers(1, MAX_AMOUNT),
    st.lists(
        st.builds(Row, ENDPOINTS, AMOUNTS, AMOUNTS, AMOUNTS, AMOUNTS, AMOUNTS),
        max_size=3,
        unique_by=lambda row: row.endpoint,
    ).map(tuple),
    st.booleans(),
    st.floats(1e-3, 0.1),
)
RESERVATIONS = st.builds(
    Reservation,
    st.lists(
        st.builds(Candidate, ENDPOINTS, AMOUNTS, AMOUNTS, AMOUNTS),
        min_size=1,
        max_size=3,
        unique_by=lambda candidate: candidate.endpoint,
    ).map(tuple),
)
schemathesis.openapi.media_type(MESSAGE_TYPE, UPDATES.map(encode))
schemathesis.openapi.media_type(
    RESERVE_TYPE, st.builds(encode_reserve, UPDATES, st.lists(RESERVATIONS, min_size=1, max_size=3))
)

schema = schemathesis.openapi.from_dict(openapi_document()).exclude(path=EVENTS_PATH)
"""A response that does not end is tested with the transport."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server in a loop of its own, because schemathesis calls it synchronously."""
    loop = asyncio.new_event_loop()
    server = HttpServer(Limits())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(server.start("127.0.0.1", 0), loop).result(10)
    yield f"http://127.0.0.1:{server.port}"
    asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@schema.parametrize()
@settings(max_examples=40, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_call_conforms(case: Case[Any], url: str) -> None:
    """No 5xx; status, headers, type and body are documented; valid input is taken, invalid input is not."""
    is_exempt = case.path == EVENT
    case.call_and_validate(
        base_url=url, checks=[check for check in CHECKS if not (is_exempt and check in DATA_CHECKS)]
    )
