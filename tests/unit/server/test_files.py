"""A path that leads to no regular file is refused at once by whoever would open it.

Without the refusal a FIFO has the reader wait for a writer, and the test for its time-out.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from extproc.config.loading import read_file
from extproc.config.sections.engines import EngineTls
from extproc.discovery.fleet import Fleet
from extproc.discovery.kubernetes.access import Access, Pem
from extproc.errors import ConfigError
from extproc.rendering import loading
from extproc.rendering.vocabulary import UnsupportedTokenizer
from extproc.server.engines.engine_tls import RequestTls
from extproc.server.listening.grpcio_server import credentials_of
from extproc.server.process.modules import ROOT
from extproc.server.sources.kubernetes_api import _tls_context, access_of
from extproc.transport import dialling
from extproc.transport.listen_tls import ListenTls, TlsFiles
from metadata_center.files import open_regular, read_regular, require_regular, write_whole
from metadata_center.sharing.redis_transport import RedisTransport
from metadata_center.sharing.redis_url import parse_url
from metadata_center.sharing.transport import TransportError
from testbed.certificates import issued
from tokenway.cli.main import main
from tokenway.simulator.replay.readers import read_trace

pytestmark = pytest.mark.timeout(60)

NOT_REGULAR = "not a regular file"


@pytest.fixture(params=["fifo", "device", "socket"])
def odd(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path that leads to no regular file, named like a configuration."""
    path = tmp_path / "tokenway.yaml"
    match request.param:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/null")
        case _:
            monkeypatch.chdir(tmp_path)  # the address of a socket has a hundred characters
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(path.name)
    return path


