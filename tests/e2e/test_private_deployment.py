"""What docs/private-deployment.md promises: its commands, no way out, and updates that nobody notices."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import openai
import pytest
import requests
import yaml

from serving.config import load_config
from serving.models.checksums import digest_of
from tests.e2e.test_adapters import SHAPES, add
from tests.e2e.test_reload import rewrite
from tests.lora_files import random_lora, write_lora, write_model
from tests.peft_files import write_peft
from tests.processes import RigServer, wait_for, write_config

BASE = "smollm2-135m"
GUIDE = (Path(__file__).parents[2] / "docs" / "private-deployment.md").read_text()
# What is indented by four.
COMMANDS = [
    command
    for block in re.findall(r"(?m)(?:^    .*\n)+", re.sub(r"(?s)```.*?```", "", GUIDE))
    for command in textwrap.dedent(block).splitlines()
    # The namespace is `test_nothing_tries_to_get_out`.
    if not command.startswith("unshare ")
]
CONFIGS = [yaml.safe_load(block) for block in re.findall(r"(?s)```yaml\n(.*?)```", GUIDE)]
PROMPT = "The capital of France is Paris, and the capital of Spain is"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Path:
    """The files that the guide speaks of."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "base.gguf").symlink_to(model_path)
    for version in (1, 2):
        # Each is sure of its first token, which is another's than the other's: no rounding turns it.
        lora = random_lora(SHAPES, seed=6, rank=8)
        stronger = replace(lora, alpha=version**3 * lora.alpha)
        write_lora(folder / f"legal-v{version}.gguf", stronger)
    module = "model.layers.{}.self_attn.q_proj"
    lora = random_lora({module.format(layer): (576, 576) for layer in range(3)}, seed=7)
    write_peft(folder / "support-v1", lora.pairs)
    return folder


@pytest.fixture(scope="module")
def rig(
    weights: Path, tmp_path_factory: pytest.TempPathFactory, cache_dir: Path
) -> Iterator[RigServer]:
    """The guide's first config, on a free port; beside it are its files, and a `rigserve` to call."""
    path = write_config(tmp_path_factory.mktemp("rig"), cache_dir)
    for each in weights.iterdir():
        (path.parent / each.name).symlink_to(each.resolve())
    config = yaml.safe_load(path.read_text())
    guide = CONFIGS[0]
    [model] = guide["models"]
    model |= {"sha256": digest_of(weights / "base.gguf"), "context_length": 512, "threads": 1}
    path.write_text(
        yaml.safe_dump({**config, "models": [model], "server": config["server"] | guide["server"]})
    )
    program = path.parent / "rigserve"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m serving "$@"\n')
    program.chmod(0o755)
    with RigServer(path) as server:
        server.wait_until_ready()
        yield server


