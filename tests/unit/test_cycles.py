"""What a request leaves behind is in no cycle: memory is given back without a collection of old objects."""

from __future__ import annotations

import gc

from extproc.errors import Reason, RouterError
from extproc.values.evidence import FailureKind
from metadata_center.types import RequestId
from tests.conftest import THREE, build_rig, chat

REQUESTS = 600
"""More than the rig keeps records of, and enough prompts to have some evicted from its history."""


def test_a_request_leaves_no_cycle() -> None:
    """Answered, retried, refused, left by its client, or lost: reference counts alone free all of it."""
    rig = build_rig()
    keys = [endpoint.key for endpoint in THREE]

    def serve(number: int) -> None:
        request_id = f"r{number}"
        if number % 10 == 9:
            rig.gateway.rejected(None, RouterError(Reason.INVALID_JSON, "no"))
        rig.decide(request_id, chat(f"{number:04d} {'word ' * 60}", stream=True))
        rig.clock.advance(0.01)
        if number % 7 == 3:
            rig.failed(request_id, keys[0], FailureKind.RESET)
        rig.gateway.first_token(RequestId(request_id), late=False)
        if number % 11 == 5:
            return  # its lease ends
        rig.clock.advance(0.1)
        rig.end(request_id, prompt_tokens=100, completion_tokens=10, cached_tokens=0)

    for number in range(50):
        serve(number)
    rig.endings.clear()
    rig.shared.clear()
    gc.collect()
    gc.disable()
    try:
        for number in range(50, REQUESTS):
            serve(number)
            rig.endings.clear()
            rig.shared.clear()
        found = gc.collect()
    finally:
        gc.enable()
    assert found < REQUESTS / 10
