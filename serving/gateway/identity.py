"""Who asks."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from serving.keys.key import NO_LIMITS, Allowance, Key
from serving.protocol.tenancy import NO_TENANT, Priority


@dataclass(frozen=True, slots=True)
class Identity:
    """The owner of a request, as the gateway knows it; never what the request says of itself.

    ``key_id`` is None where no API keys are in use: then everybody is :data:`ANYBODY`, may administer,
    and requests of one ``user`` are taken for one tenant. ``models`` None means all.
    """

    key_id: str | None = None
    key_name: str = "-"
    tenant: str = NO_TENANT
    weight: float = 1.0
    priority: Priority = "interactive"
    is_admin: bool = True
    models: tuple[str, ...] | None = None
    allowance: Allowance = NO_LIMITS

    @staticmethod
    def of(key: Key) -> Identity:
        """Whoever has this key."""
        return Identity(
            key_id=key.id,
            key_name=key.name,
            tenant=key.tenant,
            weight=key.weight,
            priority=key.priority,
            is_admin=key.is_admin,
            models=key.models,
            allowance=key.allowance,
        )


def tenant_of(http: Request) -> str:
    """Whose a request is, and what it stores."""
    identity: Identity = http.state.identity
    return identity.tenant


ANYBODY = Identity()
# Who asks without a key where keys are in use, for what needs none.
NOBODY = Identity(is_admin=False)
