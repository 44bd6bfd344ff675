"""The committed page is what its sources give, byte for byte, and it allows itself nothing but its own script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from judges import PAGE, ROOT, node

from countermark import appraise, numerics

WEB = ROOT / "web"
HTML = PAGE.read_text(encoding="utf-8")


def build(folder: Path) -> bytes:
    """The page from a copy of the sources in another place; skips when npm's packages are not there."""
    node()
    if not (WEB / "node_modules").is_dir():
        pytest.skip("no web/node_modules: the committed page was not compared with a fresh build (run `make web`)")
    shutil.copytree(WEB, folder, ignore=shutil.ignore_patterns("node_modules", "dist"))
    (folder / "node_modules").symlink_to(WEB / "node_modules")
    done = subprocess.run([node(), folder / "build.mjs"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return (folder / "dist" / "verify.html").read_bytes()


def test_two_builds_in_two_places_are_the_committed_page(tmp_path: Path) -> None:
    first, second = build(tmp_path / "here"), build(tmp_path / "elsewhere" / "deeper")
    assert first == second
    assert first == PAGE.read_bytes(), "docs/verify.html is not what web/ gives: run `make web` and commit it"


def test_types_hold() -> None:
    compiler = WEB / "node_modules" / "typescript" / "bin" / "tsc"
    if not compiler.exists():
        pytest.skip("no web/node_modules: the page's types were not checked (run `make web`)")
    done = subprocess.run([node(), compiler, "--noEmit", "-p", WEB], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_size() -> None:
    assert len(HTML) < 1_500_000


def test_the_lock_names_versions_and_no_place() -> None:
    lock = (WEB / "package-lock.json").read_text(encoding="utf-8")
    assert "http" not in re.sub(r'"(url|funding)": "[^"]*"', "", lock)
    packages = {name: item for name, item in json.loads(lock)["packages"].items() if name}
    assert len(packages) > 10
    assert all("resolved" not in item and item["integrity"].startswith("sha512-") for item in packages.values())
    wanted = json.loads((WEB / "package.json").read_text(encoding="utf-8"))
    for name, version in {**wanted["dependencies"], **wanted["devDependencies"]}.items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version), name
        assert packages[f"node_modules/{name}"]["version"] == version


def directives() -> dict[str, str]:
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', HTML)
    pairs = (item.strip().partition(" ") for item in policy.split(";"))
    return {name: value for name, _, value in pairs}


def test_only_its_own_script_and_style_may_run_and_nothing_may_be_fetched() -> None:
    def allowed(tag: str) -> str:
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", HTML, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        return f"'sha256-{digest}'"

    assert directives() == {
        "default-src": "'none'",
        "connect-src": "'none'",
        "script-src": allowed("script"),
        "style-src": allowed("style"),
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    head, _, _ = HTML.partition("<script>")
    assert head.index("Content-Security-Policy") < head.index("<style>")
    assert not re.search(r"\son\w+=|<link|<img|<iframe|src=", head)


def test_nothing_in_it_reaches_out_or_writes_markup() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in WEB.glob("src/**/*.ts"))
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|importScripts)\b", sources)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", sources)
    assert not re.search(r"localStorage|sessionStorage|indexedDB|document\.cookie", sources)


def test_every_package_inside_is_named_with_its_terms() -> None:
    contained = set(re.findall(r"// node_modules/((?:@[^/]+/)?[^/]+)/", HTML))
    notices = dict(re.findall(r"^Contains (\S+) \S+ \(([^)]+)\)\.$", HTML, re.MULTILINE))
    assert contained == set(notices)
    assert len(contained) >= 8
    assert set(notices.values()) <= {"MIT", "BSD-3-Clause", "0BSD"}


def test_steps_and_profiles_are_those_of_the_client() -> None:
    steps = (WEB / "src" / "core" / "steps.ts").read_text(encoding="utf-8")
    named = dict(re.findall(r'^  "(\w+)": "(.+)",$', steps, re.MULTILINE))
    for number, name in appraise.STEPS.items():
        assert number == "7" or named[number] == name
    client = "".join((ROOT / "client" / "countermark" / name).read_text() for name in ("receipt.py", "verify.py"))
    for number in map(str, range(12, 20)):
        assert f'"{number}", "{named[number]}"' in client, named[number]
    assert f'"{named["20"]}"' in (ROOT / "client" / "countermark" / "witness.py").read_text()
    profiles = (WEB / "src" / "core" / "numerics.ts").read_text(encoding="utf-8")
    assert f'CURRENT = "{numerics.CURRENT}"' in profiles
    for name, profile in numerics.PROFILES.items():
        assert name == numerics.CURRENT or f'"{name}"' in profiles
        assert (profile.retired or "retired") in profiles
        assert all(f'"{claim}"' in profiles for claim in (profile.determinism, *profile.claims))


def test_codes_are_ones_the_client_has() -> None:
    listed = (ROOT / "docs" / "codes.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in WEB.glob("src/core/*.ts"))
    codes = set(re.findall(r'(?:refused|malformed|undecided)\(\s*"([a-z_0-9]+\.[a-z_0-9]+)"', sources))
    assert len(codes) > 100
    missing = {code for code in codes if f"`{code}`" not in listed}
    assert not missing
