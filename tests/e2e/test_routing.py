"""One name served by several models: two real rigs, one of them the other's remote, and a commercial API."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import yaml

from serving.engines.launch import free_port
from tests.commercial_api import KEY, USAGE, CommercialApi
from tests.e2e.test_reload import rewrite
from tests.processes import RigServer, wait_for, write_config

KEY_VARIABLE = "RIGSERVE_TEST_API_KEY"
USD_PER_MILLION = {"input": 1.0, "output": 2.0}


def usd(usage: dict[str, int]) -> float:
    return (usage["prompt_tokens"] * 1.0 + usage["completion_tokens"] * 2.0) / 1e6


@pytest.fixture(scope="module")
def api() -> Iterator[CommercialApi]:
    with CommercialApi() as server:
        yield server


@pytest.fixture(scope="module")
def far_config(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("far"), cache_dir, context_length=1024)


@pytest.fixture(scope="module")
def far(far_config: Path) -> Iterator[RigServer]:
    with RigServer(far_config) as server:
        server.wait_until_ready()
        yield server


def near_config(folder: Path, cache_dir: Path, far_url: str, api: CommercialApi) -> Path:
    path = write_config(folder, cache_dir, name="home", aliases=[], context_length=1024)
    config = yaml.safe_load(path.read_text())
    paid = {
        "engine": "remote",
        "base_url": api.base_url,
        "model": "big",
        "api_key_env": KEY_VARIABLE,
        "usd_per_million": USD_PER_MILLION,
        "budget_usd": 1.0,
    }
    nowhere = f"http://127.0.0.1:{free_port()}/v1"
    config["models"] += [
        {
            "name": "away",
            "engine": "remote",
            "base_url": f"{far_url}/v1",
            "model": "smollm2-135m",
            "dialect": "rigserve",
        },
        {"name": "nowhere", "engine": "remote", "base_url": nowhere},
        {"name": "gone", "engine": "remote", "base_url": nowhere, "dialect": "rigserve"},
        {"name": "lax", "engine": "remote", "base_url": nowhere, "lenient": True},
        {"name": "paid", **paid, "first_byte_timeout_seconds": 1.0},
        {"name": "lax-paid", **paid, "lenient": True},
        {"name": "poor", **paid, "budget_usd": 0.0007, "budget_period": "day"},
    ]
    config["routes"] = [
        {"name": "pair", "targets": [{"model": "home"}, {"model": "away"}]},
        {
            "name": "split",
            "targets": [{"model": "home", "weight": 3}, {"model": "away", "weight": 1}],
        },
        {"name": "careful", "targets": [{"model": "away"}], "fallback": ["home"]},
        {"name": "chain", "targets": [{"model": "nowhere"}], "fallback": ["paid", "home"]},
        {"name": "spill", "targets": [{"model": "nowhere"}], "spill_over": ["paid"]},
        {"name": "loses", "targets": [{"model": "gone"}], "fallback": ["lax-paid"]},
        {"name": "gains", "targets": [{"model": "lax"}], "fallback": ["home"]},
        {"name": "thrifty", "targets": [{"model": "nowhere"}], "spill_over": ["poor"]},
        {
            "name": "hasty",
            "targets": [{"model": "home"}],
            "spill_over": ["paid"],
            "max_wait_seconds": 0,
        },
    ]
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def near(
    tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, far: RigServer, api: CommercialApi
) -> Iterator[RigServer]:
    path = near_config(tmp_path_factory.mktemp("near"), cache_dir, far.base_url, api)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, KEY)
        with RigServer(path) as server:
            server.wait_until_ready()
            yield server


def ask(rig: RigServer, model: str, text: str = "Hello", **fields: Any) -> requests.Response:
    return talk(rig, model, [{"role": "user", "content": text}], **fields)


def talk(rig: RigServer, model: str, messages: list[Any], **fields: Any) -> requests.Response:
    headers = fields.pop("headers", {})
    body = {"model": model, "messages": messages, "max_tokens": 4, **fields}
    url = f"{rig.base_url}/v1/chat/completions"
    stream = bool(body.get("stream"))
    return requests.post(url, json=body, headers=headers, stream=stream, timeout=60)


def rows(rig: RigServer, request_id: str, count: int = 1) -> list[dict[str, Any]]:
    """The ledger's rows of a request, once there are so many."""

    def found() -> list[dict[str, Any]]:
        with closing(sqlite3.connect(rig.ledger_path)) as connection:
            connection.row_factory = sqlite3.Row
            query = "SELECT * FROM usage WHERE request_id = ?"
            return [dict(row) for row in connection.execute(query, (request_id,))]

    wait_for(lambda: len(found()) >= count, "the ledger has the request")
    return found()


