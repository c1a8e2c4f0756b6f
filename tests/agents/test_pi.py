"""pi, a coding agent from npm, talks to rigserve by each of its APIs: streamed, with a tool call and its result."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import filelock
import pytest

from tests.processes import RigServer, wait_for, write_config

PACKAGE, VERSION = "@mariozechner/pi-coding-agent", "0.73.1"
MODEL = "smollm2-135m"
NOTE = "The harbour opens at seven."
EXTENSION = Path(__file__).with_name("one_read.js")
APIS = {
    "openai-completions": "/v1/chat/completions",
    "openai-responses": "/v1/responses",
    "anthropic-messages": "/v1/messages",
}


@pytest.fixture(scope="module")
def pi() -> Path:
    """The agent's program, installed once beside what pip has installed; needs npm."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("NOT TESTED: pi needs node and npm")
    folder = Path(sys.prefix) / "agents" / f"pi-{VERSION}"
    program = folder / "node_modules" / ".bin" / "pi"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "lock"):
        if not (folder / "complete").exists():
            options = ["--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]
            command = ["npm", "install", "--prefix", str(folder), *options, f"{PACKAGE}@{VERSION}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
            if done.returncode != 0:
                pytest.skip(f"NOT TESTED: npm cannot install pi: {done.stderr[-300:]}")
            (folder / "complete").touch()
    return program


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[RigServer]:
    folder = tmp_path_factory.mktemp("rig")
    filters = {"defaults": {"temperature": 0}, "max_tokens_ceiling": 60}
    options: dict[str, Any] = {"context_length": 4096, "max_sequences": 2, "filters": filters}
    with RigServer(write_config(folder, cache_dir, **options)) as server:
        server.wait_until_ready()
        yield server


def write_home(home: Path, rig: RigServer, api: str) -> None:
    """pi's settings, in which rigserve is a provider."""
    below = "" if api == "anthropic-messages" else "/v1"
    model = {"id": MODEL, "contextWindow": 100_000, "maxTokens": 60}
    provider = {
        "baseUrl": rig.base_url + below,
        "api": api,
        "apiKey": "unused",
        "models": [model],
    }
    home.mkdir()
    (home / "models.json").write_text(json.dumps({"providers": {"rigserve": provider}}))


def ask(pi: Path, folder: Path) -> list[dict[str, Any]]:
    """The events of one prompt, as pi prints them."""
    options = ["--provider", "rigserve", "--model", MODEL, "--tools", "read", "--no-session"]
    command = [str(pi), "--print", "--mode", "json", *options, "--extension", str(EXTENSION)]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PI_CODING_AGENT_DIR": str(folder / "home"),
        "PI_OFFLINE": "1",
    }
    done = subprocess.run(
        [*command, "Read the file notes.txt."],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def rows(rig: RigServer, endpoint: str) -> list[tuple[int, int]]:
    with closing(sqlite3.connect(rig.ledger_path)) as database:
        query = "SELECT streamed, status FROM usage WHERE endpoint = ?"
        return database.execute(query, (endpoint,)).fetchall()


@pytest.mark.parametrize("api", APIS)
def test_a_conversation_with_a_tool_call(
    pi: Path, rig: RigServer, tmp_path: Path, api: str
) -> None:
    (tmp_path / "notes.txt").write_text(NOTE)
    write_home(tmp_path / "home", rig, api)
    events = ask(pi, tmp_path)
    [end] = [event for event in events if event["type"] == "agent_end"]
    question, call, result, answer = end["messages"]
    assert [each["role"] for each in (question, call, result, answer)] == [
        *("user", "assistant", "toolResult", "assistant")
    ]
    [made] = [part for part in call["content"] if part["type"] == "toolCall"]
    assert (made["name"], made["arguments"]) == ("read", {"path": "notes.txt"})
    assert result["toolCallId"] == made["id"]
    assert not result["isError"]
    assert result["content"][0]["text"] == NOTE
    text = "".join(part["text"] for part in answer["content"])
    assert text.strip()
    deltas = [
        event["assistantMessageEvent"]
        for event in events
        if event["type"] == "message_update"
        and event["assistantMessageEvent"]["type"] == "text_delta"
    ]
    assert len(deltas) > 3
    assert "".join(delta["delta"] for delta in deltas) == text
    wait_for(lambda: rows(rig, APIS[api]) == [(1, 200)] * 2, "both streams are in the ledger")
