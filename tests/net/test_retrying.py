"""What is tried again and what is not, and what a failed request says of records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from net_appliance import Appliance, running

from countermark.errors import QuoteError, Recorded, Unavailable, UsageError
from countermark.formats.records import Kind
from countermark.retrying import Retry, retrying


@pytest.fixture
def appliance(tmp_path: Path) -> Iterator[Appliance]:
    with running(tmp_path) as appliance:
        yield appliance


def unavailable(recorded: Recorded = Recorded.NO, retry_after_s: float | None = None) -> Unavailable:
    err = Unavailable("busy", code="engine.busy", retry_after_s=retry_after_s)
    err.recorded = recorded
    return err


class Calls:
    """Raises the given errors in turn, then returns how often it was called."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.count


def test_waits_grow_to_a_bound_and_the_server_s_advice_counts() -> None:
    slept: list[float] = []
    calls = Calls(unavailable(), unavailable(), unavailable(), unavailable(retry_after_s=3.5), unavailable())
    retry = Retry(attempts=6, first_wait_s=1.0, longest_wait_s=4.0)
    assert retrying(calls, retry, sleep=slept.append) == 6
    for waited, least in zip(slept, [1.0, 2.0, 4.0, 4.0, 4.0], strict=True):
        assert least <= waited <= least * 1.25
    assert Retry(attempts=9999, longest_wait_s=1.0).wait_s(5000, unavailable())  # no number is too large


@pytest.mark.parametrize(
    ("error", "retry"),
    [
        (unavailable(Recorded.UNKNOWN), Retry()),
        (unavailable(Recorded.YES), Retry()),
        (unavailable(retry_after_s=11.0), Retry(longest_wait_s=10.0)),
        (QuoteError("no", code="quote.signature"), Retry()),
        (unavailable(), None),
        (unavailable(), Retry(attempts=1)),
    ],
)
def test_what_is_not_safe_is_not_repeated(error: Exception, retry: Retry | None) -> None:
    calls = Calls(error)
    with pytest.raises(type(error)) as caught:
        retrying(calls, retry, sleep=lambda _: None)
    assert caught.value is error
    assert calls.count == 1


def test_nothing_is_repeated_on_a_connection_that_ended() -> None:
    calls = Calls(unavailable())
    with pytest.raises(Unavailable):
        retrying(calls, Retry(), while_=lambda: False, sleep=lambda _: None)
    assert calls.count == 1


@pytest.mark.parametrize("bad", [{"attempts": 0}, {"first_wait_s": -1.0}, {"first_wait_s": 2.0, "longest_wait_s": 1.0}])
def test_a_policy_of_retries_that_makes_no_sense(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError) as caught:
        Retry(**bad)  # type: ignore[arg-type]
    assert caught.value.code == "usage.retry"


def test_a_connection_lost_before_the_commitment_leaves_it_open_whether_there_is_one(appliance: Appliance) -> None:
    appliance.engine.before_submit = appliance.front_end.close  # after the INTENT, before Accepted is read
    with appliance.connect() as session:
        with pytest.raises(Unavailable) as caught:
            session.generate("a", max_tokens=1, retry=Retry(first_wait_s=0.0))
        assert caught.value.recorded in {Recorded.UNKNOWN, Recorded.YES}
    assert appliance.kinds().count(Kind.INTENT) == 1


def test_a_connection_lost_in_the_answer_says_that_it_was_recorded(appliance: Appliance) -> None:
    appliance.engine.delay_s = 0.02
    with appliance.connect() as session:
        lost, other = session.generate("a", max_tokens=400), session.start("b", max_tokens=400)
        next(iter(lost))
        appliance.front_end.close()
        with pytest.raises(Unavailable) as caught:
            lost.result()
        assert caught.value.recorded is Recorded.YES
        with pytest.raises(Unavailable) as unknown:
            other.accept()
            other.result()
        assert unknown.value is not caught.value  # each says it of its own request
        with pytest.raises(Unavailable) as unsent:
            session.generate("c")
        assert unsent.value.recorded is Recorded.NO


def test_an_answer_that_is_read_on_after_it_failed_fails_again_in_the_same_way(appliance: Appliance) -> None:
    appliance.engine.delay_s = 0.02
    with appliance.connect() as session:
        stream = session.generate("a", max_tokens=400)
        stream.cancel()
        errors = []
        for _ in range(2):
            with pytest.raises(Unavailable) as caught:
                stream.result()
            errors.append(caught.value)
        assert errors[0] is errors[1]
        assert errors[0].recorded is Recorded.YES
