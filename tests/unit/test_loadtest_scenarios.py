"""Scenarios, their lengths, their arrivals, traces, and the prompts that come of them."""

from __future__ import annotations

import json
import random
import statistics
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from loadtest.amounts import Amount, constant, draw_count
from loadtest.arrivals import arrival_times
from loadtest.client import Reply
from loadtest.options import overridden
from loadtest.scenario import (
    Closed,
    Open,
    Replay,
    Scenario,
    ScenarioError,
    Step,
    Steps,
    Traffic,
    load_scenario,
    names,
    parse_duration,
)
from loadtest.stages import fixed_stages, stage_at
from loadtest.texts import Gauge, excerpt, words_of
from loadtest.traces import read_trace
from loadtest.workload import Workload, gauge_key
from serving.cli import main
from serving.config import ConfigError

AMOUNT: TypeAdapter[Any] = TypeAdapter(Amount)


def test_every_scenario_that_comes_with_it_loads() -> None:
    assert {"chat", "rag", "completion", "agent", "batch", "mixed", "sweep"} <= set(names())
    for name in names():
        found, scenario = load_scenario(name)
        assert found == name
        assert scenario.description
    assert load_scenario("agent")[1].traffic[0].tools
    assert {one.tenant for one in load_scenario("mixed")[1].traffic} == {"chat", "rag", "batch"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("load: {kind: closed, users: 0}", "s.yaml:1: load.users: Input should be greater than or equal to 1"),
        ("duration: 3 weeks", "s.yaml:1: duration: '3 weeks' is not a duration; write 30s, 2m, 1h or 7d"),
        ("durration: 3s", "s.yaml:1: durration: unknown key; did you mean 'duration'?"),
        (
            "traffic:\n- prompt_tokens: {kind: uniform, min: 9, max: 3}",
            "s.yaml:2: traffic[0].prompt_tokens: max is 3, below min, which is 9; swap them",
        ),
        ("traffic:\n- tools: true\n  endpoint: completions", "tools and system_prompt_tokens need endpoint: chat"),
        ("load: {kind: circus}", "'closed', 'open', 'steps', 'sweep', 'replay'"),
        ("load: {kind: open, requests_per_second: 1, burstiness: 0.2}", "burstiness needs arrivals: gamma"),
        ("load:\n  kind: steps\n  steps: [{users: 1}, {requests_per_second: 2}]", "give each step users"),
        ("warm_up: 0.5\ncool_down: 0.5", "leave nothing to measure"),
        ("traffic: [{tenant: a}, {tenant: a}]", "different names"),
        ("traffic:\n- fields: {max_tokens: 9}", "s.yaml:2: traffic[0].fields: 'max_tokens' is set by the bench itself; write output_tokens"),
        ("traffic:\n- fields: {stream: false}", "'stream' is set by the bench itself"),
        ("traffic:\n- turns: 3\n  endpoint: completions", "turns need endpoint: chat"),
        ("load: {kind: sweep, start: 300}", "start (300) is above most (256)"),
        ("load: {kind: sweep, start: 0.5}", "over: users needs whole numbers"),
        ("load: {kind: replay, trace: t.csv}\nduration: 30s", "s.yaml:2: duration: a replay takes it from its trace"),
        (
            "load: {kind: replay, trace: t.csv}\ntraffic:\n- tenant: a\n  prompt_tokens: 7",
            "s.yaml:4: traffic[0].prompt_tokens: a replay takes it from its trace; leave it out",
        ),
    ],
)  # fmt: skip
def test_errors_name_the_field_and_the_line(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_scenario(str(file))
    assert said in str(raised.value)


def test_a_scenario_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(ScenarioError, match=r"did you mean 'sweep'.*completion"):
        load_scenario("swep")


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("2m", 120), ("1.5h", 5400), ("45", 45), ("7d", 604800)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "0s", "-3s", "3 weeks", "1e3"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


def test_the_command_line_overrides_what_fits() -> None:
    chat = load_scenario("chat")[1]
    changed = overridden(chat, users=3, duration_seconds=9, prompt_tokens=7, output_tokens=5)
    assert changed.load == Closed(kind="closed", users=3)
    assert changed.duration == 9
    assert (changed.traffic[0].prompt_tokens, changed.traffic[0].output_tokens) == (
        constant(7),
        constant(5),
    )
    assert changed.traffic[0].turns == chat.traffic[0].turns
    bursts = overridden(load_scenario("bursts")[1], requests_per_second=9)
    assert isinstance(bursts.load, Open)
    assert (bursts.load.requests_per_second, bursts.load.burstiness) == (9, 0.3)
    replay = Scenario(load=Replay(kind="replay", trace="t.csv"))
    for option in ("duration_seconds", "prompt_tokens", "output_tokens"):
        with pytest.raises(ScenarioError, match="does not go with a replay"):
            overridden(replay, **{option: 9})
    steps = Scenario(load=Steps(kind="steps", steps=(Step(users=1, duration=3.0), Step(users=2))))
    with pytest.raises(ScenarioError, match="steps that have their own"):
        overridden(steps, duration_seconds=9)
    with pytest.raises(ScenarioError, match="exclude each other"):
        overridden(chat, users=3, requests_per_second=1)
    with pytest.raises(ScenarioError, match="kind 'sweep'"):
        overridden(load_scenario("sweep")[1], users=3)


@pytest.mark.parametrize(
    "amount",
    [
        7,
        {"kind": "uniform", "min": 2, "max": 12},
        {"kind": "normal", "mean": 40, "stddev": 5},
        {"kind": "lognormal", "median": 40, "sigma": 0.5},
        {"kind": "exponential", "mean": 3},
        {"kind": "values", "values": [1, 2, 9]},
    ],
)
def test_draws_have_the_mean_that_is_said(amount: Any) -> None:
    drawn = AMOUNT.validate_python(amount)
    rng = random.Random(1)
    values = [drawn.draw(rng) for _ in range(20000)]
    assert statistics.mean(values) == pytest.approx(drawn.mean, rel=0.03)


def test_draws_keep_their_bounds() -> None:
    drawn = AMOUNT.validate_python(
        {"kind": "lognormal", "median": 40, "sigma": 2, "min": 9, "max": 60}
    )
    rng = random.Random(1)
    values = {draw_count(drawn, rng) for _ in range(2000)}
    assert (min(values), max(values)) == (9, 60)


@pytest.mark.parametrize(
    ("arrivals", "burstiness", "variation"),
    [("constant", 1.0, 0.0), ("poisson", 1.0, 1.0), ("gamma", 0.25, 2.0), ("gamma", 4.0, 0.5)],
)
def test_arrivals_have_their_rate_and_their_burstiness(
    arrivals: str, burstiness: float, variation: float
) -> None:
    moments = list(islice(arrival_times(arrivals, 5.0, burstiness, random.Random(3)), 20000))
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) / 0.2 == pytest.approx(variation, abs=0.1)


