"""Flags of `tokenway serve` that say which pods there are, as llm-d's picker spells them, as settings.

They go before `discovery.kubernetes` of the file; without a file they are all that has to be said.

Source: llm-d-router, pkg/epp/server/options.go.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from extproc.discovery.kubernetes.kinds import FORMER_INFERENCE, INFERENCE
from extproc.errors import ConfigError
from metadata_center.addresses import parse_port

SELECTED: Final = "endpoints"
"""What the cluster is called that a selector makes."""

SERVE_WORDS = "tokenway serve"
"""In place of a file's name: what is wrong is in the words of the command."""

_SELECTOR: Final = "--endpoint-selector"
_PORTS: Final = "--endpoint-target-ports"


def add_pool_flags(parser: argparse.ArgumentParser) -> None:
    """Let `tokenway serve` take them."""
    flags = parser.add_argument_group("pods of Kubernetes, as llm-d spells it")
    flags.add_argument("--pool-name", metavar="NAME", help="an InferencePool whose pods are chosen from")
    flags.add_argument(
        "--pool-namespace",
        metavar="NAMESPACE",
        help="of the pool, or of the pods (default: $NAMESPACE, or the service account's)",
    )
    flags.add_argument(
        "--pool-group", choices=(INFERENCE, FORMER_INFERENCE), help=f"of the pool (default {INFERENCE})"
    )
    flags.add_argument(
        _SELECTOR, type=_labels, metavar="KEY=VALUE,…", help="labels of pods, in place of a pool"
    )
    flags.add_argument(_PORTS, type=_ports, metavar="PORT,…", help="where these pods serve")
    flags.add_argument(
        "--kubeconfig",
        type=Path,
        metavar="FILE",
        help="how the API is reached (default: as the pod that this runs in)",
    )


def pool_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, as a part of tokenway.yaml; empty if none was given.

    Raises:
        ConfigError: They do not go together.
    """
    name, namespace, group = options.pool_name, options.pool_namespace, options.pool_group
    labels, ports = options.endpoint_selector, options.endpoint_target_ports
    if name is not None and (labels is not None or ports is not None):
        raise ConfigError(SERVE_WORDS, [f"accepted: --pool-name, or {_SELECTOR} with {_PORTS}"])
    if name is None and group is not None:
        raise ConfigError(SERVE_WORDS, ["accepted: --pool-group with --pool-name only"])
    if (labels is None) is not (ports is None):
        raise ConfigError(SERVE_WORDS, [f"accepted: {_SELECTOR} and {_PORTS}, or neither"])
    where = {} if namespace is None else {"namespace": namespace}
    reached = {} if options.kubeconfig is None else {"kubeconfig": str(options.kubeconfig.absolute())}
    if name is not None:
        of_group = {} if group is None else {"group": group}
        return _discovery({"pool": {"name": name, **where, **of_group}, **reached})
    if labels is not None:
        selector = {"name": SELECTED, "match_labels": labels, "target_ports": ports, **where}
        return _discovery({"selectors": [selector], **reached})
    if namespace is not None or reached:
        problem = f"accepted: --pool-namespace and --kubeconfig with --pool-name or {_SELECTOR}"
        raise ConfigError(SERVE_WORDS, [problem])
    return {}


def _discovery(kubernetes: dict[str, Any]) -> dict[str, Any]:
    return {"discovery": {"kubernetes": kubernetes}}


def _labels(text: str) -> dict[str, str]:
    """`key=value` pairs, joined by commas; what keys and values may be is checked as the file's are."""
    found = {}
    for word in text.split(","):
        key, equals, value = (part.strip() for part in word.partition("="))
        if not key or not equals or value.startswith("="):
            raise argparse.ArgumentTypeError(
                f"`{text}` is no list of labels; accepted: text like app=vllm,tier=a"
            )
        found[key] = value
    return found


def _ports(text: str) -> list[int]:
    try:
        return [parse_port(word.strip()) for word in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
