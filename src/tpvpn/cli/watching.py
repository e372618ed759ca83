"""`status --watch`: the sessions again and again, on the screen of a terminal, or a piece of text each time."""

import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from tpvpn.cli.chosen import NOBODY
from tpvpn.cli.display import PERIOD
from tpvpn.cli.screen import Screen, open_screen, style
from tpvpn.cli.view import FAINT, Piece, Rates, screen

Ask = Callable[[], tuple[list[dict[str, Any]], list[str]]]


def watch_lines(ask: Ask, shown: Callable[[list[dict[str, Any]], list[str]], str]) -> int:
    """Print what they answer until Ctrl-C, as `shown` has it."""
    while True:
        print(shown(*ask()), flush=True)
        time.sleep(PERIOD)


def watch(ask: Ask, shown: Callable[[list[dict[str, Any]], list[str]], str]) -> int:
    """Show what they answer until Ctrl-C: on the screen, or as `shown` has it where there is none."""
    signal.signal(signal.SIGTERM, _end)
    with open_screen(sys.stdout) as opened:
        if opened:
            _watch_on(opened, ask)
        return watch_lines(ask, shown)


def _watch_on(opened: Screen, ask: Ask) -> None:
    """Draw for ever, at once when the screen has another size, or is there again after Ctrl-Z."""
    rates: dict[str, Rates] = defaultdict(Rates)
    answers, unanswered, look = list[dict[str, Any]](), list[str](), style(sys.stdout)

    def draw(*_: object) -> None:
        width, height = opened.size
        lines = [look.render([Piece(line)], width) for line in unanswered or ([] if answers else [NOBODY])]
        share = (height - len(lines) - 1) // max(1, len(answers))
        for status in answers:
            lines += [*screen(status, rates[status["name"]], (), width, share - 1, look), ""]
        opened.draw([*lines[: height - 1], look.render([Piece("Ctrl-C ends this view, no session", FAINT)], width)])

    def stop(*_: object) -> None:
        opened.suspend()
        draw()

    signal.signal(signal.SIGWINCH, draw)
    signal.signal(signal.SIGTSTP, stop)
    while True:
        answers, unanswered = ask()
        for status in answers:
            rates[status["name"]].add(time.monotonic(), status["traffic"])
        draw()
        time.sleep(PERIOD)


def _end(*_: object) -> None:
    """By SIGTERM; the terminal is to be left as it was."""
    sys.exit(0)
