"""How Istio names clusters: `outbound|<port>|<subset>|<host>`, the subset empty for a service as a whole."""

from __future__ import annotations

from dataclasses import dataclass, replace

from metadata_center.addresses import MAX_PORT, Address, ip_or_none

_OUTBOUND = "outbound"
_MAX_CHARS = 253


@dataclass(frozen=True, slots=True)
class MeshName:
    """A service of a mesh at one of its ports, or a subset of it.

    Attributes:
        host: As its ServiceEntry or Service has it, lower case.
        port: The service's own, 1..65535.
        subset: Name of a subset of a DestinationRule; empty for all of it.
    """

    host: str
    port: int
    subset: str = ""

    def __str__(self) -> str:
        return f"{_OUTBOUND}|{self.port}|{self.subset}|{self.host}"

    @property
    def service(self) -> MeshName:
        """All of it."""
        return replace(self, subset="") if self.subset else self

    @classmethod
    def parse(cls, name: str) -> MeshName | None:
        """What a cluster's name says; None if it is not of this form."""
        parts = name.split("|")
        if len(parts) != 4 or parts[0] != _OUTBOUND or not parts[3]:
            return None
        port = parts[1]
        if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) <= MAX_PORT):
            return None
        return cls(parts[3], int(port), parts[2])

    @classmethod
    def of(cls, text: str) -> MeshName | None:
        """The service that people write as `host:port`, or as its full name; None if it is neither."""
        try:
            address = Address.parse(text, lowest_port=1)
        except ValueError:
            name = cls.parse(text)
            return None if name is None or name.subset else name
        is_host = ip_or_none(address.host) is None and len(address.host) <= _MAX_CHARS and "|" not in text
        return cls(address.host.lower(), address.port) if is_host else None
