"""Keys and quotas: buckets against a clock of our own, tables of node.toml, and a real node that asks for a key."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "net"))
from net_appliance import NOW, running

from countermark.errors import ConfigError, Recorded, RequestError, Unavailable, UsageError
from countermark.session import connect
from countermark_appliance.operations.observing import Ended
from countermark_appliance.operations.quotas import Key, Quotas, metadata_of, new_key, parse_keys
from countermark_appliance.operations.watching import Operations, nothing_done


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def end(prompt: int = 0, output: int = 0) -> Ended:
    made = nothing_done("")
    return Ended(
        **{**{name: getattr(made, name) for name in made.__slots__}, "prompt_tokens": prompt, "output_tokens": output}
    )


def quotas(clock: Clock, **limits: int) -> tuple[Quotas, dict[str, str]]:
    secret, digest = new_key()
    return Quotas([Key(name="a", sha256=digest, **limits)], clock), {"authorization": f"Bearer {secret}"}


def refused(quotas: Quotas, metadata: dict[str, str]) -> Unavailable:
    with pytest.raises(Unavailable) as caught:
        quotas.admit(metadata)
    return caught.value


def test_requests_a_minute_come_back_one_by_one() -> None:
    clock = Clock()
    some, metadata = quotas(clock, requests_per_minute=6)
    for _ in range(6):
        assert some.admit(metadata) is not None
    err = refused(some, metadata)
    assert (err.code, err.retry_after_s) == ("quota.rate", pytest.approx(10.0))
    clock.now += 10.0
    assert some.admit(metadata) is not None
    assert refused(some, metadata).code == "quota.rate"
    clock.now += 10_000.0  # no more than a minute's is ever saved up
    for _ in range(6):
        some.admit(metadata)
    assert refused(some, metadata).code == "quota.rate"


def test_tokens_a_day_are_charged_when_known_and_debts_are_paid_off() -> None:
    clock = Clock()
    some, metadata = quotas(clock, tokens_per_day=86_400)  # one a second
    first, second = some.admit(metadata), some.admit(metadata)
    assert first is not None
    assert second is not None
    first.ended(end(80_000, 6_000))
    second.ended(end(400, 600))  # overdrawn by 600
    err = refused(some, metadata)
    assert (err.code, err.retry_after_s) == ("quota.tokens", pytest.approx(601.0))
    clock.now += 602
    assert some.admit(metadata) is not None


def test_places_are_given_back_once() -> None:
    some, metadata = quotas(Clock(), concurrent=2)
    first, second = some.admit(metadata), some.admit(metadata)
    assert first is not None
    assert second is not None
    assert refused(some, metadata).code == "quota.concurrent"
    for _ in range(3):
        first.ended(end())
    assert some.admit(metadata) is not None
    assert refused(some, metadata).code == "quota.concurrent"


@pytest.mark.parametrize(
    "value",
    ["", "Bearer ", "Bearer x", "Basic {key}", "bearer", "{key}", "Bearer {key} ", "Bearer {key}x", "Bearer  {key}"],
)
def test_who_has_no_key_is_refused(value: str) -> None:
    some, metadata = quotas(Clock())
    key = metadata["authorization"].removeprefix("Bearer ")
    with pytest.raises(RequestError) as caught:
        some.admit({"authorization": value.format(key=key)})
    assert caught.value.code == "access.key"
    assert key not in str(caught.value)


def test_without_keys_everybody_is_admitted() -> None:
    assert Quotas(()).admit({}) is None
    assert Quotas(()).admit({"authorization": "Bearer of nothing"}) is None


def test_metadata_given_twice_counts_as_not_given() -> None:
    assert metadata_of([("a", "1"), ("authorization", "x"), ("authorization", "x"), ("b-bin", b"\0")]) == {"a": "1"}


@given(st.lists(st.tuples(st.sampled_from(["ask", "end", "wait"]), st.integers(0, 500)), max_size=200))
def test_no_more_is_admitted_than_the_limits_allow(steps: list[tuple[str, int]]) -> None:
    """Against counts kept here: never more at a time, in a minute's window never more than two minutes' worth."""
    clock = Clock()
    some, metadata = quotas(clock, requests_per_minute=30, concurrent=4)
    running_, admitted = [], []
    for step, amount in steps:
        match step:
            case "ask":
                try:
                    running_.append(some.admit(metadata))
                    admitted.append(clock.now)
                except Unavailable as err:
                    assert err.retry_after_s is not None
                    assert err.retry_after_s > 0
            case "end" if running_:
                lease = running_.pop(amount % len(running_))
                assert lease is not None
                lease.ended(end(amount))
            case "wait":
                clock.now += amount / 10
        assert len(running_) <= 4
        assert sum(at > clock.now - 60 for at in admitted) <= 60


@pytest.mark.parametrize(
    ("table", "code"),
    [
        ({"name": "a"}, "config.value"),
        ({"name": "A", "sha256": "00" * 32}, "config.value"),
        ({"name": "a", "sha256": "00" * 31}, "config.value"),
        ({"name": "a", "sha256": "00" * 32, "concurrent": 0}, "config.value"),
        ({"name": "a", "sha256": "00" * 32, "concurrent": True}, "config.value"),
        ({"name": "a", "sha256": "00" * 32, "tokens_per_day": 1.5}, "config.value"),
        ({"name": "a", "sha256": "00" * 32, "requests": 5}, "config.unknown_key"),
        ("a", "config.value"),
    ],
)
def test_tables_that_are_wrong(table: object, code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keys([table])
    assert caught.value.code == code


def test_keys_must_differ() -> None:
    one = {"name": "a", "sha256": "00" * 32}
    for other in ({**one, "name": "b"}, {**one, "sha256": "11" * 32}):
        with pytest.raises(ConfigError):
            parse_keys([one, other])
    with pytest.raises(ConfigError):
        parse_keys("a")
    assert len(parse_keys([one, {"name": "b", "sha256": "11" * 32, "concurrent": 3}])) == 2


def test_a_node_that_asks_for_a_key(tmp_path: Path) -> None:
    secret, digest = new_key()
    assert hashlib.sha256(secret.encode()).digest() == digest
    operations = Operations(quotas=Quotas([Key(name="a", sha256=digest, requests_per_minute=2, concurrent=1)]))
    with running(tmp_path, operations=operations) as appliance:
        policy = appliance.machine.policy
        with connect(appliance.address, policy, now=NOW) as session:  # evidence is for everybody
            with pytest.raises(RequestError) as unknown:
                session.generate("a", max_tokens=1)
            assert unknown.value.code == "access.key"
        with connect(appliance.address, policy, now=NOW, key=secret) as session:
            appliance.engine.hold.set()
            running_one = session.generate("a", max_tokens=2)
            with pytest.raises(Unavailable) as busy:
                session.generate("b")
            assert (busy.value.code, busy.value.recorded) == ("quota.concurrent", Recorded.NO)
            appliance.engine.hold.clear()
            answer = running_one.result()
            assert session.replay(answer.receipt).result.identical  # a replay counts as a request
            with pytest.raises(Unavailable) as caught:
                session.generate("c")
            assert caught.value.code == "quota.rate"
            assert caught.value.retry_after_s is not None
            assert 0 < caught.value.retry_after_s <= 30
    with pytest.raises(UsageError) as bad:
        connect("127.0.0.1:1", policy, key="two words")
    assert bad.value.code == "usage.key"
    assert "two words" not in str(bad.value)
