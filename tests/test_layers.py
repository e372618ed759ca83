"""The import ladder of docs/architecture.md: imports point down only, each foreign library comes in by one door."""

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "tpvpn"

LAYERS = {
    "errors": 0, "exposition": 0, "wire": 0,
    "config": 1, "route.prefix": 1, "route.fib": 1, "route.owner": 1, "route.conflict": 1, "route.plan": 1,
    "route.verdict": 1, "route.virtual": 1, "route.advice": 1, "route.why": 1, "route.operations": 1,
    "proto": 1, "report": 1, "events": 1, "client_metrics": 1, "talkers": 2, "helper.protocol": 1, "helper.decoders": 1,
    "tun": 2, "journal": 2, "netlink": 2, "nfnetlink": 2, "route.netlink": 2, "route.changes": 2, "rundir": 2,
    "xfrm": 2, "sockdiag": 2, "holders": 2, "privileged": 2,
    "dns.policy": 1, "dns.resolv_conf": 1, "dns.answers": 1, "dns.cache": 1, "dns.advice": 1,
    "dns.system": 2, "dns.names": 2, "dns.ask": 2, "dns.resolved": 2, "dns.file": 2, "dns.marker": 2, "dns.shown": 2,
    "dns.neighbours": 2,
    "dns.exchange": 3, "dns.upstream": 3, "dns.tcp": 3, "dns.server": 3,
    "firewall": 1, "firewall.expressions": 2, "firewall.nftables": 2, "firewall.read": 2,
    "helper": 3, "transport": 3, "link": 3, "bundle": 3, "heartbeat": 3, "pump": 3, "speed": 3, "tunnel": 3,
    "manager": 3,
    "capture": 3, "packet_filter": 1,
    "engine": 4, "keeper": 4, "router": 4, "cluster": 4, "wishes": 4, "sessions": 4,
    "host_resolver": 4, "namer": 4, "place": 4,
    "sandbox.sandbox": 4, "sandbox.ordinary": 4, "sandbox.resolver": 4,
    "sandbox.namespaces": 2, "sandbox.inside": 3,
    "kube.subnets": 1, "kube.refusal": 1, "kube.manifest": 1, "kube.zipapp": 2,
    "kube.access": 2, "kube.kubeconfig": 2, "kube.api": 2, "kube.installed": 2, "kube.discover": 2, "kube.install": 2,
    "kube.helm": 2,
    "doctor.check": 1, "doctor.advice": 1, "doctor.redact": 1,
    "control": 5, "doctor": 5, "lab": 5,
    "cli": 6,
}  # fmt: skip

DOORS = {
    "dns": {"dns.names", "dns.shown", "dns.ask"},
    "dbus_fast": {"dns.resolved"},
    "asyncinotify": {"dns.file"},
    "pyroute2": {"route.netlink", "lab"},
    "uvloop": {"cli", "manager"},
    "yaml": {"config", "kube"},
    "aiohttp": {"kube.api"},
    "multidict": {"kube.api"},
    "kubernetes_asyncio": {"kube.api"},
    "scapy": set[str](),
}

STANDARD_LIBRARY_ONLY = (
    "errors",
    "exposition",
    "wire",
    "proto",
    "tun",
    "netlink",
    "nfnetlink",
    "link",
    "bundle",
    "heartbeat",
    "pump",
    "transport.stream",
    "transport.inner_tls",
    "transport.tcp",
    "transport.upgrade",
    "manager",
)

MODULES = sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    """Dotted name below tpvpn: "route.fib"; a package's own name for its __init__."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def under(name: str, table) -> str | None:
    """The longest entry of the table that holds this module."""
    while name and name not in table:
        name = name.rpartition(".")[0]
    return name or None


def imports_of(path: Path) -> set[str]:
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {module} | {
                f"{module}.{alias.name}" for alias in node.names if (SOURCE.parent / module.replace(".", "/")).is_dir()
            }
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    name = name_of(path)
    if name in ("", "__main__"):
        return
    place = under(name, LAYERS)
    if place is None:
        assert path.name == "__init__.py", (
            f"{name} has no layer: give it one in tests/test_layers.py and docs/architecture.md"
        )
        return
    for imported in imports_of(path):
        if imported.startswith("tpvpn."):
            target = under(imported.removeprefix("tpvpn."), LAYERS)
            if target is not None:
                assert LAYERS[target] <= LAYERS[place], f"{name} (layer {LAYERS[place]}) imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_foreign_libraries_have_one_door(path: Path) -> None:
    name = name_of(path)
    for imported in imports_of(path):
        top = imported.partition(".")[0]
        if top == "tpvpn" or top in sys.stdlib_module_names:
            continue
        assert top in DOORS, f"{name} imports {imported}: no door is named for it"
        assert under(name, DOORS[top]), f"{name} imports {top}, whose door is {DOORS[top]}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_manager_needs_the_standard_library_alone(path: Path) -> None:
    name = name_of(path)
    if not under(name, STANDARD_LIBRARY_ONLY):
        return
    for imported in imports_of(path):
        top = imported.partition(".")[0]
        if top == "tpvpn" and imported != "tpvpn":
            assert under(imported.removeprefix("tpvpn."), STANDARD_LIBRARY_ONLY), f"{name} imports {imported}"
        else:
            assert top in sys.stdlib_module_names or top in ("uvloop", "tpvpn"), f"{name} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_budgets(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(tree), "each module says what it holds"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1 - len((ast.get_docstring(node, False) or "").splitlines())
            assert length <= 60, f"{node.name} has {length} lines"
