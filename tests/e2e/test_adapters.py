"""LoRA adapters that come and go while the server runs: by the admin API, `rigserve adapters`, and the config."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests
import yaml

from serving.models.checksums import digest_of
from tests.e2e.test_models import cli, engines_below
from tests.e2e.test_reload import rewrite
from tests.lora_files import random_lora, write_lora
from tests.peft_files import write_peft
from tests.processes import RigServer, wait_for, write_config

BASE = "smollm2-135m"
SHAPES = {f"blk.{layer}.attn_q.weight": (576, 576) for layer in range(0, 30, 3)}
PROMPT = "The capital of France is Paris, and the capital of Spain is"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of the embedded model: a, b and c as GGUF files, tuned as a folder of PEFT's."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("abc"):
        write_lora(folder / f"{name}.gguf", random_lora(SHAPES, seed=seed, rank=8))
    module = "model.layers.{}.self_attn.q_proj"
    shapes = {module.format(layer): (576, 576) for layer in range(0, 30, 3)}
    lora = random_lora(shapes, seed=7, rank=8)
    write_peft(folder / "tuned", lora.pairs, r=8, lora_alpha=16)
    return folder


@pytest.fixture(scope="module")
def rig(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, cache_dir: Path
) -> Iterator[RigServer]:
    """A rig whose config has the adapter `fixed`, which is a."""
    adapters = [{"name": "fixed", "path": str(folder / "a.gguf")}]
    path = write_config(
        *(tmp_path_factory.mktemp("rig"), cache_dir),
        # In which one row and many are computed nearly alike.
        quantization="F16",
        adapters=adapters,
        max_sequences=4,
    )
    with RigServer(path) as server:
        server.wait_until_ready()
        yield server


def add(rig: RigServer, name: str, path: Path, **more: Any) -> requests.Response:
    body = {"name": name, "model": BASE, "path": str(path), **more}
    return requests.post(f"{rig.base_url}/admin/adapters", json=body, timeout=60)


def remove(rig: RigServer, name: str) -> requests.Response:
    return requests.delete(f"{rig.base_url}/admin/adapters/{name}", timeout=60)


def adapters(rig: RigServer) -> dict[str, dict[str, Any]]:
    return {each["id"]: each for each in rig.get("/admin/adapters").json()["data"]}


def answer(rig: RigServer, model: str, tokens: int = 12) -> str:
    told = rig.client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert told.model == model
    return told.choices[0].text


def parents(rig: RigServer) -> dict[str, str | None]:
    return {m["id"]: m.get("parent") for m in rig.get("/v1/models").json()["data"]}


class Stream(threading.Thread):
    """A long answer that is being read."""

    tokens = 240

    def __init__(self, rig: RigServer, model: str) -> None:
        super().__init__()
        self.text = ""
        self.usage = 0
        self._chunks = rig.client.completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=self.tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        self.start()
        wait_for(lambda: self.text, "it has begun")

    def run(self) -> None:
        for chunk in self._chunks:
            self.text += "".join(choice.text for choice in chunk.choices)
            if chunk.usage:
                self.usage = chunk.usage.completion_tokens


def test_an_adapter_comes_and_goes_beside_running_streams(rig: RigServer, folder: Path) -> None:
    before = engines_below(rig)
    alone = {model: answer(rig, model) for model in (BASE, "fixed")}
    streams = [Stream(rig, model) for model in alone]
    told = add(rig, "legal", folder / "b.gguf")
    assert told.status_code == 201, told.text
    entry = told.json()
    assert (entry["parent"], entry["source"], entry["state"]) == (BASE, "added", "ready")
    assert entry["sha256"] == digest_of(folder / "b.gguf")
    legal = answer(rig, "legal")
    assert legal not in alone.values()
    assert all(stream.is_alive() for stream in streams), "make the streams longer"
    assert parents(rig) == {BASE: None, "gpt-4o-mini": None, "fixed": BASE, "legal": BASE}

    # A stream with an adapter that goes ends as if it had stayed; new requests have it no more.
    leaving = Stream(rig, "legal")
    removed = remove(rig, "legal").json()
    assert (removed["state"], removed["in_flight"]) == ("leaving", 1)
    assert adapters(rig)["legal"]["state"] == "leaving"
    assert "legal" not in parents(rig)
    with pytest.raises(openai.NotFoundError):
        answer(rig, "legal")
    # The name may be another's meanwhile.
    assert add(rig, "legal", folder / "c.gguf").status_code == 201
    assert answer(rig, "legal") != legal
    assert leaving.is_alive(), "make the stream longer"
    assert remove(rig, "legal").status_code == 200
    for stream, begins in zip((*streams, leaving), (*alone.values(), legal), strict=True):
        stream.join(60)
        assert stream.text.startswith(begins)
        assert stream.usage == stream.tokens
    wait_for(lambda: set(adapters(rig)) == {"fixed"}, "it has left")
    assert engines_below(rig) == before


def test_what_cannot_be_served_is_refused_and_changes_nothing(
    rig: RigServer, folder: Path, tmp_path: Path
) -> None:
    whole = (folder / "a.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: len(whole) // 2])
    wide = write_lora(
        tmp_path / "wide.gguf", random_lora({"blk.0.attn_q.weight": (64, 64)}, seed=1)
    )
    dora = write_peft(tmp_path / "dora", {}, use_dora=True)
    good = folder / "b.gguf"
    before, listed = engines_below(rig), adapters(rig)
    refusals: list[tuple[requests.Response, int, str | None, str]] = [
        (add(rig, "new", tmp_path / "none.gguf"), 400, "path", "No such file"),
        (add(rig, "new", cut), 400, "path", "it ends early"),
        (add(rig, "new", wide), 400, "path", "made for another model"),
        (add(rig, "new", dora), 400, "path", "use_dora"),
        (add(rig, "new", good, sha256="0" * 64), 400, "sha256", "fetch it again"),
        (add(rig, "new", Path("b.gguf")), 400, "path", "path"),
        (add(rig, "new", good, model="smol"), 404, "model", "does not exist"),
        (add(rig, "new", good, model="fixed"), 409, "model", f"its base is '{BASE}'"),
        (add(rig, "fixed", good, replace=True), 409, "name", "the config's"),
        (add(rig, "gpt-4o-mini", good), 409, "name", "taken"),
        (remove(rig, "fixed"), 409, None, "take it out there"),
        (remove(rig, "nobody"), 404, None, "there are: none"),
    ]
    for response, status, param, message in refusals:
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (status, param), error
        assert message in error["message"]
    foreign = {"sec-fetch-site": "cross-site"}
    url = f"{rig.base_url}/admin/adapters"
    assert requests.post(url, json={}, headers=foreign, timeout=60).status_code == 403
    assert adapters(rig) == listed
    assert engines_below(rig) == before
    assert answer(rig, "fixed")


def test_a_folder_of_pefts_is_served_as_it_is(rig: RigServer, folder: Path) -> None:
    assert add(rig, "tuned", folder / "tuned").status_code == 201
    assert add(rig, "silent", folder / "tuned", scale=0.0).status_code == 201
    base = answer(rig, BASE)
    assert answer(rig, "tuned") != base == answer(rig, "silent")
    [made] = Path(rig.config["storage"]["cache_dir"]).glob("adapters/tuned-*.gguf")
    assert made.parent.stat().st_mode & 0o077 == 0
    for name in ("tuned", "silent"):
        assert remove(rig, name).status_code == 200


def test_usage_is_the_adapters(rig: RigServer, folder: Path) -> None:
    add(rig, "counted", folder / "b.gguf")
    answer(rig, "counted", 5)
    wait_for(lambda: rig.total("rigserve_requests_in_flight") == 0, "it is metered")
    labels = f'adapter="counted",model="{BASE}"'
    prompt = rig.series("rigserve_adapter_tokens_total")
    assert prompt['{adapter="counted",kind="completion",' + f'model="{BASE}"' + "}"] == 5
    assert rig.series("rigserve_adapter_requests_total")[f'{{{labels},status="200"}}'] == 1
    assert rig.series("rigserve_adapter_cost_usd_total")[f"{{{labels}}}"] > 0
    wait_for(lambda: rig.total("rigserve_ledger_waiting_rows") == 0, "the ledger is written")
    with closing(sqlite3.connect(rig.ledger_path)) as ledger:
        rows = ledger.execute("SELECT completion_tokens FROM usage WHERE model = 'counted'")
        assert rows.fetchall() == [(5,)]
    remove(rig, "counted")


def test_adapters_share_their_bases_memory(
    rig: RigServer, folder: Path, half_precision_path: Path
) -> None:
    [pid] = engines_below(rig).values()
    engine = psutil.Process(pid)
    before_bytes = engine.memory_info().rss
    names = [f"shared-{number}" for number in range(6)]
    for number, name in enumerate(names):
        assert add(rig, name, folder / f"{'abc'[number % 3]}.gguf").status_code == 201
        answer(rig, name)
    grown_bytes = engine.memory_info().rss - before_bytes
    # One copy of the base would be as much as that, and more.
    assert grown_bytes < 0.2 * half_precision_path.stat().st_size
    assert len({answer(rig, name) for name in names}) == 3
    for name in names:
        remove(rig, name)


def test_adapters_of_the_config_change_without_another_engine(rig: RigServer, folder: Path) -> None:
    before = engines_below(rig)
    fixed = answer(rig, "fixed")
    stream = Stream(rig, "fixed")
    [model] = rig.config["models"]
    changed: list[dict[str, Any]] = [
        {"name": "other", "path": str(folder / "c.gguf")},
        {"name": "silent", "path": str(folder / "c.gguf"), "scale": 0.0},
    ]
    add(rig, "added", folder / "b.gguf")
    rewrite(rig, {**rig.config, "models": [{**model, "adapters": changed}]})
    rig.wait_for_output(f"changed updated: {BASE}")
    assert set(parents(rig)) == {BASE, "gpt-4o-mini", "other", "silent", "added"}
    assert answer(rig, "silent") == answer(rig, BASE)
    stream.join(60)
    assert stream.text.startswith(fixed)

    # One that is broken changes nothing.
    rewrite(
        rig, {**rig.config, "models": [{**model, "adapters": [{**changed[0], "sha256": "0" * 64}]}]}
    )
    refused = requests.post(f"{rig.base_url}/admin/reload", timeout=60)
    assert refused.status_code == 409
    assert "is not the file that sha256 names" in refused.json()["message"]
    assert answer(rig, "other")

    # What the file says counts: a name that it takes for itself is its own, and comes back when it lets go of it.
    rewrite(rig, {**rig.config, "models": [{**model, "aliases": ["added"]}]})
    assert requests.post(f"{rig.base_url}/admin/reload", timeout=60).status_code == 200
    left_out = adapters(rig)["added"]
    assert (left_out["state"], left_out["in_flight"]) == ("not served", 0)
    assert "the config has the name" in left_out["reason"]
    rewrite(rig, rig.config)
    assert requests.post(f"{rig.base_url}/admin/reload", timeout=60).status_code == 200
    assert adapters(rig)["added"]["state"] == "ready"
    assert answer(rig, "fixed") == fixed
    assert engines_below(rig) == before
    assert remove(rig, "added").status_code == 200


def test_what_was_added_is_there_after_a_crash_and_a_restart_and_never_another_file(
    folder: Path, tmp_path: Path, cache_dir: Path
) -> None:
    path = write_config(tmp_path, cache_dir, max_sequences=2, load="on_demand")
    kept, lost = tmp_path / "kept.gguf", tmp_path / "lost.gguf"
    for file, source in ((kept, "a"), (lost, "b")):
        file.write_bytes((folder / f"{source}.gguf").read_bytes())
    with RigServer(path) as rig:
        rig.wait_until_ready()
        # Its file is looked at although the model is not loaded.
        told = cli(rig, "adapters", "add", "kept", str(path), "--model", "gpt-4o-mini")
        assert (told.returncode, "rig.yaml cannot be used" in told.stderr) == (2, True), told.stderr
        told = cli(rig, "adapters", "add", "kept", str(kept), "--model", "gpt-4o-mini")
        assert told.returncode == 0, told.stderr
        assert "kept: unloaded, of smollm2-135m" in told.stdout
        expected = answer(rig, "kept")
        told = cli(rig, "adapters", "add", "lost", str(lost), "--model", BASE)
        assert "lost: ready, of smollm2-135m" in told.stdout, told.stderr
        [pid] = engines_below(rig).values()
        psutil.Process(pid).kill()
        wait_for(lambda: rig.total("rigserve_engine_restarts") == 1, "the engine is started again")
        wait_for(lambda: adapters(rig)["lost"]["state"] == "ready", "it is ready")
        assert answer(rig, "kept") == expected
        rig.stop()
    lost.write_bytes(kept.read_bytes())
    with RigServer(path) as rig:
        rig.wait_until_ready()
        assert answer(rig, "kept") == expected
        assert "the adapter 'lost' is not served" in rig.output
        with pytest.raises(openai.NotFoundError):
            answer(rig, "lost")
        listed = cli(rig, "adapters", "list")
        assert "lost.gguf is not the file that what was added names" in listed.stdout
        assert cli(rig, "adapters", "add", "lost", str(lost), "--model", BASE).returncode == 0
        assert answer(rig, "lost") == expected
        assert cli(rig, "adapters", "remove", "lost").stdout == "lost: removed\n"
        unknown = cli(rig, "adapters", "remove", "lost")
        assert unknown.returncode == 2
        assert "there are: kept" in unknown.stderr
    assert yaml.safe_load(path.read_text()) == rig.config  # it is the operator's alone
