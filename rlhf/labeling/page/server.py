"""Serve the labelling page: its files, and its requests to rlhf/labeling/page/store.py.

Every request for data carries the labeler's token in a header, which the page of another site cannot send. The token is
the part of the link after #, which browsers do not send by themselves. A request for another host than this one is
refused, because a foreign name may be made to resolve to this machine (DNS rebinding). The page may load nothing but
its own files, and the browser runs no script within its markup.
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
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf.errors import UserError
from rlhf.labeling.page.form import FLAGS, MAX_NOTE, QUALITY, SKIPS, Submission
from rlhf.labeling.page.presence import Presence
from rlhf.labeling.page.store import Conflict, InvalidSubmission, LabelStore, UnknownTask

PAGE = Path(__file__).parent / "static"
SCRIPTS = ("page", "outbox", "link", "board", "card", "order")
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
    """The id of a submission."""

    id: str


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine alone."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host.strip("[]")).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def authenticate(request: Request, authorization: Annotated[str, Header()] = "") -> str:
    """Return the labeler whose token the request carries; raise HTTPException 401 for an unknown token."""
    labeler = request.app.state.store.labeler(authorization.removeprefix("Bearer "))
    if labeler is None:
        raise HTTPException(401, "this link is not valid: ask for a new one")
    request.app.state.presence.seen(labeler)
    return labeler


AuthenticatedLabeler = Annotated[str, Depends(authenticate)]


def make_app(store: LabelStore, title: str, host: str = "127.0.0.1", presence: Presence | None = None) -> FastAPI:
    """Return the application; labelers see `title`, the run's name; `presence` records who is there and notified."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # those pages load scripts from elsewhere
    app.state.store, app.state.presence = store, presence or Presence()
    app.state.title, app.state.network = title, not is_loopback(host)
    app.add_middleware(Guard, host=host)
    for path in FILES:
        app.add_api_route(path, _static_file, methods=["GET"], include_in_schema=False)
    app.include_router(api)
    for kind, status in ((UnknownTask, 404), (Conflict, 409), (InvalidSubmission, 422), (sqlite3.Error, 503)):
        app.add_exception_handler(kind, _answer_with(status))
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(400, _undecodable_request)  # FastAPI's answer to a body that it cannot decode
    return app


def _static_file(request: Request) -> Response:
    name, kind = FILES[request.url.path]
    return Response((PAGE / name).read_bytes(), media_type=kind)


# The functions below are not async, so FastAPI runs them in threads: a commit that waits for the disk delays nobody.
api = APIRouter(prefix="/api")


@api.get("/form")
def form(request: Request, labeler: AuthenticatedLabeler) -> dict[str, Any]:
    """Return the questions to a labeler."""
    state = request.app.state
    label = state.store.label
    return {
        "title": state.title,
        "labeler": labeler,
        "flags": FLAGS if label.flags else {},
        "quality": label.quality,
        "highest": QUALITY,
        "skips": SKIPS,
        "note": MAX_NOTE,
        "network": state.network,
    }


@api.get("/next")
def next_task(request: Request, labeler: AuthenticatedLabeler) -> dict[str, Any]:
    """Return the labeler's next prompt and the progress."""
    task = request.app.state.store.next_task(labeler)
    return {"task": task and task._asdict(), "progress": _notified_progress(request, labeler)}


@api.get("/progress")
def progress(request: Request, labeler: AuthenticatedLabeler) -> dict[str, Any]:
    """Return the progress to a page with a prompt on its screen, which its labeler may be about to submit."""
    return request.app.state.store.progress(labeler)


@api.post("/submit")
def submit(request: Request, given: Submission, labeler: AuthenticatedLabeler) -> dict[str, Any]:
    """Store a submission; return the progress."""
    request.app.state.store.submit(labeler, given)
    return _notified_progress(request, labeler)


@api.post("/take-back")
def take_back(request: Request, which: SubmissionId, labeler: AuthenticatedLabeler) -> dict[str, Any]:
    """Withdraw the labeler's last submission; return its prompt and the progress."""
    store, presence = request.app.state.store, request.app.state.presence
    task = store.take_back(labeler, which.id)
    presence.mark_notified(labeler, False)
    return {"task": task._asdict(), "progress": store.progress(labeler)}


def _notified_progress(request: Request, labeler: str) -> dict[str, Any]:
    """Return the progress to a page that shows an end when all rankings are in, and record whether it does."""
    found = request.app.state.store.progress(labeler)
    request.app.state.presence.mark_notified(labeler, found["complete"])
    return found


def _answer_with(status: int) -> Any:
    async def handler(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status)

    return handler


async def _invalid_request(request: Request, error: Any) -> JSONResponse:
    """Return the error of a request without the value: NaN and half a surrogate pair cannot be sent as JSON."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"][1:])).encode("utf-8", "replace").decode()
    return JSONResponse({"detail": ": ".join(filter(None, ("the request makes no sense", field, first["msg"])))}, 422)


async def _undecodable_request(request: Request, error: Any) -> JSONResponse:
    return JSONResponse({"detail": "the request is not JSON in UTF-8"}, 422)


class Guard:
    """Middleware that refuses requests for other hosts and large ones, and adds HEADERS to every answer."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app = app
        self.names = {"localhost", "127.0.0.1", "[::1]", host.lower()}
        self.network = not is_loopback(host)
        if self.network:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
        # A machine has many addresses on a network. The page of another site cannot have one of them as its host.
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
def serving(store: LabelStore, title: str, host: str, port: int = 0, presence: Presence | None = None) -> Iterator[str]:
    """Serve the page in a thread while the block lasts; yield the address that links begin with.

    Port 0 takes the port of the last server, so that open pages find this one, or else a free port. Raises UserError
    when the address is not of this machine, or the port is in use.
    """
    last = int(store.setting("port") or 0)
    sock = _listen(host, port, last)
    port = sock.getsockname()[1]
    # If another server has the last port, its pages must find it there again, so the setting stays.
    if not last or port == last or _is_free(sock, last):
        store.keep_setting("port", str(port))
    app = make_app(store, title, host, presence)
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
    """Return a listening socket on the port, or, if that is 0, on the last one or a free one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"{host} is not an address of this machine: {error}", "label.host", "give one") from None
    for attempt in (port,) if port else (last, 0):
        sock = socket.socket(family, socket.SOCK_STREAM)
        # This allows the port of a server that was killed a moment ago; a live server still refuses its port.
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
    """Return whether a port of the same address is free."""
    with socket.socket(beside.family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((beside.getsockname()[0], port))
        except OSError:
            return False
    return True


def _name(host: str) -> str:
    """Return the host as it is written in links."""
    if _is_address(host) and ipaddress.ip_address(host).is_unspecified:
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
