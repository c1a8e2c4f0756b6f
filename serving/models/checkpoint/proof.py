"""That llama.cpp takes a converted file, and reads text as the model's own tokenizer does.

``python -m serving.models.checkpoint.proof FILE`` loads a GGUF file, takes texts as JSON from its standard input, and
prints their tokens. It runs as a process of its own, so that a crash in native code, or what it prints, stays there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from serving.models.checkpoint.config import UnfitCheckpoint

_TOKENIZER = "tokenizer.json"
_MOST_ADDED_TOKENS = 256
# What pre-tokenizers differ in: runs of spaces and line breaks, numbers, contractions in either case, punctuation
# before line breaks, marks, scripts without spaces, symbols beyond the basic plane.
_TEXTS = (
    "The quick brown fox, 'quoted', isn't here; WE'LL see: don't, DON'T, I'm, I'M.",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \nend  of   spaces    here     ",
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 -1.5e-7 0x1F 2nd 4G",
    "def f(x):\n    return {'a': [x, 1]}  # comment!!\n\n\n/path/to/file.py ==> ok...\n",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u6211\u60f3\u5728apple\u5de5\u4f5c1314\u5929\uff5e \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 na\u00efve stra\u00dfe",
    "\U0001f680 (normal) \U0001f636\u200d\U0001f32b\ufe0f \u2705 \U0001f999\U0001f999 ------======= \u00bd \u2163 \u00aa",
    "CamelCaseWord HTTPServer iPhone mRNA \u00c9COLE \u01c5ungla x\u0301y",
)


def prove(path: Path, folder: Path) -> None:
    """Raise :class:`UnfitCheckpoint` unless llama.cpp loads the file and reads text as the folder's tokenizer does.

    Of a tokenizer that is there as ``tokenizer.model`` only, no text is compared.
    """
    texts: list[str] = []
    expected: list[list[int]] = []
    if (folder / _TOKENIZER).exists():
        # Takes a fifth of a second, which other commands need not wait for.
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER))
        except Exception as error:  # it has no class of its own
            raise UnfitCheckpoint(f"its {_TOKENIZER} cannot be read: {error}") from error
        added = sorted(tokenizer.get_added_tokens_decoder().items())[:_MOST_ADDED_TOKENS]
        texts = list(_TEXTS)
        texts += [token.content for _, token in added]
        texts += [f"{token.content} \n in" for _, token in added if token.rstrip]
        expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    for text, ours, theirs in zip(texts, _read_by_llama_cpp(path, texts), expected, strict=True):
        if ours != theirs:
            at = next(
                (
                    index
                    for index, pair in enumerate(zip(ours, theirs, strict=False))
                    if len({*pair}) > 1
                ),
                min(len(ours), len(theirs)),
            )
            raise UnfitCheckpoint(
                f"llama.cpp would read text otherwise than its {_TOKENIZER}: of {text!r}, from token {at} on, "
                f"{ours[at : at + 5]}, not {theirs[at : at + 5]}"
            )


def _read_by_llama_cpp(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text."""
    done = subprocess.run(
        [sys.executable, "-m", "serving.models.checkpoint.proof", str(path)],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if "error" in line.lower()][:1]
        if done.returncode < 0:
            reasons.append(f"the process was killed by {signal.Signals(-done.returncode).name}")
        raise UnfitCheckpoint(f"llama.cpp cannot load what it becomes: {'; '.join(reasons)}")
    read: list[list[int]] = json.loads(done.stdout)
    return read


def _read(path: str, texts: Sequence[str]) -> list[list[int]]:
    import llama_cpp

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False  # would copy weights
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    if not model:
        sys.exit(1)
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    read = []
    for text in texts:
        data = text.encode()
        room = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(vocabulary, data, len(data), room, len(room), False, True)
        read.append(room[:count])
    return read


if __name__ == "__main__":
    found = _read(sys.argv[1], json.load(sys.stdin))
    json.dump(found, sys.stdout)
    sys.stdout.flush()
    # What llama.cpp has taken goes with the process.
    os._exit(0)
