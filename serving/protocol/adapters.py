"""LoRA adapters as the admin API and the command line speak of them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from serving.protocol.structured import Body

_Name = Annotated[
    str, StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$")
]


class NewAdapter(Body):
    """Body of ``POST /admin/adapters``: an adapter to serve from now on, until it is removed."""

    name: _Name = Field(description="The name clients ask for.")
    model: str = Field(
        min_length=1, description="Its base: a model with an engine here, or an alias."
    )
    path: str = Field(
        pattern=r"^/",
        description="Where the server finds it: a folder of PEFT's or a GGUF file, as an absolute path.",
    )
    scale: float = Field(
        1.0, allow_inf_nan=False, description="How strongly it counts; 1 is as trained."
    )
    sha256: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="What the file or folder must have, as `rigserve models checksum` prints it.",
    )
    replace: bool = Field(
        False,
        description="Take the place of an added adapter of that name. Requests under way finish with the old one.",
    )
