"""What an API key is, and how its secret is kept."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Any

from serving.protocol.keys import BudgetPeriod
from serving.protocol.tenancy import Priority

_PREFIX = "rs-"
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a key may use; None is no limit. Tokens are those of prompts and of completions.

    A budget is for a calendar day or month, in UTC.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    budget_usd: float | None = None
    budget_tokens: int | None = None
    budget_period: BudgetPeriod = "month"


NO_LIMITS = Allowance()


@dataclass(frozen=True, slots=True)
class Key:
    """An API key without its secret. Moments are Unix times.

    ``weight`` and ``priority`` are its tenant's. ``models`` None means all.
    """

    id: str
    name: str
    tenant: str
    weight: float
    priority: Priority
    models: tuple[str, ...] | None
    allowance: Allowance
    is_admin: bool
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    last_used_at: float | None = None

    def state(self, now_unix: float) -> str:
        """``active``, ``expired`` or ``revoked``."""
        if self.revoked_at is not None:
            return "revoked"
        return (
            "expired" if self.expires_at is not None and now_unix >= self.expires_at else "active"
        )

    def to_json(self, now_unix: float) -> dict[str, Any]:
        """The key as the admin API and ``rigserve keys --json`` tell it."""
        limits = self.allowance
        return {
            "object": "key",
            "id": self.id,
            "name": self.name,
            "state": self.state(now_unix),
            "tenant": self.tenant,
            "weight": self.weight,
            "priority": self.priority,
            "models": None if self.models is None else list(self.models),
            "requests_per_minute": limits.requests_per_minute,
            "tokens_per_minute": limits.tokens_per_minute,
            "max_concurrent": limits.max_concurrent,
            "budget_usd": limits.budget_usd,
            "budget_tokens": limits.budget_tokens,
            "budget_period": limits.budget_period,
            "is_admin": self.is_admin,
            "created_at": _whole(self.created_at),
            "expires_at": _whole(self.expires_at),
            "revoked_at": _whole(self.revoked_at),
            "last_used_at": _whole(self.last_used_at),
        }


def new_secret() -> str:
    """A secret of 256 random bits, as clients send it."""
    return _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)


def hash_of(secret: str) -> bytes:
    """How a secret is kept.

    One round of SHA-256 without salt is enough: slow, salted hashes protect what people choose, which can
    be guessed. 256 random bits cannot, however fast the guesses are tested; and no two are alike.
    """
    return hashlib.sha256(secret.encode()).digest()


def _whole(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
