"""The labelling page's server: the page's files, and what the page asks of rlhf/labeling/page/store.py.

Every request for data carries the labeler's token in a header, which no other site's page can send: the token is the
part of the link after #, so that browsers send it nowhere by themselves. A request for another host than this one is
refused, for a foreign name may be made to resolve to this machine (DNS rebinding). The page may load nothing but its
own files, and no script that stands in its markup would run.
"""

from __future__ import annotations

import ipaddress
import socket
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf.errors import UserError
from rlhf.labeling.page.form import FLAGS, MAX_NOTE, QUALITY, SKIPS, Submission
from rlhf.labeling.page.presence import Presence
from rlhf.labeling.page.store import Conflict, InvalidSubmission, LabelStore, Task, UnknownTask

PAGE = Path(__file__).parent / "static"
SCRIPTS = ("page", "link", "board", "card", "order")
FILES = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css")}
FILES |= {f"/{name}.js": (f"{name}.js", "text/javascript") for name in SCRIPTS}
MAX_BODY = 64 * 1024  # bytes of a request
GRACE = 2  # seconds that open requests get when the server ends
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class SubmissionId(BaseModel):
    """A submission, by its id."""

    id: str


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host.strip("[]")).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def authenticate(request: Request, authorization: Annotated[str, Header()] = "") -> str:
    """The labeler whose token the request carries."""
    labeler = request.app.state.store.labeler(authorization.removeprefix("Bearer "))
    if labeler is None:
        raise HTTPException(401, "this link is not valid: ask for a new one")
    request.app.state.audience.seen(labeler)
    return labeler


AuthenticatedLabeler = Annotated[str, Depends(authenticate)]


def make_app(store: LabelStore, title: str, host: str = "127.0.0.1", audience: Presence | None = None) -> FastAPI:
    """The application.

    Args:
        title: of the run, shown to labelers.
        host: what it is served on.
        audience: learns who asks, and what they are told.
    """
    audience = audience or Presence()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # those pages load scripts from elsewhere
    app.state.store, app.state.audience = store, audience
    app.add_middleware(Guard, host=host)

    def page(request: Request) -> Response:
        name, kind = FILES[request.url.path]
        return Response((PAGE / name).read_bytes(), media_type=kind)

    for path in FILES:
        app.add_api_route(path, page, methods=["GET"], include_in_schema=False)

    def standing(labeler: str) -> dict[str, Any]:
        """How it stands, to a page that shows its end when all is in."""
        found = store.progress(labeler)
        audience.mark_notified(labeler, found["complete"])
        return found

    # Functions without async run in threads: a commit that waits for the disk keeps nobody else waiting.
    @app.get("/api/form")
    def form(labeler: AuthenticatedLabeler) -> dict[str, Any]:
        label = store.label
        return {
            "title": title,
            "labeler": labeler,
            "flags": FLAGS if label.flags else {},
            "quality": label.quality,
            "highest": QUALITY,
            "skips": SKIPS,
            "note": MAX_NOTE,
            "network": not is_loopback(host),
        }

    @app.get("/api/next")
    def following(labeler: AuthenticatedLabeler) -> dict[str, Any]:
        return {"task": _shown(store.next_task(labeler)), "progress": standing(labeler)}

    @app.get("/api/progress")
    def progress(labeler: AuthenticatedLabeler) -> dict[str, Any]:
        return store.progress(labeler)  # asked with a prompt on the screen: its labeler may be about to submit it

    @app.post("/api/submit")
    def submit(given: Submission, labeler: AuthenticatedLabeler) -> dict[str, Any]:
        store.submit(labeler, given)
        return standing(labeler)

    @app.post("/api/take-back")
    def take_back(which: SubmissionId, labeler: AuthenticatedLabeler) -> dict[str, Any]:
        task = store.take_back(labeler, which.id)
        audience.mark_notified(labeler, False)
        return {"task": _shown(task), "progress": store.progress(labeler)}

    for kind, status in ((UnknownTask, 404), (Conflict, 409), (InvalidSubmission, 422), (sqlite3.Error, 503)):
        app.add_exception_handler(kind, _tell(status))
    app.add_exception_handler(RequestValidationError, _bad)
    app.add_exception_handler(400, _unread)  # what FastAPI makes of a body that cannot be decoded
    return app


