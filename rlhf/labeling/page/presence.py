"""Track who is at the labelling page and who of them knows that all rankings are in: then the page may end."""

from __future__ import annotations

import threading
import time

ONLINE_SECONDS = 60.0  # the page asks every 15 s (POLL in static/page.js), and less often in a hidden window


class Presence:
    """When each labeler was last seen; any thread may call its methods."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str, float] = {}
        self._notified: set[str] = set()

    def seen(self, labeler: str) -> None:
        """Record a request of this labeler."""
        with self._lock:
            self._seen[labeler] = time.monotonic()

    def mark_notified(self, labeler: str, complete: bool) -> None:
        """Record whether the labeler's page shows that all rankings are in."""
        with self._lock:
            (self._notified.add if complete else self._notified.discard)(labeler)

    def not_notified(self) -> set[str]:
        """Return who was seen in the last ONLINE_SECONDS and whose page does not show that all rankings are in."""
        with self._lock:
            since = time.monotonic() - ONLINE_SECONDS
            return {name for name, at in self._seen.items() if at > since} - self._notified
