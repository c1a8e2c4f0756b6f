"""A changed config is taken up while the server runs, all of it or nothing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from tests.e2e.test_models import cli, engines_below, post, states, write_models
from tests.processes import RigServer, wait_for

HELLO: Any = [{"role": "user", "content": "Tell me about the sea."}]


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[RigServer]:
    folder = tmp_path_factory.mktemp("rig")
    path = write_models(folder, cache_dir, {"first": {"context_length": 2048}, "second": {}})
    with RigServer(path) as rig:
        rig.wait_until_ready()
        yield rig


def rewrite(rig: RigServer, config: dict[str, Any]) -> None:
    """Put a new config in the old one's place, as editors do it."""
    fresh = rig.config_path.with_suffix(".new")
    fresh.write_text(yaml.safe_dump(config))
    fresh.replace(rig.config_path)


def ask(rig: RigServer, model: str, **options: Any) -> Any:
    return rig.client.chat.completions.create(
        model=model, messages=HELLO, **{"max_tokens": 4, **options}
    )


def names(rig: RigServer) -> set[str]:
    return {model.id for model in rig.client.models.list()}


def test_what_cannot_be_taken_up_changes_nothing_and_says_why(two_models: RigServer) -> None:
    rig = two_models
    before, good = engines_below(rig), rig.config_path.read_text()
    # Only what asks for it is looked at here.
    quiet = {**rig.config, "server": {**rig.config["server"], "watch_config": False}}
    rewrite(rig, quiet)
    rig.wait_for_output("changed settings: server.watch_config")
    assert cli(rig, "config", "status").returncode == 0

    broken = rig.config_path.parent / "broken.gguf"
    broken.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    first, second = quiet["models"]
    moved = {**quiet, "server": {**quiet["server"], "port": 1, "lenient": True}}
    renamed = {**second, "name": "renamed"}
    unstartable = {**first, "name": "broken", "source": str(broken), "quantization": None}
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({**quiet, "models": [{**first, "contxt": 1}]}, "did you mean 'context_length'"),
        ({**moved, "models": [renamed]}, "only a restart can change server.port"),
        ({**quiet, "models": [{**renamed, "filters": {"forced": {"nonsense": 1}}}]}, "nonsense"),
        ({**quiet, "models": [renamed, unstartable]}, "has no general.architecture"),
        ({**quiet, "memory": {"budget_mib": 1}, "models": [renamed]}, "does not fit"),
    ]
    for config, reason in mistakes:
        rewrite(rig, config)
        assert rig.get("/admin/reload").json()["file_changed"]
        answer = post(rig, "/admin/reload")
        assert not answer.json()["file_changed"]
        assert answer.status_code == 409
        assert reason in answer.json()["message"]
        assert engines_below(rig) == before
        assert names(rig) == {"first", "second"}
        assert states(rig) == {"first": "ready", "second": "ready"}
    assert rig.series("rigserve_config_last_reload_successful") == {"": 0.0}
    told = cli(rig, "config", "status")
    assert told.returncode == 1
    assert "has changed since" not in told.stdout
    assert "REFUSED" in told.stdout
    assert "does not fit" in told.stdout

    rig.config_path.write_text(good)
    assert "has changed since" in cli(rig, "config", "status").stdout
    rig.process.send_signal(signal.SIGHUP)
    wait_for(lambda: rig.get("/admin/reload").json()["ok"], "SIGHUP is heeded")
    assert engines_below(rig) == before


def test_a_stream_runs_through_a_reload_that_changes_its_model(two_models: RigServer) -> None:
    """The last one for these models: it takes one away."""
    rig = two_models
    before = engines_below(rig)
    finished: list[Any] = []

    def consume() -> None:
        finished.extend(
            ask(rig, "first", max_tokens=600, stream=True, extra_body={"ignore_eos": True})
        )

    reader = threading.Thread(target=consume)
    reader.start()
    wait_for(lambda: rig.total("rigserve_sequences_running") == 1, "the stream runs")

    first, second = rig.config["models"]
    rig.config["models"] = [
        {**first, "context_length": 1024},
        {**second, "aliases": ["zweites"], "filters": {"max_tokens_ceiling": 2}},
        {**first, "name": "third", "context_length": 256},
    ]
    rewrite(rig, rig.config)
    # The file is watched; nobody has to say anything.
    seen: list[dict[str, Any]] = []

    def is_taken_up() -> bool:
        seen.append(rig.get("/admin/reload").json())
        return "changed added: third; restarted: first; updated: second" in rig.output

    wait_for(is_taken_up, "the config is taken up")
    # What is being started is not told as what is about to leave.
    assert all(not told["draining"] for told in seen if told["reloading"])
    assert reader.is_alive(), "the stream ended before the reload: make it longer"

    # From now on all is new, while the stream goes on on the old engine.
    assert names(rig) == {"first", "second", "third", "zweites"}
    assert ask(rig, "zweites", max_tokens=5).usage.completion_tokens == 2
    assert ask(rig, "third").usage.completion_tokens == 4
    assert ask(rig, "first").usage.completion_tokens == 4
    long: Any = [{"role": "user", "content": "sea " * 1500}]
    with pytest.raises(openai.BadRequestError, match="1024"):
        rig.client.chat.completions.create(model="first", messages=long)
    reader.join(60)
    assert finished[-1].choices[0].finish_reason == "length"
    pieces = [chunk for chunk in finished if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 500

    wait_for(lambda: len(rig.get("/admin/models").json()["data"]) == 3, "the old engine goes")
    after = engines_below(rig)
    assert after["second"] == before["second"]  # what has not changed was not touched
    assert after["first"] != before["first"]
    assert rig.series("rigserve_config_last_reload_successful") == {"": 1.0}

    # What is taken out of the file goes, and only that.
    rig.config["models"] = rig.config["models"][1:]
    rewrite(rig, rig.config)
    wait_for(lambda: set(engines_below(rig)) == {"second", "third"}, "first leaves")
    with pytest.raises(openai.NotFoundError):
        ask(rig, "first")
    assert engines_below(rig)["second"] == before["second"]


def test_a_changed_model_waits_for_the_room_of_its_old_engine(
    tmp_path: Path, cache_dir: Path
) -> None:
    path = write_models(
        tmp_path, cache_dir, {"only": {"memory_mib": 500}}, memory={"budget_mib": 700}
    )
    with RigServer(path) as rig:
        rig.wait_until_ready()
        [old] = engines_below(rig).values()
        [only] = rig.config["models"]
        rewrite(rig, {**rig.config, "models": [{**only, "max_sequences": 3}]})
        rig.wait_for_output("restarted: only")
        # Requests wait for the new engine.
        assert ask(rig, "only").usage.completion_tokens == 4
        assert engines_below(rig)["only"] != old
        assert rig.answers("/ready")