def breaker(rig: RigServer, model: str) -> str:
    series = rig.series("rigserve_breaker_state")
    (state,) = [labels for labels, value in series.items() if value and f'"{model}"' in labels]
    return state.partition('state="')[2].rstrip('"}')


def test_routes_are_listed_and_tell_who_answered(near: RigServer) -> None:
    names = {model.id for model in near.client.models.list()}
    assert {"home", "away", "pair", "split", "careful", "spill"} <= names
    answer = ask(near, "careful", headers={"x-request-id": "told"})
    assert answer.status_code == 200
    assert answer.headers["x-rigserve-model"] == "away"
    assert answer.headers["x-rigserve-served-as"] == "target"
    (row,) = rows(near, "told")
    told = (row["model"], row["engine"], row["route"], row["served_as"], row["completion_tokens"])
    assert told == ("away", "remote", "careful", "target", 4)
    # The other rig's energy is not this one's.
    assert (row["energy_joules"], row["energy_source"], row["api_usd"]) == (0.0, "none", 0.0)
    assert ask(near, "home").headers.get("x-rigserve-model") is None
    stream = near.client.chat.completions.with_raw_response.create(
        model="careful", messages=[{"role": "user", "content": "Hi"}], max_tokens=3, stream=True
    )
    assert stream.headers["x-rigserve-model"] == "away"
    assert len([chunk for chunk in stream.parse() if chunk.choices]) >= 4


def test_conversations_are_shared_out_and_stay_where_their_prefix_is_warm(near: RigServer) -> None:
    conversations = [
        [{"role": "user", "content": f"Story number {n}. Tell me about the sea. " * 6}]
        for n in range(4)
    ]
    homes = []
    for messages in conversations:
        answer = talk(near, "pair", messages)
        homes.append(answer.headers["x-rigserve-model"])
        messages += [answer.json()["choices"][0]["message"], {"role": "user", "content": "More."}]
    assert Counter(homes) == {"home": 2, "away": 2}
    for messages, home in zip(conversations, homes, strict=True):
        answer = talk(near, "pair", messages)
        assert answer.headers["x-rigserve-model"] == home
        assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 30


def test_weights_split_the_requests(near: RigServer) -> None:
    served = Counter(
        ask(near, "split", f"{n}", max_tokens=1).headers["x-rigserve-model"] for n in range(60)
    )
    # A quarter of 60, and four standard deviations.
    assert 2 <= served["away"] <= 28
    assert served["home"] + served["away"] == 60


def test_a_chain_goes_on_and_its_last_cost_is_known(near: RigServer, api: CommercialApi) -> None:
    answer = ask(near, "chain", headers={"x-request-id": "chained"})
    assert answer.status_code == 200
    assert answer.headers["x-rigserve-model"] == "paid"
    assert answer.headers["x-rigserve-served-as"] == "fallback"
    assert float(answer.headers["x-rigserve-cost-usd"]) == pytest.approx(usd(USAGE))
    assert answer.headers["x-rigserve-cost-basis"] == "measured"
    (row,) = rows(near, "chained")
    assert row["api_usd"] == pytest.approx(usd(USAGE))
    headers, body = api.requests[-1]
    assert headers["authorization"] == f"Bearer {KEY}"
    assert not [name for name in headers if name.lower().startswith("x-rigserve")]
    assert body["model"] == "big"
    passed_on = near.series("rigserve_route_passed_on_total")
    assert passed_on['{model="nowhere",reason="remote_unreachable",route="chain"}'] >= 1


