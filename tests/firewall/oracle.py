"""The kernel's own word on a ruleset: whether packets to a subnet leave, and whether answers come in.

    raw socket ── output, postrouting ──► tpvpn0 (a TUN) ──► the test's descriptor
    TCP socket ◄── input, prerouting ──── tpvpn0         ◄── an answer that the test writes

Both are told at once, without waiting: the kernel refuses a raw socket's packet that a rule drops (EPERM), and a write
to a TUN returns when the packet is with the socket, or gone. The flows are opened before the rules are there, and
tracked: a table of a name that is ours, so that nobody reports it, asks for that.
"""

import contextlib
import os
import re
import select
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet, Raw

from pod import inside, namespace, run
from tpvpn.firewall.model import Firewall
from tpvpn.firewall.read import read
from tpvpn.route.prefix import Prefix
from tpvpn.tun import Tun, open_tun

DEVICE = "tpvpn0"
OWN = ("246.0.0.2", "fd74:7076:706e::2")
SUBNETS = tuple(map(Prefix.parse, ("10.130.0.0/16", "10.132.0.0/16", "fd00:130::/64")))
_TRACKED = "table inet tpvpn-oracle { chain out { type filter hook output priority 0; ct state new counter; }; }"


@dataclass
class Laptop:
    """A namespace with the tunnel's device and an open flow to an address of each subnet."""

    namespace: str
    tun: Tun
    flows: dict[Prefix, "Flow"]
    port: int = 4000
    """Of the next connection's first packet: no two are one flow."""

    def install(self, program: str, rules: str) -> None:
        """Hand rules to nft, or to one of iptables' restore programs."""
        command = ["nft", "-f", "-"] if program == "nft" else [f"{program}-restore"]
        inside_it = ["ip", "netns", "exec", self.namespace, *command]
        done = subprocess.run(inside_it, input=rules, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def read(self) -> Firewall:
        with inside(self.namespace):
            return read()

    def leaves(self, subnet: Prefix) -> bool:
        """Whether the first packet of a connection to the subnet comes out of the device."""
        there = subnet.address(1)
        self.port += 1
        with inside(self.namespace), socket.socket(_family(there), socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
            try:
                raw.sendto(bytes(TCP(sport=self.port, dport=8080, flags="S")), (there, 0))
            except PermissionError:
                return False
        self._next(lambda packet: packet.dst == there and packet[TCP].sport == self.port)
        return True

    def answered(self, subnet: Prefix) -> bool:
        """Whether an answer from the subnet comes to the socket that waits for it."""
        return self.flows[subnet].hears(self.tun)

    def _next(self, wanted) -> Packet:
        while True:
            ready = select.select([self.tun.fd, self.tun.prompt_fd], [], [], 5)[0]
            assert ready, "the packet left and did not come out"
            for descriptor in ready:
                packet = _parsed(os.read(descriptor, 2048))
                if TCP in packet and wanted(packet):
                    return packet

    def open(self, subnet: Prefix) -> None:
        """Connect to the subnet's first host, for which this answers."""
        there = subnet.address(1)
        with inside(self.namespace):
            connected = socket.socket(_family(there), socket.SOCK_STREAM)
        connected.setblocking(False)
        assert connected.connect_ex((there, 80)) != 0
        syn = self._next(lambda packet: packet.dst == there and packet[TCP].dport == 80)
        flow = self.flows[subnet] = Flow(connected, syn.src, there, syn[TCP].sport, syn[TCP].seq + 1, 1000)
        flow.send(self.tun, "SA")
        assert connected.getpeername()[0] == there
        flow.sequence += 1


@dataclass
class Flow:
    """A connection whose other end the test plays."""

    socket: socket.socket
    here: str
    there: str
    port: int
    acknowledged: int
    sequence: int

    def send(self, tun: Tun, flags: str, data: bytes = b"") -> None:
        header = (IPv6 if ":" in self.here else IP)(src=self.there, dst=self.here)
        segment = TCP(sport=80, dport=self.port, flags=flags, seq=self.sequence, ack=self.acknowledged)
        os.write(tun.fd, bytes(header / segment / Raw(data)))

    def hears(self, tun: Tun) -> bool:
        self.send(tun, "PA", b"x")
        try:
            assert self.socket.recv(10) == b"x"
        except BlockingIOError:
            return False
        self.sequence += 1
        return True


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET


def _parsed(data: bytes) -> Packet:
    return IPv6(data) if data[0] >> 4 == 6 else IP(data)


@contextlib.contextmanager
def laptop(*devices: str) -> Iterator[Laptop]:
    """A laptop that has these devices too."""
    with namespace("fw") as name, contextlib.ExitStack() as stack:
        with inside(name):
            tun = open_tun(DEVICE, offload=False)
            stack.callback(tun.close)
        for address in OWN:
            run("ip", "-n", name, "addr", "add", address, "dev", DEVICE)
        run("ip", "-n", name, "link", "set", DEVICE, "up")
        for subnet in SUBNETS:
            run("ip", "-n", name, "route", "add", str(subnet), "dev", DEVICE)
        for device in devices:
            run("ip", "-n", name, "tuntap", "add", device, "mode", "tun")
        made = Laptop(name, tun, {})
        made.install("nft", _TRACKED)
        for subnet in SUBNETS:
            made.open(subnet)
            stack.callback(made.flows[subnet].socket.close)
        yield made


def agrees(host: Laptop, said: list[str], doubtful: bool = False) -> None:
    """The kernel does with real packets what the sentences say."""
    for subnet in SUBNETS:
        about = [sentence for sentence in said if re.search(rf"\b{re.escape(str(subnet))}", sentence)]
        stopped = any(re.match(r"packets to .* are (dropped|rejected) by", sentence) for sentence in about)
        perhaps = any(re.match(r"packets to .* may be (dropped|rejected) by", sentence) for sentence in about)
        unanswered = any(sentence.startswith("answers from ") for sentence in about)
        leaves, answered = host.leaves(subnet), host.answered(subnet)
        assert not (stopped and leaves), f"packets to {subnet} leave: {said}"
        assert stopped or perhaps or leaves, f"packets to {subnet} do not leave: {said}"
        assert not (unanswered and answered), f"answers from {subnet} come in: {said}"
        assert unanswered or doubtful or answered, f"answers from {subnet} do not come in: {said}"
