"""Answers that are not a vLLM server's: every one is told as a mistake of the user, without a traceback."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rlhf.errors import UserError
from rlhf.rollout.vllm_clients import Server


@contextmanager
def answering(data: bytes) -> Iterator[str]:
    """Answer every connection with these bytes, and yield the URL."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            self.request.sendall(data)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def whole(body: bytes, status: bytes = b"200 OK", length: int | None = None) -> bytes:
    """Return an answer over HTTP that claims to have `length` bytes."""
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body) if length is None else length, body)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "no vLLM server answers: .*SSH"),
        (whole(b"{}", length=99), "no vLLM server answers: IncompleteRead"),
        (whole(b"cut", b"500 Broken", length=99), "answers /weight_info with 500"),
        (whole(b"<html>hello"), "not a JSON object.*<html>hello"),
        (whole(b"[1]"), "not a JSON object"),
        (whole(b"{}"), r"the answer has no weight_version: \{\}"),
    ],
)
def test_an_unexpected_answer_is_told(data: bytes, words: str) -> None:
    with answering(data) as url, pytest.raises(UserError, match=f"(?s){words}.*where: {url}.*fix: "):
        Server(url, 10, 1).version()


def test_a_server_without_a_model_is_told() -> None:
    body = b'{"weight_version": "1", "data": []}'  # of either request
    with answering(whole(body)) as url, pytest.raises(UserError, match="the answer has no data.0"):
        Server(url, 10, 1).require_ready(8)


@pytest.mark.parametrize("url", ["localhost:8000", "http://local host:8000", "http://[::1:8000"])
def test_what_is_no_url_is_told(url: str) -> None:
    with pytest.raises(UserError, match="no vLLM server answers"):
        Server(url, 10, 1).version()
