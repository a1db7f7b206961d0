"""Certificates of Envoy's bootstrap by files of their own (SDS), which Envoy follows; the rest it reads once.

Pure: the bootstrap is changed in place, and what the files are to have is the answer.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

_TYPE = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"


def by_secret_files(document: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Have a bootstrap name files in a folder instead of certificates.

    Args:
        document: As `bootstrap.fill` leaves it; edited.
        folder: Absolute, as Envoy finds it.

    Returns:
        What each of them has, by its name in the folder; none where there is no TLS.
    """
    files: dict[str, dict[str, Any]] = {}
    static = document["static_resources"]
    (listener,) = static["listeners"]
    for name, owner in (
        ("edge", listener["filter_chains"][0]),
        *(("gateway", cluster) for cluster in static["clusters"]),
    ):
        if "transport_socket" in owner:
            owner["transport_socket"] = copy.deepcopy(owner["transport_socket"])
            common = owner["transport_socket"]["typed_config"]["common_tls_context"]
            files.update(_by_files(common, name, folder))
    return files


def _by_files(common: dict[str, Any], name: str, folder: Path) -> dict[str, dict[str, Any]]:
    """The certificate and the CA of one `CommonTlsContext`."""
    (certificate,) = common.pop("tls_certificates")
    common["tls_certificate_sds_secret_configs"] = [_source(name, folder)]
    files = {_file(name): _secret(name, tls_certificate=certificate)}
    validation = common.pop("validation_context", None)
    if validation is not None:
        authority = f"{name}-ca"
        trusted = {"trusted_ca": validation.pop("trusted_ca")}
        common["combined_validation_context"] = {
            "default_validation_context": validation,
            "validation_context_sds_secret_config": _source(authority, folder),
        }
        files[_file(authority)] = _secret(authority, validation_context=trusted)
    return files


def _file(name: str) -> str:
    return f"{name}.yaml"


def _source(name: str, folder: Path) -> dict[str, Any]:
    path = {"path": str(folder / _file(name))}
    return {"name": name, "sds_config": {"path_config_source": path, "resource_api_version": "V3"}}


def _secret(name: str, **content: dict[str, Any]) -> dict[str, Any]:
    return {"resources": [{"@type": _TYPE, "name": name, **content}]}
