"""A real browser for tests of pages."""

from __future__ import annotations

import os
import shutil

import pytest

# Debian's and Google's; where there is none, RIGSERVE_BROWSER may name another.
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def browser() -> str:
    """A browser's program; the test is skipped where there is none."""
    named = os.environ.get("RIGSERVE_BROWSER")
    found = named or next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        pytest.skip("NO BROWSER: pages are not tested; install chromium or set RIGSERVE_BROWSER")
    return found
