"""countermark: the client and verifier of LLM answers that carry proof.

The public names load when first asked for: an appliance imports `countermark.formats` and would else load all of the
client, its connections and verifiers, at every start.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from countermark.errors import CountermarkError
    from countermark.offline import replay, verify_bundle
    from countermark.policy import load_policy
    from countermark.retrying import Retry
    from countermark.session import Answer, Session, connect
    from countermark.verify import Verification
else:
    _WHERE = {
        "Answer": "session",
        "CountermarkError": "errors",
        "Retry": "retrying",
        "Session": "session",
        "Verification": "verify",
        "connect": "session",
        "load_policy": "policy",
        "replay": "offline",
        "verify_bundle": "offline",
    }

    def __getattr__(name: str) -> object:
        if name not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals().setdefault(name, getattr(import_module(f"{__name__}.{_WHERE[name]}"), name))


__all__ = [
    "Answer",
    "CountermarkError",
    "Retry",
    "Session",
    "Verification",
    "connect",
    "load_policy",
    "replay",
    "verify_bundle",
]
