"""The pictures of the page in docs/img, from a folder that `countermark demo` has written.

    python tests/web/pictures.py demo-out

Verified in part; rejected, because one word of the answer was changed; redacted, as on a phone in the dark.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from browser import Browser
from judges import PAGE, ROOT
from variants import VARIANTS, edit

from countermark.bundle import read_bundle
from countermark.formats.receipt import parse_receipt
from countermark.formats.records import parse_outcome

PICTURES = (
    ("partial", lambda data: data, {"width": 900}, 1900),
    (
        "rejected",
        edit("answer.cbor", lambda found: found.update(text=found["text"].replace("blue", "green", 1))),
        {"width": 900},
        1900,
    ),
    ("redacted", VARIANTS["without the prompt"], {"width": 400, "dark": True, "mobile": True}, 2000),
)


def main(demo: Path) -> None:
    bundle = read_bundle(demo / "answer.cmk")
    ended = parse_outcome(parse_receipt(bundle.receipt).payload.outcome.record).ended_us // 1_000_000
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ended + 60))
    out = ROOT / "docs" / "img"
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        browser = Browser(folder / "profile")
        for name, change, how, height in PICTURES:
            made = folder / f"{'answer' if name == 'partial' else name}.cmk"
            made.write_bytes(change((demo / "answer.cmk").read_bytes()))
            browser.open(PAGE, **how)
            browser.choose("bundle", made)
            browser.choose("policy", demo / "policy.toml")
            browser.run(f"document.getElementById('at').value = '{at}'; document.getElementById('assumed').click(); 0")
            browser.run("document.getElementById('verify').click(); 0")
            browser.wait(lambda: browser.run("document.getElementById('json') !== null"))
            browser.picture(out / f"verify-{name}.png", height=height)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
