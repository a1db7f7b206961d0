"""How the API server is reached and what proves who asks: of a pod, or of a kubeconfig file. Pure.

Rules:
    1. What a kubeconfig can say and is not done here is refused by name; nothing is left out in silence.
    2. Credentials go to a server whose certificate is checked, or to loopback, and nowhere else, unless the
       kubeconfig says `insecure-skip-tls-verify`.
    3. No credential is in a `repr` or in an error.

Source: client-go, tools/clientcmd/api/v1; Kubernetes, "Accessing the API from a Pod".
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from extproc.config.notation import read_yaml
from extproc.discovery.kubernetes.fields import mapping_at
from extproc.errors import ConfigError
from metadata_center.addresses import in_brackets, ip_or_none, is_loopback
from metadata_center.tokens import bearer

ACCOUNT_FOLDER: Final = "/var/run/secrets/kubernetes.io/serviceaccount"
"""Where a pod finds its token, the CA and its namespace."""

HOST_ENV: Final = "KUBERNETES_SERVICE_HOST"
PORT_ENV: Final = "KUBERNETES_SERVICE_PORT"

_NOT_DONE: Final = {
    "exec": "programs that make credentials are not run; accepted: token, tokenFile, client-certificate",
    "auth-provider": "gone from Kubernetes itself; accepted: token, tokenFile, client-certificate",
    "username": "gone from Kubernetes itself; accepted: token, tokenFile, client-certificate",
    "as": "not done; accepted: credentials of its own",
    "as-groups": "not done; accepted: credentials of its own",
}


@dataclass(frozen=True, slots=True)
class Pem:
    """A PEM text in a file, or itself; both None if there is none."""

    file: str | None = None
    data: bytes | None = field(default=None, repr=False)

    def __bool__(self) -> bool:
        return self.file is not None or self.data is not None


@dataclass(frozen=True, slots=True)
class Access:
    """How the API is reached.

    Attributes:
        server: URL without a slash at its end.
        ca: That signed its certificate; none takes the system's.
        is_verified: Its certificate is checked.
        server_name: In its certificate; None is the host of `server`.
        token: Shown as it is; None if there is none, or `token_file` has it.
        token_file: Read again and again: tokens of pods are renewed.
        certificate: Shown to the server.
        key: Of the certificate.
        namespace: Its own; None if it is not said.
    """

    server: str
    ca: Pem = Pem()
    is_verified: bool = True
    server_name: str | None = None
    token: str | None = field(default=None, repr=False)
    token_file: str | None = None
    certificate: Pem = Pem()
    key: Pem = Pem()
    namespace: str | None = None


def of_pod(environment: Mapping[str, str], namespace: str | None, folder: str = ACCOUNT_FOLDER) -> Access:
    """As a pod.

    Args:
        environment: Its variables.
        namespace: What its file of that name says; None if there is none.
        folder: Of its service account.

    Raises:
        ConfigError: This is no pod.
    """
    host, port = environment.get(HOST_ENV, ""), environment.get(PORT_ENV, "")
    if not host or not port:
        problem = (
            f"{HOST_ENV} is not set: this is no pod; accepted: a pod, or discovery.kubernetes.kubeconfig"
        )
        raise ConfigError("discovery.kubernetes", [problem])
    return Access(
        f"https://{in_brackets(host)}:{port}",
        ca=Pem(f"{folder}/ca.crt"),
        token_file=f"{folder}/token",
        namespace=namespace,
    )


def of_kubeconfig(text: str, path: str, context: str | None = None) -> Access:
    """As a kubeconfig says.

    Args:
        text: The whole file.
        path: Its name, for messages; names of files in it are relative to its folder.
        context: Which of its contexts; None is the current one.

    Raises:
        ConfigError: It is none, or wants what is not done here.
    """
    said = read_yaml(text, path).data
    if not isinstance(said, dict):
        raise ConfigError(path, ["no kubeconfig: accepted: clusters, users, contexts, current-context"])
    name = context if context is not None else _text(said, "current-context")
    if name is None:
        raise ConfigError(path, ["no current-context; accepted: one, or discovery.kubernetes.context"])
    chosen = _named(said, "contexts", "context", name, path)
    cluster = _named(said, "clusters", "cluster", _text(chosen, "cluster") or "", path)
    user_name = _text(chosen, "user")
    user = {} if user_name is None else _named(said, "users", "user", user_name, path)
    folder = path.rpartition("/")[0] or "."
    problems = [f"users: {key}: {why}" for key, why in _NOT_DONE.items() if user.get(key)]
    if cluster.get("proxy-url"):
        problems.append("clusters: proxy-url: not done; accepted: a server that is reached without")
    server = (_text(cluster, "server") or "").rstrip("/")
    problem = _problem_of(server)
    if problem is not None:
        problems.append(f"clusters: server: {problem}")
    certificate = _pem(user, "client-certificate", folder, path)
    key = _pem(user, "client-key", folder, path)
    if bool(certificate) is not bool(key):
        problems.append("users: accepted: client-certificate and client-key, or neither")
    token = _text(user, "token")
    if token is not None:
        try:
            token = bearer(token)
        except ValueError as error:
            problems.append(f"users: token: {error}")
    if problems:
        raise ConfigError(path, problems)
    token_file = _text(user, "tokenFile")
    return Access(
        server,
        ca=_pem(cluster, "certificate-authority", folder, path),
        is_verified=cluster.get("insecure-skip-tls-verify") is not True,
        server_name=_text(cluster, "tls-server-name"),
        token=None if token_file is not None else token,
        token_file=None if token_file is None else _beside(token_file, folder),
        certificate=certificate,
        key=key,
        namespace=_text(chosen, "namespace"),
    )


def _problem_of(server: str) -> str | None:
    try:
        parts = urlsplit(server)
        host = parts.hostname or ""
        is_good = bool(host) and parts.username is None and (parts.port is None or parts.port > 0)
    except ValueError:
        is_good = False
    if not is_good or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        return "not a URL; accepted: text like `https://10.0.0.1:6443`"
    if parts.scheme == "http" and host != "localhost" and not is_loopback(ip_or_none(host) or ""):
        return "credentials would go in clear text; accepted: https, or http to loopback"
    return None


def _named(said: Mapping[str, Any], many: str, one: str, name: str, path: str) -> Mapping[str, Any]:
    entries = said.get(many)
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and entry.get("name") == name:
            return mapping_at(entry, one)
    raise ConfigError(path, [f"{many}: nothing is named `{name}`"])


def _pem(section: Mapping[str, Any], name: str, folder: str, path: str) -> Pem:
    data, file = _text(section, f"{name}-data"), _text(section, name)
    if data is not None:
        try:
            return Pem(data=b64decode(data, validate=True))
        except (binascii.Error, ValueError):
            raise ConfigError(path, [f"{name}-data: not base64"]) from None
    return Pem() if file is None else Pem(_beside(file, folder))


def _beside(file: str, folder: str) -> str:
    return file if file.startswith("/") else f"{folder}/{file}"


def _text(section: Mapping[str, Any], name: str) -> str | None:
    value = section.get(name)
    return value if isinstance(value, str) and value else None
