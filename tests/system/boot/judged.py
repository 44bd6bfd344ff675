"""How a changed boot ends: the client refuses the machine, or the machine does not serve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from booted import Disks, NotReady, boot, client
from operating import Operator


def refused(
    operator: Operator, disks: Disks, folder: Path, code: str, *, exit_code: int = 12, qemu: Sequence[str] = ()
) -> None:
    """The machine serves, and a client with the policy of the good boot refuses it with `code`."""
    with boot(disks, folder / "serial", qemu=qemu) as machine:
        said = client("attest", machine.address, "--policy", operator.policy, "--json")
        assert said.code == exit_code, f"{said.out}{said.err}\n{machine.console()[-2000:]}"
        assert said.json()["code"] == code, said.err


def dies(disks: Disks, folder: Path, reason: str, qemu: Sequence[str] = ()) -> None:
    """The machine ends before it serves, and its console has `reason`."""
    with pytest.raises(NotReady) as caught, boot(disks, folder / "serial", qemu=qemu):
        pytest.fail("the machine serves")
    assert reason in str(caught.value), str(caught.value)
