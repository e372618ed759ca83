"""Both ends of the wire as tests play them, well or ill: blocking sockets and real processes in a lab's namespaces."""

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP, IP
from scapy.packet import Packet

from pod import inside, run
from tpvpn.lab import Lab
from tpvpn.proto import message
from tpvpn.proto.session import ClientHandshake, Held, Offer, Terms
from tpvpn.transport.stream import NO_CERTIFICATE
from tpvpn.wire import frame

ROOT = Path(__file__).parents[1]
NODE, POD = "192.0.2.10", "10.132.0.10"
UPGRADE = b"GET /v1/session HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: tpvpn\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tpvpn\r\n\r\n"
Handler = Callable[[socket.socket], None]
_labs = 0


def eventually(condition: Callable[[], bool], seconds: float, what: str = "") -> None:
    """Wait for a condition, which must hold before the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A lab of the module's own, without a manager."""
    global _labs
    _labs += 1
    with Lab(f"tv{os.getpid()}p{_labs}") as lab:
        for where in ("laptop", "node"):
            addresses = ["ip", "-netns", lab.namespace(where), "address", "show", "tentative"]
            eventually(lambda: not run(*addresses), 5, "no address is tentative")  # noqa: B023
        yield lab


# -- the wire ----------------------------------------------------------------------------------------------------------


class Wire:
    """Frames on a connected socket; what is waited for must come within `patience` seconds."""

    patience = 5.0

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self._decoder = frame.Decoder()
        self._frames: deque[tuple[int, bytes]] = deque()

    def close(self) -> None:
        self.socket.close()

    def send(self, kind: int, payload: bytes) -> None:
        self.socket.sendall(frame.encode(kind, payload))

    def say(self, kind: str, **members: object) -> None:
        self.send(frame.CONTROL, message.encode(kind, **members))

    def head(self) -> bytes:
        """The head of an HTTP message; frames may follow it."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._receive()
        head, _, rest = data.partition(b"\r\n\r\n")
        self._decoder.receive(rest)
        return head

    def receive(self, patience: float = patience) -> tuple[int, bytes]:
        """The next frame; EOFError at the end, TimeoutError when none comes."""
        deadline = time.monotonic() + patience
        while True:
            self._frames += self._decoder.frames()
            if self._frames:
                return self._frames.popleft()
            self._decoder.receive(self._receive(max(0.01, deadline - time.monotonic())))

    def hear(self, kind: str = "") -> message.Message:
        """The next control message; of the kind if one is named, which may come behind pings."""
        while True:
            what, payload = self.receive()
            if what == frame.CONTROL:
                heard = message.decode(payload)
                if kind in ("", heard["type"]):
                    return heard
                assert heard["type"] == "ping", heard

    def _receive(self, patience: float = patience) -> bytes:
        self.socket.settimeout(patience)
        if not (data := self.socket.recv(1 << 18)):
            raise EOFError
        return data


def ended(connected: socket.socket, seconds: float) -> float:
    """Wait for the other end to close, whatever it says before; how long that took."""
    began = time.monotonic()
    connected.settimeout(seconds)
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while connected.recv(1 << 16):
            connected.settimeout(max(0.01, began + seconds - time.monotonic()))
    return time.monotonic() - began


class Client(Wire):
    """A client that is taken in: bare packets unless it offers offloads."""

    held: Held
    terms: Terms

    def shake_hands(
        self, token: bytes, offer: Offer, certificate: bytes = NO_CERTIFICATE, secret: bytes | None = None
    ) -> None:
        self.upgrade()
        handshake = ClientHandshake(token, certificate, secrets.token_bytes(32), offer, secret)
        while handshake.held is None:
            if answer := handshake.receive(self.receive()[1]):
                self.send(frame.CONTROL, answer)
        self.held, self.terms = handshake.held, handshake.held.terms

    def receive(self, patience: float = Wire.patience) -> tuple[int, bytes]:
        """The next frame but for pings, which it answers."""
        while True:
            kind, payload = super().receive(patience)
            if kind != frame.CONTROL or b'"type":"ping"' not in payload:
                return kind, payload
            self.say("pong", id=message.decode(payload)["id"])

    def upgrade(self) -> None:
        self.socket.sendall(UPGRADE)
        assert b" 101 " in self.head()

    def packet(self, packet: Packet) -> None:
        self.send(frame.PACKET, bytes(packet))

    def next_packet(self, patience: float = Wire.patience) -> Packet | None:
        """The next packet for this client; None when none comes."""
        deadline = time.monotonic() + patience
        with contextlib.suppress(TimeoutError):
            while True:
                kind, payload = self.receive(max(0.01, deadline - time.monotonic()))
                if kind == frame.PACKET and payload[0] >> 4 == 4:
                    return IP(payload)
        return None

    def echo(self, address: str = POD, patience: float = 2.0) -> bool:
        """Whether an address answers a ping through the tunnel."""
        number = secrets.randbits(16)
        self.packet(IP(src=self.terms.ipv4, dst=address) / ICMP(id=number))
        answer = self.next_packet(patience)
        return answer is not None and ICMP in answer and (answer[ICMP].type, answer[ICMP].id) == (0, number)

    def answers(self) -> bool:
        """Whether the manager answers a ping of its own."""
        number = secrets.randbits(30)
        self.say("ping", id=number)
        return self.hear("pong")["id"] == number


def dial(lab: Lab, address: tuple[str, int]) -> socket.socket:
    """A connection from the laptop."""
    with inside(lab.namespace("laptop")):
        return socket.create_connection(address, timeout=5)


# -- the manager -------------------------------------------------------------------------------------------------------


@functools.cache
def _zipapp() -> tuple[Path, object]:
    """A copy of the manager's zipapp as the script builds it: no other test's building disturbs it."""
    subprocess.run([ROOT / "scripts" / "build-manager"], check=True, capture_output=True)
    directory = tempfile.TemporaryDirectory(prefix="tpvpn-tests-")
    Path(directory.name).chmod(0o755)  # nobody may start it too
    return Path(shutil.copy(ROOT / "dist" / "tpvpn-manager.pyz", directory.name)), directory


def zipapp_command(*options: str) -> list[str]:
    """The manager with nothing but the standard library."""
    return [sys.executable, "-I", "-S", str(_zipapp()[0]), "manager", *options]


def samples(page: str) -> Counter[str]:
    """Of a page of metrics the samples by name and labels, and by name alone the sum of those that have labels."""
    found: Counter[str] = Counter()
    for line in page.splitlines():
        if not line.startswith("#"):
            sample, _, value = line.rpartition(" ")
            for name in {sample, sample.partition("{")[0]}:
                found[name] += float(value)  # type: ignore[assignment]
    return found


def dropped(page: str) -> dict[str, int]:
    """Of a manager's page of metrics the packets that it dropped, by reason."""
    found = re.findall(r'^tpvpn_manager_dropped_packets_total\{reason="(\w+)"\} (\d+)$', page, re.M)
    return {reason: int(packets) for reason, packets in found}


