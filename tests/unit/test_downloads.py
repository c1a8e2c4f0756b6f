"""`rigserve models search|pull|list|remove|verify`, against a server that speaks the Hub's API."""

from __future__ import annotations

import json
import os
import pty
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.models.downloads import Fetch, HubFile, check_disk
from serving.models.hub import HubSource, ModelError
from tests.hub import Hub, hub_of

BIG = random.Random(1).randbytes(3_000_000)
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    quants = tmp_path / "hub" / "org" / "tiny-GGUF"
    quants.mkdir(parents=True)
    (quants / "tiny-Q4_K_M.gguf").write_bytes(BIG[:1_000_000])
    (quants / "tiny-Q8_0.gguf").write_bytes(BIG[:2_000_000])
    (quants / "README.md").write_text("tiny")
    for part in (1, 2):
        (quants / f"big-0000{part}-of-00002.gguf").write_bytes(BIG[part:])
    whole = tmp_path / "hub" / "org" / "tiny"
    (whole / "original").mkdir(parents=True)
    (whole / "config.json").write_text("{}")
    (whole / "model.safetensors").write_bytes(BIG)
    (whole / "original" / "consolidated.safetensors").write_bytes(BIG)
    (whole / "pytorch_model.bin").write_bytes(BIG)
    with hub_of(tmp_path / "hub") as served:
        yield served


_SCRIPT = """
import argparse, sys
from pathlib import Path
from serving.models.download_commands import add_download_actions
from serving.models.hub import ModelError
parser = argparse.ArgumentParser()
add_download_actions(
    parser.add_subparsers(),
    default_config=Path("configs/default.yaml"),
    fit_warning=lambda source: {warning},
)
args = parser.parse_args(sys.argv[1:])
try:
    sys.exit(args.run(args))
except ModelError as error:
    print(f"error: {{error}}", file=sys.stderr)
    sys.exit(2)
"""


