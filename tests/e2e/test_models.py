"""Loading and unloading models while the server runs: by the admin API and `rigserve models`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from tests.processes import RigServer, command_lines, wait_for, write_config

HELLO: Any = [{"role": "user", "content": "Tell me about the sea."}]


def write_models(
    folder: Path, cache_dir: Path, models: dict[str, dict[str, Any]], **sections: Any
) -> Path:
    """A config with several copies of the embedded model, by name, with what is special about each."""
    path = write_config(folder, cache_dir, max_sequences=2, prefix_cache_mib=16, aliases=[])
    config = yaml.safe_load(path.read_text())
    [base] = config["models"]
    config["models"] = [{**base, "name": name, **special} for name, special in models.items()]
    path.write_text(yaml.safe_dump({**config, **sections}))
    return path


def engine_pids(rig: RigServer) -> list[tuple[str, int]]:
    """Each engine's process, and the model that it serves."""
    return [
        (line[line.index("--served-name") + 1], pid)
        for pid, line in command_lines(rig.process.pid).items()
        if line[1:3] == ["-m", "serving.llamacpp"]
    ]


def engines_below(rig: RigServer) -> dict[str, int]:
    """The process of each model's engine."""
    pids = engine_pids(rig)
    assert len(dict(pids)) == len(pids), "no model is loaded twice"
    return dict(pids)


def models(rig: RigServer) -> dict[str, dict[str, Any]]:
    return {each["id"]: each for each in rig.get("/admin/models").json()["data"]}


def states(rig: RigServer) -> dict[str, str]:
    return {name: each["state"] for name, each in models(rig).items()}


def post(rig: RigServer, path: str, **options: Any) -> requests.Response:
    return requests.post(rig.base_url + path, timeout=60, **options)


def cli(rig: RigServer, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serving", *words, "--server", rig.base_url]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=environment
    )


def test_models_come_and_go_one_by_one(tmp_path: Path, cache_dir: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    path = write_models(
        tmp_path,
        cache_dir,
        {
            "first": {},
            "second": {"load": "on_demand"},
            "broken": {"load": "on_demand", "source": str(broken), "quantization": None},
        },
    )
    with RigServer(path) as rig:
        # One that is loaded on demand does not make the server unready.
        rig.wait_until_ready()
        assert states(rig) == {"first": "ready", "second": "unloaded", "broken": "unloaded"}
        assert set(engines_below(rig)) == {"first"}

        # Two at once share one load.
        answers: list[requests.Response] = []
        callers = [
            threading.Thread(target=lambda: answers.append(post(rig, "/admin/models/second/load")))
            for _ in range(2)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert rig.output.count("second: ready") == 1
        second = models(rig)["second"]
        assert second["devices"] == ["cpu"]
        assert second["memory"]["source"] == "measured"
        assert 100 < second["memory"]["used_mib"]["cpu"] <= second["memory"]["needed_mib"]["cpu"]

        assert rig.series("rigserve_engine_state") == {
            '{model="broken",state="unloaded"}': 1.0,
            '{model="first",state="ready"}': 1.0,
            '{model="second",state="ready"}': 1.0,
        }
        reserved = rig.series("rigserve_engine_memory_bytes")['{device="cpu",model="second"}']
        assert reserved == second["memory"]["reserved_mib"]["cpu"] * 2**20

        # The memory is free when the answer comes.
        pid = engines_below(rig)["second"]
        assert post(rig, "/admin/models/second/unload").json()["state"] == "unloaded"
        assert not psutil.pid_exists(pid)
        assert set(engines_below(rig)) == {"first"}
        assert rig.get("/ready").status_code == 200

        # Other sites' pages, in the owner's browser, may not do it.
        foreign = {"sec-fetch-site": "cross-site"}
        assert post(rig, "/admin/models/first/unload", headers=foreign).status_code == 403
        assert states(rig)["first"] == "ready"

        # What cannot be started does not end the server, and says why.
        failed = post(rig, "/admin/models/broken/load")
        assert failed.status_code == 502
        assert "has no general.architecture" in failed.json()["error"]["message"]
        assert "has no general.architecture" in models(rig)["broken"]["failure"]
        assert states(rig)["broken"] == "unloaded"

        table = cli(rig, "models", "ps")
        assert table.returncode == 0
        assert "second" in table.stdout
        assert "unloaded" in table.stdout
        loaded = cli(rig, "models", "load", "second")
        assert loaded.returncode == 0, loaded.stderr
        assert states(rig)["second"] == "ready"
        unknown = cli(rig, "models", "load", "secnod")
        assert unknown.returncode == 2
        assert "did you mean second" in unknown.stderr

        # One that crashes comes back; one that was unloaded does not.
        os.kill(engines_below(rig)["second"], signal.SIGKILL)
        wait_for(lambda: states(rig)["second"] != "ready", "the crash is noticed")
        wait_for(lambda: states(rig)["second"] == "ready", "it is back")
        assert models(rig)["second"]["restarts"] == 1


def test_a_model_in_use_is_unloaded_only_by_force(tmp_path: Path, cache_dir: Path) -> None:
    path = write_models(tmp_path, cache_dir, {"first": {"context_length": 8192}})
    with RigServer(path) as rig:
        rig.wait_until_ready()
        stream = rig.client.chat.completions.create(
            model="first", messages=HELLO, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        refused = post(rig, "/admin/models/first/unload")
        assert refused.status_code == 409
        assert refused.json()["error"]["code"] == "model_in_use"
        assert models(rig)["first"]["in_flight"] == 1
        assert cli(rig, "models", "unload", "first").returncode == 2
        forced = cli(rig, "models", "unload", "first", "--force")
        assert forced.returncode == 0, forced.stderr
        with pytest.raises(Exception, match="stopped while it worked"):
            for _ in stream:
                pass
        # The operator wanted it so: the server is not unready for that.
        assert rig.get("/ready").status_code == 200


def test_idle_models_make_room_within_the_budget(tmp_path: Path, cache_dir: Path) -> None:
    on_demand = {"load": "on_demand", "memory_mib": 400}
    path = write_models(
        tmp_path,
        cache_dir,
        {
            "first": on_demand,
            "second": on_demand,
            "third": on_demand,
            "pinned": {"pinned": True, "memory_mib": 200},
            "giant": {"load": "on_demand", "memory_mib": 801},
        },
        memory={"budget_mib": 1000},
    )
    with RigServer(path) as rig:
        rig.wait_until_ready()
        for name in ("first", "second", "third"):
            assert post(rig, f"/admin/models/{name}/load").status_code == 200
        assert states(rig) == {
            "first": "unloaded",
            "second": "ready",
            "third": "ready",
            "pinned": "ready",
            "giant": "unloaded",
        }
        refused = post(rig, "/admin/models/giant/load")
        assert refused.status_code == 409
        assert "801 MiB of main memory, configured" in refused.json()["error"]["message"]
        # Nobody left for it.
        assert states(rig)["second"] == states(rig)["third"] == "ready"
