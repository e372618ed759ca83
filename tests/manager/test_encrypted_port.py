"""A manager with a certificate: TLS from the first byte or behind an upgrade, no plain session, probes as ever."""

import contextlib
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from peers import UPGRADE, Client, Manager, ended, eventually, lab, running_manager, self_signed
from tpvpn.errors import ManagerError
from tpvpn.lab import Lab
from tpvpn.manager.server import PATIENCE
from tpvpn.proto.session import Offer

__all__ = ["lab"]
ENCRYPTED = UPGRADE.replace(b"Upgrade: tpvpn", b"Upgrade: tpvpn-tls")


@pytest.fixture(scope="module")
def manager(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    directory = tmp_path_factory.mktemp("encrypted")
    made = self_signed(directory, "manager")
    context = ssl.create_default_context(cafile=str(made.certificate))
    context.check_hostname = False
    with running_manager(lab, directory, *made.options) as manager:
        manager.tls = (context, made.digest)
        yield manager


class Inner(Client):
    """A client behind the upgrade to TLS, which asks for nothing more."""

    def upgrade(self) -> None:
        pass


def switched(connected: socket.socket) -> bytes:
    """Read the answer's head and not a byte more: TLS begins there."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += connected.recv(1)
    return head


@contextlib.contextmanager
def inside(manager: Manager, token: bytes | None = None, certificate: bytes | None = None) -> Iterator[Inner]:
    """A session whose TLS begins behind the 101."""
    assert manager.tls
    connected = manager.dial()
    connected.sendall(ENCRYPTED)
    assert b"\r\nUpgrade: tpvpn-tls\r\n" in switched(connected)
    with contextlib.closing(Inner(manager.tls[0].wrap_socket(connected))) as client:
        client.shake_hands(token or manager.token, Offer("inner"), certificate or manager.tls[1])
        yield client


def test_probes_are_answered_without_tls(manager: Manager) -> None:
    assert manager.get("/healthz")[::2] == (200, "ok\n")
    assert manager.get("/metrics")[0] == 200
    assert manager.tls
    with manager.tls[0].wrap_socket(manager.dial()) as connected:
        connected.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert connected.recv(100).startswith(b"HTTP/1.1 200 ")


def test_no_session_is_plain(manager: Manager) -> None:
    asked = "Connection: Upgrade\r\nUpgrade: tpvpn\r\n"
    status, head, body = manager.get("/v1/session", head=asked)
    assert (status, body) == (426, "it takes encrypted sessions alone: use tls:// and the pin of its certificate\n")
    assert "\r\nUpgrade: tpvpn-tls" in head
    assert manager.get("/v1/session")[2] == "ask for an upgrade to tpvpn-tls\n"


def test_tls_begins_behind_the_upgrade(manager: Manager) -> None:
    with inside(manager) as client, manager.session() as direct:
        assert client.echo()
        assert direct.echo()
        for name in ("inner", "laptop"):
            manager.says(f"event=session-open .* user=ann client={name} .* security=tls version=1")
    with pytest.raises(ManagerError, match="token"), inside(manager, certificate=bytes(32)):
        pass


def test_tls_begins_in_the_same_breath_as_the_request(manager: Manager) -> None:
    """A client that does not wait for the 101, and whose packets arrive together."""
    assert manager.tls
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = manager.tls[0].wrap_bio(incoming, outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    with manager.dial() as connected:
        connected.sendall(ENCRYPTED + outgoing.read())
        switched(connected)
        while tls.version() is None:
            incoming.write(connected.recv(1 << 16))
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
        assert tls.version() == "TLSv1.3"


def test_not_twice(manager: Manager) -> None:
    assert manager.tls
    with manager.tls[0].wrap_socket(manager.dial()) as connected:
        connected.sendall(ENCRYPTED)
        assert switched(connected).startswith(b"HTTP/1.1 426 ")


def test_strangers_behind_the_upgrade_cost_bounded_time(manager: Manager) -> None:
    quiet = manager.descriptors()
    with inside(manager) as client, contextlib.ExitStack() as stack:
        strangers: list[socket.socket] = []
        for garbage in (b"", b"\x16\x03\x01", os.urandom(3000), b"\x16\x03\x03\x40\x00" + bytes(1 << 16)):
            strangers.append(stack.enter_context(manager.dial()))
            strangers[-1].sendall(ENCRYPTED)
            switched(strangers[-1])
            with contextlib.suppress(ConnectionError):
                strangers[-1].sendall(garbage)
        for connected in strangers:
            ended(connected, PATIENCE + 1.5)
        assert client.echo()
    eventually(lambda: manager.descriptors() <= quiet, 2, "descriptors are given back")


def test_a_manager_without_a_certificate_says_so(lab: Lab, tmp_path: Path) -> None:
    with running_manager(lab, tmp_path, "--exit", "socket") as manager:
        status, head, body = manager.get("/v1/session", head="Connection: Upgrade\r\nUpgrade: tpvpn-tls\r\n")
        assert (status, "\r\nUpgrade: tpvpn" in head) == (426, True)
        assert body == "it has no certificate to encrypt with: start it with --tls-cert and --tls-key\n"