class Machine:
    """A machine with a cache of its own, on which rigserve is run."""

    def __init__(self, home: Path, url: str) -> None:
        self.cache = home / "hub"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        self.environment = {
            **kept,
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def models(
        self,
        *arguments: str,
        url: str | None = None,
        too_big: bool = False,
        stdin: int = subprocess.DEVNULL,
    ) -> tuple[int, str, str]:
        """`rigserve models`, without what the whole command has to import; its status and output."""
        warning = "f'{source} is too big'" if too_big else "None"
        result = subprocess.run(
            [sys.executable, "-c", _SCRIPT.format(warning=warning), *arguments],
            env=self.environment | ({"HF_ENDPOINT": url} if url else {}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=stdin,
        )
        return result.returncode, result.stdout, result.stderr


@pytest.fixture
def machine(hub: Hub, tmp_path: Path) -> Machine:
    return Machine(tmp_path / "home", hub.url)


Q4 = "hf://org/tiny-GGUF/tiny-Q4_K_M.gguf"


def test_a_file_is_pulled_listed_verified_and_removed(machine: Machine, hub: Hub) -> None:
    status, out, err = machine.models("pull", Q4)
    assert status == 0, err
    assert Path(out.strip()).read_bytes() == BIG[:1_000_000]
    assert "1 of 1 files, 0.00 GB of 0.00 GB" in err

    status, out, err = machine.models("pull", Q4)
    assert (status, "are here already" in err) == (0, True)

    status, out, _ = machine.models("list", "--json")
    (listed,) = json.loads(out)["downloaded"]
    assert (listed["source"], listed["size_bytes"]) == (Q4, 1_000_000)

    status, out, _ = machine.models("verify", url=NOBODY)
    assert (status, out) == (0, f"ok           {Q4}\n1 files, 0 damaged\n")
    blob = Path(listed["path"]).resolve()
    blob.write_bytes(b"x" + blob.read_bytes()[1:])
    status, out, _ = machine.models("verify", "org/tiny-GGUF", url=NOBODY)
    assert status == 1
    assert f"DAMAGED      {Q4}: rigserve models remove {Q4}" in out

    status, out, err = machine.models("remove", Q4)
    assert (status, "nothing is deleted" in err, blob.exists()) == (1, True, True)
    status, out, err = machine.models("remove", Q4, "--yes")
    assert (status, blob.exists()) == (0, False)
    status, out, _ = machine.models("list", "--json")
    assert json.loads(out)["downloaded"] == []


def test_one_of_several_files_is_removed_and_the_others_stay(machine: Machine) -> None:
    q8 = "hf://org/tiny-GGUF/tiny-Q8_0.gguf"
    for source in (Q4, q8):
        assert machine.models("pull", source)[0] == 0
    assert machine.models("remove", Q4, "-y")[0] == 0
    assert [
        each["source"] for each in json.loads(machine.models("list", "--json")[1])["downloaded"]
    ] == [q8]
    assert machine.models("verify")[1] == f"ok           {q8}\n1 files, 0 damaged\n"


def test_a_download_that_broke_off_is_taken_up(machine: Machine, hub: Hub) -> None:
    # The Hub's library writes in blocks of 10 MiB.
    content = BIG * 6
    (hub.folder / "org/tiny-GGUF/large.gguf").write_bytes(content)
    hub.cut_after_bytes = 15_000_000
    source = "hf://org/tiny-GGUF/large.gguf"
    status, out, err = machine.models("pull", source)
    if status:  # the library may have gone on by itself
        assert "cannot download it" in err
        status, out, err = machine.models("pull", source)
    assert status == 0, err
    assert Path(out.strip()).read_bytes() == content
    assert err.splitlines()[-1] == "100 %"
    assert hub.ranges == [f"bytes={10 * 2**20}-"]


def test_what_is_damaged_on_its_way_is_not_kept(machine: Machine, hub: Hub) -> None:
    hub.is_damaging = True
    status, _, err = machine.models("pull", Q4)
    assert status == 2
    assert f"error: {Q4}: it was damaged on its way, and is removed; pull it again" in err
    assert not list(machine.cache.rglob("*.gguf"))
    hub.is_damaging = False
    assert machine.models("pull", Q4)[0] == 0


def test_of_a_split_model_all_parts_are_pulled_at_once(machine: Machine, hub: Hub) -> None:
    hub.together = threading.Barrier(2)
    status, out, err = machine.models("pull", "hf://org/tiny-GGUF/big-00002-of-00002.gguf")
    assert status == 0, err
    assert [Path(line).name for line in out.splitlines()] == [
        "big-00001-of-00002.gguf",
        "big-00002-of-00002.gguf",
    ]


def test_of_a_repository_what_engines_read_is_pulled(machine: Machine) -> None:
    status, out, err = machine.models("pull", "hf://org/tiny")
    assert status == 0, err
    assert "2 of 2 files" in err
    (path,) = out.splitlines()
    folder = Path(path).parent
    assert sorted(file.name for file in folder.rglob("*")) == ["config.json", "model.safetensors"]


def test_of_many_variants_one_is_to_be_chosen(machine: Machine) -> None:
    status, _, err = machine.models("pull", "hf://org/tiny-GGUF")
    assert status == 2
    assert "choose a file of it:" in err
    assert f"  {Q4}  (0.0 GB)" in err
    status, out, _ = machine.models("pull", "hf://org/tiny-GGUF", "--include", "*Q4*", "*Q8*")
    assert (status, len(out.splitlines())) == (0, 2)


def test_models_are_found_in_the_catalog_and_on_the_hub(machine: Machine) -> None:
    status, out, _ = machine.models("search", "TINY")
    assert (status, "hf://org/tiny-GGUF" in out) == (0, True)
    status, out, _ = machine.models("search", "tiny", "--all", "--json")
    assert [each["repo_id"] for each in json.loads(out)["hub"]] == ["org/tiny", "org/tiny-GGUF"]
    status, out, _ = machine.models("search", "qwen3-8b")
    assert (status, "8.19B" in out) == (0, True)
    assert machine.models("search", "nothing-like-it")[0] == 1


def test_offline_the_catalog_is_searched_and_the_rest_is_told(machine: Machine) -> None:
    status, out, err = machine.models("search", "qwen3-8b", url=NOBODY)
    assert (status, "8.19B" in out) == (2, True)
    assert "the Hub cannot be reached at http://127.0.0.1:9" in err
    assert "Retrying" not in err
    status, _, err = machine.models("pull", Q4, url=NOBODY)
    assert status == 2
    assert f"error: {Q4}: the Hub cannot be reached" in err


def test_what_cannot_be_pulled_is_told(machine: Machine, hub: Hub) -> None:
    hub.gated.add("org/tiny-GGUF")
    for source, says in (
        ("qwen9", "look for it: rigserve models search qwen9"),
        ("hf://org/gone/m.gguf", "there is no repository org/gone"),
        ("hf://org/tiny@v9/config.json", "has no revision 'v9'"),
        ("hf://org/tiny/other.gguf", "org/tiny holds no file other.gguf"),
        (Q4, "accept its terms"),
    ):
        status, _, err = machine.models("pull", source)
        assert (status, says in err) == (2, True), err
    status, _, err = machine.models("remove", "hf://org/gone", "-y")
    assert "hf://org/gone is not on this machine; it has nothing" in err
    status, _, err = machine.models("pull", "hf://org/tiny", "--include", "*.onnx")
    assert "it has no files like *.onnx" in err


def test_a_download_that_the_disk_has_no_room_for_is_not_begun() -> None:
    fetch = Fetch(
        HubSource("org/tiny"),
        (HubFile("a.gguf", 5 * 10**9, is_here=True), HubFile("b.gguf", 4 * 10**9, is_here=False)),
    )
    check_disk(fetch, free_bytes=6 * 10**9)
    with pytest.raises(ModelError, match=r"it needs 5\.1 GB, 1\.1 GB of them to spare, but"):
        check_disk(fetch, free_bytes=5 * 10**9)


def test_a_model_that_will_not_fit_is_warned_of_before_it_is_fetched(machine: Machine) -> None:
    status, out, err = machine.models("pull", Q4, too_big=True)
    assert (status, Path(out.strip()).is_file()) == (0, True)
    warning, counts, *_ = err.splitlines()
    assert warning == f"warning: {Q4} is too big"
    assert counts.startswith(f"{Q4}: 1 of 1 files")


def test_who_is_at_a_terminal_is_asked_about_what_will_not_fit(machine: Machine) -> None:
    for answer, status in (("n", 1), ("y", 0)):
        ours, terminal = pty.openpty()
        os.write(ours, f"{answer}\n".encode())
        found = machine.models("pull", Q4, too_big=True, stdin=terminal)
        os.close(ours)
        os.close(terminal)
        assert (found[0], "Download it all the same? [y/N]" in found[1]) == (status, True)


def test_the_command_itself(machine: Machine) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "serving", "models", "pull", "hf://org/gone/m.gguf"],
        env=machine.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: hf://org/gone/m.gguf: there is no repository org/gone")
