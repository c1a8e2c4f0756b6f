"""The base of all that a scenario file may say."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping of the file. Unknown keys are errors; values cannot change after loading."""

    # Strict: "8" in quotes is text, not a number of users.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
