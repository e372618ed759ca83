"""The manager's options, apart from what they lead to: `tpvpn --help` shows them and must not load a server."""

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of DESIGN's `manager`, for the command line and for the zipapp."""
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        help="address and port of sessions and health; *:PORT: every address",
    )
    parser.add_argument("--exit", choices=["auto", "kernel", "socket"], default="auto", help="how packets leave")
    parser.add_argument(
        "--token-file",
        metavar="F",
        action="append",
        default=[],
        help="file of `name: token` lines, read again when it changes (repeatable)",
    )
    parser.add_argument(
        "--destination", metavar="CIDR", action="append", default=[], help="forward only to this subnet (repeatable)"
    )
    parser.add_argument("--tls-cert", metavar="F", help="certificate chain (PEM) for tls:// clients")
    parser.add_argument("--tls-key", metavar="F", help="its private key (PEM)")
    parser.add_argument(
        "--linger", type=float, default=600.0, metavar="S", help="keep a session so long without a connection (600)"
    )
    parser.add_argument(
        "--until-idle", type=float, metavar="S", help="end when there was no session for so many seconds (never)"
    )
    parser.add_argument("--insecure", action="store_true", help="take clients without a token; for a lab only")
