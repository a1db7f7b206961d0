"""What a demo needs of a configuration: engines that it can stand in for, and ports that are free.

It never sends to engines that are somebody's: who tries it with the configuration of a real fleet is told.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from extproc.config.clusters import ClusterSpec
from extproc.config.schema import Config
from extproc.errors import ConfigError
from metadata_center.addresses import Address

ENGINES_HOST: Final = "127.0.0.1"
"""Where simulated engines listen."""

_HERE: Final = frozenset({ENGINES_HOST, "localhost"})


def refuse_unfit(path: Path, config: Config, clusters: Sequence[ClusterSpec]) -> None:
    """Name what a demo cannot do as the configuration says, before anything is started.

    Args:
        path: The configuration's own file.
        config: What it says.
        clusters: Those of its clusters file.

    Raises:
        ConfigError: There is something.
    """
    others = "sends to engines that are not simulated"
    unfit = {
        "edge.tls: a demo's clients speak clear text": config.edge.tls is not None,
        "edge.gateway: a demo's Envoy finds the gateway in server.run_dir": config.edge.gateway is not None,
        "engine_tls: a demo's engines speak clear text": bool(config.engine_tls),
        f"discovery.istio: {others}": config.discovery.istio is not None,
        f"discovery.kubernetes: {others}": config.discovery.kubernetes is not None,
    }
    problems = [f"{problem}; a demo wants it left out" for problem, is_there in unfit.items() if is_there]
    if config.server.admin.port == 0:
        problems.append("server.admin.port: 0; a demo wants one that is known before")
    problems += [
        f"clusters: `{cluster.name}` has an endpoint at {Address(spec.address, spec.port)}, which {others};"
        f" a demo wants all at {ENGINES_HOST}"
        for cluster in clusters
        for spec in cluster.endpoints
        if spec.address not in _HERE
    ]
    if problems:
        raise ConfigError(str(path), problems)


def refuse_taken(wanted: Iterable[tuple[tuple[str, int], str]]) -> None:
    """Name the port that is taken, or wanted twice, rather than wait for another program's answer there.

    Args:
        wanted: Host and port, and whose they are to be.

    Raises:
        OSError: One is.
    """
    with contextlib.ExitStack() as probes:  # all at once: two of ours exclude each other, too
        for (host, port), whose in wanted:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            probe = probes.enter_context(socket.socket(family, socket.SOCK_STREAM))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ended connections are none
            try:
                probe.bind((host, port))
                probe.listen(1)
            except OSError as error:
                raise OSError(f"{Address(host, port)}, for {whose}: {error.strerror}") from error
