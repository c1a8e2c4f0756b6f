"""What processes that speak to Ray have in their environment."""

from __future__ import annotations

import os
from pathlib import Path


def ray_environment(*, needs_token: bool = False) -> dict[str, str]:
    """Ray asks for its token where there is one, or ``needs_token``; it tells its makers nothing.

    To count it must be there before Ray is imported.
    """
    told = {"RAY_USAGE_STATS_ENABLED": "0"}
    if "RAY_AUTH_MODE" not in os.environ and (needs_token or _has_token()):
        told["RAY_AUTH_MODE"] = "token"
    return told


def keep_token() -> None:
    """Let nobody else of this machine read the token that Ray has made."""
    if _token().is_file():
        _token().chmod(0o600)


def _token() -> Path:
    return Path.home() / ".ray" / "auth_token"


def _has_token() -> bool:
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    return bool(named) or _token().is_file()