@dataclass
class Manager:
    """A running manager process."""

    lab: Lab
    process: subprocess.Popen[bytes]
    logged: Path
    address: tuple[str, int]
    token: bytes
    tls: tuple[ssl.SSLContext, bytes] | None = None

    @property
    def authority(self) -> str:
        return f"{self.address[0]}:{self.address[1]}"

    def log(self) -> str:
        return self.logged.read_text()

    def says(self, pattern: str, seconds: float = 3) -> None:
        """Wait for a line in the log."""
        eventually(lambda: re.search(pattern, self.log()) is not None, seconds, f"{pattern!r} in\n{self.log()[-2000:]}")

    def dial(self) -> socket.socket:
        return dial(self.lab, self.address)

    @contextlib.contextmanager
    def session(self, token: bytes | None = None, name: str = "laptop", **offer: object) -> Iterator[Client]:
        """A session of an honest client."""
        connected, certificate = self.dial(), NO_CERTIFICATE
        if self.tls:
            connected, certificate = self.tls[0].wrap_socket(connected), self.tls[1]
        with contextlib.closing(Client(connected)) as client:
            client.shake_hands(self.token if token is None else token, Offer(name, **offer), certificate)  # type: ignore[arg-type]
            yield client

    def get(self, path: str, method: str = "GET", head: str = "") -> tuple[int, str, str]:
        """Status, head and body of an HTTP answer."""
        with self.dial() as connected:
            connected.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode())
            answer = b"".join(iter(lambda: connected.recv(65536), b"")).decode()
        top, _, body = answer.partition("\r\n\r\n")
        return int(top.split()[1]), top, body

    def metrics(self) -> Counter[str]:
        """Samples by name and labels, and by name alone the sum of those that have labels."""
        return samples(self.get("/metrics")[2])

    def dropped(self) -> dict[str, int]:
        """Packets dropped so far, by reason."""
        return dropped(self.get("/metrics")[2])

    def refused(self, reason: str) -> int:
        """Connections that became no link, for a reason."""
        return self.metrics()[f'tpvpn_manager_refusals_total{{reason="{reason}"}}']

    def rss(self) -> int:
        """Resident memory in KiB."""
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found
        return int(found[1])

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextlib.contextmanager
def running_manager(
    lab: Lab, directory: Path, *options: str, token: bytes = b"token-of-ann", host: str = NODE
) -> Iterator[Manager]:
    """A manager on the lab's node that takes `token`, or none when the options say so themselves."""
    if not {"--insecure", "--token-file"} & set(options):
        (directory / "tokens").write_bytes(b"ann: " + token + b"\n")
        options = (*options, "--token-file", str(directory / "tokens"))
    logged = directory / f"manager-{secrets.token_hex(4)}.log"
    if "--linger" not in options:
        options = (*options, "--linger", "0")
    command = lab.pod_command(zipapp_command("--listen", f"{host}:0", "--exit", "kernel", *options))
    with logged.open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        listening = re.compile(r"listening on \S+ port (\d+)")
        eventually(lambda: process.poll() is not None or listening.search(logged.read_text()) is not None, 10)
        found = listening.search(logged.read_text())
        assert found, logged.read_text()
        yield Manager(lab, process, logged, (host.strip("[]"), int(found[1])), token)
        assert "Traceback" not in logged.read_text(), logged.read_text()
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# -- certificates ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(self.certificate.read_text())).digest()

    @property
    def pin(self) -> str:
        return f"sha256:{self.digest.hex()}"

    @property
    def options(self) -> tuple[str, ...]:
        return "--tls-cert", str(self.certificate), "--tls-key", str(self.key)


