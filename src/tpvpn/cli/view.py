"""What a person sees of a session while it runs: its status as a screenful of lines, for any size of a terminal.

Pure: values in, lines out. A line is made of pieces, each with its colour, so that it can be cut to the width before
any escape sequence is in it. What does not fit is left out from the bottom of each part, and counted.
"""

import time
import unicodedata
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from tpvpn.report import COLOURS, bits, painted, size

GREEN, YELLOW, BOLD, FAINT = 32, 33, 1, 2
"""SGR codes (ECMA-48)."""
STATES = {"ready": GREEN, "connecting": YELLOW, "reconnecting": YELLOW}
LEAST, GRAPH = 20, 40
"""Columns of the narrowest screen that is drawn, and of the widest graph."""


@dataclass(frozen=True, slots=True)
class Style:
    """What the terminal can show."""

    colour: bool
    unicode: bool

    @property
    def blocks(self) -> str:
        """What a graph is drawn with, the lowest first."""
        return " ▁▂▃▄▅▆▇█" if self.unicode else " .:-=+*#@"

    def render(self, line: "Line", width: int) -> str:
        """One line, cut to the width."""
        shown, left = list[str](), width
        for piece in line:
            text = piece.text if piece.text.isascii() and piece.text.isprintable() else self._plain(piece.text)
            text = self.cut(text, left)
            left -= len(text)
            shown.append(painted(text, piece.colour) if self.colour and piece.colour and text else text)
        return "".join(shown)

    def cut(self, text: str, width: int) -> str:
        """As much of a text as is not wider, with a mark where it was cut."""
        return text if len(text) <= width else (text[: width - 1] + ("…" if self.unicode else "~")) if width else ""

    def _plain(self, text: str) -> str:
        """The text with a "?" for what the terminal would obey, or give another width than one column (UAX #11)."""
        if not self.unicode:
            text = text.encode("ascii", "replace").decode()
        return "".join(
            one
            if one.isprintable() and unicodedata.east_asian_width(one) not in "WF" and not unicodedata.combining(one)
            else "?"
            for one in text
        )


class Piece(NamedTuple):
    """A part of a line; `colour` 0 is the terminal's own."""

    text: str
    colour: int = 0


Line = Sequence[Piece]


class Rates:
    """How fast a session's counters grow, over the last minutes."""

    def __init__(self) -> None:
        self.up: deque[float] = deque(maxlen=GRAPH)
        self.down: deque[float] = deque(maxlen=GRAPH)
        """Bytes a second."""
        self._before: tuple[float, int, int] | None = None

    def add(self, now: float, traffic: Mapping[str, int]) -> None:
        """What the counters say now; `now` in seconds."""
        sent, received = traffic["sent_bytes"], traffic["received_bytes"]
        if self._before and now > self._before[0]:
            seconds = now - self._before[0]
            self.up.append(max(0, sent - self._before[1]) / seconds)
            self.down.append(max(0, received - self._before[2]) / seconds)
        self._before = now, sent, received


def screen(
    status: Mapping[str, Any], rates: Rates, messages: Sequence[str], width: int, height: int, style: Style
) -> list[str]:
    """The session as at most `height` lines of at most `width` columns."""
    width = max(width, LEAST)
    head = [*_head(status, width), *_throughput(status["traffic"], rates, width, style)]
    parts: dict[str, list[Line]] = {
        "subnets": _subnets(status),
        "messages": [[Piece(f"  {message}")] for message in reversed(messages)],
        "most traffic": [_talker(talker, width) for talker in status["talkers"]],
    }
    lines = head + _fitted({title: part for title, part in parts.items() if part}, height - len(head))
    return [style.render(line, width) for line in lines[:height]]


def _head(status: Mapping[str, Any], width: int) -> Iterator[Line]:
    manager, rtt = status["manager"], status["rtt"]
    yield [
        Piece(f"tpvpn {status['name']}  ", BOLD),
        Piece(status["state"], STATES[status["state"]]),
        Piece(f" {lasted(status)}"),
    ]
    exits = " and ".join(dict.fromkeys(one for one in manager["exit"].values() if one))
    ways = [
        manager["endpoint"],
        f"{exits} exit" if exits else "",
        f"{status['links']} link{'' if status['links'] == 1 else 's'}",
        f"RTT {1000 * rtt:.1f} ms" if rtt is not None else "",
        f"connected again {status['reconnects']}x" if status["reconnects"] else "",
    ]
    row = ""
    for way in filter(None, ways):  # what does not fit goes to the next line
        if row and len(row) + 2 + len(way) > width:
            yield [Piece(row, FAINT)]
            row = ""
        row += f", {way}" if row else way
    yield [Piece(row, FAINT)]


