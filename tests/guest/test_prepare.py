"""From a good boot to the service's files, and every disk a host could attach instead."""

import hashlib
import json
import struct
import subprocess
import sys

import pytest
from guest_machine import CONFIG, INJECTED, ROOT, TREE, Machine
from hypothesis import given
from hypothesis import strategies as st

from countermark.errors import ConfigError, CountermarkError, MeasurementError, WeightsError
from countermark_appliance.config import MAX_BYTES
from countermark_appliance.engine import verityformat
from countermark_appliance.guest import dm, host, prepare
from countermark_appliance.guest.disks import Disk, Disks


class Mapper:
    """Device-mapper's side of the ioctls: what a kernel reads from each request (include/uapi/linux/dm-ioctl.h)."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, dict[str, object]]] = []
        self.error: int | None = None

    def __call__(self, _descriptor: int, number: int, request: bytearray) -> None:
        if self.error is not None:
            raise OSError(self.error, "refused")
        version = struct.unpack_from("=3I", request)
        size, start, targets = struct.unpack_from("=3I", request, 12)
        (flags,) = struct.unpack_from("=I", request, 28)
        name, uuid = (bytes(request[at : at + n]).rstrip(b"\0").decode() for at, n in ((48, 128), (176, 129)))
        seen = {"version": version, "name": name, "uuid": uuid, "flags": flags, "targets": targets}
        assert (size, start) == (len(request), 312)
        if targets:
            sector, length, _, following = struct.unpack_from("=QQiI", request, 312)
            kind = bytes(request[336:352]).rstrip(b"\0").decode()
            assert following == len(request) - 312
            assert following % 8 == 0
            seen["table"] = f"{sector} {length} {kind} {bytes(request[352:]).rstrip(bytes(1)).decode()}"
        struct.pack_into("=Q", request, 40, 253 << 8 | 1)  # huge_encode_dev(253:1)
        self.calls.append((number, seen))


@pytest.fixture
def mapper(monkeypatch):
    mapper = Mapper()
    monkeypatch.setitem(dm.open_verity.__kwdefaults__, "ioctl", mapper)
    return mapper


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


def run(machine: Machine, *, fsck: int = 0):
    clock, lines = Clock(), []
    checked = []

    def check(device: str) -> int:
        checked.append(device)
        return fsck

    disks = Disks(machine, now=clock.now, sleep=clock.sleep)
    config = prepare.prepare(say=lines.append, sysfs=machine, disks=disks, check=check)
    return config, lines, checked


def test_a_good_boot(tmp_path, mapper):
    machine = Machine(tmp_path)
    config, lines, checked = run(machine)
    there = tmp_path / "run/countermark"
    assert (there / "node.toml").read_bytes() == CONFIG.encode()
    assert (there / "node.toml").stat().st_mode & 0o777 == 0o600
    assert config.digest == hashlib.sha256(CONFIG.encode()).digest()
    assert config.weights_dir == there / "weights"
    assert str((there / "weights/weights.img").readlink()) == "/dev/dm-1"
    assert str((there / "devices/log").readlink()) == "/dev/vdd"
    assert checked == ["/dev/vdd"]
    assert (tmp_path / prepare.MODULES).read_bytes().strip()[:1] == b"1"
    assert any(config.digest.hex() in line for line in lines)
    created, loaded, resumed = mapper.calls
    assert [created[0], loaded[0], resumed[0]] == [0xC138FD03, 0xC138FD09, 0xC138FD06]  # as strace names them
    assert created[1]["uuid"] == "countermark-verity-" + ROOT.hex()
    assert loaded[1]["flags"] == 1
    assert resumed[1]["flags"] == 0
    assert {call[1]["name"] for call in mapper.calls} == {"countermark-weights"}
    salt = verityformat.SALT.hex()
    assert loaded[1]["table"] == f"0 24 verity 1 254:17 254:18 4096 4096 3 1 sha256 {ROOT.hex()} {salt}"


def test_the_tree_is_veritysetups(tmp_path):
    """The root that the kernel is given is the one that the form's superblock and tree have."""
    assert verityformat.stated_blocks(TREE[:4096]) == 3
    assert len(TREE) == verityformat.tree_bytes(3)


