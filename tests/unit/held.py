"""A gateway in which requests wait for room."""

from __future__ import annotations

from typing import Any

from extproc.routing.settings import HoldSettings, RouterSettings
from extproc.routing.waiting import RequestQueue
from extproc.values.balancing import Algorithm, LoadBalancing
from extproc.values.deciding import Later
from extproc.values.placements import Decision
from tests.conftest import (
    BLOCK_BYTES,
    THREE,
    Promise,
    Rig,
    VirtualLoop,
    build_rig,
    chat,
    decided,
    request_line,
)

LEAST_COMPLETION = LoadBalancing(algorithm=Algorithm.LEAST_COMPLETION, fallbacks=0)

LONG = "long prompt " * 8_000
"""Some 24,000 tokens: half a second on the engine that prices begin from, more than two of its steps."""


class Held:
    """A rig over some endpoints in virtual time."""

    def __init__(self, endpoints: int = 1, **hold: Any) -> None:
        self.loop = VirtualLoop()
        self.rig: Rig = build_rig(
            THREE[:endpoints],
            load_balancing=LEAST_COMPLETION,
            settings=RouterSettings(block_bytes=BLOCK_BYTES, hold=HoldSettings(**hold)),
            loop=self.loop,
        )

    @property
    def waiting(self) -> RequestQueue[Decision]:
        """Where requests wait."""
        assert self.rig.router.waiting is not None
        return self.rig.router.waiting

    def ask(self, request_id: str, prompt: str = LONG, **headers: str) -> Decision | Promise:
        """What comes of a request: a decision, or the promise of one."""
        # Distinct from the first byte on: nothing of it is cached anywhere.
        body = chat(f"{request_id} {prompt}", stream=True)
        deciding = self.rig.gateway.decide(request_line(request_id, **headers), body)
        if not isinstance(deciding, Later):
            return decided(deciding)
        promise = Promise(deciding.pending)
        if len(body) > 256 * 1024:  # scheduled in the next turn of the loop
            self.loop.run()
        return promise.result() if promise.done() else promise

    def hold(self, request_id: str, prompt: str = LONG, **headers: str) -> Promise:
        """Ask for one that has to wait."""
        promise = self.ask(request_id, prompt, **headers)
        assert isinstance(promise, Promise)
        assert not promise.done()
        return promise

    def first_token(self, request_id: str) -> None:
        """The prefill of a request is done, and the loop takes a turn."""
        self.rig.gateway.first_token(request_id, late=False)
        self.loop.run()
