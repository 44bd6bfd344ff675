"""countermark: the client and verifier of LLM answers that carry proof."""

from countermark.errors import CountermarkError
from countermark.policy import load_policy
from countermark.session import Answer, Session, connect
from countermark.verify import Verification, verify_bundle

__all__ = ["Answer", "CountermarkError", "Session", "Verification", "connect", "load_policy", "verify_bundle"]
