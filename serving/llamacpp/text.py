"""From tokens to text that may be sent: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs


class TextStream:
    """Turns one sequence's token pieces into text deltas.

    Bytes of a character that is not complete yet are held back, and so is text that may turn out to
    be the beginning of a stop string.
    """

    def __init__(self, stop_strings: tuple[str, ...]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop_strings = stop_strings
        self._held = ""
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared: ``stopped_by``."""
        return self.stopped_by is not None

    def push(self, piece: bytes) -> str:
        """Add a token's bytes; returns the text that is now certain.

        When a stop string appears, the text before it is returned, and ``stopped_by`` is that string.
        """
        self._held += self._decoder.decode(piece)
        return self._release()

    def finish(self) -> str:
        """All text still held back, at the end of generation."""
        self._held += self._decoder.decode(b"", final=True)
        text = self._release() + self._held
        self._held = ""
        return text

    def _release(self) -> str:
        if self.stopped or not self._stop_strings:
            text = "" if self.stopped else self._held
            self._held = ""
            return text
        found = [(at, stop) for stop in self._stop_strings if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            text, self._held = self._held[:at], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stop_strings), default=0)
        split = len(self._held) - keep
        text, self._held = self._held[:split], self._held[split:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
