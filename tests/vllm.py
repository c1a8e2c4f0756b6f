"""Where the tests find vLLM: the environment that `rigserve engines install vllm` has made, or another."""

from __future__ import annotations

import os
from pathlib import Path

from serving.config import load_config
from serving.engines.vllm.environment import Environments

MISSING = "install it with: make vllm (or name the Python of an environment in RIGSERVE_VLLM)"
_DEFAULT = Path(__file__).parents[1] / "configs" / "default.yaml"


def vllm_python() -> Path | None:
    """The Python of an environment with vLLM; None if there is none."""
    if named := os.environ.get("RIGSERVE_VLLM"):
        return Path(named)
    current = Environments(Path(load_config(_DEFAULT).storage.data_dir)).current
    return None if current is None else current.python
