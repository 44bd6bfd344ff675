"""image/rootfs: what systemd itself says of the units, and that nothing of it opens a door."""

import re
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

from countermark_appliance.guest import host, prepare

ROOTFS = Path(__file__).parents[2] / "image" / "rootfs"
COMMON = ROOTFS / "common"
UNITS = COMMON / "usr/lib/systemd/system"
OURS = ("countermark.service", "countermark-prepare.service")
KEPT = [line for line in (ROOTFS / "systemd.keep").read_text().splitlines() if line and not line.startswith("#")]


def settings(path: Path) -> dict[str, dict[str, list[str]]]:
    """Section -> key -> values, in order; systemd.syntax(7) without line continuation, which ours do not use."""
    found: dict[str, dict[str, list[str]]] = {}
    section = ""
    for line in path.read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and line[0] not in "#;":
            key, _, value = line.partition("=")
            found.setdefault(section, {}).setdefault(key, []).append(value)
    return found


def overlays() -> list[Path]:
    return [path for path in ROOTFS.rglob("*") if path.is_file() or path.is_symlink()]


@pytest.mark.parametrize("unit", [*OURS, "run-countermark-log.mount"])
def test_whatever_ends_or_fails_reboots(unit):
    section = settings(UNITS / unit)["Unit"]
    assert section["FailureAction"] == ["reboot-force"]
    if unit == "countermark.service":
        assert section["SuccessAction"] == ["reboot-force"]
    assert settings(UNITS / "countermark-end.service")["Unit"]["SuccessAction"] == ["reboot-force"]
    assert settings(UNITS / "countermark.target")["Unit"]["OnFailure"] == ["countermark-end.service"]


def test_the_order_is_prepare_log_service():
    log, service = (
        settings(UNITS / "run-countermark-log.mount")["Unit"],
        settings(UNITS / "countermark.service")["Unit"],
    )
    assert log["After"] == log["Requires"] == ["countermark-prepare.service"]
    assert service["Requires"] == ["countermark-prepare.service run-countermark-log.mount"]
    assert {"countermark-prepare.service", "run-countermark-log.mount"} <= set(" ".join(service["After"]).split())
    mount = settings(UNITS / "run-countermark-log.mount")["Mount"]
    assert mount["What"] == [f"/{prepare.RUN}/devices/log"]
    assert mount["Where"] == [f"/{prepare.RUN}/log"]
    assert {"nodev", "nosuid", "noexec", "nosymfollow"} <= set(mount["Options"][0].split(","))


def test_the_service_can_do_nothing_that_root_can():
    service = settings(UNITS / "countermark.service")["Service"]
    assert service["CapabilityBoundingSet"] == service["AmbientCapabilities"] == [""]
    for key in ("NoNewPrivileges", "ProtectKernelTunables", "ProtectKernelModules", "RestrictNamespaces"):
        assert service[key] == ["yes"], key
    assert service["ProtectSystem"] == ["strict"]
    assert service["LimitCORE"] == ["0"]


def test_the_service_sees_no_socket_of_the_managers():
    """The manager takes orders from any process of root that reaches /run/systemd/private."""
    service = settings(UNITS / "countermark.service")["Service"]
    assert service["TemporaryFileSystem"] == ["/run:ro"]
    bound = " ".join(service["BindReadOnlyPaths"] + service["BindPaths"]).split()
    assert [path for path in bound if path.lstrip("-").startswith("/run")] == [
        *(f"/{prepare.RUN}/{name}" for name in ("node.toml", "weights")),
        "-/run/systemd/resolve",
        f"/{prepare.RUN}/log",
    ]
    assert "/sys" in bound


def test_the_commands_are_ours_and_need_no_shell():
    for unit in OURS:
        (command,) = settings(UNITS / unit)["Service"]["ExecStart"]
        assert command.startswith("/usr/bin/python3 -I -m countermark_appliance.guest ")
        assert f"--config /{prepare.RUN}/node.toml" in command or command.endswith(" prepare")


@pytest.mark.parametrize("part", ["common", "gpu"])
def test_no_shell_login_or_generator_outside_development(part):
    names = [str(path.relative_to(ROOTFS / part)) for path in (ROOTFS / part).rglob("*")]
    assert not [name for name in names if re.search(r"getty|shell|login|ssh|generator|udev|sysext|credstore", name)]
    for path in (ROOTFS / part).rglob("*.service"):
        if path.is_symlink():
            continue
        text = path.read_text()
        assert "/sh" not in text.replace("/share", "")
        assert "bash" not in text


