"""Given a running gateway, what it writes down of its requests, and what it keeps out of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from serving.keys.key import new_secret
from serving.logs import lines_of, redacted
from tests.processes import RigServer, wait_for, write_config

CHAT = "/v1/chat/completions"
SECRET = "the-password-is-swordfish"  # noqa: S105
BODY: dict[str, Any] = {
    "model": "smollm2-135m",
    "messages": [{"role": "user", "content": SECRET}],
    "max_tokens": 3,
}


def rig_with(folder: Path, cache_dir: Path, **settings: Any) -> RigServer:
    path = write_config(folder, cache_dir, max_sequences=2)
    config = yaml.safe_load(path.read_text()) | {"logging": settings}
    path.write_text(yaml.safe_dump(config))
    return RigServer(path)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[RigServer]:
    """A server that logs JSON."""
    with rig_with(tmp_path_factory.mktemp("rig"), cache_dir, format="json") as server:
        server.wait_until_ready()
        yield server


def line_of(rig: RigServer, request_id: str) -> dict[str, Any]:
    """The one line about a request."""

    def found() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in rig.output.splitlines() if request_id in line]
        return [line for line in lines if line.get("request_id") == request_id]

    wait_for(found, f"a line about {request_id}")
    (line,) = found()
    return line


def test_a_request_is_told_of_in_one_line(rig: RigServer) -> None:
    for streamed in (False, True):
        headers = {"x-request-id": f"told-{streamed}"}
        requests.post(
            rig.base_url + CHAT, json=BODY | {"stream": streamed}, headers=headers, timeout=60
        )
        line = line_of(rig, f"told-{streamed}")
        assert (line["status"], line["endpoint"], line["model"]) == (200, CHAT, "smollm2-135m")
        assert line["completion_tokens"] == 3
        assert line["prompt_tokens"] > 3
        assert 0 < line["total_seconds"] < 60
        assert line["usd"] > 0
        assert (line["streamed"], line["client_gone"]) == (streamed, False)
        assert (line["ttft_seconds"] is not None) == streamed
    assert SECRET not in rig.output


def test_refused_requests_are_told_of_too(rig: RigServer) -> None:
    late = {"x-rigserve-deadline-seconds": "soon"}
    model = "smollm2-135m"
    for number, (path, body, more, status, told) in enumerate(
        (
            (CHAT, BODY | {"model": "gone"}, {}, 404, (None, "model_not_found")),
            (CHAT, BODY | {"n": -1}, {}, 400, (None, "invalid_value")),
            (CHAT, BODY, late, 400, (model, "invalid_value")),
            ("/v1/messages", BODY, late, 400, (model, "invalid_value")),
            (CHAT, BODY, {"sec-fetch-site": "cross-site"}, 403, (None, "cross_site")),
            ("/nothing", {}, {}, 404, (None, None)),
        )
    ):
        headers = {"x-request-id": f"refused-{number}", **more}
        requests.post(rig.base_url + path, json=body, headers=headers, timeout=60)
        line = line_of(rig, f"refused-{number}")
        assert (line["status"], line["endpoint"], line["level"]) == (status, path, "info")
        assert (line["model"], line["error"]) == told


def test_a_client_that_leaves_is_told_of_once_with_its_tokens(rig: RigServer) -> None:
    body = BODY | {"stream": True, "max_tokens": 400}
    with requests.post(
        rig.base_url + CHAT, json=body, headers={"x-request-id": "gone"}, stream=True, timeout=60
    ) as answer:
        next(answer.iter_lines())
    line = line_of(rig, "gone")
    assert (line["status"], line["client_gone"]) == (499, True)
    assert 0 < line["completion_tokens"] < 400


def test_no_line_can_be_forged_and_no_key_is_shown(rig: RigServer) -> None:
    path = '/x%0A{"request_id":"forged"}?api_key=rk-0123456789&token=swordfish'
    requests.get(
        rig.base_url + path,
        headers={"authorization": "Bearer top-secret-key", "x-request-id": "odd"},
        timeout=60,
    )
    line = line_of(rig, "odd")
    assert line["endpoint"].startswith("/x%0A")
    for secret in ("rk-0123456789", "swordfish", "top-secret-key"):
        assert secret not in rig.output
    assert all(json.loads(each)["logger"] for each in rig.output.splitlines())


def test_probes_do_not_fill_the_log(rig: RigServer) -> None:
    rig.get("/health", headers={"x-request-id": "probe"})
    rig.get("/nothing", headers={"x-request-id": "after-probe"})
    line_of(rig, "after-probe")
    assert '"probe"' not in rig.output


def test_engines_output_has_a_file_for_each_and_can_be_followed(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    script = """
import logging, pathlib, sys, time
from serving import logs
from serving.config import LoggingConfig
logs._FILE_BYTES = 2000
logs.set_up(LoggingConfig(format="json"), pathlib.Path(sys.argv[1]))
engine = logging.getLogger("rigserve.engine")
engine.info("[%s] %s", "org/other", "Bearer SECRET-1234567890")
for number in range(200):
    engine.info("[%s] %s", "smol", f"line {number}")
    time.sleep(0.005)
