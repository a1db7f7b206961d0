"""Certificates of tests: authorities, and what they sign, made by openssl."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path


def issued(folder: Path, name: str, authority: str | None = None, *, who: str = "IP:127.0.0.1") -> None:
    """`NAME.pem` and `NAME.key`, valid for two days.

    Args:
        folder: Where they are made.
        name: Of the files, and the common name.
        authority: Who signs it, by its name in the folder; None makes an authority.
        who: Its subject's alternative name, as openssl writes it.
    """
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-days", "2", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem"]
    if authority is not None:
        words += ["-addext", f"subjectAltName={who}", "-addext", "basicConstraints=critical,CA:FALSE"]
        words += ["-CA", f"{authority}.pem", "-CAkey", f"{authority}.key"]
    command = ["openssl", *words]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)


def expired(folder: Path, name: str, authority: str, *, who: str) -> None:
    """As `issued`, of a certificate whose time was over before it was made."""
    issued(folder, name, authority, who=who)
    (folder / "names").write_text(f"subjectAltName={who}\n")
    asked = ["openssl", "req", "-new", "-key", f"{name}.key", "-subj", f"/CN={name}", "-out", f"{name}.csr"]
    signed = [
        "openssl",
        "x509",
        "-req",
        "-in",
        f"{name}.csr",
        "-CA",
        f"{authority}.pem",
        "-CAkey",
        f"{authority}.key",
    ]
    signed += ["-CAcreateserial", "-days", "-1", "-extfile", "names", "-out", f"{name}.pem"]
    for words in (asked, signed):
        subprocess.run(words, cwd=folder, check=True, capture_output=True, timeout=60)


def trusting(authority: Path) -> ssl.SSLContext:
    """A client that trusts an authority which says no key usage: Python 3.13's default does not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=authority)
    return context


def workload(namespace: str, account: str = "tokenway", trust_domain: str = "cluster.local") -> str:
    """An Istio workload's identity, as `issued` takes it."""
    return f"URI:spiffe://{trust_domain}/ns/{namespace}/sa/{account}"
