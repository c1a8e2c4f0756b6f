"""A gateway with each engine, started once for all tests of a process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.engines import (
    CHAT,
    EMBEDDING,
    ENGINES,
    UPSTREAM,
    ContractServer,
    EngineUnderTest,
)
from tests.processes import session_pids


def pytest_configure(config: pytest.Config) -> None:
    """Tell pytest of the marker."""
    config.addinivalue_line("markers", "needs(*capabilities): only for engines that have them all")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test on the engines that can do what it needs."""
    if "contract" not in metafunc.fixturenames:
        return
    needed = {name for mark in metafunc.definition.iter_markers("needs") for name in mark.args}
    able = [engine for engine in ENGINES if needed <= engine.capabilities]
    # The first test of each waits for its start.
    engines = []
    for engine in able:
        marks = [pytest.mark.timeout(300 + engine.start_seconds)]
        if engine.engine == "vllm":
            marks.append(pytest.mark.vllm)
        engines.append(pytest.param(engine, id=engine.name, marks=marks))
    metafunc.parametrize("contract", engines, indirect=True, scope="session")


@pytest.fixture(scope="session")
def contract(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    cache_dir: Path,
    minilm_path: Path,
) -> Iterator[ContractServer]:
    """`rigserve serve` with the models `chat` and `embedding` on an engine; ready."""
    engine: EngineUnderTest = request.param
    folder = tmp_path_factory.mktemp(f"contract-{engine.name}")
    with contextlib.ExitStack() as servers:
        upstream = None
        if engine.is_remote:
            upstream_folder = tmp_path_factory.mktemp("upstream")
            path = UPSTREAM.write_config(upstream_folder, cache_dir, minilm_path)
            upstream = _started(servers, path, UPSTREAM).base_url
        path = engine.write_config(folder, cache_dir, minilm_path, upstream)
        server = _started(servers, path, engine)
        yield server
        # What a program that is not of ours prints over what a model has written is its own matter.
        foreign = (f"[{CHAT}]", f"[{EMBEDDING}]") if engine.program else ()
        lines = server.output.splitlines()
        assert not [
            line for line in lines if "Traceback" in line and not any(map(line.count, foreign))
        ]


def _started(servers: contextlib.ExitStack, path: Path, engine: EngineUnderTest) -> ContractServer:
    server = servers.enter_context(ContractServer(path, engine))
    session_pids.add(server.process.pid)
    server.wait_until_ready(engine.start_seconds)
    return server
