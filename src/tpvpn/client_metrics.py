"""The status of sessions in Prometheus' text format (docs/reference/metrics.md).

Pure: the values that `tpvpn status --output json` shows in, text out. Every sample has the session's name as a label,
so that several sessions make one page.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from tpvpn import __version__
from tpvpn.exposition import Kind, Sample, by, family, single
from tpvpn.report import COLOURS

Status = Mapping[str, Any]
Of = Callable[[Status], list[Sample]]


def render(sessions: Sequence[Status]) -> str:
    """The text; families come in one piece, whatever session their samples are of."""
    text = family("gauge", "tpvpn_client_build_info", "What runs here; 1.", [({"version": __version__}, 1)])
    text += single("gauge", "tpvpn_client_sessions", "Sessions that run.", len(sessions))
    for kind, name, help, samples_of in _FAMILIES:
        samples = [
            ({"session": status["name"], **labels}, value)
            for status in sessions
            for labels, value in samples_of(status)
        ]
        text += family(kind, f"tpvpn_client_{name}", help, samples) if samples else ""
    return text


def _info(status: Status) -> list[Sample]:
    manager = status["manager"]
    exits = {family: kind or "none" for family, kind in manager["exit"].items()}
    return [({"device": status["device"], "endpoint": manager["endpoint"], "pod": manager["pod"], **exits}, 1)]


def _since(status: Status) -> list[Sample]:
    return [({}, datetime.fromisoformat(status["since"]).timestamp())]


def _traffic(unit: str) -> Of:
    return lambda status: by("direction", {way: status["traffic"][f"{way}_{unit}"] for way in ("sent", "received")})


def _dropped(status: Status) -> list[Sample]:
    reasons = {"foreign": "foreign_packets", "malformed": "invalid_packets"}
    return by("reason", {reason: status["traffic"][key] for reason, key in reasons.items()})


def _subnets(status: Status) -> list[Sample]:
    found = Counter(subnet["verdict"] for subnet in status["plan"]["subnets"])
    return by("verdict", {verdict: found[verdict] for verdict in COLOURS})


def _connected(status: Status) -> list[Sample]:
    return [({}, status["state"] == "ready")]


def _value(key: str) -> Of:
    """A value of the status; no sample where it is not known."""
    return lambda status: [({}, status[key])] if status.get(key) is not None else []


def _questions(status: Status) -> list[Sample]:
    return by("outcome", status["dns"].get("questions", {}))


_FAMILIES: tuple[tuple[Kind, str, str, Of], ...] = (
    ("gauge", "session_info", "What a session is; 1.", _info),
    ("gauge", "connected", "1 while there is a connection, 0 while another is sought.", _connected),
    ("gauge", "start_time_seconds", "Start of the session, by Unix time.", _since),
    ("gauge", "links", "Connections that carry.", _value("links")),
    ("counter", "reconnects_total", "Connections that took the place of a lost one.", _value("reconnects")),
    ("gauge", "rtt_seconds", "Time to the manager and back.", _value("rtt")),
    ("counter", "bytes_total", "Bytes carried, with frames.", _traffic("bytes")),
    ("counter", "packets_total", "Packets carried.", _traffic("packets")),
    ("counter", "dropped_packets_total", "Packets dropped, by reason.", _dropped),
    ("gauge", "subnets", "Subnets, by verdict.", _subnets),
    ("counter", "dns_questions_total", "Questions for names, by what became of them.", _questions),
)  # fmt: skip
