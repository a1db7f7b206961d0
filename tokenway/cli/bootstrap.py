"""`tokenway bootstrap`: Envoy's configuration for a Tokenway configuration, on standard output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from extproc.config.loading import read_all, read_once
from extproc.config.schema import Config
from extproc.server.envoys.bootstrap import as_yaml, fill, template
from extproc.server.envoys.secret_files import by_secret_files
from extproc.server.listening.run_dir import run_dir, socket_path
from metadata_center.addresses import ACCEPTED, Address, ip_or_none
from metadata_center.files import write_whole


def bootstrap(path: Path, listen: str, envoy_admin_port: int, sds: Path | None = None) -> int:
    """Print it.

    Args:
        path: The configuration.
        listen: Where clients connect, `ip:port`.
        envoy_admin_port: Of Envoy's own admin surface.
        sds: Folder that gets the files by which Envoy follows its certificates; None has it read them once.

    Raises:
        ConfigError: The configuration cannot be used.
        OSError: A file cannot be written.
        ValueError: `listen` is no address.
    """
    config, _ = read_all(path, read_once)
    document = document_of(config, listen, envoy_admin_port)
    if sds is not None:
        write_secret_files(document, sds)
    print(as_yaml(document), end="")
    return 0


def write_secret_files(document: dict[str, Any], folder: Path) -> None:
    """Have a bootstrap's certificates followed by Envoy: files in a folder, made if need be, name theirs.

    Raises:
        OSError: A file cannot be written.
    """
    place = folder.absolute()
    files = by_secret_files(document, place)
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(place / name, as_yaml(content))


def listen_address(text: str) -> Address:
    """Where Envoy listens for clients: an IP address, which Envoy takes no name for, and a port.

    Raises:
        ValueError: Saying what is wrong and what is accepted.
    """
    address = Address.parse(text, lowest_port=1)
    if ip_or_none(address.host) is None:
        raise ValueError(f"`{address.host}` is no IP address; {ACCEPTED}")
    return address


def rendered(config: Config, listen: str, envoy_admin_port: int) -> str:
    """The bootstrap for `config`, with clients at `listen` (`ip:port`), as YAML.

    Raises:
        ValueError: `listen` is no such address.
    """
    return as_yaml(document_of(config, listen, envoy_admin_port))


def document_of(config: Config, listen: str, envoy_admin_port: int) -> dict[str, Any]:
    """The same as a document.

    Raises:
        ValueError: `listen` is no such address.
    """
    document = template()
    fill(
        document,
        listen=listen_address(listen),
        admin_port=envoy_admin_port,
        sockets=sockets_of(config),
        allow_headers=config.request.allow_headers,
        forward_credentials=config.request.forward_credentials,
        max_body_bytes=config.request.max_body_bytes,
        rule_headers=config.rule_headers(),
        allow_fields=config.request.allow_fields,
        away=config.away,
        edge=config.edge,
        others="unknown" if config.default_cluster is None else "refuse",
    )
    return document


def sockets_of(config: Config) -> list[str]:
    """The Unix sockets of all workers, by names that lead there wherever Envoy is started."""
    folder = run_dir(config.server).absolute()
    return [str(socket_path(folder, index)) for index in range(config.server.workers)]
