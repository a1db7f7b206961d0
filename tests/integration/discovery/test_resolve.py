"""Host names → addresses, in threads of their own."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from extproc.discovery.resolve import MAX_THREADS, ResolveError, addresses_of

pytestmark = pytest.mark.asyncio

RECORDS = {
    "engines.test": ["10.0.0.2", "10.0.0.1", "2001:db8::1", "10.0.0.2", "fe80::1%eth0"],
    "half.test": ["0.0.0.0", "10.0.0.1", "::", "224.0.0.1", "255.255.255.255", "ff02::1", "::ffff:0.0.0.0"],
    "blocked.test": ["0.0.0.0", "::"],
}


class System:
    """Stands in for the system's resolver: `RECORDS`, and names that hang until they are let go."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.let_go = threading.Event()

    def getaddrinfo(self, host: str, port: object, **_: Any) -> list[tuple[Any, ...]]:
        """As `socket.getaddrinfo`."""
        self.asked.append(host)
        if host.startswith("slow"):
            self.let_go.wait(30)
        if host not in RECORDS:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0)) for ip in RECORDS[host]]


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The resolver; whatever still hangs at the end is let go."""
    system = System()
    monkeypatch.setattr(socket, "getaddrinfo", system.getaddrinfo)
    yield system
    system.let_go.set()
    for thread in threading.enumerate():
        if thread.name.startswith("look-up "):
            thread.join()


async def test_localhost_is_resolved_by_the_system() -> None:
    """A host name becomes addresses."""
    assert "127.0.0.1" in await addresses_of("localhost", 5)


async def test_each_address_comes_once_and_those_with_a_zone_not_at_all(system: System) -> None:
    """Envoy knows no zones, and a record given twice is one endpoint."""
    assert await addresses_of("engines.test", 5) == ("10.0.0.2", "10.0.0.1", "2001:db8::1")


async def test_what_no_engine_can_have_is_no_address(system: System) -> None:
    """A name server that blocks a name answers 0.0.0.0, where Envoy reached its own machine."""
    assert await addresses_of("half.test", 5) == ("10.0.0.1",)
    with pytest.raises(ResolveError, match=r"no engine can have 0\.0\.0\.0"):
        await addresses_of("blocked.test", 5)


@pytest.mark.parametrize("name", ["gone.test", "a" * 70 + ".test"])
async def test_name_without_an_answer_says_why(system: System, name: str) -> None:
    """The system's words for a name that does not exist, or cannot."""
    with pytest.raises(ResolveError, match=name[:60]) as error:
        await addresses_of(name, 5)
    assert list(error.value.failures) == [name]


async def test_hanging_name_costs_one_thread_however_often_it_is_asked(system: System) -> None:
    """A question is answered in time; the thread that hangs is not joined by others."""
    for _ in range(3):
        with pytest.raises(ResolveError, match=r"no answer within 0\.05 s"):
            await addresses_of("slow.test", 0.05)
    assert system.asked == ["slow.test"]


async def test_hanging_names_do_not_hold_up_the_executor_and_are_bounded(system: System) -> None:
    """More names than threads hang: the loop's executor is free, and threads end at the bound."""
    asking = [asyncio.create_task(addresses_of(f"slow{i}.test", 5)) for i in range(MAX_THREADS + 20)]
    async with asyncio.timeout(10):
        while len(system.asked) < MAX_THREADS:  # noqa: ASYNC110 - threads wake no task
            await asyncio.sleep(0.01)
        assert await asyncio.to_thread(lambda: "free") == "free"
        await asyncio.sleep(0.1)
        assert len(system.asked) == MAX_THREADS
        system.let_go.set()
        answers = await asyncio.gather(*asking, return_exceptions=True)
    assert all(isinstance(answer, ResolveError) for answer in answers)
    assert len(system.asked) == MAX_THREADS + 20
