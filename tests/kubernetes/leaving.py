"""How a pod stops being one that requests go to, at a real API server, and how it becomes one again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, TypeVar

from testbed.kubernetes import Cluster, pod
from tests.e2e.harness import Load, Stack, chat, eventually, post

T = TypeVar("T")

ACTIVE_PORTS: Final = "llm-d.ai/active-ports"
WAYS: Final = ("not ready", "port removed", "terminating", "deleted")
PROMISE_S: Final = 1.0
"""From a change of a pod to the last request that is sent there."""


class Pods:
    """Pods of engines; the annotation of each names its port.

    Args:
        cluster: Where they are.
        namespace: Theirs.
        labels: By which they are selected.
        places: Address and port of each engine.
    """

    def __init__(
        self, cluster: Cluster, namespace: str, labels: dict[str, str], places: Iterable[tuple[str, int]]
    ) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._labels = labels
        self.places = list(places)

    def name(self, number: int) -> str:
        """Of a pod."""
        return f"engine-{number}"

    async def add(self, number: int) -> None:
        """One that serves."""
        ports = {ACTIVE_PORTS: str(self.places[number][1])}
        made = pod(self.name(number), labels=self._labels, namespace=self._namespace, annotations=ports)
        await self._cluster.apply(made)
        await self.set_ready(number)

    async def set_ready(self, number: int, *, ready: bool = True) -> None:
        """What a kubelet says of it."""
        await self._cluster.make_ready(
            self.name(number), ip=self.places[number][0], ready=ready, namespace=self._namespace
        )

    async def leave(self, number: int, way: str) -> None:
        """It is not to be chosen any more."""
        match way:
            case "not ready":
                await self.set_ready(number, ready=False)
            case "port removed":
                named = pod(self.name(number), labels=self._labels, namespace=self._namespace)
                await self._cluster.merge(named, {"metadata": {"annotations": {ACTIVE_PORTS: "1"}}})
            case "terminating":
                await self._cluster.delete_pod(self.name(number), namespace=self._namespace)
            case "deleted":
                await self._cluster.delete_pod(self.name(number), namespace=self._namespace, gone=True)
            case _:
                raise AssertionError(way)

    async def come_back(self, number: int, way: str) -> None:
        """It serves again; after a deletion, as another pod of that name."""
        if way == "terminating":
            await self.leave(number, "deleted")
        await self.add(number)


async def check_leaving(stack: Stack, pods: Pods, way: str, received: Callable[[], list[int]]) -> None:
    """Under load: from `PROMISE_S` after the change nothing goes to the first pod, and no request fails."""
    before = received()[0]
    async with Load(stack, "sim", clients=6, stream=True) as load:
        await load.more(12)
        await eventually(_read(lambda: received()[0]), lambda count: count > before)
        await pods.leave(0, way)
        await asyncio.sleep(PROMISE_S)
        left = received()[0]
        await load.more(24)
        assert received()[0] == left
        await pods.come_back(0, way)
        await eventually(_read(lambda: received()[0]), lambda count: count > left)
        await load.more(20)
    assert load.failures == []
    await stack.settled()


async def check_charges_of_what_terminates(
    stack: Stack, pods: Pods, received: Callable[[], list[int]], tokens: int
) -> None:
    """A stream on a pod that terminates stays charged there, nothing new comes, and it ends whole.

    Args:
        stack: Tokenway and its gateway.
        pods: Of the engines.
        received: How many requests each engine has had.
        tokens: Of an answer that lasts some seconds.
    """
    before = received()
    running = asyncio.create_task(post(stack, chat("sim", "a long one", tokens, stream=True)))
    (number,) = await eventually(
        _read(lambda: [i for i, count in enumerate(received()) if count > before[i]]), bool
    )
    await pods.leave(number, "terminating")
    await asyncio.sleep(PROMISE_S)
    for turn in range(12):
        assert (await post(stack, chat("sim", f"{turn}: short"))).status == 200
    assert received()[number] == before[number] + 1
    assert not running.done(), "the answer is to last longer than all this"
    charged = {name: count for name, count in (await stack.charged()).items() if name.endswith(" requests")}
    place = "{}:{}/".format(*pods.places[number])
    assert [count for name, count in charged.items() if place in name] == [1], charged
    reply = await running
    assert reply.status == 200
    assert reply.body.endswith(b"data: [DONE]\n\n")
    await stack.settled()
    await pods.come_back(number, "terminating")


def _read(value: Callable[[], T]) -> Callable[[], Awaitable[T]]:
    async def read() -> T:
        return value()

    return read
