"""Waiting for what wakes no task: state that announces nothing, or that another peer changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

DEADLINE_S = 30.0
"""Far more than anything here takes, on a machine that does much else."""


async def until(condition: Callable[[], bool], within_s: float = DEADLINE_S) -> None:
    """Wait for a condition that must come true.

    Raises:
        TimeoutError: It did not within `within_s`.
    """
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0.005)
