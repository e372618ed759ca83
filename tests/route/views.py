"""Random views for hypothesis: few devices, few tables, few prefixes, every kind of rule."""

from hypothesis import strategies as st

from tpvpn.route.fib import Link, Nexthop, Route, Rule, View
from tpvpn.route.prefix import BITS, Prefix

DEVICES = ("eth0", "tun0", "wg0", "docker0")
TABLES = (254, 52, 100)


@st.composite
def prefixes(draw: st.DrawFn, version: int = 4) -> Prefix:
    """So few that most nest, touch or equal one another: two hosts in each quarter of 10.0.0.0/8 or fd00::/8."""
    top = 0x0A if version == 4 else 0xFD
    bits = BITS[version]
    address = (top << (bits - 8)) | draw(st.integers(0, 3)) << (bits - 10) | draw(st.integers(0, 1))
    length = draw(st.sampled_from((0, 4, 8, 8, 9, 9, 10, 10, bits - 1, bits)))
    return Prefix.around(version, address, length)


@st.composite
def routes(draw: st.DrawFn, version: int = 4) -> Route:
    kind = draw(st.sampled_from(("unicast", "unicast", "unicast", "unicast", "throw", "blackhole", "unreachable")))
    names = draw(st.lists(st.sampled_from(DEVICES), min_size=1, max_size=2, unique=True))
    return Route(
        draw(prefixes(version)),
        draw(st.sampled_from(TABLES)),
        kind,
        tuple(Nexthop(name) for name in names) if kind == "unicast" else (),
        metric=draw(st.sampled_from((0, 50, 100))),
        protocol=draw(st.sampled_from((3, 4))),
    )


@st.composite
def rules(draw: st.DrawFn, version: int = 4) -> Rule:
    action = draw(st.sampled_from(("lookup", "lookup", "lookup", "lookup", "goto", "nop", "blackhole")))
    return Rule(
        4 if version == 4 else 6,
        draw(st.integers(1, 40)),
        action,
        draw(st.sampled_from(TABLES)) if action == "lookup" else 0,
        destination=draw(st.none() | st.none() | prefixes(version)),
        iif=draw(st.sampled_from((None, None, None, "lo", "eth0"))),
        mark=draw(st.sampled_from((None, None, None, 0, 0xCA6C))),
        inverted=draw(st.booleans()),
        suppress_prefixlength=draw(st.sampled_from((None, None, 0, 8, 9))) if action == "lookup" else None,
        goto=draw(st.integers(1, 50)) if action == "goto" else None,
    )


def default_rules() -> tuple[Rule, ...]:
    return tuple(
        Rule(version, preference, table=table)
        for version in (4, 6)
        for preference, table in ((0, 255), (32766, 254), (32767, 253))
    )


def ordered(found: list[Rule]) -> tuple[Rule, ...]:
    """In the kernel's order: by preference, the earlier added first; a goto only jumps ahead."""
    kept = [rule for rule in found if rule.goto is None or rule.goto > rule.preference]
    return tuple(sorted((*default_rules(), *kept), key=lambda rule: (rule.version, rule.preference)))


@st.composite
def views(draw: st.DrawFn, version: int = 4, most: int = 10) -> View:
    unique = draw(
        st.lists(routes(version), max_size=most, unique_by=lambda route: (route.prefix, route.table, route.metric))
    )
    links = tuple(
        Link(index, name, up=draw(st.sampled_from((True, True, True, False))), carrier=draw(st.booleans()))
        for index, name in enumerate(DEVICES, 2)
    )
    return View(ordered(draw(st.lists(rules(version), max_size=5))), tuple(unique), links)
