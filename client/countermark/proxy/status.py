"""The status page: what is known of the nodes and of the latest answers, without a word of either.

One HTML file (`status.html`) that reads status.json again every few seconds. Its content security policy names its own
script and style by digest and allows nothing else: what a node says can be shown, and cannot run.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from importlib.metadata import version
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

from countermark.explain import explain_check, explain_code
from countermark.proxy import spoken
from countermark.proxy.upstream import Node, Seen

if TYPE_CHECKING:
    from countermark.proxy.app import App

PAGE: Final = (files("countermark.proxy") / "status.html").read_bytes()


def _digests(tag: str) -> str:
    found = re.findall(rb"<%s>(.*?)</%s>" % (tag.encode(), tag.encode()), PAGE, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one).digest()).decode()}'" for one in found)


HEADERS: Final = {
    "content-type": "text/html; charset=utf-8",
    "content-security-policy": (
        f"default-src 'none'; script-src {_digests('script')}; style-src {_digests('style')}; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-frame-options": "DENY",
}


def as_json(app: App) -> dict[str, Any]:
    """Everything on the page, JSON-ready."""
    bundles = None
    if app.keeper is not None and app.settings.bundles is not None:
        count, size = app.keeper.sizes()
        bundles = {"count": count, "bytes": size, "keep": app.settings.bundles.keep}
        bundles |= {"keep_bytes": app.settings.bundles.keep_bytes, "every": app.settings.bundles.every}
    return {
        "now": time.time(),
        "version": version("countermark"),
        "started": app.started,
        "hold": app.settings.hold,
        "resend": app.settings.resend,
        "reattest_s": app.settings.node_limits.reattest_s,
        "active": app.serving.active,
        "streams": app.settings.streams,
        "sums": app.ledger.sums,
        "bundles": bundles,
        "nodes": [_node(node) for node in app.upstream.nodes],
        "receipts": app.ledger.as_json(),
    }


def _node(node: Node) -> dict[str, Any]:
    seen, counts, links = node.seen, node.counts, node.links
    return {
        "address": node.address,
        "state": seen.state.name.lower(),
        "at": seen.at,
        "model": node.model,
        "verdict": None if seen.verdict is None else _verdict(seen),
        "refusal": _refusal(seen),
        "checks": [check.as_json() | {"explain": _advice(explain_check(check))} for check in seen.checks],
        "connections": len(links),
        "active": sum(link.active for link in links),
        "appraisals": counts.appraisals,
        "refusals": counts.refusals,
        "key_changes": counts.key_changes,
        "answers": counts.answers,
        "withheld": counts.withheld,
    }


def _verdict(seen: Seen) -> dict[str, Any]:
    verdict = seen.verdict
    assert verdict is not None
    return {
        "text": str(verdict),
        "simulated": verdict.simulated,
        "platform": verdict.platform.value,
        "image_id": verdict.image_id.hex(),
        "weights_root": verdict.weights_root.hex(),
        "profile": verdict.profile,
        "tcb": verdict.tcb_status,
        "gpus": len(verdict.gpu),
        "boot_id": verdict.boot_id.hex(),
        "tls_key": verdict.claims.tls_spki.hex() if verdict.claims.tls_spki else "",
        "log": verdict.log_origin,
        "system_fingerprint": spoken.fingerprint(verdict),
    }


def _refusal(seen: Seen) -> dict[str, Any] | None:
    if seen.error is None:
        return None
    err = seen.error
    return {"code": err.code, "step": err.step, "text": str(err), "explain": _advice(explain_code(err.code))}


def _advice(advice: object) -> str | None:
    return None if advice is None else str(advice)
