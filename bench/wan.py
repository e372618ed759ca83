"""A wide-area link in user space, since the kernel may have no netem: delay, loss and rate between two namespaces.

`python -m bench.wan NETNS NETNS DELAY,LOSS,RATE` (ms one way, percent, Mb/s) opens a TUN device `wan0` in
each namespace, prints "ready" and carries packets between them until it is ended. Without offload each packet is one of
the wire. Each direction is a queue as a router has it: a packet leaves when those before it have been sent at the rate,
arrives a delay later, and is dropped when it would wait longer than the buffer holds.
"""

import argparse
import contextlib
import ctypes
import fcntl
import os
import random
import select
import struct
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

DEVICE = "wan0"
BUFFER = 0.1  # seconds of packets that a direction holds at its rate
CLONE_NEWNET = 0x40000000  # sched.h
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h


@dataclass(frozen=True)
class Wan:
    """What the link is like: seconds one way, the share of packets lost, bytes a second."""

    delay: float
    loss: float
    rate: float

    @classmethod
    def parse(cls, text: str) -> "Wan":
        """From "DELAY,LOSS,RATE" in ms, percent and Mb/s; ValueError when it is something else."""
        delay, loss, rate = (float(part) for part in text.split(","))
        if delay < 0 or not 0 <= loss < 100 or rate <= 0:
            raise ValueError("delay and loss must not be negative, loss below 100, and rate positive")
        return cls(delay / 1e3, loss / 100, rate * 1e6 / 8)


@dataclass
class Direction:
    """One direction of the link: a pure queue. `now` is in seconds of any steady clock."""

    wan: Wan
    chance: random.Random
    _idle_at: float = 0.0
    _under_way: deque[tuple[float, bytes]] = field(default_factory=deque[tuple[float, bytes]])

    def receive(self, packet: bytes, now: float) -> None:
        """Take a packet from the sender."""
        starts = max(now, self._idle_at)
        if starts - now > BUFFER:
            return
        self._idle_at = starts + len(packet) / self.wan.rate
        if self.chance.random() >= self.wan.loss:
            self._under_way.append((self._idle_at + self.wan.delay, packet))

    def arrived(self, now: float) -> list[bytes]:
        """The packets that have reached the other side by now."""
        packets: list[bytes] = []
        while self._under_way and self._under_way[0][0] <= now:
            packets.append(self._under_way.popleft()[1])
        return packets

    def next_arrival(self) -> float | None:
        """When the next packet arrives; None when none is under way."""
        return self._under_way[0][0] if self._under_way else None


def carry(one: int, other: int, wan: Wan) -> None:
    """Carry packets between two TUN descriptors for ever."""
    chance = random.Random(1)
    directions = ((one, other, Direction(wan, chance)), (other, one, Direction(wan, chance)))
    while True:
        arrivals = [at for _, _, direction in directions if (at := direction.next_arrival()) is not None]
        wait = max(0.0, min(arrivals) - time.monotonic()) if arrivals else None
        readable = select.select([one, other], [], [], wait)[0]
        now = time.monotonic()
        for source, target, direction in directions:
            if source in readable:
                with contextlib.suppress(BlockingIOError):
                    for _ in range(64):
                        direction.receive(os.read(source, 2048), now)
            for packet in direction.arrived(now):
                with contextlib.suppress(OSError):  # the device is down, or its queue is full
                    os.write(target, packet)


def open_in(netns: Path) -> int:
    """The descriptor of a new TUN device in a network namespace, which this process then stays in."""
    with netns.open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {netns}")
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    return fd


def main() -> None:
    """The command described above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("netns", type=Path, nargs=2)
    parser.add_argument("link", type=Wan.parse, metavar="DELAY,LOSS,RATE")
    arguments = parser.parse_args()
    one, other = (open_in(netns) for netns in arguments.netns)
    print("ready", flush=True)
    carry(one, other, arguments.link)


if __name__ == "__main__":
    main()
