"""The ways to a manager, against servers that are one, are another thing, or are nothing; in a namespace of its own."""

import asyncio
import contextlib
import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peers import SWITCH, Certificate, Wire, self_signed
from pod import inside, namespace
from tpvpn.errors import ManagerError, UsageError
from tpvpn.transport import tcp
from tpvpn.transport.inner_tls import InnerTlsStream
from tpvpn.transport.stream import Stream
from tpvpn.transport.tcp import Direct, Endpoint, parse_endpoint
from tpvpn.transport.upgrade import MAX_HEAD

Handler = Callable[[socket.socket], None]
HOST, HOST6 = "127.0.0.1", "::1"
PIN = "sha256:" + "0f" * 32


# -- URLs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("tcp://192.0.2.10:7070", "192.0.2.10", 7070),
        ("tls://manager.example.org:443/", "manager.example.org", 443),
        ("tls://[2001:db8::1]:7070", "2001:db8::1", 7070),
        ("tcp://[::ffff:192.0.2.1]:1", "::ffff:192.0.2.1", 1),
        ("tcp://localhost:65535", "localhost", 65535),
    ],
)
def test_urls(url: str, host: str, port: int) -> None:
    endpoint = parse_endpoint(url)
    assert (endpoint.host, endpoint.port, endpoint.tls, endpoint.pin) == (host, port, url.startswith("tls"), None)
    assert endpoint.url == url.removesuffix("/")
    assert parse_endpoint(endpoint.url) == endpoint


@pytest.mark.parametrize(
    "url",
    [
        *("", "manager", "192.0.2.10:7070", "http://192.0.2.10:7070", "tcp:192.0.2.10:7070", "tcp://192.0.2.10"),
        *("tcp://192.0.2.10:", "tcp://192.0.2.10:0", "tcp://192.0.2.10:65536", "tcp://192.0.2.10:1e3", "tcp://:7070"),
        *("tcp://2001:db8::1:7070", "tcp://[2001:db8::1]", "tcp://[::zz]:1", "tcp://[:::::]:1", "tcp://[1.2.3.4]:1"),
        *("tcp://ann@192.0.2.10:7070", "tcp://a b:1", "tcp://a/b:1", "tls://a:1/path", "tls://a:1?x", " tcp://a:1"),
        *("tcp://a..b:1", f"tcp://{'x' * 64}:1", "tcp://\udcff:1", "tcp://a:٣"),
    ],
)
def test_urls_that_name_no_manager(url: str) -> None:
    with pytest.raises(UsageError, match="write tcp://HOST:PORT or tls://HOST:PORT"):
        parse_endpoint(url)


@given(st.text(max_size=30) | st.from_regex(r"(tcp|tls)://[^\n]{0,20}:\d{0,6}/?", fullmatch=True))
def test_any_text_is_a_url_or_a_usage_error(url: str) -> None:
    with contextlib.suppress(UsageError):
        assert 0 < parse_endpoint(url).port < 65536


@pytest.mark.parametrize("pin", [PIN, PIN.upper().replace("SHA", "sha"), "sha256:" + ":".join(["0F"] * 32)])
def test_pins(pin: str) -> None:
    assert parse_endpoint("tls://a:1", pin).pin == bytes([15]) * 32


@pytest.mark.parametrize(
    "pin", ["", "sha256:", "0f" * 32, "sha1:" + "0f" * 20, PIN + "00", PIN[:-1] + "g", "sha256:" + "é" * 64]
)
def test_pins_that_are_none(pin: str) -> None:
    with pytest.raises(UsageError, match="is no pin: write sha256:"):
        parse_endpoint("tls://a:1", pin)


@pytest.mark.parametrize("pin", ["", PIN])
def test_a_pin_wants_tls(pin: str) -> None:
    with pytest.raises(UsageError, match="--tls-pin needs a manager at tls://HOST:PORT"):
        parse_endpoint("tcp://a:1", pin)


# -- dialling ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place() -> Iterator[str]:
    with namespace("transport") as name:
        yield name


@contextlib.contextmanager
def serving(place: str, handle: Handler, host: str = HOST) -> Iterator[int]:
    """A server whose every connection is `handle`d in turn; its port."""
    with inside(place):
        listening = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connected, _ = listening.accept()
                connected.settimeout(10)
                with connected, contextlib.suppress(OSError, EOFError):
                    handle(connected)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def dialled(place: str, endpoint: Endpoint, *addresses: str) -> bytes:
    """Dial, and give back what came early."""

    async def scenario() -> bytes:
        transport = Direct(endpoint)
        stream, early = await transport.dial(list(addresses) or await transport.resolve())
        stream.close()
        return early

    with inside(place):
        return asyncio.run(scenario())