def _shown(task: Task | None) -> dict[str, Any] | None:
    return task and task._asdict()


def _tell(status: int) -> Any:
    async def handler(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status)

    return handler


async def _bad(request: Request, error: Any) -> JSONResponse:
    """What is wrong with a request, without the value: a number that is none, or half a character, is no JSON."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"][1:])).encode("utf-8", "replace").decode()
    return JSONResponse({"detail": ": ".join(filter(None, ("the request makes no sense", place, first["msg"])))}, 422)


async def _unread(request: Request, error: Any) -> JSONResponse:
    return JSONResponse({"detail": "the request is no JSON in UTF-8"}, 422)


class Guard:
    """Refuses requests for other hosts and large ones, and adds HEADERS to every answer."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app = app
        self.names = {"localhost", "127.0.0.1", "[::1]", host.lower()}
        self.network = not is_loopback(host)
        if self.network:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on, one request."""
        if scope["type"] != "http":  # no WebSocket is served
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self._refusal(scope["method"], headers):
            status, detail = refusal
            await JSONResponse({"detail": detail}, status)(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    def _refusal(self, method: str, headers: dict[str, str]) -> tuple[int, str] | None:
        name = headers.get("host", "").lower()
        name = name.rpartition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]
        # On a network this machine has many addresses. A page of another site cannot have one as its own host.
        if name not in self.names and not (self.network and _is_address(name)):
            return 403, f"this page is not served for the host {name!r}"
        if method == "POST":
            length = headers.get("content-length", "")
            if not length.isdigit():
                return 411, "the request does not say how long it is"
            if int(length) > MAX_BODY:
                return 413, "the request is too long"
        return None


@contextmanager
def serving(store: LabelStore, title: str, host: str, port: int = 0, audience: Presence | None = None) -> Iterator[str]:
    """Serve the page in a thread while the block lasts; gives the address that links begin with.

    Args:
        port: 0 takes the one of the last time, so that open pages find the server again, or else a free one.
        audience: learns who is at the page.

    Raises:
        UserError: when the address or port cannot be had.
    """
    last = int(store.setting("port") or 0)
    sock = _listen(host, port, last)
    port = sock.getsockname()[1]
    # Where another server has the last port, that server's pages are to find it there again.
    if not last or port == last or _is_free(sock, last):
        store.keep_setting("port", str(port))
    app = make_app(store, title, host, audience)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield f"http://{_name(host)}:{port}/"
    finally:
        server.should_exit = True
        thread.join()
        sock.close()


def _listen(host: str, port: int, last: int) -> socket.socket:
    """A listening socket on the port, or, where none is given, on the last one or a free one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"{host} is no address of this machine: {error}", "label.host", "give one") from None
    for attempt in (port,) if port else (last, 0):
        sock = socket.socket(family, socket.SOCK_STREAM)
        # A server that was killed a moment ago leaves its port waiting; a live one still refuses it.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((address[0], attempt))
            sock.listen(128)
        except OSError as error:
            sock.close()
            refused = error
            continue
        return sock
    fix = "give another port (0: a free one), and an address of this machine"
    raise UserError(f"the page cannot be served: {refused}", f"{host}, port {port}", fix)


def _is_free(beside: socket.socket, port: int) -> bool:
    """Whether a port of the same address is nobody's."""
    with socket.socket(beside.family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((beside.getsockname()[0], port))
        except OSError:
            return False
    return True


def _name(host: str) -> str:
    """What links call the host."""
    if _is_address(host) and ipaddress.ip_address(host).is_unspecified:
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
