"""Names of clusters as istiod makes them: `outbound|8000||llama.models.internal`.

Source: Istio, pilot/pkg/model, `BuildSubsetKey`: direction, port, subset (empty for the whole host), host.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

ACCEPTED: Final = "`host:port`, or Istio's own `outbound|port||host`"

SUBSET_LABEL: Final = "subset"
"""Label by which a rule names a subset of a DestinationRule."""

_HOST: Final = r"(?=[^|:]{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*"
_NAME: Final = re.compile(r"outbound\|(?P<port>\d{1,5})\|(?P<subset>[A-Za-z0-9._-]*)\|(?P<host>[^|]*)")
_SHORT: Final = re.compile(r"(?P<host>[^|:]*):(?P<port>\d{1,5})")


@dataclass(frozen=True, slots=True, order=True)
class Destination:
    """A service of Istio's, or a subset of it.

    Attributes:
        host: DNS name, with a dot: Istio takes a short one for a Kubernetes service.
        port: 1..65535.
        subset: Of a DestinationRule; empty for the whole.
    """

    host: str
    port: int
    subset: str = ""

    @property
    def cluster(self) -> str:
        """Envoy's name for it."""
        return f"outbound|{self.port}|{self.subset}|{self.host}"

    @property
    def whole(self) -> Destination:
        """The host without a subset."""
        return replace(self, subset="")


def destination_of(name: str) -> Destination | None:
    """What a cluster's name says, in either form; None for what is no name of Istio's."""
    found = _NAME.fullmatch(name) or _SHORT.fullmatch(name)
    if found is None:
        return None
    host, port = found["host"], int(found["port"])
    if re.fullmatch(_HOST, host) is None or "." not in host or not 0 < port < 65_536:
        return None
    return Destination(host, port, found.groupdict().get("subset") or "")
