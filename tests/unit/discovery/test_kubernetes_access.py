"""Credentials of a pod and of a kubeconfig: what is read, what is refused, what is not shown."""

from __future__ import annotations

import base64
from typing import Any

import pytest
import yaml

from extproc.discovery.kubernetes.access import ACCOUNT_FOLDER, Access, Pem, of_kubeconfig, of_pod
from extproc.errors import ConfigError

PATH = "/etc/kube/config"


def kubeconfig(user: Any = None, **cluster: Any) -> str:
    """A file of one context."""
    return yaml.safe_dump(
        {
            "current-context": "here",
            "contexts": [
                {"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "models"}},
                {"name": "there", "context": {"cluster": "d", "user": "u"}},
            ],
            "clusters": [
                {"name": "c", "cluster": {"server": "https://10.0.0.1:6443/", **cluster}},
                {"name": "d", "cluster": {"server": "https://[2001:db8::1]:6443"}},
            ],
            "users": [{"name": "u", "user": user or {"token": "s3cret"}}],
        }
    )


def refusal(text: str, context: str | None = None) -> str:
    """What is said against a file."""
    with pytest.raises(ConfigError) as error:
        of_kubeconfig(text, PATH, context)
    return "; ".join(error.value.problems)


def test_a_pod() -> None:
    """What every container finds."""
    environment = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    assert of_pod(environment, "models") == Access(
        "https://[fd00::1]:443",
        ca=Pem(f"{ACCOUNT_FOLDER}/ca.crt"),
        token_file=f"{ACCOUNT_FOLDER}/token",
        namespace="models",
    )
    with pytest.raises(ConfigError, match="KUBERNETES_SERVICE_HOST"):
        of_pod({}, None)


def test_a_kubeconfig() -> None:
    """Its current context, or another."""
    access = of_kubeconfig(kubeconfig(**{"certificate-authority": "ca.crt", "tls-server-name": "kube"}), PATH)
    assert access == Access(
        "https://10.0.0.1:6443",
        ca=Pem("/etc/kube/ca.crt"),
        server_name="kube",
        token="s3cret",
        namespace="models",
    )
    other = of_kubeconfig(kubeconfig(), PATH, "there")
    assert (other.server, other.namespace) == ("https://[2001:db8::1]:6443", None)


def test_kinds_of_credentials() -> None:
    """Files relative to the kubeconfig, data in it; a token's file goes before a token."""
    data = base64.b64encode(b"PEM").decode()
    access = of_kubeconfig(
        kubeconfig(
            {"client-certificate": "/a/b.crt", "client-key-data": data},
            **{"certificate-authority-data": data},
        ),
        PATH,
    )
    assert (access.certificate, access.key, access.ca) == (
        Pem("/a/b.crt"),
        Pem(data=b"PEM"),
        Pem(data=b"PEM"),
    )
    access = of_kubeconfig(kubeconfig({"token": "x", "tokenFile": "t"}), PATH)
    assert (access.token, access.token_file) == (None, "/etc/kube/t")
    assert not of_kubeconfig(kubeconfig(**{"insecure-skip-tls-verify": True}), PATH).is_verified
    assert of_kubeconfig(kubeconfig(server="http://127.0.0.1:8001"), PATH).server == "http://127.0.0.1:8001"


def test_secrets_are_not_shown() -> None:
    """Not even in a trace."""
    data = base64.b64encode(b"PRIVATE").decode()
    access = of_kubeconfig(
        kubeconfig({"token": "s3cret", "client-key-data": data, "client-certificate": "c"}), PATH
    )
    assert "s3cret" not in repr(access)
    assert "PRIVATE" not in repr(access)


MERGED = "\n".join(
    ["x0: &a0 {k: 1}", *(f"x{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 11))]
)
"""Ten billion values."""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not valid YAML"),
        ("a: 2001-99-99", "cannot be read as timestamp"),
        ("a: !!bool maybe", "cannot be read as bool"),
        ("[" * 5_000, "nested too deep"),
        (MERGED, "expands without end"),
        (kubeconfig({"token": "s3cret\nother"}), "users: token: no token; accepted: one line"),
        ("[]", "no kubeconfig"),
        ("{}", "current-context"),
        ("current-context: x", "nothing is named `x`"),
        (kubeconfig({"exec": {"command": "aws"}}), "exec: programs that make credentials are not run"),
        (kubeconfig({"auth-provider": {"name": "gcp"}}), "auth-provider"),
        (kubeconfig({"username": "a", "password": "b"}), "username"),
        (kubeconfig({"token": "x", "as": "root"}), "as: not done"),
        (kubeconfig({"client-certificate": "c"}), "client-certificate and client-key, or neither"),
        (kubeconfig({"client-certificate": "c", "client-key-data": "%%"}), "client-key-data: not base64"),
        (kubeconfig(server="http://10.0.0.1:8080"), "clear text"),
        (kubeconfig(server="ftp://x"), "not a URL"),
        (kubeconfig(server="https://a:b@x"), "not a URL"),
        (kubeconfig(server="https://x:99999"), "not a URL"),
        (kubeconfig(**{"proxy-url": "http://p"}), "proxy-url"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    """By name, with what is accepted."""
    assert words in refusal(text)
    assert "s3cret" not in refusal(text)


def test_a_context_that_is_not_there() -> None:
    """Is named."""
    assert "nothing is named `nowhere`" in refusal(kubeconfig(), "nowhere")
