"""What a real redis-server refuses is said with what to do, and by the keys of the configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from ssl import SSLCertVerificationError

import pytest
from redis.exceptions import AuthenticationError, ClusterDownError, ResponseError

from extproc.config.sections.sharing import MetadataCenter
from extproc.server.exchanging.sharing import transport_of
from metadata_center.sharing.messages import Row, Update, member_id
from metadata_center.sharing.redis_faults import explained
from metadata_center.sharing.redis_transport import RedisTransport
from metadata_center.sharing.redis_url import parse_url
from metadata_center.sharing.transport import TransportError
from metadata_center.types import EndpointKey
from testbed.redis_server import RedisServer, running

UPDATE = Update(member_id("gw1", 0, "x"), 1, (Row(EndpointKey("10.0.0.1:8000"), 1),), True, 6.0, (), False)

WEAK = ("reset", "resetchannels", "on", ">s3cret", "~{tokenway}:*", "&{tokenway}:*")
SET_UP: dict[str, Sequence[Sequence[str]]] = {
    "open": (),
    "closed": (("CONFIG", "SET", "requirepass", "s3cret"),),
    "full": (("CONFIG", "SET", "maxmemory", "1000"),),
    "replica": (("REPLICAOF", "127.0.0.1", "1"),),
    "mute": (("ACL", "SETUSER", "gw", *WEAK),),
    "by script": (("ACL", "SETUSER", "gw", *WEAK, "+evalsha", "+eval", "+publish"),),
}


@pytest.fixture
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """One that was set up."""
    with running(tmp_path) as server:
        for command in SET_UP[request.param]:
            assert server.command(*command) == b"+OK\r\n"
        yield server


@pytest.mark.parametrize(
    ("server", "url", "says"),
    [
        ("closed", "redis://{}", "metadata_center.password_env"),
        ("closed", "redis://:wr0ng@{}", "metadata_center.password_env"),
        ("closed", "redis://gw:wr0ng@{}", "metadata_center.username"),
        ("open", "redis://:wr0ng@{}", "the server has no password"),
        ("open", "redis://{}/99", "the number at the end of metadata_center.url"),
        ("open", "redis+sentinel://{}/main", "metadata_center.url names a server where a sentinel should be"),
        ("open", "rediss://{}?ca_certs=/none.pem", "ca_certs, certfile and keyfile in metadata_center.url"),
        (
            "closed",
            "redis+sentinel://{}/main?sentinel_password=wr0ng",
            "see sentinel_username in",
        ),
        (
            "open",
            "redis+sentinel://{}/main?sentinel_password=wr0ng",
            "sentinel_password_env",
        ),
        ("replica", "redis://{}", "for the master, or for sentinels"),
        ("full", "redis://{}", "raise maxmemory"),
        ("mute", "redis://gw:s3cret@{}", "the rights that docs/metadata-center.md lists"),
        ("by script", "redis://gw:s3cret@{}", "the rights that docs/metadata-center.md lists"),
    ],
    indirect=["server"],
)
async def test_a_refusal_says_what_to_do(server: RedisServer, url: str, says: str) -> None:
    """And shows no password."""
    transport = RedisTransport(parse_url(url.format(server.url.removeprefix("redis://"))))
    try:
        with pytest.raises(TransportError) as refused:
            async with asyncio.timeout(10):
                await transport.publish(UPDATE)
    finally:
        await transport.close()
    assert says in str(refused.value)
    assert "s3cret" not in str(refused.value)
    assert "wr0ng" not in str(refused.value)


FAILED = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: "


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (
            SSLCertVerificationError(1, FAILED + "Hostname mismatch, certificate is not valid for 'a'."),
            "other names",
        ),
        (
            SSLCertVerificationError(1, FAILED + "IP address mismatch, certificate is not valid for '::1'."),
            "names",
        ),
        (SSLCertVerificationError(1, FAILED + "certificate has expired (_ssl.c:1006)"), "a new certificate"),
        (SSLCertVerificationError(1, FAILED + "self-signed certificate"), "against ca_certs"),
        (
            ResponseError("Error running script: attempted to access a non local key in a cluster node"),
            "moves",
        ),
        (ClusterDownError("The cluster is down"), "when the cluster is whole"),
    ],
)
def test_what_a_cluster_or_tls_says_has_a_hint_of_its_own(fault: Exception, says: str) -> None:
    """In the words that they were seen to use."""
    assert says in explained(fault, ())


async def test_the_sentinels_password_is_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of real ones that ask for it; without it the hint names the setting."""
    monkeypatch.setenv("OF_SENTINELS", "s3cret")
    folder = tmp_path / "sentinel"
    folder.mkdir()
    with running(tmp_path) as master:
        (folder / "sentinel.conf").write_text(f"sentinel monitor main 127.0.0.1 {master.port} 1\n")
        with running(folder, sentinel=True) as sentinel:
            assert sentinel.command("ACL", "SETUSER", "default", "resetpass", ">s3cret") == b"+OK\r\n"
            url = f"redis+sentinel://127.0.0.1:{sentinel.port}/main"
            told = transport_of(MetadataCenter(url=url, sentinel_password_env="OF_SENTINELS"), "x")
            untold = transport_of(MetadataCenter(url=url), "x")
            try:
                async with asyncio.timeout(10):
                    await told.publish(UPDATE)
                    with pytest.raises(TransportError, match="sentinel_password_env names"):
                        await untold.publish(UPDATE)
            finally:
                await told.close()
                await untold.close()


def test_a_sentinel_has_a_login_of_its_own() -> None:
    """One that wants a password is not given that of the server, and the hint names which."""
    fault = AuthenticationError("Authentication required.")
    assert "the sentinel wants a login: sentinel_username in metadata_center.url and" in explained(
        fault, (), by_sentinel=True
    )
    assert "metadata_center.password_env" in explained(fault, ())
