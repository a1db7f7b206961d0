"""The log goes into a pipe that nobody reads: requests, administration and the end go on."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sys

import aiohttp
import pytest

from tests.e2e.harness import chat, cluster, eventually, post, recording, running_stack

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

REQUESTS = 60
PIPE_BYTES = 4096
"""Some five lines of requests."""


async def test_a_log_that_nobody_reads_holds_up_no_request() -> None:
    """Envoy went on without Tokenway, half a second later for each request, and only SIGKILL ended it."""
    models = {"m": {"rules": [{"cluster": "c"}]}}
    async with (
        recording() as engine,
        running_stack([cluster("c", [engine.key])], {"models": models}) as stack,
    ):
        await stack.gateway.kill()
        reading, writing = os.pipe()
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        words = ["-m", "tokenway.cli.main", "serve", str(stack.run_dir / "tokenway.yaml")]
        process = await asyncio.create_subprocess_exec(sys.executable, *words, stdout=writing, stderr=writing)
        os.close(writing)
        try:

            async def is_taken() -> bool:
                reply = await post(stack, chat("m", "hello"))
                with contextlib.suppress(aiohttp.ClientError):  # it starts
                    return reply.status == 200 and bool(await stack.last(1))
                return False

            await eventually(is_taken, bool, 20)
            before = len(await stack.last(REQUESTS))
            for number in range(REQUESTS):
                assert (await post(stack, chat("m", f"request {number}"))).status == 200
            assert before < REQUESTS
            assert len(await stack.last(REQUESTS)) == REQUESTS, "each was decided here"
            process.terminate()
            assert await asyncio.wait_for(process.wait(), 20) == 0
            assert os.read(reading, PIPE_BYTES).startswith(b'{"time":')
        finally:
            os.close(reading)
            if process.returncode is None:
                process.kill()
                await process.wait()
