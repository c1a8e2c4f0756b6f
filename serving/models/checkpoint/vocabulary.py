"""A Hugging Face model's tokenizer, as GGUF has it.

Which of llama.cpp's ways to cut a text into words is the tokenizer's own is known by the definition in
``tokenizer.json``; that both come to the same tokens is proved afterwards (``proof.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from serving.models.checkpoint.config import UnfitCheckpoint
from serving.models.checkpoint.sentencepiece import read_sentencepiece

_JSON, _PROTO = "tokenizer.json", "tokenizer.model"
_SPACE = "\u2581"  # how SentencePiece writes a space

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
# llama.cpp's names (src/llama-vocab.cpp) of what Hugging Face's tokenizers define.
PRE_TOKENIZERS: Mapping[tuple[str, ...], str] = {
    (_GPT2,): "gpt-2",
    (r"\p{N}", _GPT2): "smollm",
    (_CL100K,): "llama-bpe",
    (_CL100K.replace(r"\p{N}{1,3}", r"\p{N}"),): "qwen2",
    (
        rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_REST}",
    ): "tekken",
    (
        rf"{_BEFORE}{_UPPER}*{_LOWER}+{_SUFFIX}|{_BEFORE}{_UPPER}+{_LOWER}*{_SUFFIX}"
        rf"|\p{{N}}{{1,3}}|{_REST}",
    ): "gpt-4o",
}  # fmt: skip
# The same words, but a word that is a token itself may be made of others.
_WITHOUT_WHOLE_WORDS = {"llama-bpe": "dbrx"}

_OF_PHI3 = {"<unk>", "<s>", "</s>", "<|endoftext|>"}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """``model`` and ``pre_tokenizer`` are llama.cpp's names.

    ``left_out`` are tokens for which the model has no embedding. ``scores`` and ``adds_space_prefix`` are of
    SentencePiece's kind only. ``strips_like_phi3``: its special tokens swallow the spaces after them.
    """

    model: str
    pre_tokenizer: str
    tokens: Sequence[str]
    types: Sequence[gguf.TokenType]
    left_out: Sequence[str]
    scores: Sequence[float] | None = None
    adds_space_prefix: bool | None = None
    strips_like_phi3: bool = False

    def write(self, writer: gguf.GGUFWriter, folder: Path) -> None:
        """Add it, and from the folder which tokens are special, and the chat template."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre_tokenizer)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.scores is not None:
            writer.add_token_scores(list(self.scores))
        if self.adds_space_prefix is not None:
            writer.add_add_space_prefix(self.adds_space_prefix)
        special = gguf.SpecialVocab(
            folder, load_merges=self.scores is None, n_vocab=len(self.tokens)
        )
        if (folder / _JSON).exists():
            # llama.cpp adds one to some vocabularies unless it is told not to.
            special.add_special_token.setdefault("bos", False)
        special.add_to_gguf(writer, quiet=True)


def read_vocabulary(folder: Path, count: int) -> Vocabulary:
    """The vocabulary, for a model that has embeddings of ``count`` tokens.

    Raises :class:`UnfitCheckpoint` and OSError.
    """
    path = folder / _JSON
    if not path.exists():
        if not (folder / _PROTO).exists():
            raise UnfitCheckpoint(f"it has neither a {_JSON} nor a {_PROTO}")
        return _of_sentencepiece(folder, count)
    try:
        definition = json.loads(path.read_bytes())
        model = definition["model"]
        if model.get("type", "BPE") != "BPE":
            raise UnfitCheckpoint(f"its {_JSON} is of type {model['type']}; BPE can be converted")
        if model.get("byte_fallback"):
            return _of_spaces(definition, count)
        return _of_bytes(definition, count)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnfitCheckpoint(f"its {_JSON} is damaged ({error!r}); fetch it again") from error


def _of_bytes(definition: Mapping[str, Any], count: int) -> Vocabulary:
    """Of GPT-2's kind: words, cut by regular expressions, of bytes that are written as letters."""
    normalizer = definition.get("normalizer")
    # NFC, too, is something that llama.cpp does not do, but few texts are otherwise, and all converters accept it.
    if normalizer is not None and normalizer["type"] != "NFC":
        raise UnfitCheckpoint(f"its {_JSON} has the normalizer {normalizer['type']}")
    expressions = tuple(_expressions(definition.get("pre_tokenizer") or {"type": None}))
    name = PRE_TOKENIZERS.get(expressions)
    if name is None:
        raise UnfitCheckpoint(f"its {_JSON} cuts words by {list(expressions)}, which is not known")
    if not definition["model"].get("ignore_merges"):
        name = _WITHOUT_WHOLE_WORDS.get(name, name)
    tokens, types, left_out = _listed(definition, count)
    return Vocabulary("gpt2", name, tokens, types, left_out)