def test_the_guides_commands_run(rig: RigServer) -> None:
    assert len(COMMANDS) >= 10
    folder = rig.config_path.parent
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "RIGSERVE_SERVER": rig.base_url,
        "COLUMNS": "200",
    }
    outputs, secrets = [], {}
    for command in COMMANDS:
        done = subprocess.run(
            ["timeout", "60", "bash", "-c", command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        # A key may be for models that are still to come.
        assert not done.stderr or done.stderr.startswith("note: "), f"{command}: {done.stderr}"
        assert done.stdout.strip(), command
        outputs.append(done.stdout)
        if command.startswith("rigserve keys create "):
            [secrets[command.split()[3]]] = re.findall(r"rs-\S+", done.stdout)
            environment["RIGSERVE_API_KEY"] = secrets["ops"]
    told = dict(zip(COMMANDS, outputs, strict=True))
    checksums = next(output for command, output in told.items() if "checksum" in command)
    by_coreutils = next(output for command, output in told.items() if command.startswith("cd "))
    assert by_coreutils.split()[0] in checksums
    listed = told["rigserve adapters list"]
    assert re.search(r"legal +base +ready +added", listed)
    assert re.search(r"support +base +ready +config", listed)
    who_reaches_what(rig, secrets)


def who_reaches_what(rig: RigServer, secrets: dict[str, str]) -> None:
    """As the guide's table says."""

    def headers(who: str) -> dict[str, str]:
        return {"authorization": f"Bearer {secrets[who]}"}

    def status(who: str, model: str) -> int:
        body: Any = {"model": model, "prompt": PROMPT, "max_tokens": 2}
        url = f"{rig.base_url}/v1/completions"
        return requests.post(url, json=body, headers=headers(who), timeout=60).status_code

    url = f"{rig.base_url}/admin/adapters"
    path = str(rig.config_path.parent / "legal-v2.gguf")
    body: Any = {"name": "legal", "model": "base", "path": path}
    assert requests.post(url, json=body, timeout=60).status_code == 401
    assert (
        requests.post(url, json=body, headers=headers("legal-app"), timeout=60).status_code == 403
    )
    assert status("legal-app", "legal") == 404
    assert requests.post(url, json=body, headers=headers("ops"), timeout=60).status_code == 201
    for who, reached in (("legal-app", ["legal"]), ("support-app", ["support"])):
        listed = rig.get("/v1/models", headers=headers(who)).json()["data"]
        assert [(model["id"], model["parent"]) for model in listed] == [(reached[0], "base")]
        for model in ("base", "legal", "support"):
            assert status(who, model) == (200 if model in reached else 403), (who, model)
        assert rig.get("/admin/adapters", headers=headers(who)).status_code == 403


def test_the_guides_configs_are_configs(weights: Path, tmp_path: Path) -> None:
    assert len(CONFIGS) == 2
    for each in weights.iterdir():
        (tmp_path / each.name).symlink_to(each.resolve())
    for config in CONFIGS:
        path = tmp_path / "rig.yaml"
        path.write_text(yaml.safe_dump(config))
        load_config(path)


def namespace() -> list[str]:
    """How to run a command where there is no network but its own loopback."""
    for command in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("unshare") is None:
            break
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return command
    pytest.skip("NOT TESTED: network namespaces are not to be had here (unshare -rn)")


def test_nothing_tries_to_get_out(weights: Path, tmp_path: Path, cache_dir: Path) -> None:
    """Also with a model that the Hub's cache has, where HF_HUB_OFFLINE says that it is not to be asked."""
    in_namespace = namespace()
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--org--repo"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    shutil.copy(weights / "base.gguf", repository / "snapshots" / commit / "base.gguf")
    path = write_config(tmp_path, cache_dir, source="hf://org/repo/base.gguf", quantization=None)
    hub = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    nothing_gets_out(in_namespace, path, weights / "support-v1", hub)


def nothing_gets_out(
    in_namespace: list[str],
    config: Path,
    adapter: Path,
    environment: Mapping[str, str] = MappingProxyType({}),
    seconds: float = 120.0,
) -> None:
    """A rig that works in a network namespace without a way out does not look for one."""
    done = subprocess.run(
        [
            *(*in_namespace, sys.executable, "-m", "tests.isolation"),
            *(str(config), BASE, str(adapter)),
        ],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["interfaces"] == ["lo"]
    assert told["tokens"] == [4, 4]
    assert told["seen"] >= 3, "the kernel counts tries to get out"
    assert told["tried"] == 0


@pytest.mark.parametrize("part", ["source", "adapter", "projector"])
def test_a_file_that_is_another_is_not_served(
    weights: Path, tmp_path: Path, cache_dir: Path, part: str
) -> None:
    wrong = "0f" * 32
    model: dict[str, Any] = {"source": str(weights / "base.gguf"), "quantization": None}
    if part == "source":
        model["sha256"] = wrong
    elif part == "adapter":
        adapter = {"name": "legal", "path": str(weights / "legal-v1.gguf"), "sha256": wrong}
        model["adapters"] = [adapter]
    else:
        model |= {"projector": str(weights / "legal-v1.gguf"), "projector_sha256": wrong}
    path = write_config(tmp_path, cache_dir, **model)
    done = subprocess.run(
        [sys.executable, "-m", "serving", "serve", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"and {wrong} is wanted; fetch it again" in done.stderr
    assert "Traceback" not in done.stderr


class Load:
    """Clients that ask one name again and again; ``failures`` is what they were told instead of an answer."""

    def __init__(self, rig: RigServer, model: str, clients: int = 4) -> None:
        self._rig = rig
        self._model = model
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]
        self.answers: list[str] = []
        self.failures: list[Exception] = []

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        client = self._rig.client
        while not self._stop.is_set():
            try:
                self.answers.append(answer(client, self._model))
            except openai.OpenAIError as failure:
                self.failures.append(failure)

    def more(self, count: int = 6) -> None:
        """Wait for so many more answers."""
        wanted = len(self.answers) + count
        wait_for(lambda: len(self.answers) >= wanted or self.failures, "it is answered", 60)


def answer(client: openai.OpenAI, model: str) -> str:
    """The first token of an answer: those after it hang on near ties, which batches of other sizes round differently."""
    told = client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=6,
        temperature=0,
        logprobs=1,
        extra_body={"ignore_eos": True},
    )
    logprobs = told.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens
    return logprobs.tokens[0]


def turns(rig: RigServer, model: str, change: Callable[[int], None]) -> None:
    """Version 1 is served, updated to 2, and rolled back, under load: no request fails, and each change is seen."""
    change(1)
    first = answer(rig.client, model)
    with Load(rig, model) as load:
        load.more()
        change(2)
        second = answer(rig.client, model)
        load.more()
        change(1)
        assert answer(rig.client, model) == first
        load.more()
    assert not load.failures, load.failures[0]
    assert second != first
    assert {first, second} <= set(load.answers)


def test_an_adapter_is_updated_and_rolled_back_under_load(
    weights: Path, tmp_path: Path, cache_dir: Path
) -> None:
    with RigServer(write_config(tmp_path, cache_dir, max_sequences=4)) as rig:
        rig.wait_until_ready()

        def change(version: int) -> None:
            told = add(rig, "legal", weights / f"legal-v{version}.gguf", replace=True)
            assert told.status_code == 201, told.text

        turns(rig, "legal", change)


def test_a_merged_model_is_updated_and_rolled_back_under_load(
    model_path: Path, tmp_path: Path, cache_dir: Path
) -> None:
    lora = random_lora({"blk.0.attn_q.weight": (576, 576)}, seed=1)
    # It has two layers only, and so has little to say; but no two are more unlike.
    other = write_model(tmp_path / "other.gguf", model_path, layers=2, lora=lora, scale=1.0)
    files = [model_path, other]
    path = write_config(tmp_path, cache_dir, source=str(files[0]), quantization=None)
    with RigServer(path) as rig:
        rig.wait_until_ready()
        [model] = rig.config["models"]

        def change(version: int) -> None:
            file = files[version - 1]
            changed = {**model, "source": str(file), "sha256": digest_of(file)}
            rewrite(rig, {**rig.config, "models": [changed]})
            told = requests.post(f"{rig.base_url}/admin/reload", timeout=60)
            assert told.status_code == 200, told.text

        turns(rig, BASE, change)
