"""The circuit breaker of a remote: when it opens, what it lets through, how it closes."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from serving.engines.breaker import LEGAL_MOVES, Breaker, BreakerState, Passage

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def a_breaker() -> tuple[Breaker, Clock]:
    clock = Clock()
    return Breaker("m", clock), clock


def passage(breaker: Breaker) -> Passage:
    entered = breaker.enter()
    assert entered is not None
    return entered


def opened() -> tuple[Breaker, Clock]:
    breaker, clock = a_breaker()
    for _ in range(5):
        passage(breaker).failed()
    assert breaker.state is OPEN
    return breaker, clock


def test_five_failures_in_a_row_open_it_and_a_success_between_starts_anew() -> None:
    breaker, _ = a_breaker()
    for _ in range(4):
        passage(breaker).failed()
    passage(breaker).succeeded()
    for _ in range(4):
        passage(breaker).failed()
    assert breaker.state is CLOSED
    passage(breaker).failed()
    assert breaker.state is OPEN
    assert breaker.enter() is None


def test_half_of_the_last_twenty_open_it() -> None:
    breaker, _ = a_breaker()
    for outcome in itertools.islice(itertools.cycle("sf"), 19):
        call = passage(breaker)
        call.succeeded() if outcome == "s" else call.failed()
    assert breaker.state is CLOSED
    passage(breaker).failed()
    assert breaker.state is OPEN


def test_what_succeeds_and_breaks_off_later_has_failed() -> None:
    breaker, _ = a_breaker()
    for _ in range(10):
        call = passage(breaker)
        call.succeeded()
        call.failed()
    assert breaker.state is OPEN


def test_a_probe_half_opens_it_and_one_trial_decides() -> None:
    breaker, clock = opened()
    assert breaker.seconds_until_probe == 1.0
    clock.seconds = 1.0
    assert breaker.seconds_until_probe == 0.0
    breaker.probed(works=True)
    assert (breaker.state, breaker.seconds_until_probe) == (HALF_OPEN, math.inf)
    trial = passage(breaker)
    assert breaker.enter() is None
    trial.succeeded()
    assert breaker.state is CLOSED
    assert breaker.enter()


def test_a_trial_that_fails_opens_it_again_and_one_that_leaves_lets_the_next_through() -> None:
    breaker, _ = opened()
    breaker.probed(works=True)
    passage(breaker).withdraw()
    passage(breaker).failed()
    assert breaker.state is OPEN
    # Each pause is longer than the one before, up to half a minute; then all begins anew.
    pauses = []
    for _ in range(6):
        pauses.append(breaker.seconds_until_probe)
        breaker.probed(works=False)
    assert pauses == [2, 4, 8, 16, 30, 30]
    breaker.probed(works=True)
    passage(breaker).succeeded()
    for _ in range(5):
        passage(breaker).failed()
    assert breaker.seconds_until_probe == 1


def test_what_was_sent_before_says_nothing_of_now() -> None:
    breaker, _ = a_breaker()
    early = [passage(breaker) for _ in range(8)]
    for call in early[:5]:
        call.failed()
    breaker.probed(works=True)
    early[5].succeeded()
    assert breaker.state is HALF_OPEN
    early[6].failed()
    assert breaker.state is HALF_OPEN
    passage(breaker).succeeded()
    early[7].failed()
    assert breaker.state is CLOSED


def test_probes_count_while_it_is_closed() -> None:
    breaker, _ = a_breaker()
    for _ in range(5):
        breaker.probed(works=False)
    assert breaker.state is OPEN


@given(st.lists(st.sampled_from(["enter", "ok", "fail", "leave", "probe ok", "probe fail"])))
def test_it_moves_only_as_the_table_says_and_never_lets_two_trials_out(steps: list[str]) -> None:
    breaker, _ = a_breaker()
    out: list[Passage] = []
    trials = 0
    for step in steps:
        before = breaker.state
        if step == "enter" and (entered := breaker.enter()):
            assert before is not OPEN
            trials += before is HALF_OPEN
            out.append(entered)
        elif step.startswith("probe"):
            breaker.probed(works=step == "probe ok")
        elif step != "enter" and out:
            call = out.pop()
            {"ok": call.succeeded, "fail": call.failed, "leave": call.withdraw}[step]()
        if breaker.state is not before:
            assert breaker.state in LEGAL_MOVES[before]
            trials = 0
        elif before is HALF_OPEN and step == "leave":
            trials = min(trials, 0 if breaker.lets_through else 1)
        assert trials <= 1
