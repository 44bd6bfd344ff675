"""What is in an image that was built (`make image`): nothing that a production image may not hold."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path, PurePosixPath

import pytest

OUT = Path(__file__).resolve().parents[2] / "image" / "out"
SITE = "usr/lib/python3/dist-packages"
NEVER = re.compile(
    r"/(?:sh|bash|dash|busybox|zsh|perl[\d.]*|python2[\d.]*|pip3?|apt[-\w]*|dpkg[-\w]*|snap|ssh\w*|telnet\w*|agetty|getty|login|"
    r"su|sudo|pkexec|gdb|strace|tcpdump|nc|curl|wget|systemctl|udevadm|systemd-run|systemd-sysext|systemd-creds)$"
)
NEEDLESS = re.compile(
    r"^usr/(?:share/(?:doc|man|info|locale|i18n)|include|games|src)/|\.(?:h|a|la|pc|pyi|pyx|pxd|whl)$|/tests?/"
)


def built(name: str) -> Path:
    folder = OUT / name
    if not (folder / "image.json").is_file():
        pytest.skip(f"no image {name} was built: nothing of it is checked here (make image)")
    return folder


def files(folder: Path) -> dict[str, tuple[str, int, str]]:
    """path -> (digest or link, bytes, mode), from files.txt."""
    found = {}
    for line in (folder / "files.txt").read_text().splitlines():
        digest, size, mode, path = line.rsplit(" ", 3)
        assert path not in found
        found[path] = (digest, int(size), mode)
    assert len(found) > 1000
    return found


@pytest.mark.parametrize("name", ["production-cpu", "production-gpu"])
def test_production_holds_no_simulated_platform(name: str) -> None:
    listed = files(built(name))
    assert f"{SITE}/countermark_appliance/platform/base.py" in listed
    assert f"{SITE}/countermark_appliance/platform/tdx/__init__.py" in listed
    for path in listed:
        assert "/platform/sim" not in path and "vtpm" not in PurePosixPath(path).parts, path
        assert not path.startswith("usr/lib/countermark/sim"), path
        assert "swtpm" not in path, path


@pytest.mark.parametrize("name", ["production-cpu", "production-gpu", "test-cpu"])
def test_no_shell_no_package_manager_nothing_setuid_nothing_writable(name: str) -> None:
    for path, (_, _, mode) in files(built(name)).items():
        assert not NEVER.search(f"/{path}"), path
        assert mode in ("0644", "0755", "0777"), (path, mode)
        assert not path.startswith(("usr/lib/modules/", "boot/")) or name.endswith("gpu"), path


@pytest.mark.parametrize("name", ["production-cpu", "production-gpu", "test-cpu"])
def test_nothing_that_the_service_cannot_use(name: str) -> None:
    # C sources of our kernels stay: their digest is the numerics' name.
    ours = f"{SITE}/countermark_kernels/native/"
    needless = [path for path in files(built(name)) if NEEDLESS.search(path) and not path.startswith(ours)]
    assert needless == []


@pytest.mark.parametrize("name", ["production-cpu", "test-cpu"])
def test_every_module_has_its_byte_code(name: str) -> None:
    listed = files(built(name))
    for path in listed:
        if path.endswith(".py"):
            pure = PurePosixPath(path)
            assert str(pure.parent / "__pycache__" / f"{pure.stem}.cpython-313.pyc") in listed, path


def test_test_and_production_differ_in_the_simulation_alone() -> None:
    production, test = files(built("production-cpu")), files(built("test-cpu"))
    more = {path for path in test if test[path] != production.get(path)}
    allowed = ("/platform/sim/", "/platform/vtpm/", "countermark/sim/", "/formats/tpm_log.py", "/tpm_log.cpython-")
    assert more
    assert {path for path in more if not any(part in path for part in allowed)} == set()
    assert set(production) <= set(test)


@pytest.mark.parametrize("name", ["production-cpu", "test-cpu", "development-cpu"])
def test_image_json_says_what_lies_beside_it(name: str) -> None:
    folder = built(name)
    stated = json.loads((folder / "image.json").read_text())
    assert f"{stated['kind']}-{stated['variant']}" == name
    assert stated["cmdline"].split().count(f"roothash={stated['roothash']}") == 1
    assert stated["image_id"] == stated["roothash"]
    for file, digest in stated["subjects"].items():
        said = subprocess.run(["sha256sum", str(folder / file)], capture_output=True, text=True, check=True).stdout
        assert said.split()[0] == digest
        assert (folder / file).stat().st_size == stated["sizes"][file]
