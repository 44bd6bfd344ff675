"""What is fetched is what was locked, or the build ends and says what to do."""

from __future__ import annotations

import hashlib
import http.server
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from steps import locks
from steps.errors import BuildError
from steps.fetch import fetch_packages, fetch_wheels, unpack_wheels
from steps.locks import Package, Wheel

DATA = b"!<arch>\nnot really a package\n"


def package(data: bytes = DATA, path: str = "debian/pool/main/h/hello/hello_1.0_amd64.deb") -> Package:
    return Package(
        name="hello", version="1.0", arch="amd64", sha256=hashlib.sha256(data).hexdigest(), size=len(data), path=path
    )


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A pool on a port of this machine: a folder served as deb.debian.org would."""
    root = tmp_path / "pool"
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, directory=str(root), **kwargs)  # type: ignore[arg-type, misc]

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setitem(locks.HOSTS, "debian", f"http://127.0.0.1:{server.server_port}/")
    yield root
    server.shutdown()
    server.server_close()


def serve(pool: Path, data: bytes) -> None:
    file = pool / package().path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def test_a_package_comes_from_the_pool_once(pool: Path, tmp_path: Path) -> None:
    serve(pool, DATA)
    (file,) = fetch_packages([package()], tmp_path / "cache")
    assert file.read_bytes() == DATA
    (pool / package().path).unlink()
    assert fetch_packages([package()], tmp_path / "cache") == [file]


@pytest.mark.parametrize("data", [b"", DATA[:-1], DATA + b"x", b"X" + DATA[1:]])
def test_other_bytes_are_refused_and_not_kept(pool: Path, tmp_path: Path, data: bytes) -> None:
    serve(pool, data)
    with pytest.raises(BuildError, match=r"hello 1\.0: expected"):
        fetch_packages([package()], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_changed_file_in_the_cache_is_fetched_again(pool: Path, tmp_path: Path) -> None:
    serve(pool, DATA)
    (file,) = fetch_packages([package()], tmp_path / "cache")
    file.write_bytes(b"X" + DATA[1:])
    (again,) = fetch_packages([package()], tmp_path / "cache")
    assert again.read_bytes() == DATA


def test_a_package_that_the_pool_forgot_is_named_with_the_way_out(pool: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"hello 1\.0 is no longer in Debian's pool.*image/lock.*--packages"):
        fetch_packages([package()], tmp_path / "cache")


def test_a_saved_folder_is_enough_and_is_checked_as_well(pool: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    with pytest.raises(BuildError, match=r"hello 1\.0: .* is not there"):
        fetch_packages([package()], tmp_path / "cache", saved)
    (saved / package().filename).write_bytes(DATA[:-1] + b"?")
    with pytest.raises(BuildError, match="expected"):
        fetch_packages([package()], tmp_path / "cache", saved)
    (saved / package().filename).write_bytes(DATA)
    (file,) = fetch_packages([package()], tmp_path / "cache", saved)
    assert file.read_bytes() == DATA


def test_a_wheel_is_found_by_its_hash_not_by_its_name(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "any-name-at-all.whl").write_bytes(DATA)
    right = Wheel(name="thing", version="1", sha256=hashlib.sha256(DATA).hexdigest())
    wrong = Wheel(name="thing", version="1", sha256="0" * 64)
    assert fetch_wheels([right], tmp_path / "cache", saved) == [saved / "any-name-at-all.whl"]
    with pytest.raises(BuildError, match="thing 1"):
        fetch_wheels([wrong], tmp_path / "cache", saved)


@pytest.mark.parametrize("name", ["../outside.py", "/etc/outside.py", "a/../../outside.py"])
def test_a_wheel_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    wheel = tmp_path / "bad.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(BuildError, match="leaves"):
        unpack_wheels([wheel], tmp_path / "out")
    assert not (tmp_path / "outside.py").exists()


def test_two_wheels_may_not_fight_over_a_file(tmp_path: Path) -> None:
    wheels = []
    for number in (1, 2):
        wheels.append(tmp_path / f"{number}.whl")
        with zipfile.ZipFile(wheels[-1], "w") as archive:
            archive.writestr("same/name.py", f"value = {number}\n")
            archive.writestr("shared/__init__.py", "")
    with pytest.raises(BuildError, match="another package's"):
        unpack_wheels(wheels, tmp_path / "out")
