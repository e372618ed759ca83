"""The manager as it is started and stopped: its options, the errors they can lead to, its last words."""

import os
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP
from scapy.packet import Raw

from peers import (
    NODE,
    POD,
    UPGRADE,
    Client,
    Manager,
    ended,
    eventually,
    lab,
    running_manager,
    self_signed,
    zipapp_command,
)
from pod import inside, run, sysctl
from tpvpn.errors import ManagerError
from tpvpn.lab import Lab
from tpvpn.manager.server import PATIENCE
from tpvpn.proto import message
from tpvpn.wire import frame

__all__ = ["lab"]

Start = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def start(lab: Lab, tmp_path: Path) -> Start:
    """Starts a manager that is to end by itself, with a good token file unless the options name one."""
    token_file = tmp_path / "token"
    token_file.write_text("ann: secret\n")

    def start(*options: str, under: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        command = [*under, *zipapp_command(*(option.replace("TOKEN", str(token_file)) for option in options))]
        process = subprocess.run(
            ["setsid", *lab.command("node", command)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
        )
        assert "Traceback" not in process.stderr, process.stderr
        return process

    return start


LISTEN = ("--listen", f"{NODE}:0", "--exit", "kernel")
GOOD = (*LISTEN, "--token-file", "TOKEN")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "a manager needs --listen HOST:PORT"),
        ((*GOOD, "--frobnicate"), "unrecognized arguments: --frobnicate"),
        ((*GOOD, "--exit", "teleport"), "invalid choice: 'teleport'"),
        *(
            (("--listen", address, "--token-file", "TOKEN"), said)
            for address, said in [
                ("", "'' is no address to listen on: write HOST:PORT"),
                ("7070", "'7070' is no address to listen on"),
                ("somewhere", "'somewhere' is no address"),
                (f"{NODE}:", "is no address"),
                (f"{NODE}:65536", "is no address"),
                (f"{NODE}:-1", "is no address"),
                (f"{NODE}:²", "is no address"),
                (f"{NODE}:http", "is no address"),
                ("a..b:80", "cannot listen on a..b:80"),
                (f"{'x' * 70}.org:80", "cannot listen on xxx"),
                ("[fd00::1:80", "cannot listen on [fd00::1:80"),
                ("203.0.113.254:80", "cannot listen on 203.0.113.254:80: Cannot assign requested address"),
            ]
        ),
        ((*GOOD, "--destination", "everywhere"), "--destination everywhere: 'everywhere' does not appear to be"),
        ((*GOOD, "--destination", "10.0.0.0/33"), "--destination 10.0.0.0/33"),
        ((*GOOD, "--destination", "10.0.0.1/8"), "--destination 10.0.0.1/8: 10.0.0.1/8 has host bits set"),
        (LISTEN, "a manager needs --token-file F"),
        ((*GOOD, "--insecure"), "--insecure and --token-file contradict each other"),
        ((*LISTEN, "--token-file", "/nowhere"), "cannot read the token file /nowhere: No such file"),
        ((*LISTEN, "--token-file", "/etc"), "cannot read the token file /etc: Is a directory"),
        ((*LISTEN, "--token-file", "/dev/null"), "the token file is empty"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else "",
)
def test_options_that_make_no_sense(start: Start, options: tuple[str, ...], said: str) -> None:
    process = start(*options)
    assert process.returncode == 2, process.stderr
    assert said in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1 or process.stderr.startswith("usage:")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "empty"),
        (b"# only a comment\n\n", "empty"),
        (b"\xff\xfe\x00", "it is not text"),
        (b"ann:\n", "line 1 of the token file has no token"),
        (b"ann: x\n: y\n", "line 2 of the token file has no token"),
        (b"ann: x\nann: y\n", "names ann again"),
    ],
)
def test_token_files_that_are_none(start: Start, tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "bad").write_bytes(text)
    process = start(*LISTEN, "--token-file", str(tmp_path / "bad"))
    assert (process.returncode, said in process.stderr) == (2, True), process.stderr


def test_certificates_that_are_none(start: Start, tmp_path: Path) -> None:
    one, other = self_signed(tmp_path, "one"), self_signed(tmp_path, "other")
    garbage, locked = tmp_path / "garbage", tmp_path / "locked.key"
    garbage.write_bytes(os.urandom(500))
    run("openssl", "pkey", "-in", str(one.key), "-out", str(locked), "-aes128", "-passout", "pass:secret")
    for certificate, key, said in [
        (one.certificate, None, "--tls-cert and --tls-key go together"),
        (None, one.key, "--tls-cert and --tls-key go together"),
        (one.certificate, other.key, "cannot use --tls-cert"),
        (one.certificate, tmp_path / "nowhere", "cannot use --tls-cert"),
        (tmp_path / "nowhere", one.key, "cannot use --tls-cert"),
        (garbage, one.key, "cannot use --tls-cert"),
        (one.certificate, garbage, "cannot use --tls-cert"),
        (one.key, one.key, "cannot use --tls-cert"),
        (one.certificate, locked, "cannot use --tls-cert"),
    ]:
        options = [("--tls-cert", str(certificate)) if certificate else (), ("--tls-key", str(key)) if key else ()]
        process = start(*GOOD, *options[0], *options[1])
        assert (process.returncode, said in process.stderr) == (2, True), (certificate, key, process.stderr)


