"""The status page in a browser: what it shows, that it runs nothing of a node's, and that it asks for the key."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace

import pytest
from net_appliance import Appliance
from proxy_helpers import Proxy

from countermark.errors import MeasurementError
from countermark.proxy import status
from countermark.proxy.guard import Guard
from countermark.proxy.upstream import Seen, State

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def dom(url: str) -> str:
    """What the browser shows once the page has asked for its facts."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: the status page was NOT opened in a browser")
    command = (CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom", url)
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_policy_of_the_page_names_its_own_script_and_style_alone() -> None:
    policy = status.HEADERS["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert policy.count("'sha256-") == 2
    assert "unsafe" not in policy
    page = status.PAGE.decode()
    assert "http://" not in page and "https://" not in page
    assert "innerHTML" not in page


def test_what_it_shows(proxy: Proxy, appliance: Appliance) -> None:
    _, found = proxy.chat("SECRET words")
    shown = dom(f"http://{proxy.address}/")
    for text in (
        appliance.address,
        "SIMULATED",
        "verified",
        found["countermark"]["receipt"][:16],
        found["system_fingerprint"],
        "numbered checks: 10 passed, 2 skipped",
        "17 passed, 1 skipped",
    ):
        assert text in shown
    assert "SECRET" not in shown


def test_what_a_node_says_is_shown_and_does_not_run(appliance: Appliance) -> None:
    evil = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
    with Proxy.of(appliance) as proxy:
        (node,) = proxy.app.upstream.nodes
        error = MeasurementError(evil, code="measurement.mrtd", step="5")
        node.seen = replace(Seen(state=State.REFUSED, at=0.0, error=error))
        node.model = evil
        shown = dom(f"http://{proxy.address}/")
    assert "<title>countermark proxy</title>" in shown
    assert "&lt;img src=x onerror=" in shown
    assert "<img" not in shown


def test_a_key_is_asked_for_before_anything_is_shown(appliance: Appliance) -> None:
    with Proxy.of(appliance, guard=Guard(listen="127.0.0.1", key=b"a key of this proxy")) as proxy:
        shown = dom(f"http://{proxy.address}/")
    assert "This proxy has a key" in shown
    assert '<form id="ask">' in shown
    assert appliance.address not in shown