"""
    writer = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(writer, stderr=subprocess.PIPE, text=True) as process:
        wait_for((folder / "smol.log").exists, "the engine prints")
        lines = lines_of(folder, "smol", 1, follow=True)
        first = int(next(lines).removeprefix("line "))
        followed = [next(lines) for _ in range(199 - first)]
        _, output = process.communicate(timeout=30)
    assert followed == [f"line {number}" for number in range(first + 1, 200)]
    told = [json.loads(line) for line in output.splitlines()]
    assert (told[1]["model"], told[1]["message"]) == ("smol", "line 0")
    assert "SECRET" not in output + (folder / "org%2Fother.log").read_text()
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert (folder / "smol.log").stat().st_size <= 2000
    assert list(lines_of(folder, None, 1, follow=False)) == [
        "[org/other] Bearer [redacted]",
        "[smol] line 199",
    ]


@pytest.mark.parametrize("in_journal", [False, True])
def test_text_has_the_time_unless_the_journal_has(tmp_path: Path, in_journal: bool) -> None:
    script = """
import logging, os, pathlib, sys
from serving import logs
from serving.config import LoggingConfig
stat = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{stat.st_dev}:{stat.st_ino}" if sys.argv[2] == "True" else "1:2"
logs.set_up(LoggingConfig(), pathlib.Path(sys.argv[1]))
logging.info("all is well")
logging.error("with Bearer SECRET-1234567890")
"""
    command = [sys.executable, "-c", script, str(tmp_path), str(in_journal)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    times = [line[:20] for line in lines if not in_journal]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", each) for each in times)
    assert [line[0 if in_journal else 20 :] for line in lines] == [
        "all is well",
        "ERROR: with Bearer [redacted]",
    ]


def test_an_engine_that_starts_later_is_followed_too(tmp_path: Path) -> None:
    (tmp_path / "early.log").write_text("one\n")
    lines = lines_of(tmp_path, None, 0, follow=True)
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(next, lines)
        time.sleep(0.5)
        (tmp_path / "org%2Flate.log").write_text("two\n")
        assert told.result(10) == "[org/late] two"


def test_the_output_of_a_real_engine_is_followed(rig: RigServer) -> None:
    """It is unloaded and loaded again, which it says."""
    command = [sys.executable, "-m", "serving", "logs", "-f", "-n", "0", "smollm2-135m"]
    with subprocess.Popen(
        [*command, "--config", str(rig.config_path)], stdout=subprocess.PIPE, text=True
    ) as follower:
        try:
            assert follower.stdout is not None
            output, told = follower.stdout, list[str]()
            first = threading.Thread(target=lambda: told.append(output.readline()))
            first.start()
            time.sleep(2)  # it has found the end of the file
            models = rig.base_url + "/admin/models/smollm2-135m/"
            requests.post(models + "unload", timeout=60).raise_for_status()
            requests.post(models + "load", timeout=60).raise_for_status()
            first.join(20)
        finally:
            follower.terminate()
    folder = Path(rig.config["storage"]["data_dir"]) / "logs"
    assert told
    assert told[0] in (folder / "smollm2-135m.log").read_text()


def test_logs_command(rig: RigServer) -> None:
    folder = Path(rig.config["storage"]["data_dir"]) / "logs"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not (folder / "prompts.jsonl").exists()
    (folder / "other.log").write_text("one\ntwo\nthree\n")
    command = [sys.executable, "-m", "serving", "logs", "--config", str(rig.config_path)]
    shown = subprocess.run(
        [*command, "other", "-n", "2"], capture_output=True, text=True, check=True
    )
    assert shown.stdout == "two\nthree\n"
    (folder / "other.log").unlink()
    gone = subprocess.run([*command, "gone"], capture_output=True, text=True, check=False)
    assert gone.returncode == 2
    assert "no engine of gone has written" in gone.stderr
    assert "these have: smollm2-135m" in gone.stderr


def test_a_models_log_is_that_of_all_its_replicas(tmp_path: Path) -> None:
    for name in ("chat%231", "chat%232", "chatty"):
        (tmp_path / f"{name}.log").write_text(f"{name[4:]}\n")
    assert list(lines_of(tmp_path, "chat", 9, follow=False)) == ["[chat#1] %231", "[chat#2] %232"]
    assert list(lines_of(tmp_path, "chat#2", 9, follow=False)) == ["%232"]
    assert list(lines_of(tmp_path, "chatty", 9, follow=False)) == ["ty"]


def test_what_is_stored_is_for_the_servers_user_only(rig: RigServer) -> None:
    folder = Path(rig.config["storage"]["data_dir"])
    assert folder.stat().st_mode & 0o777 == 0o700
    requests.post(
        rig.base_url + "/v1/files",
        files={"file": ("a.jsonl", b"{}")},
        data={"purpose": "user_data"},
        timeout=30,
    )
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"ledger.sqlite", "ledger.sqlite-wal"} <= {path.name for path in files}
    assert {(path.name, path.stat().st_mode & 0o077) for path in files} == {
        (path.name, 0) for path in files
    }


def test_prompts_are_written_only_when_asked_and_only_there(
    tmp_path: Path, cache_dir: Path
) -> None:
    with rig_with(tmp_path, cache_dir, prompts=True) as rig:
        rig.wait_until_ready()
        requests.post(rig.base_url + CHAT, json=BODY, headers={"x-request-id": 'a"b'}, timeout=60)
        file = tmp_path / "data" / "logs" / "prompts.jsonl"
        (line,) = file.read_text().splitlines()
        written = json.loads(line)
        assert written["request_id"] == 'a"b'
        assert written["body"]["messages"][0]["content"] == SECRET
        assert file.stat().st_mode & 0o777 == 0o600
        rig.wait_for_output(f'a"b 200 POST {CHAT}; smollm2-135m, ')
        assert SECRET not in rig.output


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer SECRET-1234567890",
        "authorization=Basic SECRET1234567890==",
        "{'x-api-key': 'SECRET-1234567890'}",
        "[(b'x-api-key', b'SECRET-1234567890')]",
        '{"Authorization": "SECRET-1234567890"}',
        "GET /v1/models?api_key=SECRET-1234567890&x=1",
        "/x?a=1&token=SECRET-1234567890",
        "the key sk-SECRET-1234567890 is wrong",
        "HF_TOKEN='hf_SECRET0123456789abcdef'",
        "cannot reach https://ana:SECRET-1@collector.example.org:4318/v1/traces",
        # The same for every process of a parallel run.
        f"rigserve's own: {new_secret()[:3]}SECRET{'x1' * ((len(new_secret()) - 9) // 2)}",
    ],
)
def test_keys_are_redacted(text: str) -> None:
    assert "SECRET" not in redacted(text)
    assert "[redacted]" in redacted(text)


def test_other_words_are_left_alone() -> None:
    text = "a bearer of news; 5 tokens: 12 keys, authorization failed; key ana of team; http://127.0.0.1:80/@x:1"
    assert redacted(text) == text
