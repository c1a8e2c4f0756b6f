"""Images in conversations: from data URLs to where they stand in a prompt."""

from __future__ import annotations

import base64
import io
import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from PIL import Image as Pillow
from PIL import ImageOps

from serving.llamacpp.runtime import (
    Image,
    Model,
    Picture,
    Projector,
    RuntimeFault,
    UnfitPicture,
)
from serving.protocol.errors import ApiError
from serving.protocol.requests import ChatCompletionRequest, Message, TextPart

# What OpenAI takes. Others stay shut: Pillow knows formats that run programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_MOST_BYTES = 20 * 2**20
# Of a request's images together: a small file may unpack to any size. The largest photos of phones fit.
_MOST_PIXELS = 50_000_000
# As Qwen's own preprocessing has it: some others cannot scale narrower ones at all.
_LARGEST_ASPECT_RATIO = 200

_DATA_URL = re.compile(r"data:[\w.+/-]*(?:;[\w.+=-]+)*;base64,", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Placed:
    """A conversation in which each image's place is taken by ``marker``, which is in no other text."""

    request: ChatCompletionRequest
    pictures: list[Picture]
    marker: str


class ImageReader:
    """Reads conversations' images. Where there are some, one thread at a time may: :attr:`thread`."""

    def __init__(
        self,
        model: Model,
        projector_path: Path | None,
        *,
        threads: int,
        use_gpu: bool,
        batch_tokens: int,
        check_length: Callable[[int], None],
    ) -> None:
        """Load the projector; None: the model takes text only. Raises :class:`RuntimeFault`.

        ``check_length`` raises :class:`ApiError` for prompts of more tokens than the context takes.
        """
        self._model = model
        self._batch_tokens = batch_tokens
        self._check_length = check_length
        self._projector = (
            Projector(model, projector_path, threads=threads, use_gpu=use_gpu)
            if projector_path is not None
            else None
        )
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="images")

    def close(self) -> None:
        """Finish what is being read, and free the projector."""
        self.thread.shutdown(cancel_futures=True)
        if self._projector is not None:
            self._projector.close()

    def place(self, request: ChatCompletionRequest) -> Placed:
        """Decode a conversation's images; raises :class:`ApiError` (400) that says which is at fault."""
        if not request.has_images:
            return Placed(request, [], "")
        if self._projector is None:
            raise ApiError(
                400,
                "This model takes text only. Models that see images come with a projector file (mmproj); "
                "the config's 'projector' names it.",
                param="messages",
                code="unsupported_content",
            )
        marker = f"image-{secrets.token_hex(16)}"
        messages: list[Message] = []
        pictures: list[Picture] = []
        room = _MOST_PIXELS
        for number, message in enumerate(request.messages):
            if message.has_images:
                texts = []
                for index, part in enumerate(message.content or ()):
                    if isinstance(part, TextPart):
                        texts.append(part.text)
                    elif not isinstance(part, str):
                        where = f"messages[{number}].content[{index}].image_url.url"
                        pictures.append(decode(part.image_url.url, where, room))
                        room -= pictures[-1].width * pictures[-1].height
                        texts.append(marker)
                message = message.model_copy(update={"content": "".join(texts)})  # noqa: PLW2901
            messages.append(message)
        return Placed(request.model_copy(update={"messages": messages}), pictures, marker)

    def read(self, prompt: str, placed: Placed) -> tuple[list[int], list[Image]]:
        """A rendered conversation as tokens, and its images; raises :class:`ApiError`."""
        if not placed.pictures or self._projector is None:
            return self._model.tokenize(prompt, add_special=True, parse_special=True), []
        texts = prompt.split(placed.marker)
        if len(texts) != len(placed.pictures) + 1:
            raise ApiError(
                400,
                "The model's chat template has no place for images in this conversation.",
                param="messages",
                code="template_error",
            )
        parts = chain.from_iterable(zip_longest(texts, placed.pictures))
        try:
            tokens, images = self._projector.read(
                [part for part in parts if part], self._check_length
            )
        except UnfitPicture as unfit:
            raise ApiError(400, f"{unfit}.", param="messages", code="invalid_image") from unfit
        except RuntimeFault as fault:
            raise ApiError(500, f"{fault}.", code="engine_error") from fault
        for image in images:
            if not image.is_causal and len(image.embeddings) > self._batch_tokens:
                raise ApiError(
                    400,
                    f"An image takes {len(image.embeddings)} tokens, which this model reads at once; "
                    f"the engine reads {self._batch_tokens}. Set max_batch_tokens higher.",
                    param="messages",
                    code="image_too_large",
                )
        return tokens, images


def decode(url: str, where: str, room: int) -> Picture:
    """The picture in a data URL, of ``room`` pixels at most."""
    head = _DATA_URL.match(url)
    if head is None:
        problem = (
            "remote images are not fetched; send the image itself, as a data URL"
            if re.match(r"https?:", url, re.IGNORECASE)
            else "must be a data URL"
        )
        raise _refusal(where, f"{problem}: data:image/png;base64,...", "invalid_image_url")
    if (len(url) - head.end()) * 3 // 4 > _MOST_BYTES:
        raise _refusal(where, f"the image has more than {_MOST_BYTES} bytes", "image_too_large")
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except ValueError as error:
        raise _refusal(where, f"this is not base64: {error}", "invalid_image") from error
    try:
        image = Pillow.open(io.BytesIO(data), formats=_FORMATS)
    except Exception as error:
        raise _refusal(
            where, "this is not a PNG, JPEG, WebP or GIF image", "invalid_image"
        ) from error
    with image:
        width, height = image.size
        if width * height > room:
            raise _refusal(
                where,
                f"with this image of {width} x {height} the request has more than {_MOST_PIXELS} "
                "pixels; scale it down",
                "image_too_large",
            )
        if max(width, height) > _LARGEST_ASPECT_RATIO * min(width, height):
            raise _refusal(
                where,
                f"an image of {width} x {height} is too narrow to be seen; the longer side may be "
                f"{_LARGEST_ASPECT_RATIO} times the shorter",
                "invalid_image",
            )
        if getattr(image, "is_animated", False):
            raise _refusal(where, "animations are not supported; send one frame", "invalid_image")
        try:
            return _picture(image)
        except Exception as error:
            # Decoders raise what they like.
            raise _refusal(where, f"the image is damaged: {error}", "invalid_image") from error


def _picture(image: Pillow.Image) -> Picture:
    """Upright, and on white where it is transparent (as Transformers' processors do)."""
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        white = Pillow.new("RGBA", upright.size, "white")
        upright = Pillow.alpha_composite(white, upright)
    upright = upright.convert("RGB")
    return Picture(upright.width, upright.height, upright.tobytes())


def _refusal(where: str, problem: str, code: str) -> ApiError:
    return ApiError(400, f"'{where}': {problem}.", param=where, code=code)
