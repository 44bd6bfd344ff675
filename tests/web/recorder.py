"""A pytest plugin that keeps whatever other tests appraise and verify, so that the page can be asked about it too.

`pytest -p recorder` with COUNTERMARK_RECORD naming a folder: each call of `countermark.verify.verify_bundle`, of
`countermark.appraise.appraise` from a test, and of `lies.appraised` (a quote with endorsements), becomes a JSON file
there: {bundle | evidence | quote, endorsements; policy, now}.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from countermark.bundle import Bundle, encode_bundle
from countermark.errors import PolicyError
from countermark.policy import Policy, encode_policy, parse_policy

_FOLDER = Path(os.environ["COUNTERMARK_RECORD"])
_MOST = 6  # of one test: those that flip every bit are about one thing
_counts: Counter[str] = Counter()


def _keep(policy: Policy, now: int, **parts: bytes) -> None:
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    _counts[test] += 1
    if _counts[test] > _MOST:
        return
    try:
        text = encode_policy(policy)
        if parse_policy(text.encode()) != policy:
            return
    except PolicyError:
        return  # a test's own policy that no file can hold
    value: dict[str, Any] = {name: base64.b64encode(data).decode() for name, data in parts.items()}
    encoded = json.dumps({**value, "policy": text, "now": now})
    (_FOLDER / f"{hashlib.sha256(encoded.encode()).hexdigest()[:24]}.json").write_text(encoded)


_appraise = importlib.import_module("countermark.appraise")
_real = _appraise.appraise


def _recorded(evidence: bytes, policy: Policy, **arguments: Any) -> Any:
    if arguments.get("endorsements") is None:
        _keep(policy, arguments["now"], evidence=evidence)
    return _real(evidence, policy, **arguments)


_verify = importlib.import_module("countermark.verify")  # has taken the real `appraise`
_verified = _verify.verify_bundle


def _kept(bundle: Bundle, policy: Policy, at: int, **arguments: Any) -> Any:
    if arguments.get("endorsements") is None:
        _keep(policy, at, bundle=encode_bundle(bundle))
    return _verified(bundle, policy, at, **arguments)


_appraise.appraise = _recorded  # type: ignore[attr-defined]
_verify.verify_bundle = _kept  # type: ignore[attr-defined]


def pytest_collection_finish() -> None:
    """The tests are imported now: record what they appraise part by part, too."""
    lies: Any = sys.modules.get("lies")
    if lies is None:
        return
    real = lies.appraised

    def appraised(quote: bytes, endorsements: bytes, policy: Policy | None = None, **arguments: Any) -> Any:
        used = policy or lies.policy_for(lies.machine())
        _keep(used, arguments.get("now", lies.NOW), quote=quote, endorsements=endorsements)
        return real(quote, endorsements, policy, **arguments)

    lies.appraised = appraised