def replaced(old: str, new: str) -> bytes:
    text = CONFIG.replace(old, new).encode()
    return text + bytes(-len(text) % 4096)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "guest.config_disk"),
        (bytes(4096), "guest.config_disk"),
        (CONFIG.encode(), "guest.config_disk"),
        (replaced("", "") + bytes(4096), "guest.config_disk"),
        (CONFIG.encode() + b"\0x" + bytes(4000), "guest.config_disk"),
        (b"#" * (MAX_BYTES + 4097), "guest.config_disk"),
        (b"#" * (MAX_BYTES + 4096), "config.too_long"),
        (replaced("[node]", "[node"), "config.malformed"),
        (replaced('dir = "log"', 'dir = "log"\nextra = 1'), "config.unknown_key"),
        (replaced('dir = "weights"', 'dir = "/mnt"'), "guest.config_path"),
        (replaced('dir = "weights"', 'dir = "weights/../../../mnt"'), "guest.config_path"),
        (replaced('dir = "log"', 'dir = "/var/log"'), "guest.config_path"),
        (replaced('dir = "log"', 'dir = "log/../../x"'), "guest.config_path"),
        (replaced('dir = "log"', 'dir = "log"\noperator_dir = "/proc/self"'), "guest.config_path"),
        (replaced("[log]", '[endorsements]\ndir = "weights"\n[log]'), "guest.config_path"),
        (replaced("[log]", '[endorsements]\ngpu_dir = "/run/log"\n[log]'), "guest.config_path"),
        (replaced("[log]", '[endorsements]\nca_file = "log/../node.toml"\n[log]'), "guest.config_path"),
    ],
)  # fmt: skip
def test_a_config_disk_that_is_refused(tmp_path, mapper, data, code):
    machine = Machine(tmp_path)
    machine.put("dev/vdc", data)
    with pytest.raises(ConfigError) as refused:
        run(machine)
    assert refused.value.code == code
    assert mapper.calls == []
    assert not (tmp_path / "run/countermark/node.toml").exists()


def test_a_host_may_choose_its_own_files_on_the_log_disk(tmp_path, mapper):
    machine = Machine(tmp_path)
    endorsements = '[endorsements]\ndir = "log/pcs"\ngpu_dir = "log/rims"\nca_file = "log/ca.pem"\n'
    machine.put(
        "dev/vdc", replaced('[log]\ndir = "log"', endorsements + '[log]\ndir = "log/a"\noperator_dir = "log/b"')
    )
    config, _, _ = run(machine)
    assert config.log_operator_dir == tmp_path / "run/countermark/log/b"


@given(st.binary(min_size=1, max_size=9000).filter(lambda text: b"\0" not in text))
def test_padding_comes_off_exactly(text):
    assert prepare.strip_padding(text + bytes(-len(text) % 4096)) == text


@pytest.mark.parametrize(
    ("serial", "name"), [("cm-config", "sys/block/vdc/serial"), ("cm-log", "sys/block/vdd/serial")]
)
def test_a_disk_that_is_not_there(tmp_path, mapper, serial, name):
    machine = Machine(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=serial) as refused:
        run(machine)
    assert refused.value.code == "guest.disk_missing"


@pytest.mark.parametrize("serial", ["cm-config", "cm-log"])
def test_a_disk_that_is_there_twice(tmp_path, mapper, serial):
    machine = Machine(tmp_path)
    machine.disk("vde", 64, serial=serial, data=b"x" * 4096)
    with pytest.raises(ConfigError) as refused:
        run(machine)
    assert refused.value.code == "guest.disk_twice"


def test_weights_that_are_there_twice(tmp_path, mapper):
    machine = Machine(tmp_path)
    machine.disk("vde", 64, partitions={"countermark-weights": b"x" * 4096})
    with pytest.raises(ConfigError) as refused:
        run(machine)
    assert refused.value.code == "guest.disk_twice"


def test_a_late_disk_is_waited_for(tmp_path, mapper):
    machine, clock = Machine(tmp_path), Clock()
    serial = tmp_path / "sys/block/vdc/serial"
    serial.unlink()

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.time > 3:
            serial.write_text("cm-config\n")

    disks = Disks(machine, now=clock.now, sleep=sleep)
    assert disks.with_serial("cm-config") == Disk(name="vdc", device="254:32", size_bytes=4096)


