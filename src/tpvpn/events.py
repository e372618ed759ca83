"""What happens in a session, as values: lines for a terminal, a record for a log, objects for other programs.

It knows nothing of who listens, and prints nothing. A session tells; each listener is called at once, in order, and
does what it does with its own errors. docs/reference/events.md has the kinds and their members.
"""

import contextlib
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA = "tpvpn.events/1"
Kind = Literal["step", "message", "warning", "plan", "verdict", "state", "ready", "traffic", "ended"]
Step = Literal["API server", "subnets", "plan", "helper", "manager", "TUN", "routes", "DNS"]
_WARNING = "warning: "


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened; `text` is a sentence for people, "" when it is for programs only."""

    kind: Kind
    text: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])


Listener = Callable[[Event], None]


class Detail:
    """What a step has to say at its end: for its line among the steps, and where only sentences are shown."""

    def __init__(self) -> None:
        self.short = self.sentence = ""


class Events:
    """The events of one session, as they are told."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = list(listeners)

    def listen(self, listener: Listener) -> None:
        """One more who is told."""
        self._listeners.append(listener)

    def tell(self, kind: Kind, text: str = "", **facts: Any) -> None:
        """It happened."""
        event = Event(kind, text, facts)
        for listener in self._listeners:
            listener(event)

    def say(self, text: str) -> None:
        """A sentence for people; one that begins with "warning: " is a warning."""
        if text.startswith(_WARNING):
            self.tell("warning", text.removeprefix(_WARNING))
        else:
            self.tell("message", text)

    @contextlib.contextmanager
    def step(self, name: Step) -> Generator[Detail]:
        """A part of the way to a session that is ready, which takes time; it ends as "done" or "failed"."""
        self.tell("step", step=name, state="begun")
        began, detail, state = time.monotonic(), Detail(), "failed"
        try:
            yield detail
            state = "done"
        finally:
            seconds = round(time.monotonic() - began, 3)
            sentence = detail.sentence if state == "done" else ""
            self.tell("step", sentence, step=name, state=state, seconds=seconds, detail=detail.short)
