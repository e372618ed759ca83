"""The stub resolver alone, for `bench/names`: `python -m bench.stub bare|cached|asked ADDRESS`.

It answers on port 53 of an address. The cluster is at the other end of a socket pair in the same process and answers
at once; what it says holds for a minute (`cached`) or for no time (`asked`). `bare` is the cluster itself, without the
stub before it.
"""

import asyncio
import socket
import struct
import sys

import uvloop

from tpvpn.dns.exchange import Exchange
from tpvpn.dns.policy import Decision
from tpvpn.dns.server import Server
from tpvpn.dns.upstream import Upstream

TTLS = {"bare": 0, "cached": 60, "asked": 0}
ADDRESS = bytes([10, 130, 0, 7])


def answer(query: bytes, ttl: int) -> bytes:
    """One address, whatever is asked."""
    end = query.index(b"\0", 12) + 5
    record = b"\xc0\x0c\0\1\0\1" + struct.pack(">IH", ttl, len(ADDRESS)) + ADDRESS
    return query[:2] + b"\x85\0\0\1\0\1\0\0\0\0" + query[12:end] + record


def serve(mode: str, udp: socket.socket) -> None:
    """Answer for as long as the loop runs."""
    loop = asyncio.get_running_loop()
    if mode == "bare":

        def on_datagram() -> None:
            query, sender = udp.recvfrom(4096)
            udp.sendto(answer(query, TTLS[mode]), sender)

        udp.setblocking(False)
        loop.add_reader(udp, on_datagram)
        return
    exchange = Exchange()
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    near.setblocking(False)
    far.setblocking(False)

    def ask(identity: int, message: bytes) -> None:
        near.send(len(message).to_bytes(2) + message)

    def each(stream: socket.socket) -> list[bytes]:
        came, found = stream.recv(1 << 16), list[bytes]()  # whole messages: each is sent at once, and few wait
        while came:
            length = 2 + int.from_bytes(came[:2])
            found.append(came[2:length])
            came = came[length:]
        return found

    def on_questions() -> None:
        said = (answer(query, TTLS[mode]) for query in each(far))
        far.send(b"".join(len(message).to_bytes(2) + message for message in said))

    def on_answers() -> None:
        for message in each(near):
            exchange.receive(int.from_bytes(message[:2]), message)

    loop.add_reader(far, on_questions)
    loop.add_reader(near, on_answers)
    exchange.attach(ask)
    Server([udp], exchange, Upstream(), lambda _name, _kind: Decision("cluster", "all is"))


async def main(mode: str, address: str) -> None:
    """Answer until it is killed."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind((address, 53))
        serve(mode, udp)
        print("ready", flush=True)
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(*sys.argv[1:]))
