"""One operator's files for all boot tests, made once for the run; and no machine outlives the tests."""

import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

import booted
import pytest
from booted import Disks
from operating import Operator, prepare


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes of this test run have in common."""
    here = tmp_path_factory.getbasetemp()
    folder = (here.parent if here.name.startswith("popen-") else here) / "boot"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def operator(smollm2: Path, shared: Path) -> Operator:
    """Everything an operator has made before anything boots. The first test process to come makes it."""
    folder = shared / "operator"
    one = Operator(folder=folder, smollm2=smollm2)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = Path(tempfile.mkdtemp(dir=shared))  # what a failure leaves behind is not taken for whole
            prepare(Operator(folder=partial, smollm2=smollm2))
            partial.rename(folder)
    return one


@pytest.fixture(scope="session", autouse=True)
def nothing_left_running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever this process started has ended; another test process may still have a machine."""
    yield
    mine = str(tmp_path_factory.getbasetemp())
    assert not [line for line in booted.children() if mine in line]


@pytest.fixture
def disks(operator: Operator, tmp_path: Path) -> Disks:
    """Disks of a machine that would be accepted; a test changes a copy of one."""
    return operator.disks("small", tmp_path / "log.raw")