def _expressions(pre_tokenizer: Mapping[str, Any]) -> list[str]:
    """The regular expressions by which it cuts words, one after the other."""
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return [each for part in pre_tokenizer["pretokenizers"] for each in _expressions(part)]
    if kind == "Split" and pre_tokenizer["behavior"] == "Isolated":
        return [pre_tokenizer["pattern"]["Regex"]]
    if kind == "Split" and pre_tokenizer["behavior"] == "Removed" and pre_tokenizer["invert"]:
        return [pre_tokenizer["pattern"]["Regex"]]
    if kind == "ByteLevel" and not pre_tokenizer.get("add_prefix_space"):
        return [_GPT2] if pre_tokenizer.get("use_regex", True) else []
    if kind == "Digits" and pre_tokenizer["individual_digits"]:
        return [r"\p{N}"]
    raise UnfitCheckpoint(f"its {_JSON} has the pre-tokenizer {kind}, which is not known")


def _of_spaces(definition: Mapping[str, Any], count: int) -> Vocabulary:
    """Of SentencePiece's kind: BPE over whole texts, whose spaces are letters, too.

    llama.cpp merges by scores; the rank of a merge makes the score of what it gives.
    """
    tokens, types, left_out = _listed(definition, count)
    model = definition["model"]
    merges = (_pair(merge) for merge in model["merges"])
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    for index, token in enumerate(tokens):
        if types[index] is gguf.TokenType.NORMAL and len(token) == 6 and token[:3] == "<0x":
            types[index] = gguf.TokenType.BYTE
        elif token == model.get("unk_token"):
            types[index] = gguf.TokenType.UNKNOWN
    strips = any(added["special"] and added.get("rstrip") for added in definition["added_tokens"])
    return Vocabulary(
        "llama",
        "default",
        tokens,
        types,
        left_out,
        scores,
        _adds_space_prefix(definition),
        strips_like_phi3=strips and _OF_PHI3.issubset(tokens),
    )


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _adds_space_prefix(definition: Mapping[str, Any]) -> bool:
    steps = [definition.get("normalizer") or {}, definition.get("pre_tokenizer") or {}]
    steps += steps[0].get("normalizers", []) + steps[1].get("pretokenizers", [])
    return any(
        step.get("type") == "Prepend"
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _listed(
    definition: Mapping[str, Any], count: int
) -> tuple[list[str], list[gguf.TokenType], list[str]]:
    """All tokens by id, their types, and those beyond the embeddings."""
    tokens = [f"[PAD{index}]" for index in range(count)]
    types = [gguf.TokenType.UNUSED] * count
    left_out = []
    for token, index in definition["model"]["vocab"].items():
        if index < count:
            tokens[index], types[index] = token, gguf.TokenType.NORMAL
        else:
            left_out.append(token)
    for added in definition.get("added_tokens") or []:
        token, index = added["content"], added["id"]
        if index >= count:
            left_out.append(token)
        elif added["special"] or _looks_special(token):
            tokens[index], types[index] = token, gguf.TokenType.CONTROL
        else:
            tokens[index] = token.replace(_SPACE, " ")
            types[index] = gguf.TokenType.USER_DEFINED
    return tokens, types, sorted(set(left_out))


def _looks_special(token: str) -> bool:
    """As llama.cpp's conversion scripts tell: some models forgot to say so."""
    return (
        token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith(("<|", "<\uff5c")) and token.endswith(("|>", "\uff5c>")))
        or (token.startswith("<unused") and token.endswith(">"))
    )


def _of_sentencepiece(folder: Path, count: int) -> Vocabulary:
    """From ``tokenizer.model``, and tokens that were added to it later."""
    model = read_sentencepiece(folder / _PROTO)
    tokens = [f"[PAD{index}]" for index in range(count)]
    types = [gguf.TokenType.UNUSED] * count
    scores = [-10000.0] * count
    for index, piece in enumerate(model.pieces[:count]):
        tokens[index], scores[index] = piece.text, piece.score
        types[index] = gguf.TokenType(piece.kind)
    left_out = [piece.text for piece in model.pieces[count:]]
    for index, token, is_special in _added(folder):
        if index >= count:
            left_out.append(token)
            continue
        is_control = is_special or _looks_special(token)
        tokens[index], scores[index] = token.replace(_SPACE, " "), -1000.0
        types[index] = gguf.TokenType.CONTROL if is_control else gguf.TokenType.USER_DEFINED
    return Vocabulary("llama", "default", tokens, types, left_out, scores, model.adds_space_prefix)


def _added(folder: Path) -> list[tuple[int, str, bool]]:
    added: dict[int, tuple[str, bool]] = {}
    try:
        path = folder / "added_tokens.json"
        if path.exists():
            for token, index in json.loads(path.read_bytes()).items():
                added[index] = token, False
        path = folder / "tokenizer_config.json"
        if path.exists():
            decoder = json.loads(path.read_bytes()).get("added_tokens_decoder", {})
            for index, entry in decoder.items():
                added[int(index)] = entry["content"], bool(entry.get("special"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnfitCheckpoint(f"its {path.name} is damaged ({error!r})") from error
    return [(index, *entry) for index, entry in sorted(added.items())]
