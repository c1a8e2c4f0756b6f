"""Given a collector of OpenTelemetry's, what a running server sends it of its requests."""

from __future__ import annotations

import gzip
import http.server
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import requests
import yaml
from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.gateway.test_bad_engine import BadRig
from tests.processes import RigServer, wait_for, write_config

CHAT: Final = "/v1/chat/completions"
SECRET = "the-password-is-swordfish"  # noqa: S105
BODY: dict[str, Any] = {
    "model": "gpt-4o-mini",
    "messages": [{"role": "user", "content": SECRET}],
    "max_tokens": 5,
    "temperature": 0.5,
    "ignore_eos": True,
}
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}


class Collector:
    """Takes traces by OTLP over HTTP."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers["content-encoding"] == "gzip":
                    body = gzip.decompress(body)
                read: Any = ExportTraceServiceRequest.FromString
                collector.requests.append(read(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def spans(self) -> list[dict[str, Any]]:
        """All spans so far, with plain values for attributes."""
        return [
            {
                **MessageToDict(span),
                "id": span.span_id.hex(),
                "trace": span.trace_id.hex(),
                "parent": span.parent_span_id.hex(),
                "resource": _plain(each.resource.attributes),
                "seconds": (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
                "attributes": _plain(span.attributes),
            }
            for request in list(self.requests)
            for each in request.resource_spans
            for scope in each.scope_spans
            for span in scope.spans
        ]

    def of(self, request_id: str) -> dict[str, Any]:
        """The span of a request that reached an engine."""

        def found() -> list[dict[str, Any]]:
            spans = self.spans
            return [s for s in spans if s["attributes"].get("rigserve.request_id") == request_id]

        wait_for(found, f"a span of {request_id}")
        (span,) = found()
        return span

    def below(self, span: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The parts of a span, by their names."""
        return {each["name"]: each for each in self.spans if each["parent"] == span["id"]}


