"""Given a running gateway, its documentation is true: the examples run, and what comes back is as it says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import requests
import yaml
from openapi_spec_validator import validate
from playwright.sync_api import Page, Request, sync_playwright

from serving.gateway.api_document import EMBEDDING_MODEL, RERANKER
from tests.browser import browser
from tests.lora_files import random_lora, write_lora
from tests.models import write_minilm
from tests.processes import RigServer, write_config

_LINE = {
    "custom_id": "1",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"messages": [{"role": "user", "content": "Hi."}], "max_tokens": 200},
}
# In this order each finds what it names, and nothing is deleted before it is looked at.
_ORDER = (
    ("post", "/admin/keys"),
    ("post", "/admin/adapters"),
    ("post", "/v1/files"),
    ("post", "/v1/batches"),
    ("post", "/v1/batches/{batch_id}/cancel"),  # while there is something to cancel
    ("post", "/v1/responses"),
    ("post", "/v1/responses/{response_id}/cancel"),
)
_LAST = ("revoke", "unload", "reload")


class DocumentedRig(RigServer):
    """A server, and how its owner asks it for things."""

    headers: dict[str, str]
    document: dict[str, Any]


@pytest.fixture(scope="module")
def rig(
    tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, minilm_path: Path
) -> Iterator[DocumentedRig]:
    """A server with a chat model and an embedding model, and an admin key; ready."""
    path = write_config(tmp_path_factory.mktemp("rig"), cache_dir)
    config = yaml.safe_load(path.read_text())
    embedder = {"name": EMBEDDING_MODEL, "aliases": [], "source": str(minilm_path)}
    reranker = {"name": RERANKER, "source": str(path.with_name("reranker.gguf"))}
    write_minilm(path.with_name("reranker.gguf"), head=np.ones((1, 384), np.float32))
    plain = config["models"][0] | {"quantization": None}
    config["models"] += [plain | embedder, plain | embedder | reranker]
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "serving", "keys", "create", "owner", "--admin", "--json"]
    made = subprocess.run(
        [*command, "--config", str(path)], capture_output=True, text=True, check=True
    )
    secret = json.loads(made.stdout)["secret"]
    with DocumentedRig(path) as server:
        server.wait_until_ready()
        server.headers = {"authorization": f"Bearer {secret}"}
        server.document = server.get("/openapi.json").json()
        yield server


def test_the_document_is_valid_openapi(rig: DocumentedRig) -> None:
    validate(rig.document)


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """All operations, those first that others need, those last that end something."""
    listed = [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]

    def place(each: tuple[str, str, Any]) -> int:
        method, path, _ = each
        if (method, path) in _ORDER:
            return _ORDER.index((method, path))
        return len(_ORDER) + (method == "delete" or path.endswith(_LAST))

    return iter(sorted(listed, key=place))


def test_every_operation_says_what_it_does_and_what_comes_back(rig: DocumentedRig) -> None:
    for method, path, operation in operations(rig.document):
        where = f"{method} {path}"
        assert operation["description"], where
        assert operation["tags"], where
        assert {"4XX", "5XX"} < set(operation["responses"]), where
        body = operation.get("requestBody", {}).get("content", {}).get("application/json")
        assert body is None or body["examples"], where


def test_the_examples_run_and_the_answers_are_as_told(rig: DocumentedRig, tmp_path: Path) -> None:
    ids = {"name": "smollm2-135m"}
    for method, path, operation in operations(rig.document):
        body = operation.get("requestBody", {}).get("content", {})
        examples = body.get("application/json", {}).get("examples", {"": {"value": None}})
        for name, example in examples.items():
            sent: dict[str, Any] = {"json": example["value"]} if example["value"] else {}
            if "multipart/form-data" in body:
                line = _LINE | {"body": {"model": ids["name"], **_LINE["body"]}}  # type: ignore[dict-item]
                sent = {
                    "files": {"file": json.dumps(line)},
                    "data": {"purpose": "batch"},
                }
            elif sent and "input_file_id" in sent["json"]:
                sent["json"]["input_file_id"] = ids["file_id"]
            elif sent and path == "/admin/adapters":
                lora = random_lora({"blk.0.attn_q.weight": (576, 576)}, seed=1)
                sent["json"]["path"] = str(write_lora(tmp_path / "legal.gguf", lora))
            address = path.format(**ids)
            answer = requests.request(
                method, rig.base_url + address, headers=rig.headers, timeout=60, **sent
            )
            where = f"{method} {address} {name}: {answer.status_code} {answer.text[:500]}"
            told = operation["responses"].get(str(answer.status_code))
            assert answer.ok, where
            assert told, where
            media_type = answer.headers["content-type"].partition(";")[0]
            assert media_type in told["content"], where
            if media_type == "application/json":
                check(rig.document, told["content"][media_type]["schema"], answer.json())
                remember(ids, path, answer.json())


def check(document: dict[str, Any], schema: dict[str, Any], value: object) -> None:
    """Raise for a value that is not what the schema, a part of the document, says."""
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(
        value
    )


def remember(ids: dict[str, str], path: str, answer: dict[str, Any]) -> None:
    """Keep the id of what was made for the operations that name one."""
    kinds = {"files": "file_id", "batches": "batch_id", "responses": "response_id", "keys": "key"}
    kinds["adapters"] = "adapter"
    made = kinds.get(path.rpartition("/")[2])
    if made and "id" in answer:
        ids[made] = answer["id"]


def test_errors_are_as_told(rig: DocumentedRig) -> None:
    for path, schema in (("/v1/chat/completions", "Error"), ("/v1/messages", "MessageError")):
        answer = requests.post(rig.base_url + path, json={}, headers=rig.headers, timeout=30)
        assert answer.status_code == 400
        check(rig.document, {"$ref": f"#/components/schemas/{schema}"}, answer.json())


def test_the_page_works_in_a_browser_and_asks_no_other_host(
    rig: DocumentedRig, tmp_path: Path
) -> None:
    asked: list[str] = []
    complaints: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser(), args=["--no-sandbox", "--disable-gpu"]
        )
        page = chromium.new_page(viewport={"width": 1200, "height": 1400})

        def on_request(request: Request) -> None:
            asked.append(request.url)

        page.on("request", on_request)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"{rig.base_url}/docs")
        _authorize(page, rig.headers["authorization"].removeprefix("Bearer "))
        status = _execute_chat(page)
        page.screenshot(path=str(tmp_path / "docs.png"))
        chromium.close()
    assert status == "200"
    assert complaints == []
    assert [url for url in asked if not url.startswith((rig.base_url, "data:"))] == []


def _authorize(page: Page, key: str) -> None:
    page.click("button.authorize")
    page.fill(".auth-container input", key)
    page.click(".auth-btn-wrapper button.authorize")
    page.click(".auth-btn-wrapper button.btn-done")


def _execute_chat(page: Page) -> str:
    """Try chat completions out, as a reader would; the status that the page shows."""
    block = page.locator(".opblock", has=page.locator('[data-path="/v1/chat/completions"]'))
    block.locator(".opblock-summary-control").click()
    block.locator(".try-out__btn").click()
    block.locator("button.execute").click()
    shown = block.locator(".live-responses-table .response-col_status").last
    shown.wait_for(timeout=30_000)
    return shown.inner_text().split()[0]
