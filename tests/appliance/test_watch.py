"""The watch over the machine: it tells once, whatever the platform's check raises, and stops when told."""

import threading
import time

import pytest

from countermark.errors import GpuError
from countermark_appliance.watch import Watch


class Machine:
    """A platform whose check raises `fault` from the `after`th time on."""

    def __init__(self, fault: Exception | None, after: int = 2) -> None:
        self.fault, self.after, self.asked = fault, after, 0

    def check_unchanged(self) -> None:
        self.asked += 1
        if self.fault is not None and self.asked >= self.after:
            raise self.fault


@pytest.mark.parametrize(
    ("fault", "code", "exit_code"),
    [
        (GpuError("GPUs: expected two, got one", code="gpu.changed"), "gpu.changed", 14),
        (RuntimeError("a secret"), "platform.check", 1),
    ],
)
def test_a_change_is_told_once(fault, code, exit_code, caplog):
    told: list[float] = []
    event = threading.Event()

    def on_change() -> None:
        told.append(time.monotonic())
        event.set()

    machine = Machine(fault)
    watch = Watch(machine, on_change=on_change, interval_s=0.01)
    watch.start()
    assert event.wait(10)
    watch._thread.join(10)
    assert not watch._thread.is_alive()
    assert watch.found is not None
    assert (watch.found.code, watch.found.exit_code) == (code, exit_code)
    assert (len(told), machine.asked) == (1, 2)
    assert code in caplog.text
    assert "secret" not in caplog.text


def test_a_machine_that_stays_is_asked_until_the_end():
    machine = Machine(None)
    watch = Watch(machine, on_change=lambda: pytest.fail("nothing changed"), interval_s=0.005)
    watch.start()
    deadline = time.monotonic() + 10
    while machine.asked < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    watch.close()
    watch._thread.join(10)
    assert machine.asked >= 3
    assert watch.found is None
    asked = machine.asked
    time.sleep(0.05)
    assert machine.asked == asked


def test_closing_does_not_wait_for_a_driver_that_hangs():
    hangs, release = threading.Event(), threading.Event()

    class Hanging:
        def check_unchanged(self) -> None:
            hangs.set()
            release.wait(10)

    watch = Watch(Hanging(), on_change=lambda: None, interval_s=0.001)
    watch.start()
    assert hangs.wait(10)
    before = time.monotonic()
    watch.close()
    assert time.monotonic() - before < 1
    release.set()
