"""How long a worker that stops listens for the ends of what runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from extproc.server.draining import Draining

SOON_S = 0.2
LATE_S = 30.0


class Stopping:
    """What a worker lets go of, on one record.

    Attributes:
        said: What was done, in order.
        requests: That run.
    """

    def __init__(self, requests: int) -> None:
        self.said: list[str] = []
        self.requests = requests

    def closing(self, what: str) -> Closing:
        """A part that notes when it is closed."""
        return Closing(lambda did: self.said.append(f"{what} {did} at {self.requests}"))


class Closing:
    """Is closed."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note

    def __len__(self) -> int:
        return 0

    def close(self) -> None:
        """Closed."""
        self._note("closed")

    def stop_reading(self) -> None:
        """And read no more."""
        self._note("read")


class Server:
    """No call of it is open."""

    async def listen(self) -> None:
        """Never."""

    async def drain(self, grace_s: float) -> None:
        """At once."""

    async def close(self) -> None:
        """At once."""


async def stop(
    requests: int, drain_s: float, *, ends: bool = True, reached_for: int = 1_000_000
) -> list[str]:
    """What becomes of the access log, and of new requests, while requests end one by one."""
    stopping = Stopping(requests)
    looks = iter(range(reached_for))
    draining = Draining(
        Server(),
        stopping.closing("discovery"),
        stopping.closing("requests"),
        stopping.closing("waiting"),
        stopping.closing("log"),
        lambda: stopping.requests > 0,
        lambda: next(looks, None) is not None,
        lambda: drain_s,
    )

    async def end_all() -> None:
        while stopping.requests and ends:
            await asyncio.sleep(0.01)
            stopping.requests -= 1

    await asyncio.gather(draining.drain(), end_all())
    return [said for said in stopping.said if said.startswith(("log", "requests"))]


async def test_ends_of_all_that_runs_are_heard() -> None:
    """Though no call is open: Envoy calls to tell of the first one, and other workers hand over ours."""
    done = ["requests closed at 30", "log closed at 0", "log read at 0"]
    assert await stop(30, LATE_S) == done


async def test_nobody_is_waited_for_where_nobody_is_connected() -> None:
    """Envoy is gone, and with it whatever it would have told."""
    (_, closed, _) = await stop(1, LATE_S, ends=False, reached_for=2)
    assert closed == "log closed at 1"


async def test_one_that_nothing_runs_at_is_gone_at_once() -> None:
    """However long it may take."""
    done = ["requests closed at 0", "log closed at 0", "log read at 0"]
    assert await stop(0, LATE_S) == done


async def test_what_does_not_end_is_waited_for_as_long_as_it_may_take() -> None:
    """`server.drain_s`."""
    (_, closed, _) = await stop(1, SOON_S, ends=False)
    assert closed == "log closed at 1"
