"""Who is at the labelling page, and who of them is done because all rankings are in: the page may end when they are."""

from __future__ import annotations

import threading
import time

ONLINE_SECONDS = 60.0  # seconds: the page asks every 15 (POLL in static/page.js), and less often in a hidden window


class Presence:
    """Labelers by when they were last heard of; any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str, float] = {}
        self._notified: set[str] = set()

    def seen(self, labeler: str) -> None:
        """A request of this labeler has come."""
        with self._lock:
            self._seen[labeler] = time.monotonic()

    def mark_notified(self, labeler: str, complete: bool) -> None:
        """The labeler's page shows that all rankings are in, or that there is something to do."""
        with self._lock:
            (self._notified.add if complete else self._notified.discard)(labeler)

    def not_notified(self) -> set[str]:
        """Those who were seen lately and whose page does not show that all rankings are in."""
        with self._lock:
            since = time.monotonic() - ONLINE_SECONDS
            return {name for name, at in self._seen.items() if at > since} - self._notified
