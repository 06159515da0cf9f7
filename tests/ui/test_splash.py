"""The start page: there at once, silent about what it cannot answer, and gone when the port is needed."""

import socket
import urllib.error
import urllib.request

import pytest

from workbench.ui.splash import Splash


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def splash(port):
    running = Splash("127.0.0.1", port)
    yield running
    running.close()


def fetch(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as reply:
        return reply.status, reply.read().decode()


def test_the_start_page_is_there_and_asks_nobody_else(splash, port):
    status, text = fetch(port, "/?tab=search")
    assert status == 200 and "is starting" in text
    assert "http://" not in text and "https://" not in text


def test_everything_else_is_not_yet(splash, port):
    assert fetch(port, "/config?1") == (204, "")
    with pytest.raises(urllib.error.HTTPError, match="503"):
        fetch(port, "/gradio_api/info")


def test_a_taken_port_is_an_error(splash, port):
    with pytest.raises(OSError):
        Splash("127.0.0.1", port)


def test_the_port_is_free_after_close(port):
    Splash("127.0.0.1", port).close()
    with socket.socket() as next_server:
        next_server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        next_server.bind(("127.0.0.1", port))
