"""What an engine is asked to hold: sequences, tokens of each, and how they are kept."""

from __future__ import annotations

from dataclasses import dataclass

# llama.cpp rounds what it keeps of a sequence up to so many tokens.
_CELL_BLOCK = 256
# Of prompts that are scored, the rows of one step, as rigserve's engine has it.
SCORED_ROWS = 64


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a llama.cpp engine that memory depends on.

    ``pool_tokens`` is a cache that all slots share; without it each slot has ``context_length`` of its own.
    ``has_full_windows`` keeps also those tokens that layers with a sliding window see no more, so that prompts
    can be taken back: rigserve's own engine does, llama-server does not.
    """

    context_length: int
    slots: int = 1
    batch_tokens: int = 512
    pool_tokens: int | None = None
    key_type: str = "F16"
    value_type: str = "F16"
    has_flash_attention: bool = True
    has_full_windows: bool = True
    # Rows of a step whose scores are read, beside one of each slot: of prompts that are scored, or of drafts.
    scored_rows: int = SCORED_ROWS
    # Drafts are found in each text: it is indexed.
    has_lookup: bool = False
    # Embeddings: a text is read once, in one step, and no tokens are scored.
    is_pooled: bool = False

    @property
    def has_small_cache(self) -> bool:
        """Whether it is quantized."""
        return self.key_type not in ("F32", "F16", "BF16")

    @property
    def step_tokens(self) -> int:
        """The most tokens of one step."""
        return min(max(self.batch_tokens, self.slots), self.streams * self.cells)

    @property
    def output_rows(self) -> int:
        """The most rows of a step whose scores main memory gets."""
        return 0 if self.is_pooled else min(self.slots + self.scored_rows, self.step_tokens)

    @property
    def held_tokens(self) -> int:
        """The most tokens of texts that slots are at."""
        return self.streams * self.cells

    @property
    def streams(self) -> int:
        """Caches that are kept apart."""
        return 1 if self.pool_tokens is not None else self.slots

    @property
    def cells(self) -> int:
        """Tokens that one cache holds, of layers that see all."""
        return _padded(self.pool_tokens or self.context_length)

    def cells_of(self, window_tokens: int | None) -> int:
        """Tokens that one cache holds, of layers that see so far back (None: to the beginning)."""
        if window_tokens is None or self.has_full_windows:
            return self.cells
        seen = window_tokens * (self.slots if self.pool_tokens is not None else 1)
        return _padded(min(self.cells, seen + self.step_tokens))


def _padded(tokens: int) -> int:
    return -(-tokens // _CELL_BLOCK) * _CELL_BLOCK
