"""Names of settings, as documents write them."""

from __future__ import annotations

from typing import Any


def is_setting(node: dict[str, Any], schema: dict[str, Any], names: list[str]) -> bool:
    """True if a dotted name, in parts, leads somewhere in the schema of tokenway.yaml from here."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    if not names:
        return True
    if any(is_setting(one, schema, names) for one in node.get("anyOf", ())):
        return True
    inner = node.get("properties", {}).get(names[0], node.get("additionalProperties"))
    return isinstance(inner, dict) and is_setting(inner, schema, names[1:])