def test_a_staircase_has_no_pauses() -> None:
    steps = Steps.model_validate(
        {"kind": "steps", "steps": [{"users": 2}, {"users": 4, "duration": "5s"}, {"users": 1}]}
    )
    stages = fixed_stages(Scenario(load=steps, duration=10.0), 1.0, 0.0)
    assert [(one.begin, one.end, one.users) for one in stages] == [
        (1, 11, 2),
        (11, 16, 4),
        (16, 26, 1),
    ]
    assert stages[1].window == (11.5, 15.5)
    assert stage_at(stages, 11.0) == stages[1]
    assert stage_at(stages, 0.5) is None
    assert stage_at(stages, 26.0) is None


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,110,27
2023-11-16 18:17:04.0781490,0,27
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:00.017335+00:00,2399,6
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,0,417,Conversation log
"""
MOONCAKE = """{"timestamp": 1000, "input_length": 700, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 4000, "input_length": 600, "output_length": 26, "hash_ids": [46, 2366]}
"""


@pytest.mark.parametrize(
    ("text", "moments", "lengths"),
    [
        (AZURE, [0, 0.052], [(4808, 10), (110, 27)]),
        (AZURE_2024, [0, 0.007405], [(2162, 5), (2399, 6)]),
        (BURSTGPT, [0, 40], [(472, 18), (1087, 230)]),
        (MOONCAKE, [0, 3], [(700, 52), (600, 26)]),
    ],
)
def test_public_traces_are_read(
    text: str, moments: list[float], lengths: list[tuple[int, int]], tmp_path: Path
) -> None:
    file = tmp_path / "trace"
    file.write_text(text)
    requests = read_trace(file)
    assert [one.at_seconds for one in requests] == pytest.approx(moments, abs=1e-6)
    assert [(one.prompt_tokens, one.output_tokens) for one in requests] == lengths
    assert len(read_trace(file, most=1)) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "trace:1: neither Azure's columns"),
        (BURSTGPT + "x,ChatGPT,1,2,3,log\n", "trace:5: ValueError"),
        ('{"timestamp": 1}\n', "trace:1: KeyError"),
        ("", "neither Azure's"),
    ],
)
def test_bad_traces_are_told_with_their_line(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_text(text)
    with pytest.raises(ScenarioError, match=said):
        read_trace(file)


def test_a_replay_takes_its_trace_from_beside_its_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("load: {kind: replay, trace: t.csv, speed: 2}")
    load = load_scenario(str(tmp_path / "r.yaml"))[1].load
    assert isinstance(load, Replay)
    assert load.trace == str(tmp_path / "t.csv")


@given(st.integers(0, 10**9), st.integers(1, 30000))
def test_counted_texts_have_the_length_that_is_asked_for(start: int, tokens: int) -> None:
    # A server for which a word has as many tokens as it has letters.
    words = words_of("prose")
    gauge = Gauge.of("prose")
    gauge.counted = [0]
    for place in range(0, len(words), 250):
        letters = sum(len(word.split()[0]) for word in words[place : place + 250])
        gauge.counted.append(gauge.counted[-1] + letters)
    text = excerpt("prose", start, gauge.words_for(tokens, start))
    letters = sum(map(len, text.split()))
    assert letters == pytest.approx(tokens, rel=0.02, abs=60)


def test_an_estimate_is_corrected_by_what_the_server_counts() -> None:
    gauge = Gauge.of("prose")
    gauge.calibrate((10, 23), (60, 98))  # 8 tokens of template, 1.5 a word
    assert gauge.words_for(90, 0) == 60
    for _ in range(100):
        gauge.learn(100, 8 + 200)
    assert gauge.words_for(100, 0) == pytest.approx(50, abs=2)


def test_a_server_that_counts_nonsense_gets_no_endless_prompts() -> None:
    gauge = Gauge.of("prose")
    gauge.calibrate((10, 10), (60, 10))
    for _ in range(1000):
        gauge.learn(gauge.words_for(80, 0), 10)
    assert gauge.words_for(80, 0) <= 100


def workload(traffic: Traffic, seed: int = 0, *, ignore_eos: bool = True) -> Workload:
    gauges = {gauge_key(traffic): Gauge.of(traffic.text)}
    return Workload([traffic], "tiny", gauges, seed, ignore_eos=ignore_eos)


def test_conversations_grow_repeat_and_differ() -> None:
    traffic = Traffic(turns=constant(3), system_prompt_tokens=20, prompt_tokens=constant(30))
    talk = workload(traffic).conversation(traffic, 5)
    sizes = []
    while not talk.over:
        request = talk.next()
        sizes.append(len(request.body["messages"]))
        reply = Reply()
        reply.text = "I see."
        talk.answered(reply)
    assert sizes == [2, 4, 6]
    assert request.body["messages"][2] == {"role": "assistant", "content": "I see."}
    again, other = (workload(traffic).conversation(traffic, n).next().body for n in (5, 6))
    assert again["messages"] == request.body["messages"][:2]
    assert again["messages"][0] == other["messages"][0], "tenants share their system prompt"
    assert again["messages"][1] != other["messages"][1]
    assert again["ignore_eos"] is True
    assert (
        "ignore_eos" not in workload(traffic, ignore_eos=False).conversation(traffic, 5).next().body
    )
    assert workload(traffic, seed=1).conversation(traffic, 5).next().body != again


@pytest.mark.parametrize(
    ("arguments", "called"), [('{"path": "a.py"}', True), ('{"path": "a.', False)]
)
def test_tools_that_are_called_have_their_results(arguments: str, called: bool) -> None:
    traffic = Traffic(turns=constant(2), tools=True)
    talk = workload(traffic).conversation(traffic, 0)
    assert next(tool["function"]["name"] for tool in talk.next().body["tools"]) == "read_file"
    reply = Reply()
    function = {"name": "read_file", "arguments": arguments}
    reply.tool_calls = [{"id": "call_1", "type": "function", "function": function}]
    talk.answered(reply)
    roles = [message["role"] for message in talk.next().body["messages"]]
    # A call that max_tokens cut off is none.
    assert roles == (["user", "assistant", "tool"] if called else ["user", "assistant", "user"])


def test_completions_have_a_prompt_of_code() -> None:
    traffic = Traffic(endpoint="completions", text="code", prompt_tokens=constant(90))
    request = workload(traffic).conversation(traffic, 1).next()
    assert request.path == "/completions"
    assert "messages" not in request.body
    assert json.dumps(request.body)


def test_blocks_of_a_trace_are_shared_text(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(MOONCAKE)
    traffic = Traffic()
    texts = []
    for number, request in enumerate(read_trace(file)):
        _, asked = workload(traffic).replayed(request, number)
        texts.append(asked.body["messages"][0]["content"])
    one, other = texts
    block = len(excerpt("prose", 0, round(512 / 1.4)))
    assert one[: block // 2] == other[: block // 2]
    assert one[-100:] != other[-100:]


def test_users_are_shared_out_by_weight() -> None:
    traffic = [Traffic(tenant="a", weight=3), Traffic(tenant="b", weight=1)]
    load = Workload(traffic, "tiny", {}, 0, ignore_eos=True)
    tenants = [load.traffic_of_user(number).tenant for number in range(8)]
    assert tenants.count("a") == 6
    assert sorted(tenants[:4]) == ["a", "a", "a", "b"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--join", "h:1", "--users", "3"], "takes nothing but --api-key beside it, not users"),
        (["rag", "--join", "h:1"], "not scenario"),
        (["--bind", "127.0.0.1:5557"], "needs --remote-workers"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