def _throughput(traffic: Mapping[str, int], rates: Rates, width: int, style: Style) -> Iterator[Line]:
    yield []
    top = max((*rates.up, *rates.down, 1))
    for label, past, total in (("up", rates.up, "sent_bytes"), ("down", rates.down, "received_bytes")):
        now = f"{label:<5}{bits(past[-1] if past else 0):>10}  "
        room = min(GRAPH, width - len(now) - 12)
        shown = list(past)[-room:] if room > 0 else []
        graph = "".join(style.blocks[_level(rate, top)] for rate in shown)
        yield [Piece(now), Piece(graph.rjust(max(room, 0)), GREEN), Piece(f"{size(traffic[total]):>11}", FAINT)]


def _level(rate: float, top: float) -> int:
    """Which block a rate is; anything but nothing is seen."""
    return 0 if rate <= 0 else 1 + min(7, int(8 * rate / top))


def _subnets(status: Mapping[str, Any]) -> list[Line]:
    lines, subnets = list[Line](), status["plan"]["subnets"]
    column = max((len(subnet["cidr"]) for subnet in subnets), default=0)
    for subnet in subnets:
        against = [
            f"{'before' if one['allowed'] else 'against'} {one['route']} on {one['device']} ({one['owner']})"
            for one in subnet["conflicts"]
        ]
        at = [f"at {subnet['virtual']}"] if subnet["virtual"] else []
        shadowed = [status["shadowed"][one] for one in subnet["routes"] if one in status["shadowed"]]
        verdict = Piece(f"{subnet['verdict']:<9}", YELLOW if shadowed else COLOURS[subnet["verdict"]])
        rest = "  ".join([subnet["kind"], *at, *shadowed, *against])
        lines.append([Piece(f"  {subnet['cidr']:<{column}}  "), verdict, Piece(f" {rest}", FAINT)])
    warnings = [*status["plan"]["warnings"], *status["dns"]["warnings"]]
    return lines + [[Piece("  warning: ", YELLOW), Piece(warning)] for warning in warnings]


def _talker(talker: Mapping[str, Any], width: int) -> Line:
    host = f"[{talker['address']}]" if ":" in talker["address"] else talker["address"]
    many = f" ({talker['connections']})" if talker["connections"] > 1 else ""
    wide = width >= 60
    room = max(8, width - (32 if wide else 18))
    name = f"{talker['name'] or host}:{talker['port']}{many}"
    if len(name) > room:  # the port is at the end
        name = name[: room - 8] + "~" + name[-7:]
    up, down = bits(talker["sent_rate"]), bits(talker["received_rate"])
    return [Piece(f"  {name:<{room}}{up:>11} up{down:>11} down" if wide else f"  {name:<{room}}{down:>11} down")]


def _fitted(parts: Mapping[str, list[Line]], rows: int) -> list[Line]:
    """The parts in the rows that there are: each has its share, and what one does not need is the others'."""
    lines, waiting = list[Line](), min(len(parts), rows // 3)
    for title, part in list(parts.items())[:waiting]:
        room = rows // waiting - 2
        waiting -= 1
        shown = part if len(part) <= room else part[: room - 1]
        more = [[Piece(f"  and {len(part) - len(shown)} more", FAINT)]] if len(shown) < len(part) else []
        lines += [[], [Piece(title, BOLD)], *shown, *more]
        rows -= 2 + len(shown) + len(more)
    return lines


def lasted(status: Mapping[str, Any]) -> str:
    """For how long the session has been there."""
    return duration(time.time() - datetime.fromisoformat(status["since"]).timestamp())


def duration(seconds: float) -> str:
    """A time in its two largest units: "2 min 13 s"."""
    left = max(0, int(seconds))
    parts = [(left // 86400, "d"), (left // 3600 % 24, "h"), (left // 60 % 60, "min"), (left % 60, "s")]
    while len(parts) > 1 and not parts[0][0]:
        parts.pop(0)
    return " ".join(f"{count} {unit}" for count, unit in parts[:2])