READERS: dict[str, Callable[[Path], object]] = {
    "open_regular": open_regular,
    "read_regular": read_regular,
    "require_regular": lambda path: require_regular(None, path),
    "trace": read_trace,
    "packed trace": lambda path: read_trace(path.rename(path.with_suffix(".gz"))),
    "listener": lambda path: ListenTls(TlsFiles(path, path)),
    "listener by grpc.aio": lambda path: credentials_of(TlsFiles(path, path)),
    "token": lambda path: dialling.content(str(path), 1024),
    "certificate": lambda path: dialling.certificate_pair(str(path), str(path)),
    "kubernetes authority": lambda path: _tls_context(Access("https://a", ca=Pem(file=str(path)))),
    "kubernetes certificate": lambda path: _tls_context(
        Access("https://a", certificate=Pem(file=str(path)), key=Pem(file=str(path)))
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused(reader: str, odd: Path) -> None:
    """Whoever reads a file that a user named says so, and what was named."""
    with pytest.raises(OSError, match=NOT_REGULAR) as refused:
        READERS[reader](odd)
    assert refused.value.filename.startswith(str(odd.with_suffix("")))


def test_a_configuration_is_refused(odd: Path) -> None:
    """Configuration and kubeconfig, each as a configuration that cannot be read."""
    with pytest.raises(ConfigError, match=f"cannot be read: {NOT_REGULAR}"):
        read_file(odd)
    with pytest.raises(ConfigError, match=f"cannot be read: {NOT_REGULAR}"):
        access_of(odd.name, None, odd.parent)


@pytest.mark.parametrize(
    "words",
    [
        ["check", "FILE"],
        ["bootstrap", "FILE"],
        ["render", "istio", "--config", "FILE"],
        ["demo", "--config", "FILE"],
        ["replay", "FILE"],
        ["replay", "sample", "--profiles", "FILE"],
    ],
    ids=" ".join,
)
def test_verbs_say_it_in_one_line(words: list[str], odd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, and one line with the path."""
    assert main([str(odd) if word == "FILE" else word for word in words]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert NOT_REGULAR in line
    assert str(odd) in line


SHIPPED = dict.fromkeys(("check", "check --print-effective", "bootstrap"), "etc/tokenway.yaml")
SHIPPED["render"] = "etc/istio/tokenway.yaml"

PIPED: dict[str, list[str]] = {
    "check": ["check"],
    "check --print-effective": ["check", "--print-effective"],
    "bootstrap": ["bootstrap"],
    "render": ["render", "istio", "--config"],
}


@pytest.mark.parametrize("name", ["/dev/fd/N", "/proc/self/fd/N", "-"])
@pytest.mark.parametrize("verb", PIPED)
def test_what_is_read_once_may_be_a_pipe(
    verb: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tokenway check <(...)` and `... | tokenway check -`: as the file itself, but for its name."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / SHIPPED[verb]).read_text()
    (tmp_path / "clusters.json").write_text((ROOT / "etc/clusters.json").read_text())
    Path("tokenway.yaml").write_text(text)
    ours, theirs = os.pipe()
    os.write(theirs, text.encode())
    os.close(theirs)
    stdin = os.dup(0)
    os.dup2(ours, 0)
    try:
        path = "/dev/stdin" if name == "-" else name.replace("N", str(ours))
        by_pipe = main([*PIPED[verb], name.replace("N", str(ours))]), *capsys.readouterr()
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
        os.close(ours)
    by_file = main([*PIPED[verb], "tokenway.yaml"]), *capsys.readouterr()
    assert by_file[0] == 0
    assert by_pipe == (0, *(said.replace("tokenway.yaml", path) for said in by_file[1:]))


@pytest.mark.parametrize("words", [["serve"], ["demo", "--config"]], ids=" ".join)
def test_what_is_read_again_may_be_none(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The sentence says why, and the words count as misuse."""
    ours, theirs = os.pipe()
    for name in (f"/dev/fd/{ours}", "-"):
        with pytest.raises(SystemExit) as ended:
            main([*words, name])
        assert ended.value.code == 2
        assert f"`{name}` is a pipe; accepted: a file, which is read again" in capsys.readouterr().err
    os.close(ours)
    os.close(theirs)


def test_a_clusters_file_is_refused(odd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file that a configuration names, by the name of that file."""
    clusters = odd.rename(odd.with_name("clusters.json"))
    odd.write_text("version: 1\n")
    assert main(["check", str(odd)]) == 1
    assert capsys.readouterr().err == f"{clusters}: cannot be read: {NOT_REGULAR}\n"


def test_a_tokenizer_is_refused(odd: Path) -> None:
    """The file of a tokenizer folder: the model is matched by bytes, as where there is none."""
    odd.rename(odd.with_name("tokenizer.json"))
    with pytest.raises(UnsupportedTokenizer, match=NOT_REGULAR):
        loading.load(odd.parent)


def test_certificates_for_engines_are_named_in_the_log(odd: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Probes of the cluster fail, and the gateway serves the others."""
    with caplog.at_level(logging.ERROR):
        RequestTls(Fleet()).configure({"a": EngineTls(ca_file=str(odd), server_name="engine.internal")})
    [record] = caplog.records
    assert NOT_REGULAR in record.__dict__["reason"]


async def test_certificates_for_redis_are_refused(odd: Path) -> None:
    """The connection fails like one that is refused: the event loop does not wait for a writer."""
    transport = RedisTransport(parse_url(f"rediss://127.0.0.1:1/?ca_certs={odd}"), prefix="tokenway")
    try:
        with pytest.raises(TransportError, match=NOT_REGULAR):
            await transport.snapshot()
    finally:
        await transport.close()


def test_a_link_to_a_regular_file_is_one(tmp_path: Path) -> None:
    """As Kubernetes mounts them."""
    issued(tmp_path, "gateway")
    for name in ("pem", "key"):
        (tmp_path / f"tls.{name}").symlink_to(tmp_path / f"gateway.{name}")
    require_regular(tmp_path / "tls.pem", None, tmp_path / "tls.key")
    assert read_regular(tmp_path / "tls.pem") == (tmp_path / "gateway.pem").read_bytes()
    ListenTls(TlsFiles(tmp_path / "tls.pem", tmp_path / "tls.key")).context()


def test_a_folder_and_a_missing_file_keep_their_words(tmp_path: Path) -> None:
    """What the system says of them is said."""
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "missing")


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk left half a manifest, and an error without a name."""
    path = tmp_path / "gateway.yaml"
    write_whole(path, "before")
    path.chmod(0o600)
    write, mode = Path.write_bytes, 0o600

    def half(to: Path, content: bytes) -> int:
        write(to, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="No space left") as raised:
            write_whole(path, "what comes after")
    assert raised.value.filename == str(path)
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    write_whole(path, "after")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("after", mode)


def test_what_is_no_file_of_ones_own_is_written_to_as_it_is(tmp_path: Path) -> None:
    """A link, /dev/stdout for one, stays one; a device is none the less named when it is full."""
    (tmp_path / "real").write_text("before")
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", b"after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "after"
    with pytest.raises(OSError, match="No space left") as raised:
        write_whole(Path("/dev/full"), "x")
    assert raised.value.filename == "/dev/full"
