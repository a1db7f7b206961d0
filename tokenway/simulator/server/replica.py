"""What all handlers of one simulated replica share."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Final, Protocol

from tokenway.simulator.engine.engine import Engine
from tokenway.simulator.server.answers import ApiError
from tokenway.simulator.server.dialects import Completions, Dialect
from tokenway.simulator.server.driver import EngineDriver, Publisher, Served
from tokenway.simulator.server.faults import FaultBoard
from tokenway.simulator.server.metrics import EngineMetrics
from tokenway.simulator.server.settings import ServerSettings
from tokenway.simulator.server.text import TokenArray
from tokenway.simulator.server.tokenizer import BpeTokenizer

MAX_SERVED_RECORDS: Final = 10_000  # what /sim/state remembers


class RunningPublisher(Publisher, Protocol):
    """What the server needs of a publisher beyond sending, spelt out so that ZeroMQ stays optional."""

    def describe(self) -> dict[str, Any]:
        """Its entry of `/kv_event_sources`."""
        ...

    async def stop(self) -> None:
        """Close its sockets."""
        ...


class Replica:
    """One engine and what is known of it.

    Attributes:
        settings: As given.
        engine: The step model.
        faults: What goes wrong next.
        served: Latest requests.
        metrics: What `/metrics` says.
        tokenizer: Of the settings, None for hashed words.
        publisher: Of cache events, None without.
        http_requests: Under way, as `/load` counts them.
        port: Where it listens; real once the server is started.
        started_s: Unix time.

    Raises:
        ValueError: The tokenizer of the settings cannot be used.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.engine = Engine(settings.profile)
        self.faults = FaultBoard()
        self.served: deque[Served] = deque(maxlen=MAX_SERVED_RECORDS)
        self.metrics = EngineMetrics(self.engine, settings.models[0], settings.engine_id)
        self.tokenizer = None if settings.tokenizer is None else BpeTokenizer(settings.tokenizer)
        self.publisher: RunningPublisher | None = None
        self.http_requests = 0
        self.port = settings.port
        self.started_s = int(time.time())
        self._driver: EngineDriver | None = None

    @property
    def driver(self) -> EngineDriver:
        """The running driver.

        Raises:
            RuntimeError: The server is not started.
        """
        if self._driver is None:
            raise RuntimeError("the server is not started")
        return self._driver

    def drive(self) -> None:
        """Start stepping."""
        self._driver = EngineDriver(self.engine, self.metrics, self.settings.time_scale, self.publisher)
        self._driver.start()

    def prompt(self, dialect: type[Dialect], body: dict[str, Any]) -> TokenArray:
        """Token ids of the prompt, shape (n,), n > 0."""
        if self.tokenizer is not None and dialect is Completions:
            given = body.get("prompt")
            if isinstance(given, list) and len(given) == 1:
                given = given[0]
            if isinstance(given, str) and given:
                return self.tokenizer.encode(given)
        return dialect.prompt(body)

    def model(self, body: dict[str, Any]) -> str:
        """The model that a body names.

        Raises:
            ApiError: 404 in vLLM's words.
        """
        model = body.get("model")
        if model is None:
            return self.settings.models[0]
        if model not in self.settings.models:
            aliases = ", ".join(self.settings.models)
            raise ApiError(
                404,
                "NotFoundError",
                f"The model `{model}` does not exist. Valid aliases: {aliases}.",
                "model",
            )
        return str(model)
