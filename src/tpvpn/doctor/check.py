"""What the doctor says of one thing: a sentence, and with it a remedy where it is not well. A value."""

from dataclasses import dataclass
from typing import Any, Literal

State = Literal["ok", "warning", "failure"]


@dataclass(frozen=True, slots=True)
class Check:
    """Something that was looked at; with a remedy it is not well."""

    id: str
    sentence: str
    remedy: str | None = None
    warns: bool = False
    """Whether what is not well keeps nobody from working."""

    @property
    def state(self) -> State:
        """How it is."""
        return "ok" if self.remedy is None else "warning" if self.warns else "failure"

    @property
    def ok(self) -> bool:
        """Whether it keeps nobody from working."""
        return self.state != "failure"

    def as_json(self) -> dict[str, Any]:
        """As `tpvpn doctor --output json` shows it."""
        return {
            "id": self.id,
            "state": self.state,
            "ok": self.ok,
            "sentence": self.sentence,
            "remedy": self.remedy,
        }


def warning(identity: str, sentence: str, remedy: str) -> Check:
    """Of what keeps nobody from working."""
    return Check(identity, sentence, remedy, warns=True)