def test_a_port_in_use(start: Start, lab: Lab) -> None:
    with inside(lab.namespace("node")):
        other = socket.create_server((NODE, 0))
    with other:
        address = f"{NODE}:{other.getsockname()[1]}"
        process = start("--listen", address, "--token-file", "TOKEN")
    assert process.returncode == 2
    assert f"cannot listen on {address}: Address already in use" in process.stderr
    assert "choose another --listen" in process.stderr


def test_a_second_manager_in_the_same_place(start: Start, lab: Lab, tmp_path: Path) -> None:
    with running_manager(lab, tmp_path) as manager, manager.session() as client:
        process = start(*GOOD)
        assert process.returncode == 2, process.stderr
        assert "belongs to a running program" in process.stderr
        assert client.echo()


NO_RIGHT = {
    "without the capability": ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"),
    "as an ordinary user": ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
}


@pytest.mark.parametrize("under", NO_RIGHT.values(), ids=NO_RIGHT)
def test_the_kernel_exit_without_the_right(start: Start, tmp_path: Path, under: tuple[str, ...]) -> None:
    directory = Path(zipapp_command()[3]).parent
    directory.chmod(0o755)
    tokens = directory / "readable"
    tokens.write_text("ann: secret\n")
    tokens.chmod(0o644)
    process = start(*LISTEN, "--token-file", str(tokens), under=under)
    assert process.returncode == 5, process.stderr
    assert "--cap-add NET_ADMIN" in process.stderr
    assert "securityContext" in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1


def test_neither_tun_driver_nor_packet_sockets(start: Start) -> None:
    hidden = ("unshare", "--mount", "sh", "-ec", 'mount -t tmpfs none /dev/net; exec "$@"', "sh")
    process = start(*GOOD, under=(*hidden, "setpriv", "--bounding-set=-mknod,-net_raw", "--inh-caps=-mknod,-net_raw"))
    assert process.returncode == 5, process.stderr
    assert "/dev/net/tun is missing" in process.stderr
    assert "a veth pair in its place needs CAP_NET_RAW" in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1
    assert "--device /dev/net/tun" in process.stderr


# -- stopping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_a_goodbye_and_nothing_left(lab: Lab, tmp_path: Path, number: signal.Signals) -> None:
    node = lab.namespace("node")

    def network() -> str:
        shown = [run("ip", "-n", node, *what) for what in (("link",), ("route", "show", "table", "all"), ("rule",))]
        with inside(node):
            return "\n".join([*shown, run("nft", "list", "ruleset"), sysctl(node, "ipv4/conf/all/forwarding")])

    before = network()
    with running_manager(lab, tmp_path) as manager, manager.session() as client, manager.dial() as stranger:
        assert network() != before
        manager.process.send_signal(number)
        assert client.hear("goodbye")["reason"] == "the manager shuts down"
        ended(client.socket, 2)
        ended(stranger, 2)
        assert manager.process.wait(2) == 0
        assert manager.log().endswith('reason="the manager shuts down"\n'), manager.log()
    assert network() == before


def deafen(client: Client) -> None:
    """Ask for more than the connection holds, without reading; it is less than what ends a session."""
    ping = frame.encode(frame.CONTROL, message.encode("ping", id=10**4000))
    for _ in range(1000):
        client.socket.sendall(ping)


def test_a_goodbye_waits_for_what_is_on_the_way(lab: Lab, tmp_path: Path) -> None:
    """It comes behind everything that the connection has not taken yet."""
    lab.sysctl("node", "net/ipv6/conf/default/disable_ipv6", 1)
    with running_manager(lab, tmp_path) as manager, manager.session() as client:
        deafen(client)
        manager.process.send_signal(signal.SIGTERM)
        manager.says("shutting down")
        while (heard := client.hear())["type"] == "pong":
            assert heard["id"] == 10**4000
        assert heard == {"type": "goodbye", "reason": "the manager shuts down", "again": True}
    lab.sysctl("node", "net/ipv6/conf/default/disable_ipv6", 0)


def test_a_client_that_does_not_listen_delays_no_end(lab: Lab, tmp_path: Path) -> None:
    with running_manager(lab, tmp_path) as manager, manager.session() as client:
        deafen(client)
        manager.process.send_signal(signal.SIGTERM)
        assert manager.process.wait(3) == 0


# -- who may come ------------------------------------------------------------------------------------------------------


