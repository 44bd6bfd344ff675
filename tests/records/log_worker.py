"""Child processes of the crash and disk-full tests: append until killed or refused, telling every acknowledgement."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from pathlib import Path

from record_values import intent, open_recorder, outcome

from countermark.errors import Unavailable
from countermark_appliance.records.recorder import Recorder


def tell(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def append(recorder: Recorder) -> None:
    while True:
        committed = intent(recorder)
        tell("ack", recorder.epoch.boot_id.hex(), committed.acceptance.leaf_index, committed.leaf.hex())
        completed = outcome(recorder, committed)
        tell("end", recorder.epoch.boot_id.hex(), completed.index, committed.leaf.hex())


def until_killed(directory: Path) -> None:
    recorder = open_recorder(directory)
    tell("ready", recorder.epoch.boot_id.hex())
    threads = [threading.Thread(target=append, args=(recorder,), daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def nursery() -> None:
    """For each directory named on stdin: a forked child appends there until the next line, when it is killed.

    One interpreter for many kills; it has no threads of its own when it forks.
    """
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            until_killed(Path(line.strip()))
        sys.stdin.readline()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        tell("killed")


def until_full(directory: Path) -> None:
    """Files may not grow beyond 5 MiB: one chunk of the journal fits, a second does not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, 5 << 20))
    recorder = open_recorder(directory)
    pending = [intent(recorder) for _ in range(5)]
    try:
        while True:
            committed = intent(recorder)
            tell("ack", recorder.epoch.boot_id.hex(), committed.acceptance.leaf_index, committed.leaf.hex())
    except Unavailable as err:
        tell("refused", err.code)
    for committed in pending:
        recorder.receipt(outcome(recorder, committed))
        tell("end", recorder.epoch.boot_id.hex(), 0, committed.leaf.hex())
    try:
        intent(recorder)
    except Unavailable as err:
        tell("refused", err.code)
    recorder.close()


if __name__ == "__main__":
    if sys.argv[1] == "nursery":
        nursery()
    else:
        until_full(Path(sys.argv[2]))
