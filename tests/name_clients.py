"""The programs that ask for names: each C library's resolver, Go's own, Python's and curl's, each with a way to run it.

Each says one address a line, or fails.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GO = """
package main

import (
	"context"
	"fmt"
	"net"
	"os"
)

func main() {
	resolver := net.Resolver{PreferGo: true}
	addresses, err := resolver.LookupHost(context.Background(), os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	for _, address := range addresses {
		fmt.Println(address)
	}
}
"""
C = """
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>

int main(int count, char **words) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    int error = getaddrinfo(words[1], NULL, &hints, &found);
    if (error) {
        fprintf(stderr, "%s\\n", gai_strerror(error));
        return 2;
    }
    for (; found; found = found->ai_next) {
        char text[INET6_ADDRSTRLEN];
        void *address = found->ai_family == AF_INET
            ? (void *)&((struct sockaddr_in *)found->ai_addr)->sin_addr
            : (void *)&((struct sockaddr_in6 *)found->ai_addr)->sin6_addr;
        puts(inet_ntop(found->ai_family, address, text, sizeof text));
    }
    return 0;
}
"""
PYTHON = """
import socket, sys
try:
    found = socket.getaddrinfo(sys.argv[1], None, type=socket.SOCK_STREAM)
except OSError as error:
    sys.exit(str(error))
print("\\n".join(entry[4][0] for entry in found))
"""
CLIENTS = ("glibc", "musl", "go", "python", "getent")


@pytest.fixture(scope="session")
def clients(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, ...]]:
    """The command of each client, to which the name is added."""
    made = tmp_path_factory.mktemp("clients")
    (made / "client.c").write_text(C)
    for compiler, name in (("gcc", "glibc"), ("musl-gcc", "musl")):
        static = ["-static"] if name == "musl" else []
        _make(made, [compiler, *static, "-O1", "-o", name, "client.c"])
    (made / "client.go").write_text(GO)
    _make(made, ["go", "build", "-o", "go", "client.go"], CGO_ENABLED="0", GOFLAGS="-mod=mod", GO111MODULE="off")
    return {
        **{name: (str(made / name),) for name in ("glibc", "musl", "go")},
        "python": (sys.executable, "-c", PYTHON),
        "getent": ("sh", "-c", "getent ahosts \"$1\" | awk '/STREAM/ { print $1 }' | grep .", "getent"),
    }


def _make(where: Path, command: list[str], **environment: str) -> None:
    assert shutil.which(command[0]), f"{command[0]} is not installed: run scripts/tools"
    done = subprocess.run(command, cwd=where, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
