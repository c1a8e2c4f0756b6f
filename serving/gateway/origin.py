"""Keeps other sites' pages, in the owner's browser, from using and administering the rig."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from starlette.requests import Request

from serving.protocol.errors import ApiError

_OWN = (b"same-origin", b"none")


def is_of_other_site(headers: Iterable[tuple[bytes, bytes]], listed: Collection[str] = ()) -> bool:
    """Whether a browser sends a request on behalf of another site's page, which is of none of the ``listed`` origins.

    Browsers say so themselves, and pages cannot make them say otherwise; programs say nothing.
    """
    site, origin = b"none", b""
    for name, value in headers:
        if name == b"sec-fetch-site":
            site = value
        elif name == b"origin":
            origin = value
    return site not in _OWN and "*" not in listed and origin.decode("latin-1") not in listed


async def refuse_other_sites(http: Request) -> None:
    """Raise :class:`ApiError` (403) for what another site's page asks."""
    if is_of_other_site(http.headers.raw):
        raise ApiError(403, "Other sites' pages may not do this.", code="cross_site")
