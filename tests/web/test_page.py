"""The page in a browser without a network: what a person sees, hears read aloud and prints."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from judges import PAGE
from variants import VARIANTS

from countermark.bundle import encode_bundle
from countermark.policy import encode_policy
from one_answer import NOW, World, make_world

HOSTILE = '<img src="x" onerror="document.title=1"><script>document.title=2</script>'


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("answer"))


@pytest.fixture(scope="module")
def files(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the policy and bundles: good, tampered, redacted."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "policy.toml").write_text(encode_policy(world.machine.policy), encoding="utf-8")
    good = encode_bundle(world.bundle())
    for name, variant in (
        ("answer", "good"),
        ("tampered", "answer text"),
        ("redacted", "without the prompt"),
        ("other", "quote signature"),
        ("cut", "cut in half"),
    ):
        make = VARIANTS.get(variant, VARIANTS["ES256 signature"])
        (folder / f"{name}.cmk").write_bytes(make(good))
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def verify(browser: Browser, bundle: Path, policy: Path, **how: Any) -> dict[str, Any]:
    """Open the page, choose the files and the time, press the button; the result as JSON."""
    browser.open(PAGE, **how)
    browser.choose("bundle", bundle)
    browser.choose("policy", policy)
    at = datetime.fromtimestamp(NOW, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    browser.run(f"document.getElementById('at').value = '{at}'; document.getElementById('assumed').click(); 0")
    browser.run("document.getElementById('verify').click(); 0")
    browser.wait(lambda: browser.run("document.getElementById('json') !== null"))
    value: dict[str, Any] = json.loads(browser.run("document.getElementById('json').textContent"))
    return value


def shown(browser: Browser) -> str:
    text: str = browser.run("document.getElementById('result').innerText")
    return text


@pytest.mark.parametrize(
    ("name", "verdict", "code", "words"),
    [
        ("answer", "partial", "", ("SIMULATED", "Verified in part", "Which city is the capital of France?", "Paris.")),
        ("tampered", "reject", "receipt.output_text", ("SIMULATED", "Rejected", "(receipt.output_text)")),
        ("redacted", "partial", "", ("Redacted: the prompt was left out", "left out of this file", "Paris.")),
        ("other", "reject", "receipt.es256", ("Rejected", "the ES256 signature does not verify")),
        ("cut", "reject", "bundle.container", ("Rejected", "Steps 1 to 20: not reached")),
    ],
)
def test_what_it_says(
    browser: Browser, files: Path, name: str, verdict: str, code: str, words: tuple[str, ...]
) -> None:
    result = verify(browser, files / f"{name}.cmk", files / "policy.toml")
    assert (result["verdict"], result["code"], result["simulated"]) == (verdict, code, True)
    assert result["time"] == {"value": NOW, "basis": "assumed"}
    text = shown(browser)
    for part in words:
        assert part in text
    assert ("Paris." in text) is (verdict == "partial")
    assert "time: assumed" in text
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith(("file:", "data:image/svg+xml"))] == []
    assert browser.run("document.activeElement.tagName") == "H2"


def test_what_came_from_a_file_is_never_markup(browser: Browser, world: World, tmp_path: Path) -> None:
    """An answer that is markup, properly signed: it is shown as it is."""
    from test_receipt_agreement import answered

    (tmp_path / "policy.toml").write_text(encode_policy(world.machine.policy), encoding="utf-8")
    made = answered(world.machine, world.evidence, out_output_text=HOSTILE)
    (tmp_path / "hostile.cmk").write_bytes(encode_bundle(made))
    assert verify(browser, tmp_path / "hostile.cmk", tmp_path / "policy.toml")["verdict"] == "partial"
    assert HOSTILE in shown(browser)
    assert browser.run("document.querySelectorAll('#result img, #result script').length") == 0
    assert browser.run("document.title").startswith("SIMULATED, partial")


def test_the_content_security_policy_holds(browser: Browser) -> None:
    browser.open(PAGE)
    reached = browser.run("fetch('https://example.com').then(() => 'reached', () => 'refused')")
    assert reached == "refused"
    assert browser.run("try { eval('1'); 'ran' } catch { 'refused' }") == "refused"
    assert browser.run("try { document.body.innerHTML = '<b>x</b>'; 'ran' } catch { 'refused' }") == "refused"
    refused = " ".join(browser.complaints())
    assert "connect-src" in refused or "Content Security Policy" in refused


def test_it_asks_for_what_is_missing(browser: Browser, files: Path) -> None:
    def says() -> str:
        browser.run("document.getElementById('verify').click(); 0")
        text: str = browser.run("document.getElementById('status').textContent")
        return text

    browser.open(PAGE)
    assert says() == "Choose the bundle, a .cmk file."
    browser.choose("bundle", files / "answer.cmk")
    assert says() == "Choose the policy, a .toml file."
    browser.choose("policy", files / "answer.cmk")
    browser.run("document.getElementById('assumed').click(); 0")
    assert says() == "Choose the time, or take the computer's clock."
    browser.run("document.querySelector('input[value=now]').click(); document.getElementById('verify').click(); 0")
    browser.wait(lambda: browser.run("document.querySelector('#status.error') !== null"))
    assert browser.run("document.getElementById('status').textContent") == "The policy is not a text file."


def test_files_can_be_dropped(browser: Browser, files: Path) -> None:
    """Both at once, whatever their names: what they are is told by their content."""
    browser.open(PAGE)
    encoded = {name: list((files / name).read_bytes()) for name in ("answer.cmk", "policy.toml")}
    browser.run(
        f"""(() => {{
        const list = new DataTransfer();
        list.items.add(new File([new Uint8Array({encoded["answer.cmk"]})], "one"));
        list.items.add(new File([new Uint8Array({encoded["policy.toml"]})], "two"));
        document.dispatchEvent(new DragEvent("drop", {{ dataTransfer: list, bubbles: true, cancelable: true }}));
        }})()"""
    )
    browser.wait(lambda: browser.run("document.getElementById('json') !== null"))
    result = json.loads(browser.run("document.getElementById('json').textContent"))
    assert result["time"]["basis"] == "now"
    assert result["verdict"] in ("reject", "undecidable", "partial")  # by the clock of the machine that tests


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 1000])
def test_it_fits_the_screen_and_can_be_read(browser: Browser, files: Path, width: int, dark: bool) -> None:
    verify(browser, files / "answer.cmk", files / "policy.toml", width=width, dark=dark, mobile=width < 500)
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.run(CONTRAST) == []


def test_names_and_roles_for_those_who_listen(browser: Browser, files: Path) -> None:
    verify(browser, files / "answer.cmk", files / "policy.toml")
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    named = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]}
    assert ("button", "Verify") in named
    assert ("status", "") in named or any(role == "status" for role, _ in named)
    assert any(role == "alert" for role, _ in named)
    assert any(role == "heading" and "Verified in part" in name for role, name in named)
    assert any("Bundle (.cmk)" in name for _, name in named)
    assert any("Policy (.toml)" in name for _, name in named)
    assert any("Time in UTC" in name for _, name in named)
    levels = browser.run("[...document.querySelectorAll('h1,h2,h3')].map((item) => Number(item.tagName[1]))")
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))


def test_it_prints(browser: Browser, files: Path) -> None:
    verify(browser, files / "answer.cmk", files / "policy.toml", dark=True)
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.run("getComputedStyle(document.querySelector('form')).display") == "none"
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    pages = browser.call("Page.printToPDF", printBackground=False)["data"]
    assert len(pages) > 10_000
    browser.call("Emulation.setEmulatedMedia", media="")


# Every text on the page against what is behind it: WCAG 2.2, 1.4.3, at least 4.5 to 1, and 3 to 1 where it is large.
CONTRAST = """(() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [...n.slice(0, 3), n[3] ?? 1]; };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (item) => {
    for (let at = item; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color[3] === 1) return color;
    }
    return [255, 255, 255, 1];
  };
  const bad = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const item = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !item.checkVisibility() || item.closest("script, noscript, button")) continue;
    const style = getComputedStyle(item);
    const [a, b] = [light(parse(style.color).slice(0, 3)), light(behind(item).slice(0, 3))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) bad.push([ratio, walk.currentNode.data.slice(0, 40)]);
  }
  return bad;
})()"""
