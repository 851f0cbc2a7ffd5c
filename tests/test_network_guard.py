"""The guard of conftest.py holds, in this process and in those that tests start."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request

import pytest

FAR = ("192.0.2.1", 80)  # reserved for documentation; nobody is there


@pytest.mark.parametrize("method", ["connect", "connect_ex"])
def test_sockets_do_not_leave_the_machine(method: str) -> None:
    with socket.socket() as sock, pytest.raises(RuntimeError, match=r"wanted to reach '192\.0\.2\.1'"):
        getattr(sock, method)(FAR)


def test_foreign_names_are_not_resolved() -> None:
    with pytest.raises(RuntimeError, match=r"wanted to reach 'example\.org'"):
        socket.getaddrinfo("example.org", 443)


def test_sockets_reach_this_machine() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        client.sendall(b"here")
        with server.accept()[0] as accepted:
            assert accepted.recv(4) == b"here"


def test_http_of_started_processes_ends_at_a_closed_local_port() -> None:
    code = "import urllib.request as r; print(r.getproxies()['https'], r.getproxies()['http'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["http://127.0.0.1:9"] * 2
    assert urllib.request.proxy_bypass("localhost")
