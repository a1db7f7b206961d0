"""How a process of parts starts, serves, drains and stops, in whatever order these are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from extproc.server.parts import Part, Parts, StoppedWhileStarting
from extproc.server.worker import Life, Stage, Worker

pytestmark = pytest.mark.asyncio

NAMES = ("lock", "configuration", "server", "admin")


class StepError(Exception):
    """A part could not start, or not stop."""


class Course:
    """A worker of parts that write down what is done to them, in one log with all else that happens.

    Args:
        fails: Steps that raise, as they are written down.
        held: Steps that wait until `release` is set.
        sync: Parts whose start and stop are no coroutines.
    """

    def __init__(
        self, *, fails: tuple[str, ...] = (), held: tuple[str, ...] = (), sync: tuple[str, ...] = ()
    ) -> None:
        self.log: list[str] = []
        self.release = asyncio.Event()
        self.life = Life()
        self._fails = fails
        self._held = held
        self.parts = Parts(
            Part(name, self._step(f"start {name}", name in sync), self._step(f"stop {name}", name in sync))
            for name in NAMES
        )
        self.worker = Worker(
            self.life, self.parts, self._step("drain"), self._step("reload", sync=True), lambda: 7, {}
        )

    def _step(self, step: str, sync: bool = False) -> Callable[[], Any]:
        def now() -> None:
            self.log.append(step)
            if step in self._fails:
                raise StepError(step)

        async def later() -> None:
            now()
            if step in self._held:
                await self.release.wait()
                self.log.append(f"{step}, released")

        return now if sync else later

    async def until(self, step: str) -> None:
        """Wait for a step to begin."""
        while step not in self.log:  # noqa: ASYNC110 - steps wake no task
            await asyncio.sleep(0)

    def stops(self) -> list[str]:
        """Parts that were stopped, in that order."""
        return [step.removeprefix("stop ") for step in self.log if step.startswith("stop ")]


@pytest.mark.parametrize("sync", [(), ("server",), NAMES])
async def test_parts_stop_once_in_the_reverse_order(sync: tuple[str, ...]) -> None:
    """After the drain, whether their steps are awaited or not, and however often a stop is asked for."""
    course = Course(sync=sync)
    await course.worker.start()
    assert course.log == [f"start {name}" for name in NAMES]
    assert course.life.is_ready()
    await course.worker.stop()
    await course.worker.stop()
    assert course.log[len(NAMES) :] == ["drain", *(f"stop {name}" for name in reversed(NAMES))]
    assert course.worker.stage is Stage.STOPPED


@pytest.mark.parametrize("failing", NAMES)
async def test_what_began_is_stopped_if_a_start_fails(failing: str) -> None:
    """The part that failed as well, for half of it may be there; nothing drains that never served."""
    course = Course(fails=(f"start {failing}",))
    with pytest.raises(StepError, match=f"start {failing}"):
        await course.worker.start()
    begun = NAMES[: NAMES.index(failing) + 1]
    assert course.log == [*(f"start {name}" for name in begun), *(f"stop {name}" for name in reversed(begun))]
    assert course.worker.stage is Stage.STOPPED
    await course.worker.stop()
    assert len(course.stops()) == len(begun)


@pytest.mark.parametrize("reached", NAMES)
async def test_a_stop_breaks_a_start_off(reached: str) -> None:
    """Whatever part it waits for: what began is stopped once, and the start says why it did not succeed."""
    course = Course(held=(f"start {reached}",))
    starting = asyncio.create_task(course.worker.start())
    await course.until(f"start {reached}")
    assert not course.life.is_ready()
    await course.worker.stop()
    with pytest.raises(StoppedWhileStarting):
        await starting
    begun = NAMES[: NAMES.index(reached) + 1]
    assert course.stops() == list(reversed(begun))
    assert "drain" not in course.log
    assert course.worker.stage is Stage.STOPPED


async def test_a_start_that_is_cancelled_leaves_nothing() -> None:
    """As by a time limit around it."""
    course = Course(held=("start server",))
    starting = asyncio.create_task(course.worker.start())
    await course.until("start server")
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert course.stops() == ["server", "configuration", "lock"]


async def test_what_is_stopped_does_not_start() -> None:
    """A stop that comes first is not forgotten."""
    course = Course()
    await course.worker.stop()
    with pytest.raises(StoppedWhileStarting):
        await course.worker.start()
    assert course.log == []
    assert course.worker.stage is Stage.STOPPED


async def test_new_requests_are_taken_while_it_serves_and_only_then() -> None:
    """Not while parts start, not from the first moment of the drain on; reloads go on until it is over."""
    course = Course(held=("start admin", "drain"))
    worker, life = course.worker, course.life
    worker.reload()
    starting = asyncio.create_task(worker.start())
    await course.until("start admin")
    worker.reload()
    assert not life.is_ready()
    course.release.set()
    await starting
    assert life.is_ready()
    worker.reload()
    assert course.log.count("reload") == 1
    course.release.clear()
    stopping = asyncio.create_task(worker.stop())
    await course.until("drain")
    assert not life.is_ready()
    assert worker.stage is Stage.DRAINING
    worker.reload()
    assert course.log.count("reload") == 2
    assert course.stops() == []
    course.release.set()
    await stopping
    worker.reload()
    assert course.log.count("reload") == 2
    assert course.stops() == list(reversed(NAMES))


async def test_stops_that_come_together_stop_each_part_once() -> None:
    """The second one waits for nothing less than the first."""
    course = Course(held=("stop server",))
    await course.parts.start()
    stops = [asyncio.create_task(course.parts.stop()) for _ in range(3)]
    await course.until("stop server")
    course.release.set()
    await asyncio.gather(*stops)
    assert course.stops() == ["admin", "server", "server, released", "configuration", "lock"]


@pytest.mark.parametrize("fails", [("stop admin",), ("stop server", "stop lock"), ("drain",)])
async def test_a_stop_that_fails_keeps_nothing_from_stopping(
    fails: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """A part that fails is logged by its name; a failed drain is raised when all is stopped."""
    course = Course(fails=fails)
    await course.worker.start()
    if "drain" in fails:
        with pytest.raises(StepError):
            await course.worker.stop()
    else:
        await course.worker.stop()
    assert course.stops() == list(reversed(NAMES))
    logged = [record.__dict__["part"] for record in caplog.records if record.name == "tokenway.parts"]
    assert logged == [step.removeprefix("stop ") for step in fails if step != "drain"]
    assert course.worker.stage is Stage.STOPPED