def self_signed(directory: Path, name: str, alternatives: str = f"IP:{NODE}") -> Certificate:
    """A certificate signed by itself, as openssl makes it."""
    made = Certificate(directory / f"{name}.crt", directory / f"{name}.key")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    files = ["-keyout", str(made.key), "-out", str(made.certificate)]
    request = ["openssl", "req", "-x509", *curve, "-subj", f"/CN={name}", "-addext", f"subjectAltName={alternatives}"]
    subprocess.run([*request, *files], check=True, capture_output=True)
    return made


# -- the client --------------------------------------------------------------------------------------------------------

WANTED = ("--service-cidr", "10.130.0.0/16", "--allow-conflicting-subnets", "10.130.0.0/16")


@dataclass
class Ended:
    """How a client ended."""

    code: int
    said: str

    @property
    def sentence(self) -> str:
        """Its last line, which must be the error's."""
        last = self.said.strip().splitlines()[-1]
        assert last.startswith("tpvpn: "), self.said
        return last


class Laptop:
    """Runs `tpvpn connect` on the lab's laptop with a run directory of its own, and sees what is left behind."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab, self.directory = lab, directory
        self.token_file: Path | None = directory / "laptop-token"
        self.token_file.write_text("ann: token-of-ann\n")
        self._environment = {**os.environ, "TPVPN_RUN_DIR": str(directory / "run"), "NO_COLOR": "1"}
        self._environment.pop("SUDO_UID", None)
        self._before = self.network()

    def command(self, *words: str, under: tuple[str, ...] = ()) -> list[str]:
        return self.lab.command("laptop", [*under, sys.executable, "-m", "tpvpn", *words])

    def connect(self, url: str, *options: str, under: tuple[str, ...] = (), **changed: str) -> subprocess.Popen[str]:
        """Start a client; the token file and the subnets go without saying."""
        token = ("--token-file", str(self.token_file)) if self.token_file else ()
        words = ["connect", "--manager", url, *token, *WANTED, *options]
        return subprocess.Popen(
            self.command(*words, under=under),
            env=self._environment | changed,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ended(self, client: subprocess.Popen[str], seconds: float = 10) -> Ended:
        """Wait for its end; it must have said no traceback and left nothing behind."""
        try:
            said = client.communicate(timeout=seconds)[1]
        finally:
            client.kill()
            client.wait()
        assert "Traceback" not in said, said
        eventually(lambda: self.network() == self._before, 2, "the laptop is as it was")
        assert not any((self.directory / "run").glob("*/*"))
        return Ended(client.returncode, said)

    def failing(self, url: str, *options: str, seconds: float = 10, **rest: object) -> Ended:
        """A client that is to end by itself, with its first connection at the latest."""
        options = (*options, "--give-up-after", "0")
        return self.ended(self.connect(url, *options, **rest), seconds)  # type: ignore[arg-type]

    def status(self) -> dict[str, object]:
        """The one session as `tpvpn status` shows it."""
        shown = subprocess.run(
            self.command("status", "--output", "json"), env=self._environment, capture_output=True, text=True
        )
        assert shown.returncode == 0, shown.stderr
        return json.loads(shown.stdout)

    def network(self) -> str:
        """All that a session could leave something in."""
        shows = "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; ip link; nft list ruleset"
        return self.lab.run("laptop", ["sh", "-ec", shows]).stdout


@pytest.fixture
def laptop(lab: Lab, tmp_path: Path) -> Laptop:
    return Laptop(lab, tmp_path)


@contextlib.contextmanager
def serving(lab: Lab, handle: Handler, host: str = NODE) -> Iterator[str]:
    """A server on the node, whose every connection has a thread that runs `handle`; its URL.

    An error in one of them, but for the client's leaving, is this context's.
    """
    errors: list[BaseException] = []
    threads: list[threading.Thread] = []
    with inside(lab.namespace("node")):
        listening = socket.create_server((host, 0))

    def run_one(connected: socket.socket) -> None:
        connected.settimeout(20)
        try:
            with connected:
                handle(connected)
        except (OSError, EOFError):
            pass
        except BaseException as error:
            errors.append(error)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=run_one, args=(listening.accept()[0],)))
                threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield f"tcp://{host}:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        for thread in (accepting, *threads):
            thread.join()
    if errors:
        raise errors[0]
