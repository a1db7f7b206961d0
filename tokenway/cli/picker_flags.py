"""Flags of `tokenway serve` in the spelling of other endpoint pickers, as settings that go before the file's.

Any of them makes Tokenway an endpoint picker at the ports that deployments of llm-d's expect, encrypted as
they are by default. They replace where `endpoint_picker:` of the file listens; the rest of it stays.

Source: llm-d-router, pkg/epp/server/options.go.
"""

from __future__ import annotations

import argparse
import socket
from typing import Any, Final

from metadata_center.addresses import parse_port

GRPC_PORT: Final = 9002
HEALTH_PORT: Final = 9003
METRICS_PORT: Final = 9090

_YES: Final = ("true", "t", "1")
_NO: Final = ("false", "f", "0")


def add_picker_flags(parser: argparse.ArgumentParser) -> None:
    """Let `tokenway serve` take them."""
    flags = parser.add_argument_group("endpoint picker, as llm-d spells it")
    for name, port, what in (
        ("--grpc-port", GRPC_PORT, "where gateways ask"),
        ("--grpc-health-port", HEALTH_PORT, "gRPC health, in clear text"),
        ("--metrics-port", METRICS_PORT, "Prometheus metrics, over HTTP"),
    ):
        flags.add_argument(
            name, type=_port, metavar="PORT", help=f"{what} (default {port} with any of these)"
        )
    flags.add_argument(
        "--secure-serving",
        type=_bool,
        nargs="?",
        const=True,
        metavar="BOOL",
        help="TLS on the gRPC port (default true with any of these)",
    )
    flags.add_argument(
        "--cert-path",
        metavar="FOLDER",
        help="of tls.crt and tls.key, read again when they change (default: a certificate made at the start)",
    )


def picker_settings(options: argparse.Namespace, *, is_wanted: bool = False) -> dict[str, Any]:
    """What the flags say, as a part of tokenway.yaml; empty if none was given, unless it `is_wanted`."""
    given = (
        *(options.grpc_port, options.grpc_health_port, options.metrics_port),
        *(options.secure_serving, options.cert_path),
    )
    if all(one is None for one in given) and not is_wanted:
        return {}
    secure = options.secure_serving is not False
    files = None
    if secure and options.cert_path is not None:
        folder = options.cert_path.rstrip("/")
        files = {"cert_file": f"{folder}/tls.crt", "key_file": f"{folder}/tls.key"}
    return {
        "endpoint_picker": {
            "listen": [_everywhere(_or(options.grpc_port, GRPC_PORT))],
            "listen_tls": files,
            "self_signed": secure and files is None,
            "listen_insecure": not secure,
            "health_listen": [_everywhere(_or(options.grpc_health_port, HEALTH_PORT))],
            "metrics_listen": _each_family(_or(options.metrics_port, METRICS_PORT)),
        }
    }


def _or(port: int | None, default: int) -> int:
    return default if port is None else port


def _everywhere(port: int) -> str:
    """All addresses of this machine: a gRPC server on `::` takes both families."""
    return _each_family(port)[-1]


def _each_family(port: int) -> list[str]:
    """The same by family; an HTTP server on `::` takes IPv6 alone."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::", 0))
    except OSError:
        return [f"0.0.0.0:{port}"]
    return [f"0.0.0.0:{port}", f"[::]:{port}"]


def _port(text: str) -> int:
    try:
        return int(parse_port(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _bool(text: str) -> bool:
    if text.lower() in _YES:
        return True
    if text.lower() in _NO:
        return False
    raise argparse.ArgumentTypeError(f"`{text}` is neither true nor false")