@pytest.mark.parametrize(
    ("change", "code", "error"),
    [
        (lambda m: m.put("dev/vdb2", b"x" + TREE[1:]), "weights.superblock", WeightsError),
        (lambda m: m.put("dev/vdb2", b""), "weights.superblock", WeightsError),
        (lambda m: m.put("dev/vdb2", verityformat.superblock(4)), "guest.weights_size", ConfigError),
        (lambda m: m.put("sys/class/block/vdb1/size", "16"), "guest.weights_size", ConfigError),
        (lambda m: m.put("sys/class/block/vdb2/size", "8"), "guest.weights_size", ConfigError),
        (lambda m: m.put("sys/class/block/vdb1/size", ""), "guest.weights_size", ConfigError),
        (lambda m: (m.root / "dev/mapper/control").unlink(), "guest.device_mapper", ConfigError),
    ],
)
def test_weights_that_are_refused(tmp_path, mapper, change, code, error):
    machine = Machine(tmp_path)
    change(machine)
    with pytest.raises(error) as refused:
        run(machine)
    assert refused.value.code == code
    assert mapper.calls == []


def test_device_mapper_says_no(tmp_path, mapper):
    mapper.error = 22
    with pytest.raises(ConfigError) as refused:
        run(Machine(tmp_path))
    assert refused.value.code == "guest.device_mapper"
    assert not (tmp_path / "run/countermark/weights").exists()


@pytest.mark.parametrize("code", [2, 4, 8, 12, -11])
def test_a_log_disk_that_cannot_be_repaired(tmp_path, mapper, code):
    with pytest.raises(ConfigError) as refused:
        run(Machine(tmp_path), fsck=code)
    assert refused.value.code == "guest.log_disk"
    assert not (tmp_path / "run/countermark/devices").exists()


def test_a_repaired_log_disk_serves(tmp_path, mapper):
    run(Machine(tmp_path), fsck=1)


def test_modules_that_stay_open(tmp_path, mapper):
    machine = Machine(tmp_path)
    machine.no_write = True
    with pytest.raises(ConfigError) as refused:
        run(machine)
    assert refused.value.code == "guest.modules"


def test_the_host_is_heard_first(tmp_path, mapper):
    """Nothing is read from a disk of a host that says what it may not."""
    machine = Machine(tmp_path)
    machine.put(host.OEM_STRINGS, INJECTED)
    (tmp_path / "dev/vdc").unlink()
    with pytest.raises(MeasurementError) as refused:
        run(machine)
    assert refused.value.code == "guest.smbios"


def test_it_runs_once(tmp_path, mapper):
    machine = Machine(tmp_path)
    run(machine)
    with pytest.raises((CountermarkError, FileExistsError)):
        run(machine)


PROGRAM = """
import logging, sys
from countermark.errors import ConfigError
from countermark_appliance.guest import __main__ as guest

def ours():
    raise ConfigError("disks:\\nexpected one", code="guest.disk_missing")

def fault():
    raise ValueError("the prompt")

def run(_args):
    logging.getLogger("countermark_appliance.main").warning("ours\\nin two lines")
    logging.getLogger("asyncio").error("the prompt", exc_info=True)
    {"ours": ours, "fault": fault, "module": lambda: __import__("absent"), "fine": lambda: None}[sys.argv[1]]()

guest._prepare = run
sys.exit(guest.main(["prepare"]))
"""


@pytest.mark.parametrize(
    ("kind", "code", "last"),
    [
        ("ours", 1, "countermark: refused guest.disk_missing: disks: expected one"),
        ("fault", 70, "countermark: failed: ValueError at fault:"),
        ("module", 70, "countermark: failed: the image has no module 'absent'"),
        ("fine", 0, ""),
    ],
)
def test_what_the_console_shows(kind, code, last):
    ended = subprocess.run([sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True, check=False)
    lines = ended.stdout.splitlines()
    assert ended.returncode == code
    assert lines[0].endswith("WARNING countermark_appliance.main: ours in two lines")
    assert "ERROR asyncio: (text withheld)" in lines[1]
    assert lines[-1].startswith(last)
    assert "the prompt" not in ended.stdout + ended.stderr


def test_prepare_loads_no_engine():
    """Under emulation every import costs; none of these is needed before the service."""
    program = "import json, sys; import countermark_appliance.guest.prepare; print(json.dumps(sorted(sys.modules)))"
    shown = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True).stdout
    heavy = {"torch", "numpy", "grpc", "cryptography", "OpenSSL", "lxml", "rich", "google.protobuf", "tokenizers"}
    assert heavy.isdisjoint(json.loads(shown))