@pytest.mark.parametrize(("said", "ends_at"), [("fail 503", "home"), ("fail 429", "home")])
def test_who_answers_that_it_cannot_is_passed_over(
    near: RigServer, said: str, ends_at: str
) -> None:
    answer = ask(near, "chain", said)
    assert (answer.status_code, answer.headers["x-rigserve-model"]) == (200, ends_at)


def test_a_clients_fault_is_not_tried_elsewhere(near: RigServer, api: CommercialApi) -> None:
    before = near.total("rigserve_route_passed_on_total")
    answer = ask(near, "chain", "fail 400")
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "as asked for")
    # Only what cannot be reached was passed over.
    assert near.total("rigserve_route_passed_on_total") - before <= 1


def test_what_the_operator_must_mend_is_no_fault_of_the_client(near: RigServer) -> None:
    answer = ask(near, "paid", "fail 401", headers={"x-request-id": "refused"})
    assert answer.status_code == 502
    assert "base_url, model and API key" in answer.json()["error"]["message"]
    assert KEY not in near.output
    (row,) = rows(near, "refused")
    assert (row["status"], row["api_usd"]) == (502, 0.0)


def test_fields_that_an_api_does_not_know_are_refused_or_served_by_who_does(
    near: RigServer,
) -> None:
    refused = ask(near, "paid", top_k=5)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_k")
    answer = ask(near, "chain", top_k=5)
    assert (answer.status_code, answer.headers["x-rigserve-model"]) == (200, "home")


def test_what_does_not_count_is_told_of_who_answers(near: RigServer) -> None:
    answer = ask(near, "loses", top_k=5)
    assert (answer.status_code, answer.headers["x-rigserve-model"]) == (200, "lax-paid")
    assert answer.headers["x-rigserve-ignored"] == "top_k"
    answer = ask(near, "gains", top_k=5)
    assert (answer.status_code, answer.headers["x-rigserve-model"]) == (200, "home")
    assert "x-rigserve-ignored" not in answer.headers


def test_spill_over_is_marked_and_can_be_declined(near: RigServer) -> None:
    answer = ask(near, "spill", headers={"x-request-id": "spilled"})
    assert answer.headers["x-rigserve-served-as"] == "spill_over"
    (row,) = rows(near, "spilled")
    assert (row["model"], row["served_as"]) == ("paid", "spill_over")
    assert row["api_usd"] == pytest.approx(usd(USAGE))
    declined = ask(near, "spill", headers={"x-rigserve-spill-over": "never"})
    assert declined.status_code == 503
    # Work that can wait does not spend money.
    assert ask(near, "spill", service_tier="flex").status_code == 503
    assert near.series("rigserve_cost_usd_total")['{model="paid",part="api"}'] > 0


def test_a_queue_that_is_too_long_spills_over(near: RigServer) -> None:
    slots = near.config["models"][0]["max_sequences"]
    endless: dict[str, Any] = {"max_tokens": 900, "ignore_eos": True, "stream": True}
    with contextlib.ExitStack() as running, ThreadPoolExecutor(slots) as pool:
        for _ in range(slots):
            running.enter_context(ask(near, "home", **endless))
        waiting = [pool.submit(ask, near, "home") for _ in range(slots)]
        # The engine has some of them at hand; the others wait in the gateway.
        wait_for(lambda: near.total("rigserve_admission_waiting") >= 1, "requests wait")
        answer = ask(near, "hasty")
        # Who leaves makes room for who waits.
        running.close()
        assert {each.result().status_code for each in waiting} == {200}
    assert answer.headers["x-rigserve-served-as"] == "spill_over"
    assert ask(near, "hasty").headers["x-rigserve-model"] == "home"


