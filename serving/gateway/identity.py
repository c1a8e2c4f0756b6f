"""Who asks."""

from __future__ import annotations

from dataclasses import dataclass

from serving.protocol.tenancy import Priority


@dataclass(frozen=True, slots=True)
class Identity:
    """The owner of a request, as the gateway knows it; never what the request says of itself.

    ``key_id`` is None where no API keys are in use: then everybody is :data:`ANYBODY`, may administer,
    and requests of one ``user`` are taken for one tenant.
    """

    key_id: str | None = None
    key_name: str = "-"
    tenant: str = "-"
    weight: float = 1.0
    priority: Priority = "interactive"
    is_admin: bool = True


ANYBODY = Identity()
