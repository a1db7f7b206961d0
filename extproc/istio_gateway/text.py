"""Manifests as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

Manifest = dict[str, Any]
"""A Kubernetes resource, or a part of one."""


def as_yaml(manifests: Iterable[Manifest]) -> str:
    """One document each; scripts as they were written."""
    text: str = yaml.dump_all(
        manifests, Dumper=_Readable, sort_keys=False, width=110, explicit_start=True, allow_unicode=True
    )
    return text


class _Readable(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the library's signature
        return True


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Readable.add_representer(str, _represent)
