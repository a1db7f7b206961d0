"""`tokenway bootstrap`: Envoy's configuration for a Tokenway configuration, on standard output."""

from __future__ import annotations

from pathlib import Path

from extproc.config.loading import load_all
from extproc.config.schema import Config
from extproc.server.bootstrap import render, template
from extproc.server.worker import socket_path


def bootstrap(path: Path, listen: str, envoy_admin_port: int) -> int:
    """Print it.

    Raises:
        ConfigError: The configuration cannot be used.
    """
    config, _ = load_all(path)
    print(rendered(config, listen, envoy_admin_port), end="")
    return 0


def rendered(config: Config, listen: str, envoy_admin_port: int) -> str:
    """The bootstrap for `config`, with clients at `listen` (`ip:port`)."""
    host, _, port = listen.rpartition(":")
    run_dir = Path(config.server.run_dir)
    return render(
        template(),
        listen=(host.strip("[]"), int(port)),
        admin_port=envoy_admin_port,
        sockets=[str(socket_path(run_dir, index)) for index in range(config.server.workers)],
        allow_headers=config.request.allow_headers,
        forward_credentials=config.request.forward_credentials,
        max_body_bytes=config.request.max_body_bytes,
    )
