"""`tpvpn connect` where something is wrong: one clear sentence, the documented exit code, and nothing left behind."""

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from peers import (
    NODE,
    SWITCH,
    Certificate,
    Handler,
    Laptop,
    Wire,
    eventually,
    lab,
    laptop,
    running_manager,
    self_signed,
    serving,
)
from pod import inside, run
from tpvpn.lab import Lab
from tpvpn.proto import message
from tpvpn.proto.session import ManagerHandshake, Terms
from tpvpn.wire import frame

__all__ = ["lab", "laptop"]

TOKEN = b"token-of-ann"
NOWHERE = "tcp://192.0.2.10:9"
TERMS = Terms("s1", "246.0.0.1", None, 1500, [], {"ipv4": "kernel", "ipv6": None}, "pod-0")


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--service-cidr", "10.130.0.0/33"), "--service-cidr: '10.130.0.0/33'"),
        (("--pod-cidr", "10.132.0.1/16"), "--pod-cidr: 10.132.0.1/16 has host bits set; the network is 10.132.0.0/16"),
        (("--pod-cidr", "10.132.0.0/16,pods"), "--pod-cidr: 'pods'"),
        (("--allow-conflicting-subnets", "fd00::/129"), "--allow-conflicting-subnets: 'fd00::/129'"),
        (("--also-proxy", ""), "--also-proxy: ''"),
        (("--never-proxy", "1.2.3.4/255.0.0.0"), "--never-proxy: '1.2.3.4/255.0.0.0'"),
        (("--service-cidr", "127.0.0.0/8"), "127.0.0.0/8"),
        (("--on-conflict", "pray"), "--on-conflict: 'pray' is none of fail, skip, hosts, virtual; see"),
        (("--frobnicate",), "unknown flag --frobnicate; see"),
        (("curl",), "curl"),
        (("--manager", "192.0.2.10"), "'192.0.2.10' names no manager: write tcp://HOST:PORT"),
        (("--manager", "tcp://[::1"), "names no manager"),
        (("--tls-pin", "sha256:" + "0" * 64), "--tls-pin needs a manager at tls://HOST:PORT"),
        (("--manager", "tls://192.0.2.10:9", "--tls-pin", "0" * 64), "is no pin: write sha256:"),
        (("--manager", "tls://192.0.2.10:9", "--tls-pin", ""), "is no pin: write sha256:"),
        (("--token-file", "/nowhere"), "cannot read the token file /nowhere: No such file or directory"),
        (("--token-file", "/etc"), "cannot read the token file /etc: Is a directory"),
        (("--token-file", "/dev/null"), "the token file is empty"),
        (("--token-file", "/bin/true"), "cannot read the token file /bin/true: it is not text"),
        (("--name", "Über/alles"), "alles"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_that_make_no_sense(laptop: Laptop, options: tuple[str, ...], said: str) -> None:
    with serving(laptop.lab, lambda connected: None) as url:
        end = laptop.failing(url, *options)
    assert end.code == 2, end.said
    assert said in end.said
    assert end.said.startswith("tpvpn: "), end.said


# -- rights ------------------------------------------------------------------------------------------------------------


def test_neither_root_nor_sudo(laptop: Laptop) -> None:
    setpriv = shutil.which("setpriv") or ""
    user = ("env", "PATH=/nonexistent", setpriv, "--reuid=65534", "--regid=65534", "--clear-groups")
    end = laptop.failing(NOWHERE, "--token-file", "/dev/null", under=user)
    assert end.code == 2  # the token file is read with the user's own rights, before anybody's else are asked for
    readable = Path("/run") / f"tpvpn-test-{os.getpid()}"
    readable.write_text("ann: x\n")
    try:
        end = laptop.failing(NOWHERE, "--token-file", str(readable), under=user)
    finally:
        readable.unlink()
    assert end.code == 5
    assert "sudo is not installed" in end.sentence


def test_no_capability(laptop: Laptop) -> None:
    without = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    with running_manager(laptop.lab, laptop.directory) as manager:
        end = laptop.failing(f"tcp://{manager.authority}", under=without)
    assert end.code == 5
    assert "CAP_NET_ADMIN" in end.sentence
    assert "--cap-add NET_ADMIN" in end.sentence


def test_no_tun_driver(laptop: Laptop) -> None:
    hidden = ("unshare", "--mount", "sh", "-ec", 'mount -t tmpfs none /dev/net; exec "$@"', "sh")
    with running_manager(laptop.lab, laptop.directory) as manager:
        end = laptop.failing(f"tcp://{manager.authority}", under=hidden)
    assert end.code == 5
    assert "/dev/net/tun is missing: load the driver with `modprobe tun`" in end.sentence


# -- managers that are none --------------------------------------------------------------------------------------------


def saying(text: bytes) -> Handler:
    def handle(connected: socket.socket) -> None:
        connected.sendall(text)
        while connected.recv(1000):
            pass

    return handle


def greeting(*frames: bytes) -> Handler:
    """Upgrades, and then says these control payloads."""

    def handle(connected: socket.socket) -> None:
        Wire(connected).head()
        connected.settimeout(20)
        connected.sendall(SWITCH + b"".join(frame.encode(frame.CONTROL, one) for one in frames))
        while connected.recv(1000):
            pass

    return handle


def test_nobody_listens(laptop: Laptop) -> None:
    end = laptop.failing(NOWHERE)
    assert end.code == 6
    assert (
        "cannot reach the manager at 192.0.2.10:9: 192.0.2.10: Connection refused. Check that it runs" in end.sentence
    )


@pytest.mark.parametrize(
    ("handle", "said"),
    [
        (lambda connected: None, "closed the connection without a word|Connection reset"),
        (saying(b"SSH-2.0-OpenSSH_9.9\r\n"), "is no tpvpn manager: it answered 'SSH-2.0-OpenSSH_9.9"),
        (saying(b"220 mail.example.org ESMTP\r\n"), "is no tpvpn manager: it answered '220 mail"),
        (saying(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"), "or not on this port: it answered HTTP 200 OK"),
        (saying(os.urandom(5000)), "is no tpvpn manager"),
        (saying(SWITCH + b"\xff" * 100), "a frame of kind 255 with 16777215 bytes"),
        (greeting(b"hello"), "a control frame that is not JSON"),
        (greeting(b"[" * 1_000_000), "a control frame that is not JSON"),
        (greeting(b"{}"), "a control frame without a type"),
        (greeting(message.encode("welcome")), "the manager sent 'welcome' in the middle of the handshake"),
        (greeting(message.encode("greeting", versions="1")), "no proper versions"),
        (greeting(message.encode("greeting", versions=[1], nonce="0")), "no nonce of 64 digits"),
        (greeting(*[message.encode("greeting", versions=[1], nonce="0" * 64)] * 2), "sent 'greeting' in the middle"),
        (
            greeting(message.encode("greeting", versions=[2], nonce="0" * 64)),
            "the manager speaks protocol version 2, this tpvpn 1: upgrade tpvpn here",
        ),
        (greeting(message.encode("greeting", versions=[0], nonce="")), "version 0, this tpvpn 1: upgrade the manager"),
        (greeting(message.encode("error", message="out to lunch\x1b[2J")), r"the manager refuses: out to lunch\?\[2J"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_something_else_listens(laptop: Laptop, handle: Handler, said: str) -> None:
    with serving(laptop.lab, handle) as url:
        end = laptop.failing(url, seconds=15)
    assert end.code == 6, end.said
    assert re.search(said, end.sentence), end.said
    assert end.sentence.isprintable()


def test_a_hole_and_a_silence_cost_bounded_time(laptop: Laptop) -> None:
    """An address that swallows everything, and servers that never say a word: all at once, to save time."""
    with inside(laptop.lab.namespace("node")):
        run("ip", "addr", "add", "192.0.2.99/32", "dev", "lo")
        run("nft", "add table ip hole; add chain ip hole in { type filter hook input priority 0; }")
        run("nft", "add rule ip hole in ip daddr 192.0.2.99 drop")
    began = time.monotonic()
    waiting = [
        (serving(laptop.lab, greeting()), "said no welcome within 10 s"),
        (serving(laptop.lab, saying(SWITCH + bytes([0, 0, 9, 9]) + bytes(900))), "said no welcome within 10 s"),
        (serving(laptop.lab, saying(b"")), "did not answer within 10 s"),
        (contextlib.nullcontext("tcp://192.0.2.99:7070"), "did not answer within 10 s"),
    ]
    with contextlib.ExitStack() as stack:
        started = [
            (laptop.connect(stack.enter_context(context), "--name", f"c{number}"), said)
            for number, (context, said) in enumerate(waiting)
        ]
        said = [(client.communicate(timeout=20)[1], expected) for client, expected in started]
    assert [client.returncode for client, _ in started] == [6] * 4, said
    assert [last for last, expected in said if expected not in last] == []
    assert time.monotonic() - began < 15
    assert laptop.failing(NOWHERE).code == 6  # and nothing is left


def test_a_wrong_token(laptop: Laptop) -> None:
    with running_manager(laptop.lab, laptop.directory, token=b"another") as manager:
        end = laptop.failing(f"tcp://{manager.authority}")
        assert end.code == 6
        assert "the manager refuses: the token is not one of this manager's: check --token-file" in end.sentence
        manager.says(rf"event=token-refused client={re.escape(socket.gethostname())} peer=192\.0\.2\.2:\d+")
        assert manager.refused("token") == 1


# -- someone in between ------------------------------------------------------------------------------------------------


def between(
    lab: Lab,
    address: tuple[str, int],
    swap: dict[bytes, bytes],
    tls: tuple[ssl.SSLContext, ssl.SSLContext] | None = None,
):
    """Passes on what comes, in both directions, with some bytes swapped for others of the same length."""

    async def passing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                for old, new in swap.items():
                    data = data.replace(old, new)
                writer.write(data)
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def relay(connected: socket.socket, manager: socket.socket) -> None:
        reader, writer = await streams(connected, tls and tls[0], server=True)
        there, back = await streams(manager, tls and tls[1], server=False)
        await asyncio.gather(passing(reader, back), passing(there, writer))

    def handle(connected: socket.socket) -> None:
        with inside(lab.namespace("node")):
            manager = socket.create_connection(address, timeout=10)
        asyncio.run(relay(connected, manager))

    return handle


async def streams(
    connected: socket.socket, context: ssl.SSLContext | None, *, server: bool
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connected socket as streams, with TLS when there is a context."""
    connected.setblocking(False)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    if server:
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, connected, ssl=context)
    else:
        name = "manager" if context else None
        transport, _ = await loop.create_connection(lambda: protocol, sock=connected, ssl=context, server_hostname=name)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


@pytest.mark.parametrize(
    ("swap", "said"),
    [
        ({b'"session":null': b'"session":"no"'}, "the token is not one of this manager's"),
        ({b"tso4": b"tso5"}, "the token is not one of this manager's|does not know this token"),
        ({b'"mtu":1500': b'"mtu":1400'}, "the manager does not know this token: is it the right manager"),
        ({b'"linger":0': b'"linger":9'}, "the manager does not know this token: is it the right manager"),
    ],
    ids=str,
)
def test_an_altered_handshake(laptop: Laptop, swap: dict[bytes, bytes], said: str) -> None:
    with running_manager(laptop.lab, laptop.directory) as manager:
        with serving(laptop.lab, between(laptop.lab, manager.address, swap)) as url:
            end = laptop.failing(url)
        assert end.code == 6, end.said
        assert re.search(said, end.sentence), end.said
        with serving(laptop.lab, between(laptop.lab, manager.address, {})) as url:
            client = laptop.connect(url, "--", "true")
            assert laptop.ended(client).code == 0


def test_a_reflected_proof(laptop: Laptop) -> None:
    def mirror(connected: socket.socket) -> None:
        wire = Wire(connected)
        wire.head()
        connected.sendall(SWITCH)
        wire.say("greeting", versions=[1], nonce="0" * 64)
        hello = json.loads(wire.receive()[1])
        wire.say("welcome", **asdict(TERMS), proof=hello["proof"])

    with serving(laptop.lab, mirror) as url:
        end = laptop.failing(url)
    assert end.code == 6
    assert "does not know this token" in end.sentence


def test_a_replayed_welcome(laptop: Laptop) -> None:
    """Both sides of a whole handshake, recorded: a new client has another nonce."""
    nonce, recorded = secrets.token_bytes(32), list[bytes]()

    def handle(connected: socket.socket) -> None:
        wire = Wire(connected)
        wire.head()
        connected.sendall(SWITCH)
        handshake = ManagerHandshake({"ann": TOKEN}, bytes(32), nonce)
        wire.send(frame.CONTROL, handshake.greeting)
        hello = wire.receive()[1]
        if not recorded:
            handshake.receive(hello)
            recorded.append(handshake.welcome(TERMS))
        wire.send(frame.CONTROL, recorded[0])
        wire.hear("goodbye")

    with serving(laptop.lab, handle) as url:
        assert laptop.ended(laptop.connect(url, "--", "true")).code == 0
        end = laptop.failing(url)
    assert end.code == 6
    assert "does not know this token" in end.sentence


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Certificate:
    return self_signed(tmp_path, "manager", f"IP:{NODE},IP:2001:db8:2::10")


@pytest.mark.parametrize("host", [NODE, "[2001:db8:2::10]"])
def test_the_right_pin(laptop: Laptop, made: Certificate, host: str) -> None:
    with running_manager(laptop.lab, laptop.directory, *made.options, host=host) as manager:
        url = f"tls://{host}:{manager.address[1]}"
        curl = ("--", "curl", "--silent", "--fail", "--max-time", "5", "http://10.130.0.80/")
        end = laptop.ended(laptop.connect(url, "--tls-pin", made.pin, *curl))
        assert end.code == 0, end.said
        assert "warning" not in end.said


def test_a_wrong_pin_and_none(laptop: Laptop, made: Certificate) -> None:
    with running_manager(laptop.lab, laptop.directory, *made.options) as manager:
        url = f"tls://{manager.authority}"
        wrong = laptop.failing(url, "--tls-pin", "sha256:" + "0" * 64)
        assert (wrong.code, f"it has {made.pin}" in wrong.sentence) == (6, True), wrong.said
        none = laptop.failing(url)
        assert (none.code, "give --tls-pin sha256:…" in none.sentence) == (6, True), none.said
        plain = laptop.failing(f"tcp://{manager.authority}")
        assert (plain.code, "it takes encrypted sessions alone: use tls://" in plain.sentence) == (6, True), plain.said
    with running_manager(laptop.lab, laptop.directory) as manager:
        end = laptop.failing(f"tls://{manager.authority}", "--tls-pin", made.pin)
        assert (end.code, "does not speak TLS as expected" in end.sentence) == (6, True), end.said


def contexts(
    server: Certificate, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """For someone in between: with a certificate towards the client, and with no question towards the manager."""
    towards_client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    towards_client.load_cert_chain(server.certificate, server.key)
    towards_client.maximum_version = newest
    towards_manager = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    towards_manager.check_hostname, towards_manager.verify_mode = False, ssl.CERT_NONE
    return towards_client, towards_manager


def test_tls_1_2_is_refused(laptop: Laptop, made: Certificate) -> None:
    old = contexts(made, ssl.TLSVersion.TLSv1_2)[0]

    def handle(connected: socket.socket) -> None:
        with old.wrap_socket(connected, server_side=True) as secured:
            secured.recv(100)

    with serving(laptop.lab, handle) as url:
        end = laptop.failing(url.replace("tcp", "tls"), "--tls-pin", made.pin)
    assert (end.code, "does not speak TLS as expected" in end.sentence) == (6, True), end.said


def test_someone_in_between_whom_the_system_trusts(laptop: Laptop, made: Certificate, tmp_path: Path) -> None:
    """Every authority's blessing does not help: the proofs hold the hash of the manager's own certificate."""
    other = self_signed(tmp_path, "other")
    with running_manager(laptop.lab, laptop.directory, *made.options) as manager:
        relay = between(laptop.lab, manager.address, {}, contexts(other))
        with serving(laptop.lab, relay) as url:
            end = laptop.failing(url.replace("tcp", "tls"), SSL_CERT_FILE=str(other.certificate))
        assert end.code == 6, end.said
        assert "the token is not one of this manager's" in end.sentence
        trusting = laptop.connect(f"tls://{manager.authority}", "--", "true", SSL_CERT_FILE=str(made.certificate))
        assert laptop.ended(trusting).code == 0


BULK = 200  # MiB
PROGRAM = """
    import hashlib, os, socket, sys

    MIB, ADDRESS = 1 << 20, ("10.130.0.80", 5555)
    block = os.urandom(MIB)

    def send(connected, count):
        seen = hashlib.sha256()
        for number in range(count):
            data = number.to_bytes(8, "big") + block[8:]
            seen.update(data)
            connected.sendall(data)
        connected.sendall(seen.digest())

    def receive(connected, count):
        seen = hashlib.sha256()
        left = count * MIB
        while left:
            data = connected.recv(min(left, MIB))
            assert data, "cut short"
            seen.update(data)
            left -= len(data)
        with connected.makefile("rb") as stream:
            assert stream.read(32) == seen.digest(), "not what was sent"

    count = int(sys.argv[1])
    if sys.argv[2] == "serve":
        connected, _ = socket.create_server(ADDRESS).accept()
        receive(connected, count)
        send(connected, count)
    else:
        connected = socket.create_connection(ADDRESS, timeout=20)
        send(connected, count)
        receive(connected, count)
"""


def test_two_hundred_megabytes_each_way_through_tls(laptop: Laptop, made: Certificate) -> None:
    program = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(BULK)]
    with running_manager(laptop.lab, laptop.directory, *made.options) as manager:
        server = subprocess.Popen(laptop.lab.command("cluster", [*program, "serve"]))
        try:
            listening = ["ss", "--listening", "--tcp", "--no-header", "sport", "=", ":5555"]
            eventually(lambda: "5555" in laptop.lab.run("cluster", listening).stdout, 5, "the server listens")
            url = f"tls://{manager.authority}"
            end = laptop.ended(laptop.connect(url, "--tls-pin", made.pin, "--", *program, "ask"), 60)
            assert end.code == 0, end.said
            assert server.wait(5) == 0
        finally:
            server.kill()
            server.wait()


def test_a_manager_that_ends_says_why(laptop: Laptop) -> None:
    with running_manager(laptop.lab, laptop.directory) as manager:
        client = laptop.connect(f"tcp://{manager.authority}", "--give-up-after", "0")
        manager.says("event=session-open .* user=ann .* ipv4=246")
        eventually(lambda: "tpvpn0" in laptop.network(), 5)
        manager.process.send_signal(signal.SIGTERM)
        end = laptop.ended(client)
    assert end.code == 7
    assert "the manager ended the session: the manager shuts down" in end.sentence


def test_without_a_token_only_an_insecure_manager_takes_us_in(laptop: Laptop) -> None:
    with running_manager(laptop.lab, laptop.directory, "--insecure") as manager:
        laptop.token_file = None
        assert laptop.ended(laptop.connect(f"tcp://{manager.authority}", "--", "true")).code == 0
    with running_manager(laptop.lab, laptop.directory) as manager:
        end = laptop.failing(f"tcp://{manager.authority}")
        assert (end.code, "--token-file" in end.sentence) == (6, True), end.said
