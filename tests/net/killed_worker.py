"""A nursery of whole services for the kill tests: one line in, a service up; the next line, all of it killed.

`stdin`: a directory a line, then any line to kill what runs there. `stdout`: JSON lines. The interpreter imports
everything once and forks for each service, which is a process group of its own with its front end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from net_appliance import running

from countermark.policy import encode_policy


def tell(**facts: object) -> None:
    os.write(1, json.dumps(facts).encode() + b"\n")


def serve(directory: Path) -> None:
    with running(directory) as appliance:
        appliance.engine.delay_s = 0.002
        tell(
            address=appliance.address,
            policy=encode_policy(appliance.machine.policy),
            boot=appliance.machine.keyring.boot_id.hex(),
        )
        while True:
            time.sleep(60)


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.setsid()
            try:
                serve(Path(line.strip()))
            finally:
                os._exit(1)
        sys.stdin.readline()
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        tell(killed=True)


if __name__ == "__main__":
    main()
