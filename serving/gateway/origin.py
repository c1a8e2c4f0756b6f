"""Keeps other sites' pages, in the owner's browser, from administering the rig."""

from __future__ import annotations

from starlette.requests import Request

from serving.protocol.errors import ApiError

_OWN = ("same-origin", "none")


async def refuse_other_sites(http: Request) -> None:
    """Raise :class:`ApiError` (403) for what a browser sends on behalf of another site's page.

    Browsers say so themselves, and pages cannot make them say otherwise; programs say nothing.
    """
    if http.headers.get("sec-fetch-site", "none") not in _OWN:
        raise ApiError(403, "Other sites' pages may not do this.", code="cross_site")