def test_tokens_come_and_go_while_it_runs(lab: Lab, tmp_path: Path) -> None:
    tokens = tmp_path / "rotated"
    tokens.write_text("ann: first\n")
    with running_manager(lab, tmp_path, "--token-file", str(tokens)) as manager:

        def taken(token: bytes) -> bool:
            try:
                with manager.session(token) as client:
                    return client.answers()
            except ManagerError as error:
                assert "token" in str(error)
                return False

        assert (taken(b"first"), taken(b"second")) == (True, False)
        tokens.write_text("ann: first\nbob: second\n")
        assert (taken(b"first"), taken(b"second")) == (True, True)
        assert "user=bob" in manager.log()
        tokens.write_text("bob: second\n")
        assert (taken(b"first"), taken(b"second")) == (False, True)
        replacement = tmp_path / "replacement"
        replacement.write_text("eve: eleven\n")
        replacement.rename(tokens)
        assert (taken(b"second"), taken(b"eleven")) == (False, True)
        for spoil in (
            tokens.unlink,
            tokens.mkdir,
            tokens.rmdir,
            lambda: tokens.write_bytes(b"\xff"),
            lambda: tokens.write_text(""),
        ):
            spoil()
            assert (taken(b"second"), taken(b"eleven")) == (False, True)
        manager.says("the tokens read before stay in force")
        tokens.write_text("ann: again\n")
        assert (taken(b"eleven"), taken(b"again")) == (False, True)


def test_insecure_takes_anyone_and_says_so(lab: Lab, tmp_path: Path) -> None:
    with running_manager(lab, tmp_path, "--insecure") as manager:
        with manager.session(b"") as client:
            assert client.echo()
        assert "user=anonymous" in manager.log()
        assert "--insecure" in manager.log()
        with pytest.raises(ManagerError), manager.session(b"some token"):
            pass


def test_destinations_bound_what_sessions_reach(lab: Lab, tmp_path: Path) -> None:
    with running_manager(lab, tmp_path, "--destination", "10.132.0.10/32", "--destination", "fd10::/16") as manager:
        with manager.session() as client:
            assert client.echo(POD)
            assert not client.echo("10.132.0.11", 0.2)
            client.packet(IP(src=client.terms.ipv4, dst="10.130.0.80") / UDP(dport=53) / Raw(b"x"))
            assert client.next_packet(0.1) is None
        assert manager.dropped()["destination"] >= 2


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def secured(lab: Lab, tmp_path: Path) -> Iterator[Manager]:
    made = self_signed(tmp_path, "manager")
    context = ssl.create_default_context(cafile=str(made.certificate))
    with running_manager(lab, tmp_path, *made.options) as manager:
        manager.tls = (context, made.digest)
        context.check_hostname = False
        yield manager


def test_tls_and_strangers_to_it(secured: Manager) -> None:
    quiet = secured.descriptors()
    with secured.session() as client:
        began = time.monotonic()
        garbage = [b"", b"\x16\x03\x01\x02\x00\x01", os.urandom(2000), UPGRADE, b"GET /healthz HTTP/1.1\r\n\r\n"]
        strangers = [secured.dial() for _ in garbage]
        for connected, text in zip(strangers, garbage, strict=True):
            connected.sendall(text)
        assert client.echo()
        for connected in strangers:
            ended(connected, PATIENCE + 1.5)
            connected.close()
        assert time.monotonic() - began < PATIENCE + 1.5
        with secured.session() as other:
            assert other.echo()
        assert client.echo()
    eventually(lambda: secured.descriptors() <= quiet, 2, "descriptors are given back")


def test_nothing_older_than_tls_1_3(secured: Manager) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with secured.dial() as connected, pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        context.wrap_socket(connected)


def test_the_proof_is_bound_to_the_certificate(secured: Manager) -> None:
    """Frames passed on from another TLS connection prove nothing here."""
    assert secured.tls
    secured.tls = (secured.tls[0], bytes(range(32)))
    with pytest.raises(ManagerError, match="token"), secured.session():
        pass


def test_a_certificate_with_its_chain(lab: Lab, tmp_path: Path) -> None:
    """The first of several certificates in the file is the manager's own."""
    made, other = self_signed(tmp_path, "manager"), self_signed(tmp_path, "issuer")
    context, digest = ssl.create_default_context(cafile=str(made.certificate)), made.digest
    context.check_hostname = False
    made.certificate.write_text(f"manager\n{made.certificate.read_text()}issuer\n{other.certificate.read_text()}")
    with running_manager(lab, tmp_path, *made.options) as manager:
        manager.tls = (context, digest)
        with manager.session() as client:
            assert client.echo()


def test_listening_on_ipv6(lab: Lab, tmp_path: Path) -> None:
    with running_manager(lab, tmp_path, host="[2001:db8:2::10]") as manager:
        assert manager.get("/healthz")[0] == 200
        with manager.session() as client:
            assert client.echo()
        assert "[2001:db8:2::2]:" in manager.log()
