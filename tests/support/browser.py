"""Drive an installed Chromium by Playwright for the tests of the labelling page, and run axe-core in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SERIOUS = ("serious", "critical")


def chromium() -> str | None:
    """Return the browser's program: CHROMIUM in the environment, or an installed one, or None."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def started() -> Iterator[Any]:
    """Yield a browser; the test is skipped where there is none."""
    program = chromium()
    if program is None:
        pytest.skip(f"no Chromium: none of {', '.join(NAMES)} is installed, and CHROMIUM names none")
    from playwright.sync_api import sync_playwright

    # Chromium's sandbox does not start as root.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=options)
        yield browser
        browser.close()


def violations(page: Any) -> list[str]:
    """Return, in words, the serious and critical problems that axe-core finds on the page as it is now."""
    from axe_playwright_python.sync_playwright import Axe

    found = [each for each in Axe().run(page).response["violations"] if each["impact"] in SERIOUS]
    return [f"{each['id']}: {each['help']}: {[node['html'][:200] for node in each['nodes']]}" for each in found]