def answering(text: bytes) -> Handler:
    def handle(connected: socket.socket) -> None:
        Wire(connected).head()
        connected.sendall(text)

    return handle


def resetting(connected: socket.socket) -> None:
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def banner(connected: socket.socket) -> None:
    connected.sendall(b"SSH-2.0-OpenSSH_9.9\x1b[2J\r\n")
    connected.recv(100)


def test_a_manager_is_found_behind_addresses_that_do_not_answer(place: str) -> None:
    with serving(place, answering(SWITCH + b"early")) as port:
        assert dialled(place, Endpoint(False, "manager", port), "::1", "127.0.0.2", HOST) == b"early"


@pytest.mark.parametrize(
    ("handle", "said"),
    [
        (answering(b"HTTP/1.1 200 OK\r\n\r\nhi"), "no tpvpn manager, or not on this port: it answered HTTP 200 OK"),
        (answering(b"HTTP/1.0 404 Not Found\r\n\r\n"), "it answered HTTP 404 Not Found"),
        (answering(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"), "switched to another protocol"),
        (answering(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"), "switched to another protocol"),
        (answering(b"HTTP/2 200\r\n\r\n"), "it answered 'HTTP/2 200' instead of HTTP"),
        (answering(b"HTTP/1.1\r\n\r\n"), "it answered"),
        (answering(b"\0\0\0\x12\4\0\0\0\0\0\0\0\0\0"), "it answered"),
        (answering(b"HTTP/1.1 101 x\r\n" + b"X: y\r\n" * MAX_HEAD), "it answered"),
        (answering(b"HTT"), "closed the connection after 'HTT': is a tpvpn manager listening there?"),
        (answering(b"HTTP/1.1 101 Switching"), "closed the connection after"),
        (answering(b""), "closed the connection without a word"),
        (banner, "it answered 'SSH-2.0-OpenSSH_9.9?[2J??' instead of HTTP"),
        (resetting, "Connection reset by peer"),
    ],
)
def test_servers_that_are_no_manager(place: str, handle: Handler, said: str) -> None:
    with serving(place, handle) as port, pytest.raises(ManagerError) as caught:
        dialled(place, Endpoint(False, HOST, port))
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


def test_nobody_at_all(place: str) -> None:
    with pytest.raises(ManagerError) as caught:
        dialled(place, Endpoint(False, "manager", 9), HOST, HOST6, "203.0.113.1")
    for said in (f"{HOST}: Connection refused", f"{HOST6}: Connection refused", "203.0.113.1: Network is unreachable"):
        assert said in str(caught.value)


def test_a_server_that_is_slow_or_silent_costs_bounded_time(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "CONNECT_TIMEOUT", 0.5)

    def dripping(connected: socket.socket) -> None:
        for byte in b"HTTP/1.1 101 Switching Protocols, but at a pace that tries any patience":
            connected.sendall(bytes([byte]))
            connected.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                while connected.recv(1000):
                    pass

    def silent(connected: socket.socket) -> None:
        while connected.recv(1000):
            pass

    for handle in (dripping, silent):
        with serving(place, handle) as port, pytest.raises(ManagerError, match="did not answer within"):
            dialled(place, Endpoint(False, HOST, port))


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 64, "\udcff", "."])
def test_hosts_that_are_none(place: str, host: str) -> None:
    with pytest.raises(ManagerError, match="cannot find the manager's host"):
        dialled(place, Endpoint(True, host, 1))


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return self_signed(tmp_path_factory.mktemp("tls"), "manager", f"IP:{HOST},IP:{HOST6},DNS:manager.example")


def over_tls(made: Certificate, handle: Handler, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> Handler:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, made.key)
    context.maximum_version = newest

    def secured(connected: socket.socket) -> None:
        with contextlib.suppress(ssl.SSLError), context.wrap_socket(connected, server_side=True) as tls:
            handle(tls)

    return secured


@pytest.mark.parametrize("host", [HOST, HOST6])
def test_the_pinned_certificate(place: str, made: Certificate, host: str) -> None:
    with serving(place, over_tls(made, answering(SWITCH + b"x")), host) as port:
        assert dialled(place, Endpoint(True, host, port, made.digest)) == b"x"


def test_another_certificate_than_the_pinned(place: str, made: Certificate) -> None:
    with serving(place, over_tls(made, answering(SWITCH))) as port, pytest.raises(ManagerError) as caught:
        dialled(place, Endpoint(True, HOST, port, bytes(32)))
    assert f"is not the pinned one: it has {made.pin}" in str(caught.value)


def test_a_certificate_that_nobody_vouches_for(place: str, made: Certificate) -> None:
    with serving(place, over_tls(made, answering(SWITCH))) as port, pytest.raises(ManagerError, match="--tls-pin"):
        dialled(place, Endpoint(True, HOST, port))


def test_a_certificate_that_the_system_trusts(place: str, made: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(made.certificate))
    with serving(place, over_tls(made, answering(SWITCH))) as port:
        assert dialled(place, Endpoint(True, HOST, port)) == b""
        assert dialled(place, Endpoint(True, "manager.example", port), HOST) == b""
        with pytest.raises(ManagerError, match="Hostname mismatch"):
            dialled(place, Endpoint(True, "other.example", port), HOST)


def test_tls_1_2_is_refused(place: str, made: Certificate) -> None:
    handle = over_tls(made, answering(SWITCH), ssl.TLSVersion.TLSv1_2)
    with serving(place, handle) as port, pytest.raises(ManagerError, match="does not speak TLS as expected"):
        dialled(place, Endpoint(True, HOST, port, made.digest))


@pytest.mark.parametrize("text", [b"SSH-2.0-OpenSSH_9.9\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03", b""])
def test_tls_to_a_server_that_has_none(place: str, text: bytes) -> None:
    def handle(connected: socket.socket) -> None:
        connected.recv(1000)
        connected.sendall(text)

    with serving(place, handle) as port, pytest.raises(ManagerError, match=r"as expected|reset by peer|in the middle"):
        dialled(place, Endpoint(True, HOST, port, bytes(32)))


def test_plain_to_a_server_that_speaks_tls(place: str, made: Certificate) -> None:
    with serving(place, over_tls(made, answering(SWITCH))) as port, pytest.raises(ManagerError, match=HOST):
        dialled(place, Endpoint(False, HOST, port))


# -- streams -----------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def tls_pair(made: Certificate):
    """The two ends of a TLS connection: a stream, and a blocking socket for another thread."""
    left, right = socket.socketpair()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made.certificate, made.key)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    stream = InnerTlsStream(Stream(left), client)
    other = asyncio.create_task(asyncio.to_thread(server.wrap_socket, right, server_side=True))
    await stream.handshake()
    peer = await other
    try:
        yield stream, peer
    finally:
        stream.close()
        peer.close()


def test_what_was_decrypted_before_an_error_is_not_lost(made: Certificate) -> None:
    """A goodbye and a broken connection arrive together: the goodbye is heard first."""

    async def scenario() -> None:
        async with tls_pair(made) as (stream, peer):
            peer.sendall(b"goodbye")
            raw = socket.socket(fileno=os.dup(peer.fileno()))
            raw.sendall(b"\x17\x03\x03\x00\x20" + os.urandom(32))  # a record that nobody can decrypt
            raw.close()
            assert await stream.receive(1000) == b"goodbye"
            with contextlib.suppress(ssl.SSLError):
                assert await stream.receive(1000) == b""

    asyncio.run(scenario())


@pytest.mark.parametrize("size", [1, 16_384, 16_385, 5_000_000])
def test_all_bytes_pass_whatever_the_sizes(made: Certificate, size: int) -> None:
    """More than the connection holds, and more records than one receive takes."""
    data = os.urandom(size)

    def mirror(peer: ssl.SSLSocket) -> None:
        received = b""
        while len(received) < size:
            received += peer.recv(1 << 16)
        peer.sendall(received)

    async def scenario() -> bytes:
        async with tls_pair(made) as (stream, peer):
            mirroring = asyncio.create_task(asyncio.to_thread(mirror, peer))
            await stream.send_all(data)
            received = b""
            while len(received) < size:
                received += await stream.receive(100_000)
            await mirroring
            return received

    assert asyncio.run(scenario()) == data


def test_a_stream_waits_and_ends() -> None:
    async def scenario() -> None:
        left, right = socket.socketpair()
        stream = Stream(left)
        waiting = asyncio.create_task(stream.receive(10))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), 0.05)
        right.sendall(b"now")
        assert await waiting == b"now"
        right.close()
        assert await stream.receive(10) == b""
        stream.close()

    asyncio.run(scenario())
