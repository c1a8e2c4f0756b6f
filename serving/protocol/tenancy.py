"""For whom a request is, and how urgent: what the gateway, and nobody else, tells an engine in headers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import quote, unquote

from serving.protocol.errors import ApiError

Priority = Literal["interactive", "batch"]

# Whose everything is where there are no API keys. No tenant can have this name.
NO_TENANT = "-"

_TENANT, _WEIGHT, _PRIORITY = "x-rigserve-tenant", "x-rigserve-weight", "x-rigserve-priority"


@dataclass(frozen=True, slots=True)
class Tenancy:
    """Tenants of a class share an engine by ``weight``; ``batch`` gives way to ``interactive``."""

    tenant: str = NO_TENANT
    weight: float = 1.0
    priority: Priority = "interactive"

    def to_headers(self) -> dict[str, str]:
        """The headers of a request to an engine; a tenant's name may hold any characters."""
        return {
            _TENANT: quote(self.tenant, safe=""),
            _WEIGHT: repr(self.weight),
            _PRIORITY: self.priority,
        }

    @staticmethod
    def from_headers(headers: Mapping[str, str]) -> Tenancy:
        """What :meth:`to_headers` wrote; without headers the defaults. Raises :class:`ApiError`."""
        weight = headers.get(_WEIGHT, "1")
        try:
            share = float(weight)
        except ValueError:
            share = math.nan
        if not 0 < share < math.inf:
            raise _refusal(_WEIGHT, weight, "a number above 0")
        wanted = headers.get(_PRIORITY, "interactive")
        for priority in get_args(Priority):
            if wanted == priority:
                return Tenancy(unquote(headers.get(_TENANT, NO_TENANT)), share, priority)
        raise _refusal(_PRIORITY, wanted, " or ".join(get_args(Priority)))


def _refusal(header: str, value: str, wanted: str) -> ApiError:
    return ApiError(400, f"The header {header} must be {wanted}; got {value!r}.", param=header)
