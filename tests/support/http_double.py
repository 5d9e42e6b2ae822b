"""Run a real HTTP server on a free port that answers JSON with JSON, for doubles of other people's servers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, dict[str, Any], dict[str, str]], tuple[int, Any]]


class Server(ThreadingHTTPServer):
    """A server that waits for the requests that are under way when it closes."""

    daemon_threads = False
    request_queue_size = 64  # with the default of 5, a busy machine resets some of many simultaneous connections


@contextmanager
def listening(answer: Answer) -> Iterator[str]:
    """Serve `answer(path, body, headers)` -> (status, JSON) while the block lasts, and yield the server's URL.

    Each request has a thread of its own.
    """

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, found = answer(self.path, json.loads(text or b"{}"), headers)
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with suppress(BrokenPipeError):  # the client has given up
                self.wfile.write(data)

        do_GET = do_POST = respond

        def log_message(self, *args: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
