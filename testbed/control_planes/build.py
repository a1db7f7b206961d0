"""Builds control planes: the Go module `tests/control_planes/NAME/` into `.tools/control-planes/NAME/`.

    python -m testbed.control_planes.build istio etcd kubernetes

Rules:
    1. A build leaves a stamp of what it was made from (go.mod, go.sum and the plan below). The same does
       nothing, another builds anew; a build that fails leaves what was there.
    2. One build at a time, in however many checkouts share the folder: two would fight for the cores.
    3. Go is used as this machine configures it; no proxy is named here. Without Go, or without its modules,
       the reason is said and the exit code is not 0.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from testbed.processes import REPOSITORY

MODULES: Final = REPOSITORY / "tests" / "control_planes"
BUILT: Final = REPOSITORY / ".tools" / "control-planes"
STAMP: Final = ".made-from"


@dataclass(frozen=True, slots=True)
class Plan:
    """What one control plane consists of.

    Attributes:
        binaries: Name of the program to the import path of its main package.
        version_of: The module whose version the programs shall report, from go.mod.
        variables: Go variables that hold that version, as text with `{version}`, `{major}`, `{minor}`.
    """

    binaries: Mapping[str, str]
    version_of: str
    variables: Mapping[str, str] = field(default_factory=dict)


_KUBERNETES_VERSIONS: Final = {
    f"{package}.{variable}": text
    for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    for variable, text in (("gitVersion", "{version}"), ("gitMajor", "{major}"), ("gitMinor", "{minor}"))
}
"""Istio asks for a least version of the API server."""

PLANS: Final[Mapping[str, Plan]] = {
    "istio": Plan(
        {
            "pilot-discovery": "istio.io/istio/pilot/cmd/pilot-discovery",
            "istioctl": "istio.io/istio/istioctl/cmd/istioctl",
        },
        "istio.io/istio",
        {"istio.io/istio/pkg/version.buildVersion": "{version}"},
    ),
    "kubernetes": Plan(
        {
            "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
            "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
        },
        "k8s.io/kubernetes",
        _KUBERNETES_VERSIONS,
    ),
    "envoy-gateway": Plan(
        {"egctl": "github.com/envoyproxy/gateway/cmd/egctl"}, "github.com/envoyproxy/gateway"
    ),
    "etcd": Plan({"etcd": "go.etcd.io/etcd/server/v3"}, "go.etcd.io/etcd/server/v3"),
}


def binary(plane: str, name: str) -> Path:
    """Where a program is once its control plane is built."""
    assert name in PLANS[plane].binaries, name
    return BUILT / plane / name


def version(plane: str, modules: Path = MODULES) -> str:
    """The version of a control plane that its go.mod requires, with its `v`."""
    module = PLANS[plane].version_of
    for line in (modules / plane / "go.mod").read_text().splitlines():
        words = line.removeprefix("require").split()
        if len(words) > 1 and words[0] == module:
            return words[1]
    raise AssertionError(f"{plane}/go.mod does not require {module}")


def fingerprint(plane: str, modules: Path = MODULES) -> str:
    """Of all that a build depends on but Go itself."""
    digest = hashlib.sha256(repr(PLANS[plane]).encode())
    for name in ("go.mod", "go.sum"):
        digest.update((modules / plane / name).read_bytes())
    return digest.hexdigest()


def is_built(plane: str, modules: Path = MODULES, built: Path = BUILT) -> bool:
    """True if its programs are there and made from what is required now."""
    stamp = built / plane / STAMP
    return stamp.exists() and stamp.read_text() == fingerprint(plane, modules)


def go_environment() -> dict[str, str]:
    """Our environment, without what would make another build of it.

    `GOFLAGS` may hold flags that are meant for other modules; what these need is given on the command line.
    """
    return {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off", "GOFLAGS": "-mod=readonly"}


def go() -> str:
    """The go command.

    Raises:
        SystemExit: There is none.
    """
    found = shutil.which("go")
    if found is None:
        raise SystemExit("the control planes are built with Go, and there is no go command on the PATH")
    return found


def link_flags(plane: str, modules: Path = MODULES) -> str:
    """What the linker is given: no symbols, and the version."""
    found = version(plane, modules)
    major, minor, *_ = found.removeprefix("v").split(".")
    texts = {
        variable: text.format(version=found, major=major, minor=minor)
        for variable, text in PLANS[plane].variables.items()
    }
    return " ".join(["-s", "-w", *(f"-X {variable}={text}" for variable, text in texts.items())])


def build(plane: str, modules: Path = MODULES, built: Path = BUILT) -> None:
    """Build one control plane if it is not built; says how long that took.

    Raises:
        SystemExit: Go is missing or failed; what it had to say is on standard error.
    """
    if is_built(plane, modules, built):
        return
    command = go()
    built.mkdir(parents=True, exist_ok=True)
    with _alone(built):
        if is_built(plane, modules, built):
            return
        print(f"Building {plane} {version(plane, modules)} ...", flush=True)
        fresh = built / f"{plane}.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        began_s, cpu_began_s = time.monotonic(), _children_cpu_s()
        flags = ["-trimpath", "-buildvcs=false", "-ldflags", link_flags(plane, modules)]
        # One call for all programs compiles what they share once and links them side by side.
        paths = list(PLANS[plane].binaries.values())
        _run([command, "build", *flags, "-o", f"{fresh}/", *paths], modules / plane)
        for name, path in PLANS[plane].binaries.items():
            made = fresh / _default_name(path)
            made.rename(fresh / name)
        (fresh / STAMP).write_text(fingerprint(plane, modules))
        shutil.rmtree(built / plane, ignore_errors=True)
        fresh.rename(built / plane)
        took_s, cpu_s = time.monotonic() - began_s, _children_cpu_s() - cpu_began_s
        print(f"Built {plane} in {took_s:.0f} s ({cpu_s:.0f} s of CPU).", flush=True)


def _default_name(path: str) -> str:
    """What `go build` calls the program of a package: its last part, but for a major version."""
    *before, last = path.split("/")
    return before[-1] if last.startswith("v") and last[1:].isdigit() else last


def _run(argv: Sequence[str], folder: Path) -> None:
    done = subprocess.run(argv, cwd=folder, env=go_environment(), check=False)
    if done.returncode:
        raise SystemExit(f"{folder.name} was not built: see above")


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def _alone(built: Path) -> Iterator[None]:
    """While no other process builds."""
    with (built / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Build what is named."""
    parser = argparse.ArgumentParser(description="Builds control planes for tests.")
    parser.add_argument("planes", nargs="+", choices=sorted(PLANS))
    for plane in parser.parse_args().planes:
        build(plane)


if __name__ == "__main__":
    main()
