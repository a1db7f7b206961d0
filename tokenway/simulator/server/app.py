"""A vLLM look-alike over HTTP.

Rules:
    1. The headers of a stream leave before anything is computed; a whole answer's leave with its body.
    2. A client that goes away frees its request in the engine at once.
    3. Errors have vLLM's bodies; faults are injected before a request is looked at.
    4. One object owns everything: `SimulatorServer` starts it, stops it, or drops dead with it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from tokenway.simulator.engine.engine import Engine
from tokenway.simulator.server.answers import ApiError, json_response
from tokenway.simulator.server.dialects import BadRequestError
from tokenway.simulator.server.driver import EngineDriver, Served
from tokenway.simulator.server.generation_api import GenerationApi
from tokenway.simulator.server.operator_api import OperatorApi
from tokenway.simulator.server.replica import Replica
from tokenway.simulator.server.response_api import ResponseApi
from tokenway.simulator.server.settings import ServerSettings
from tokenway.simulator.server.stored import EngineResponses

IDLE_TIMEOUT_S = 5.0  # vLLM's VLLM_HTTP_TIMEOUT_KEEP_ALIVE
MAX_BODY_BYTES = 64 << 20  # above any prompt that fits a model; vLLM itself has no limit


class SimulatorServer:
    """One simulated replica: engine, HTTP server and cache events.

    Raises:
        ValueError: The tokenizer of the settings cannot be used.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._replica = Replica(settings)
        self.responses = EngineResponses()
        """Those it keeps."""
        self._runner: web.AppRunner | None = None

    @property
    def settings(self) -> ServerSettings:
        """As given."""
        return self._replica.settings

    @property
    def engine(self) -> Engine:
        """The step model."""
        return self._replica.engine

    @property
    def driver(self) -> EngineDriver:
        """What steps the engine.

        Raises:
            RuntimeError: The server is not started.
        """
        return self._replica.driver

    @property
    def served(self) -> deque[Served]:
        """Latest requests."""
        return self._replica.served

    @property
    def http_requests(self) -> int:
        """Under way, as `/load` counts them."""
        return self._replica.http_requests

    @property
    def port(self) -> int:
        """Where it listens; real once it is started."""
        return self._replica.port

    @property
    def url(self) -> str:
        """Base URL, without a slash at the end."""
        return f"http://{self.settings.host}:{self.port}"

    async def start(self) -> None:
        """Open all sockets and start stepping; afterwards `port` is real.

        Raises:
            OSError: An address cannot be bound.
        """
        settings, replica = self.settings, self._replica
        if settings.kv_events is not None:
            # Only a replica that publishes needs ZeroMQ and msgspec.
            from tokenway.simulator.server.kv_events import KvEventPublisher

            publisher = KvEventPublisher(settings.kv_events, settings.profile.block_size, settings.engine_id)
            publisher.start()
            replica.publisher = publisher
        replica.drive()
        responses = ResponseApi(self.responses, replica.driver.abort)
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors])
        app.on_response_prepare.append(_name_server)
        for api in (GenerationApi(replica, responses), responses, OperatorApi(replica)):
            app.add_routes(api.routes())
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,
            keepalive_timeout=IDLE_TIMEOUT_S,
            shutdown_timeout=0.1,
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, settings.host, settings.port, backlog=1024).start()
        replica.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """End all generations with the finish reason `abort`, then close; as vLLM does on SIGTERM."""
        self._replica.driver.abort_all()
        await asyncio.sleep(0)  # lets handlers write their last bytes
        await self._close()

    async def kill(self) -> None:
        """Reset every connection and close, as if the process had died."""
        if self._runner is not None and self._runner.server is not None:
            for connection in self._runner.server.connections:
                if connection.transport is not None:
                    connection.transport.abort()
        await self._close()

    async def _close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        await self._replica.driver.stop()
        if self._replica.publisher is not None:
            await self._replica.publisher.stop()


@asynccontextmanager
async def running(settings: ServerSettings) -> AsyncIterator[SimulatorServer]:
    """A started server for the length of a block."""
    server = SimulatorServer(settings)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return error.response()
    except BadRequestError as error:
        return ApiError(400, "BadRequestError", error.message, error.param).response()
    except web.HTTPException as error:
        return json_response({"detail": error.reason}, error.status)


async def _name_server(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "uvicorn"
