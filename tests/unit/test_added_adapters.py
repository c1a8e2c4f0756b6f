"""Adapters that were added beside the config's: how the two go together, and where they are kept."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from serving.adapters.added import AddedAdapter, with_added
from serving.adapters.store import AdapterStore
from serving.config import AdapterConfig, Config
from serving.models.checksums import digest_of

CONFIG = Config.model_validate(
    {
        "models": [
            {
                "name": "base",
                "source": "base.gguf",
                "aliases": ["nick"],
                "adapters": [{"name": "own", "path": "own.gguf"}],
            },
            {"name": "far", "engine": "remote", "base_url": "http://far.example/v1"},
        ],
        "routes": [{"name": "way", "targets": [{"model": "base"}]}],
    }
)


def added(name: str, model: str = "base", path: str = "x.gguf", **more: Any) -> AddedAdapter:
    return AddedAdapter(model, AdapterConfig(name=name, path=path, **more), 1.0)


def test_they_come_after_the_configs_own() -> None:
    config, left_out = with_added(CONFIG, [added("one"), added("two")])
    assert [each.name for each in config.models[0].adapters] == ["own", "one", "two"]
    assert left_out == {}
    assert with_added(CONFIG, [])[0] == CONFIG


@pytest.mark.parametrize("name", ["base", "nick", "own", "far", "way"])
def test_a_name_that_the_config_has_is_its_own(name: str) -> None:
    config, left_out = with_added(CONFIG, [added(name), added("other")])
    assert left_out == {name: "the config has the name for something else"}
    assert [each.name for each in config.models[0].adapters] == ["own", "other"]


@pytest.mark.parametrize("model", ["gone", "far", "nick"])
def test_without_their_model_they_are_left_out(model: str) -> None:
    config, left_out = with_added(CONFIG, [added("one", model)])
    assert left_out == {"one": f"the config has no model '{model}' with an engine here"}
    assert config == CONFIG


def test_the_store_keeps_them_over_a_restart(tmp_path: Path) -> None:
    first, second = added("one", scale=0.5, sha256="0" * 64), added("two", sha256="1" * 64)
    with closing(AdapterStore(tmp_path)) as store:
        store.put(first)
        store.put(second)
        store.put(AddedAdapter("base", first.adapter, 2.0))
        assert store.remove("two")
        assert not store.remove("two")
    with closing(AdapterStore(tmp_path)) as store:
        assert store.all() == [AddedAdapter("base", first.adapter, 2.0)]
    assert (tmp_path / "adapters.sqlite").stat().st_mode & 0o077 == 0


def test_it_may_be_written_from_several_threads(tmp_path: Path) -> None:
    with closing(AdapterStore(tmp_path)) as store:
        threads = [
            threading.Thread(target=store.put, args=(added(f"a{number}", sha256="0" * 64),))
            for number in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(store.all()) == 20


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda file: None, None),
        (lambda file: file.unlink(), "there is no .* any more"),
        (lambda file: file.write_text("other"), "is not the file that what was added names"),
    ],
)
def test_a_file_that_is_another_now_is_told(
    tmp_path: Path, change: Callable[[Path], object], fault: str | None
) -> None:
    file = tmp_path / "lora.gguf"
    file.write_text("weights")
    each = added("one", path=str(file), sha256=digest_of(file))
    change(file)
    found = each.fault(tmp_path)
    assert found is None if fault is None else found and re.search(fault, found)