def test_a_budget_is_exact_and_outlives_the_server(
    near: RigServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses = [ask(near, "thrifty", max_tokens=40).status_code for _ in range(12)]
    assert statuses[0] == 200
    assert statuses[-1] == 503
    refused = ask(near, "thrifty", max_tokens=40)
    error = refused.json()["error"]
    assert error["code"] == "budget_exhausted"
    assert "of its 0.0007 USD of this day" in error["message"]
    (spent,) = [v for k, v in near.series("rigserve_api_spent_usd").items() if '"poor"' in k]
    assert spent == pytest.approx(statuses.count(200) * usd(USAGE))

    config = yaml.safe_load(near.config_path.read_text())
    config["server"]["port"] = free_port()
    config["models"][0]["load"] = "on_demand"
    path = near.config_path.with_name("again.yaml")
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with RigServer(path) as again:
        again.wait_until_ready()
        assert ask(again, "thrifty", max_tokens=40).json()["error"]["code"] == "budget_exhausted"


def test_a_stream_of_an_api_that_is_cut_off_ends_in_an_error(near: RigServer) -> None:
    stream = near.client.chat.completions.create(
        model="paid", messages=[{"role": "user", "content": "cut"}], stream=True, max_tokens=4
    )
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["The ", "sea."]
    with pytest.raises(openai.APIError):
        next(stream)


def test_an_api_that_does_not_answer_in_time_is_given_up(near: RigServer) -> None:
    answer = ask(near, "chain", "hang", headers={"x-request-id": "hung"})
    assert (answer.status_code, answer.headers["x-rigserve-model"]) == (200, "home")
    # It may have worked on it: that counts at the most it can have cost.
    lost, served = sorted(rows(near, "hung", 2), key=lambda row: str(row["model"]), reverse=True)
    assert (lost["model"], lost["status"], lost["tokens_source"]) == ("paid", 504, "estimated")
    assert lost["api_usd"] > usd(USAGE)
    assert (served["model"], served["status"]) == ("home", 200)


def test_a_reload_changes_routes_under_way_streams_go_on(near: RigServer) -> None:
    finished: list[Any] = []

    def consume() -> None:
        finished.extend(
            near.client.chat.completions.create(
                model="careful",
                messages=[{"role": "user", "content": "Tell me about the sea."}],
                max_tokens=300,
                stream=True,
                extra_body={"ignore_eos": True},
            )
        )

    reader = threading.Thread(target=consume)
    reader.start()
    wait_for(lambda: near.total("rigserve_requests_in_flight") == 1, "the stream runs")
    before = near.config["routes"]
    near.config["routes"] = [{"name": "careful", "targets": [{"model": "home"}]}]
    rewrite(near, near.config)
    near.wait_for_output("settings: routes")
    assert reader.is_alive(), "the stream ended before the reload: make it longer"
    assert ask(near, "careful").headers["x-rigserve-model"] == "home"
    assert ask(near, "spill").status_code == 404
    reader.join(60)
    assert finished[-1].choices[0].finish_reason == "length"
    near.config["routes"] = before
    rewrite(near, near.config)
    wait_for(lambda: ask(near, "spill").status_code == 200, "all routes are back")


def test_a_remote_that_dies_is_noticed_and_comes_back(
    near: RigServer, far: RigServer, far_config: Path
) -> None:
    """The last one here: it kills the other rig."""
    stream = near.client.chat.completions.create(
        model="away",
        messages=[{"role": "user", "content": "Tell me about the sea."}],
        max_tokens=600,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    far.process.kill()
    far.process.wait()
    with pytest.raises(openai.APIError):
        list(stream)

    # The next request is served elsewhere.
    answer = ask(near, "careful")
    assert (answer.status_code, answer.headers["x-rigserve-served-as"]) == (200, "fallback")
    codes = [ask(near, "away").json()["error"]["code"] for _ in range(8)]
    assert codes[0] == "remote_unreachable"
    assert codes[-1] == "remote_unavailable"
    assert breaker(near, "away") == "open"
    assert near.get("/ready").json()["models"]["away"] == "unavailable"

    with RigServer(far_config) as again:
        again.wait_until_ready()
        wait_for(lambda: breaker(near, "away") == "half_open", "a probe succeeds", 40)
        answer = ask(near, "careful")
        assert answer.headers["x-rigserve-model"] == "away"
        assert breaker(near, "away") == "closed"
