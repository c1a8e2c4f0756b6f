"""`rigserve` with engines that compute nothing, to measure the gateway by itself: the benchmark's own.

    python -m tools.fake_rig serve CONFIG

All but the engines is as in `rigserve`. RIGSERVE_FAKE_ENGINE_CORE pins the engines to a core.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest.mock import patch

from serving import cli
from serving.config import ModelConfig
from serving.engines.launch import Files, Footprint, Launch

_ENGINE_MIB = 64


class FakeLauncher:
    """Starts :mod:`loadtest.benchmarks.gateway.engine` for every model, whatever its source."""

    uses_gpus = False

    def __init__(self, _cache_dir: Path) -> None:
        pass

    def prepare(self, model: ModelConfig) -> Files:
        """There are no files."""
        return Files(Path(os.devnull))

    def differ(self, old: ModelConfig, new: ModelConfig) -> bool:
        """All are alike, but for their ports."""
        return old.port != new.port

    def footprint(self, model: ModelConfig, files: Files, *, on_gpu: bool) -> Footprint:
        """That of a small Python program."""
        return Footprint(_ENGINE_MIB)

    def launch(
        self,
        model: ModelConfig,
        files: Files,
        port: int,
        api_key: str,
        gpus: tuple[str, ...] | None,
    ) -> Launch:
        """The process; it asks for no key."""
        words = [sys.executable, "-m", "loadtest.benchmarks.gateway.engine", str(port)]
        core = os.environ.get("RIGSERVE_FAKE_ENGINE_CORE")
        return Launch(words + ([core] if core else []), {})


if __name__ == "__main__":
    with patch("serving.site.LlamaCppLauncher", FakeLauncher):
        sys.exit(cli.main(sys.argv[1:]))
