"""API keys as the admin API and the command line speak of them."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, WithJsonSchema, model_validator

from serving.protocol.errors import conflict
from serving.protocol.structured import Body, ListOf
from serving.protocol.tenancy import Priority

BudgetPeriod = Literal["day", "month"]

_MAX_COUNT = 10**12
_TEN_YEARS_SECONDS = 10 * 366 * 24 * 3600
# It begins unlike "-", which stands for nobody.
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._@+ -]*$"
_ModelName = Annotated[str, StringConstraints(min_length=1, max_length=128)]


def _is_a_name(value: str) -> str:
    if not re.fullmatch(_NAME, value):
        raise ValueError(
            "must begin with a letter or digit, and have letters, digits, spaces and . _ @ + - only"
        )
    return value


_Name = Annotated[
    str,
    StringConstraints(max_length=64),
    AfterValidator(_is_a_name),
    WithJsonSchema({"type": "string", "maxLength": 64, "pattern": _NAME}),
]


class NewKey(Body):
    """Body of ``POST /admin/keys``: an API key that is to be made."""

    name: _Name = Field(description="What the key is called; one at a time may have a name.")
    tenant: _Name | None = Field(
        None,
        description="For whom it is. A tenant's requests wait in one line, and its files, batches and responses are seen by no other. Unset: one with the key's name.",
    )
    weight: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="The tenant's share of a busy engine, from now on for all its keys. Unset: as it is, 1 for a new one.",
    )
    priority: Priority | None = Field(
        None,
        description="The tenant's class, from now on for all its keys; 'batch' gives way to 'interactive'. Unset: as it is, 'interactive' for a new one.",
    )
    models: ListOf[_ModelName] | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="Models, aliases and adapters that it may use. A model's name stands for its aliases, too, but not for its adapters. Unset: all.",
    )
    requests_per_minute: int | None = Field(None, ge=1, le=_MAX_COUNT)
    tokens_per_minute: int | None = Field(
        None, ge=1, le=_MAX_COUNT, description="Tokens of prompts and completions."
    )
    max_concurrent: int | None = Field(
        None, ge=1, le=_MAX_COUNT, description="Requests under way at once."
    )
    budget_usd: float | None = Field(
        None, gt=0, le=_MAX_COUNT, description="What its requests may cost in a period."
    )
    budget_tokens: int | None = Field(
        None, ge=1, le=_MAX_COUNT, description="Tokens of prompts and completions in a period."
    )
    budget_period: BudgetPeriod | None = Field(
        None, description="A calendar day or month, in UTC. Unset: month."
    )
    expires_in_seconds: int | None = Field(None, ge=1, le=_TEN_YEARS_SECONDS)
    is_admin: bool = Field(False, description="Whether it opens the admin API.")

    @model_validator(mode="after")
    def _period_of_a_budget(self) -> Self:
        if self.budget_period and self.budget_usd is None and self.budget_tokens is None:
            raise conflict("budget_period", "there is no budget; send budget_usd or budget_tokens")
        return self


class RotateKey(Body):
    """Body of ``POST /admin/keys/{id}/rotate``."""

    grace_seconds: int = Field(
        0,
        ge=0,
        le=_TEN_YEARS_SECONDS,
        description="How long the old secret is still good beside the new one.",
    )
