"""Runs a command in a network of its own, where addresses beyond loopback are as private as loopback.

    python -m testbed.own_network COMMAND...

Rules:
    1. In the network there is one interface, the loopback, with `127.0.0.1/8` and `SUBNET`: what listens
       there is reached from within alone.
    2. The command finds an address in the environment variable `VARIABLE`. Where the kernel gives no network
       (no privilege, no user namespaces), the reason is said and the command runs without the variable.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
from ipaddress import IPv4Network
from pathlib import Path
from typing import Final

SUBNET: Final = IPv4Network("10.203.0.0/24")
"""All of its addresses lead to the loopback."""

VARIABLE: Final = "TOKENWAY_OWN_NETWORK"

_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFADDR: Final = 0x8916
_SIOCSIFNETMASK: Final = 0x891C
_IFF_UP: Final = 1
"""include/uapi/linux/sched.h, sockios.h, if.h."""


def enter() -> None:
    """Go into a new network, this process and those it starts.

    Raises:
        OSError: The kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    namespaces = _CLONE_NEWNET if user == 0 else _CLONE_NEWUSER | _CLONE_NEWNET
    if libc.unshare(namespaces) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))
        fcntl.ioctl(control, _SIOCSIFADDR, _request(b"lo:1", str(SUBNET[1])))
        fcntl.ioctl(control, _SIOCSIFNETMASK, _request(b"lo:1", str(SUBNET.netmask)))


def main() -> None:
    """Does not return."""
    command = sys.argv[1:]
    try:
        enter()
    except OSError as error:
        print(f"no network of our own: {error}; what needs one is left out", file=sys.stderr, flush=True)
    else:
        os.environ[VARIABLE] = str(SUBNET[1])
    os.execvp(command[0], command)  # noqa: S606 - the caller's own command


def _request(interface: bytes, address: str) -> bytes:
    """A `struct ifreq` with an IPv4 address."""
    return struct.pack("16sHH4s8x", interface, socket.AF_INET, 0, socket.inet_aton(address))


if __name__ == "__main__":
    main()
