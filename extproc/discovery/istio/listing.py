"""Members of a service and of its subsets → endpoints as the fleet takes them.

Rules:
    1. Pure and deterministic: the same members in any order give the same endpoints in the same order.
    2. What the service as a whole does not have is no endpoint, whatever a subset says.
    3. The key is the workload and the address where istiod names the workload, else the address: another
       workload at a reused address is another replica, a label of it changes nothing. Numbers at the end of
       its name are no part of it: istiod numbers the endpoints in a ServiceEntry by their place in the list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from extproc.discovery.istio.messages import Member, Members, Workload
from extproc.discovery.listed import Listed
from extproc.values.endpoints import SUBSET_LABEL
from metadata_center.addresses import Address, ip_or_none

VERSION_LABEL = "version"
"""The canonical revision of its workload."""

_NUMBER = re.compile(r"-\d+$")


def listed_of(
    members: Members, subsets: Mapping[str, Members], addresses_of: Callable[[str], Sequence[str]]
) -> tuple[Listed, ...]:
    """The endpoints of a service.

    Args:
        members: All of them.
        subsets: Those of each subset, by its name.
        addresses_of: IP addresses of a host name.
    """
    of_place: dict[tuple[str, int], list[str]] = {}
    for name in sorted(subsets):
        for place in {(member.host, member.port) for member in subsets[name]}:
            of_place.setdefault(place, []).append(name)
    found: dict[Address, Listed] = {}
    for member in sorted(members, key=lambda member: (member.host, member.port)):
        names = of_place.get((member.host, member.port), ())
        hosts = (member.host,) if ip_or_none(member.host) else addresses_of(member.host)
        for host in hosts:
            address = Address.of(host, member.port)
            found.setdefault(address, _listed(member, address, names))
    return tuple(found.values())


def _listed(member: Member, address: Address, subsets: Sequence[str]) -> Listed:
    workload = member.workload
    labels = {}
    if subsets:
        labels[SUBSET_LABEL] = ",".join(subsets)
    if workload.version:
        labels[VERSION_LABEL] = workload.version
    return Listed(
        _key(workload, address),
        address,
        member.weight,
        labels,
        _metadata(workload),
        member.draining,
        locality=member.locality,
        ready=member.ready,
    )


def _key(workload: Workload, address: Address) -> str:
    if not workload.name:
        return str(address)
    name = _NUMBER.sub("", workload.name)
    return f"{workload.namespace}/{name}@{address}" if workload.namespace else f"{name}@{address}"


def _metadata(workload: Workload) -> dict[str, str]:
    said = {
        "workload": workload.name,
        "namespace": workload.namespace,
        "service": workload.service,
        "kubernetes_cluster": workload.cluster,
    }
    return {name: text for name, text in said.items() if text}
