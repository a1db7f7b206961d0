"""Host names → IP addresses, asked of the system's resolver.

Rules:
    1. Each look-up has a thread of its own: `getaddrinfo` cannot be cancelled, and in the event loop's
       executor a few names whose servers hang would hold up everything else that is run there.
    2. At most `MAX_THREADS` look-ups run; a name whose last look-up still hangs is not asked twice.
    3. The threads are daemons: a process that ends waits for no name server.
    4. Addresses that no engine can have are none: name servers that block a name answer 0.0.0.0 or ::, which
       is the machine of whoever connects.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Mapping, Sequence

from metadata_center.addresses import is_of_many, is_unspecified

MAX_THREADS = 64
"""Look-ups at a time. A thread that waits for an answer costs some 50 KiB; a fleet of 1,000 names at 1 ms
each is through in 20 ms."""

_THREAD_NAME = "look-up "
_POLL_S = 0.01
"""Between looks for a free thread."""


class ResolveError(OSError):
    """Host names that could not be resolved.

    Args:
        failures: Host name to cause.
    """

    def __init__(self, failures: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"cannot resolve {name!r}: {cause}" for name, cause in failures.items()))
        self.failures = failures


async def addresses_of(name: str, timeout_s: float) -> tuple[str, ...]:
    """The addresses of one name, in the order of the resolver.

    Raises:
        ResolveError: It has none, or none was found within `timeout_s`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            found = await _look_up([name], timeout_s)
    except TimeoutError:
        raise ResolveError({name: f"no answer within {timeout_s:g} s"}) from None
    return tuple(found.get(name, ()))


async def _look_up(names: Sequence[str], timeout_s: float) -> dict[str, list[str]]:
    """All addresses of each name; each is waited for up to `timeout_s`."""
    found: dict[str, list[str]] = {}
    failures: dict[str, str] = {}

    async def look_up(name: str) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                found[name] = await _in_a_thread(name)
        except TimeoutError:
            failures[name] = f"no answer within {timeout_s:g} s"
        except (OSError, UnicodeError) as error:  # UnicodeError: not encodable as IDNA
            failures[name] = str(error)

    async with asyncio.TaskGroup() as tasks:
        for name in names:
            tasks.create_task(look_up(name))
    if failures:
        raise ResolveError(dict(sorted(failures.items())))
    return found


async def _in_a_thread(name: str) -> list[str]:
    while not _may_ask(name):  # noqa: ASYNC110 - a thread's end wakes no task
        await asyncio.sleep(_POLL_S)
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[str]] = loop.create_future()

    def settle(addresses: list[str] | None, error: Exception | None) -> None:
        if answer.done():
            return  # no caller waits any more
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(addresses or [])

    def ask() -> None:
        addresses, failure = None, None
        try:
            addresses = _ask_system(name)
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            loop.call_soon_threadsafe(settle, addresses, failure)

    threading.Thread(target=ask, name=_THREAD_NAME + name, daemon=True).start()
    return await answer


def _may_ask(name: str) -> bool:
    running = [thread.name for thread in threading.enumerate() if thread.name.startswith(_THREAD_NAME)]
    return len(running) < MAX_THREADS and _THREAD_NAME + name not in running


def _ask_system(name: str) -> list[str]:
    """Blocks until the system's resolver answers or gives up."""
    answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    addresses = dict.fromkeys(str(answer[4][0]) for answer in answers)
    found = [address for address in addresses if "%" not in address]  # a zone means nothing to Envoy
    usable = [address for address in found if not (is_unspecified(address) or is_of_many(address))]
    if found and not usable:
        raise OSError(f"no engine can have {found[0]}")
    return usable