def test_development_adds_a_shell_and_nothing_else():
    names = sorted(path.name for path in (ROOTFS / "development").rglob("*") if path.is_file() or path.is_symlink())
    assert names == ["countermark-shell.service", "countermark-shell.service"]  # the unit, and the link that wants it


def test_nothing_of_systemd_is_kept_that_takes_a_hosts_word():
    doors = r"generator|getty|emergency|rescue|sulogin|debug|credential|creds|sysext|confext|firstboot|pcr|tpm|ask-pass"
    doors += (
        r"|ssh|udev|logind|hostnamed|localed|timedated|import|gpt|fstab|repart|homed|machined|coredump|kexec|volatile"
    )
    assert len(KEPT) > 40
    assert [line for line in KEPT if re.search(doors, line)] == []


def test_the_words_of_the_command_line():
    words = (COMMON / host.WORDS).read_text().split()
    wanted = {
        "systemd.gpt_auto=0",
        "systemd.import_credentials=no",
        "lockdown=confidentiality",
        "module.sig_enforce=1",
        "panic=-1",
        "random.trust_cpu=on",
        "random.trust_bootloader=off",
        "efi=noruntime",
    }
    assert wanted <= set(words)
    assert len(words) == len(set(words))
    assert not [word for word in words if word.startswith("roothash=") or '"' in word]


def test_the_kernel_is_closed():
    text = (COMMON / "usr/lib/sysctl.d/50-countermark.conf").read_text()
    found = dict(line.lstrip("-").split(" =") for line in text.splitlines() if line and not line.startswith("#"))
    assert found["kernel.kexec_load_disabled"].strip() == "1"
    assert found["kernel.sysrq"].strip() == "0"
    assert found["user.max_user_namespaces"].strip() == "0"
    assert "kernel.modules_disabled" not in found  # too early for a GPU's modules: the preparation does it


def test_nobody_can_log_in():
    for line in (COMMON / "etc/passwd").read_text().splitlines():
        name, password, _, _, _, _, shell = line.split(":")
        assert (password, shell) == ("*", "/usr/sbin/nologin"), name


def test_the_network_gives_addresses_and_no_names():
    parser = ConfigParser(strict=True)
    parser.optionxform = str
    parser.read_string((COMMON / "etc/systemd/network/10-host.network").read_text())
    for section in ("DHCPv4", "DHCPv6"):
        for key in ("UseHostname", "UseDomains", "UseNTP"):
            assert parser[section][key] == "no"


def test_networkd_sees_no_udev():
    """It takes links as they are when /sys is read-only, and else waits for udev, which an image has not."""
    for unit in ("systemd-networkd", "systemd-networkd-wait-online"):
        drop_in = COMMON / f"etc/systemd/system/{unit}.service.d/50-countermark.conf"
        assert settings(drop_in)["Service"]["BindReadOnlyPaths"] == ["/sys"]


def test_links_stay_inside():
    for path in overlays():
        if path.is_symlink():
            target = path.readlink()
            assert ".." not in target.parts[2:], path
            assert not target.is_absolute() or target.parts[1] in ("usr", "run", "etc"), path


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_reads_the_units(tmp_path):
    """`systemd-analyze verify` on the overlay over this machine's own systemd units of the kept names."""
    units = [path for line in KEPT if line.startswith("usr/lib/systemd/system/") and (path := Path("/", line)).exists()]
    if not units:
        pytest.skip("systemd's units are not installed")
    for unit in units:
        target = tmp_path / str(unit)[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(unit, target, follow_symlinks=True)
    shutil.copytree(COMMON, tmp_path, symlinks=True, dirs_exist_ok=True)
    for program in (
        "usr/bin/python3",
        *(line for line in KEPT if "/systemd/systemd" in line and "/system/" not in line),
    ):
        (tmp_path / program).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / program).write_text("#!/bin/false\n")
        (tmp_path / program).chmod(0o755)
    shown = subprocess.run(
        ["systemd-analyze", "verify", f"--root={tmp_path}", "--man=no", "--generators=no", "countermark.target"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    version = int(
        re.search(
            r"\d+", subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=True).stdout
        )[0]
    )
    known = "" if version >= 257 else r"PrivateTmp|PrivateIPC|CrashAction|DHCPv|Unknown|Failed to parse"
    lines = [
        line for line in shown.stderr.splitlines() if "countermark" in line and not (known and re.search(known, line))
    ]
    assert lines == []