def _plain(attributes: Any) -> dict[str, Any]:
    plain = {}
    for each in attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind)
        plain[each.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return plain


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def traced(path: Path, **settings: Any) -> Path:
    """The config, with traces on."""
    config = yaml.safe_load(path.read_text()) | {"tracing": {"enabled": True, **settings}}
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def rig(
    tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, collector: Collector
) -> Iterator[RigServer]:
    """A server that sends traces twice a second."""
    path = write_config(tmp_path_factory.mktemp("rig"), cache_dir, max_sequences=1, max_queue=1)
    server = RigServer(traced(path, endpoint=collector.url))
    server._environment |= {
        "OTEL_BSP_SCHEDULE_DELAY": "500",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
    }
    with server:
        server.wait_until_ready()
        yield server


def ask(
    rig: RigServer, request_id: str, path: str = CHAT, headers: Any = None, **fields: Any
) -> requests.Response:
    headers = {"x-request-id": request_id, **(headers or {})}
    return requests.post(rig.base_url + path, json=BODY | fields, headers=headers, timeout=60)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_with_its_phases_below(
    rig: RigServer, collector: Collector, stream: bool
) -> None:
    before_unix = time.time()
    assert ask(rig, f"span-{stream}", stream=stream, headers=SAMPLED).status_code == 200
    span = collector.of(f"span-{stream}")
    told = span["attributes"]
    assert (span["name"], span["kind"]) == ("chat gpt-4o-mini", "SPAN_KIND_SERVER")
    assert (span["trace"], span["parent"]) == (TRACE_ID, PARENT_ID)
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.provider.name"] == "rigserve"
    assert told["gen_ai.request.model"] == "gpt-4o-mini"
    assert told["gen_ai.response.model"] == "smollm2-135m"
    assert told["gen_ai.request.max_tokens"] == 5
    assert told["gen_ai.request.temperature"] == 0.5
    assert told["gen_ai.request.stream"] == stream
    assert told["gen_ai.usage.input_tokens"] > 5
    assert told["gen_ai.usage.output_tokens"] == 5
    assert told["gen_ai.response.finish_reasons"] == ["length"]
    assert ("gen_ai.response.time_to_first_chunk" in told) == stream
    assert told["http.response.status_code"] == 200
    assert told["server.port"] == rig.config["server"]["port"]
    assert told["rigserve.cost_usd"] > 0
    assert "error.type" not in told
    assert span["resource"]["service.name"] == "rigserve"
    assert span["resource"]["deployment.environment.name"] == "test"
    parts = collector.below(span)
    assert set(parts) == {"queue", "prefill", "decode"}
    assert parts["decode"]["seconds"] > 0.001
    assert sum(part["seconds"] for part in parts.values()) <= span["seconds"]
    for part in parts.values():
        assert before_unix * 1e9 <= int(part["startTimeUnixNano"]) < time.time() * 1e9
    assert SECRET not in str(collector.requests)


def test_each_kind_of_request_has_its_operation(rig: RigServer, collector: Collector) -> None:
    plain = {"model": "smollm2-135m", "max_tokens": 2}
    body: Any
    for path, body, name in (
        ("/v1/completions", {"prompt": "The sea"}, "text_completion smollm2-135m"),
        ("/v1/messages", {"messages": BODY["messages"]}, "chat smollm2-135m"),
        (
            "/v1/responses",
            {"input": "Hi", "max_tokens": None, "max_output_tokens": 2},
            "chat smollm2-135m",
        ),
    ):
        fields: Any = {k: v for k, v in (plain | body).items() if v is not None}
        headers = {"x-request-id": f"kind-{path}"}
        answer = requests.post(rig.base_url + path, json=fields, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        span = collector.of(f"kind-{path}")
        assert span["name"] == name
        assert span["parent"] == ""
        assert span["attributes"]["url.path"] == path


def test_who_is_refused_has_a_span_that_says_so(rig: RigServer, collector: Collector) -> None:
    trace_id = "1" * 32
    headers = {"traceparent": f"00-{trace_id}-{PARENT_ID}-01"}
    assert ask(rig, "refused", model="gone", headers=headers).status_code == 404
    assert ask(rig, "long", messages=[{"role": "user", "content": "a b " * 600}],
               headers=headers).status_code == 400  # fmt: skip

    def spans() -> dict[str, dict[str, Any]]:
        found = [span for span in collector.spans if span["trace"] == trace_id]
        return {span["name"]: span for span in found}

    wait_for(lambda: {"chat", "chat gpt-4o-mini"} <= spans().keys(), "both spans")
    # What reaches no engine was not read for certain, and has no model's name.
    assert spans()["chat"]["attributes"]["error.type"] == "404"
    too_long = spans()["chat gpt-4o-mini"]
    assert too_long["attributes"]["error.type"] == "400"
    assert too_long["status"] == {}
    assert collector.below(too_long).keys() <= {"queue"}


def test_a_client_that_leaves_has_its_tokens_told(rig: RigServer, collector: Collector) -> None:
    body = BODY | {"stream": True, "max_tokens": 400}
    headers = {"x-request-id": "left"}
    with requests.post(
        rig.base_url + CHAT, json=body, headers=headers, stream=True, timeout=60
    ) as answer:
        next(answer.iter_lines())
    told = collector.of("left")["attributes"]
    assert (told["http.response.status_code"], told["error.type"]) == (499, "499")
    assert 0 < told["gen_ai.usage.output_tokens"] < 400


def test_who_waits_shows_it(rig: RigServer, collector: Collector) -> None:
    """One sequence: the second request waits for the first."""
    first = threading.Thread(target=ask, args=(rig, "first"), kwargs={"max_tokens": 100})
    first.start()
    time.sleep(0.1)
    ask(rig, "second", max_tokens=1)
    first.join()
    decoding = collector.below(collector.of("first"))["decode"]["seconds"]
    assert collector.below(collector.of("second"))["queue"]["seconds"] > decoding / 2


def test_a_client_decides_whether_it_is_traced(rig: RigServer, collector: Collector) -> None:
    unsampled = {"traceparent": f"00-{'2' * 32}-{PARENT_ID}-00"}
    assert ask(rig, "unsampled", headers=unsampled).status_code == 200
    ask(rig, "after")
    collector.of("after")
    assert not [span for span in collector.spans if span["trace"] == "2" * 32]


def test_a_response_in_the_background_and_a_batch_are_traced(
    rig: RigServer, collector: Collector
) -> None:
    trace_id = "3" * 32
    body: Any = {
        "model": "smollm2-135m", "input": "Hi", "max_output_tokens": 2, "background": True
    }  # fmt: skip
    headers = {"x-request-id": "behind", "traceparent": f"00-{trace_id}-{PARENT_ID}-01"}
    answer = requests.post(rig.base_url + "/v1/responses", json=body, headers=headers, timeout=60)
    assert answer.json()["status"] == "in_progress"
    assert collector.of("behind")["trace"] == trace_id
    line = {"custom_id": "a", "method": "POST", "url": CHAT, "body": BODY | {"max_tokens": 2}}
    client = rig.client
    file = client.files.create(file=("a.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    wait_for(lambda: client.batches.retrieve(batch.id).status == "completed", "the batch", 60)
    (result,) = client.files.content(
        client.batches.retrieve(batch.id).output_file_id or ""
    ).text.splitlines()
    span = collector.of(json.loads(result)["response"]["request_id"])
    assert (span["name"], span["parent"]) == ("chat gpt-4o-mini", "")


def test_the_engine_is_told_of_the_span_and_its_fault_is_an_error(
    tmp_path: Path, cache_dir: Path, collector: Collector
) -> None:
    path = traced(write_config(tmp_path, cache_dir), endpoint=collector.url + "/", prompts=True)
    with BadRig(path) as rig:
        rig.wait_until_ready()
        messages = [{"role": "user", "content": "traceparent"}]
        answer = ask(rig, "told", messages=messages, headers=SAMPLED).json()
        assert ask(rig, "bad", messages=[{"role": "user", "content": "page"}]).status_code == 502
        rig.stop()
    span = collector.of("told")
    assert answer["id"] == f"00-{TRACE_ID}-{span['id']}-01"
    assert json.loads(span["attributes"]["gen_ai.input.messages"]) == [
        {"role": "user", "parts": [{"type": "text", "content": "traceparent"}]}
    ]
    failed = collector.of("bad")
    assert failed["status"] == {"code": "STATUS_CODE_ERROR"}
    assert failed["attributes"]["error.type"] == "502"
    assert failed["attributes"]["rigserve.timing_source"] == "estimated"


def test_a_collector_that_is_gone_costs_spans_and_nothing_else(
    tmp_path: Path, cache_dir: Path
) -> None:
    path = write_config(tmp_path, cache_dir, max_sequences=1)
    # Nobody listens there: port 9 is what nobody uses.
    with RigServer(traced(path, endpoint="http://127.0.0.1:9", sample_ratio=1)) as rig:
        rig.wait_until_ready()
        assert ask(rig, "alone").status_code == 200
        stopping = time.monotonic()
        assert rig.stop() == 0
        assert time.monotonic() - stopping < 15
    assert "Traceback" not in rig.output


def test_without_the_extra_the_start_says_what_to_do(tmp_path: Path, cache_dir: Path) -> None:
    path = traced(write_config(tmp_path, cache_dir))
    script = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "from serving.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "serve", str(path)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 2
    assert "pip install 'rigserve[otel]'" in told.stderr


def test_off_it_imports_nothing() -> None:
    """Of the extra's: other libraries may have the API, which does nothing by itself."""
    script = (
        "import sys, serving.cli, serving.gateway.tracing\n"
        "extra = ('opentelemetry.sdk', 'opentelemetry.exporter')\n"
        "sys.exit(any(name.startswith(extra) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
