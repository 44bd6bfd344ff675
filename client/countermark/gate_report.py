"""What a gate run ends with: the report as a value, as JSON, and signed by the operator's own key.

The signed form is a JWS in the flattened JSON serialization (RFC 7515 section 7.2.2) with ES256 (RFC 7518 section 3.4),
header {alg, cty, kid}; `kid` is SHA-256 of the public key's DER in hex. Any JOSE library verifies it. An unsigned
report is the same JSON in plain and says `"signed": false`.

Not checked here: whose key it is. A report is its maker's word; the receipts it names are the appliance's.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import version
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from countermark.checks import rfc3339
from countermark.errors import CountermarkError, ReplayDiverged, UsageError
from countermark.formats import cbor
from countermark.keys import P256_ORDER
from countermark.session import Answer

TYPE: Final = "countermark/gate/v1"
CONTENT_TYPE: Final = "countermark-gate+json"


class Part(StrEnum):
    """Of an answer, what came out differently."""

    PROMPT = "prompt_tokens"
    OUTPUT = "output"
    END = "finish_reason"
    TEXT = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The sampler's settings for one series of identical requests. None: the node's default."""

    name: str
    temperature: float
    top_k: int | None = None
    top_p: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Whom one attested connection leads to."""

    boot_id: bytes
    quote_digest: bytes
    image_id: bytes
    weights_root: bytes
    profile: str
    simulated: bool

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        return {name: value.hex() if isinstance(value, bytes) else value for name, value in values.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One of the identical requests and its answer, whose receipt was verified.

    `connection`: index into the report's nodes. `beside`: neighbours that were being answered when it began.
    """

    setting: str
    connection: int
    beside: int
    answer: Answer

    @property
    def digest(self) -> bytes:
        """SHA-256 over the CBOR array of what is compared: prompt tokens, tokens, fingerprints, end, text."""
        receipt = self.answer.receipt
        parts = [
            list(receipt.accepted.acceptance.prompt_tokens),
            list(self.answer.tokens),
            b"".join(receipt.answer.fingerprints),
            receipt.outcome.finish_reason,
            self.answer.text,
        ]
        return hashlib.sha256(cbor.encode(parts)).digest()

    def as_json(self) -> dict[str, Any]:
        receipt = self.answer.receipt
        return {
            "setting": self.setting,
            "connection": self.connection,
            "neighbours": self.beside,
            "request_id": receipt.intent.request_id.hex(),
            "receipt": hashlib.sha256(receipt.receipt).hexdigest(),
            "leaf": receipt.accepted.acceptance.leaf_index,
            "digest": self.digest.hex(),
            "tokens": {
                "prompt": receipt.outcome.prompt_count,
                "cached": receipt.outcome.cached_count,
                "output": receipt.outcome.output_count,
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first difference between two runs of one setting, by their index in the report.

    `position`: of the token (of the prompt or the output), or of the character in TEXT. A token is None where that run
    had ended, and in END and TEXT.
    """

    setting: str
    runs: tuple[int, int]
    part: Part
    position: int
    tokens: tuple[int | None, int | None]
    fingerprint_equal: bool

    def __str__(self) -> str:
        runs = f"{self.setting}, run {self.runs[1]}"
        match self.part:
            case Part.END:
                return f"{runs}: expected the end of run {self.runs[0]}, got another reason"
            case Part.TEXT:
                return f"{runs}: expected the text of run {self.runs[0]}, got another character at {self.position}"
            case part:
                where = f"{part.value} token {self.position}" if part is Part.PROMPT else f"token {self.position}"
        if self.tokens[0] == self.tokens[1]:
            return f"{runs}, {where}: same token as in run {self.runs[0]}, other logits (fingerprints differ)"
        return f"{runs}, {where}: expected {self.tokens[0]}, as in run {self.runs[0]}, got {self.tokens[1]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """The traffic beside the runs. Every answer's receipt was verified, too; `left` ended theirs early."""

    wanted: int
    answers: int
    left: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What ran and what came of it. `failure`: why the gate could not be finished, or what was refused."""

    address: str
    prompt: str
    seed: int
    max_tokens: int
    wanted: int  # runs of each setting
    settings: tuple[Setting, ...]
    started: int
    ended: int
    nodes: tuple[Node, ...]
    runs: tuple[Run, ...]
    neighbours: Neighbours
    difference: Difference | None
    failure: CountermarkError | None

    @property
    def simulated(self) -> bool:
        """Anything here rests on a simulated platform."""
        return any(node.simulated for node in self.nodes)

    @property
    def result(self) -> str:
        """`identical` only when everything that was wanted ran, was verified, and is equal."""
        if self.difference is not None:
            return "differs"
        return "identical" if self.failure is None else "incomplete"

    @property
    def error(self) -> CountermarkError | None:
        """What `require_identical` would raise."""
        if self.difference is not None:
            return ReplayDiverged(str(self.difference), code="gate.differs")
        return self.failure

    def require_identical(self) -> None:
        """Raises `ReplayDiverged` (`gate.differs`), else what stopped the gate."""
        if (error := self.error) is not None:
            raise error

    def as_json(self, *, signed: bool = False) -> dict[str, Any]:
        """A JSON-ready dict with stable keys; the prompt as its digest."""
        failure = self.failure
        return {
            "simulated": self.simulated,
            "type": TYPE,
            "signed": signed,
            "gate": self.result,
            "countermark": version("countermark"),
            "address": self.address,
            "started": rfc3339(self.started),
            "ended": rfc3339(self.ended),
            "request": {
                "prompt_sha256": hashlib.sha256(self.prompt.encode()).hexdigest(),
                "max_tokens": self.max_tokens,
                "seed": self.seed,
            },
            "settings": [self._series(setting) for setting in self.settings],
            "nodes": [node.as_json() for node in self.nodes],
            "receipts_verified": len(self.runs) + self.neighbours.answers,
            "neighbours": asdict(self.neighbours),
            "runs": [run.as_json() for run in self.runs],
            "difference": None if self.difference is None else asdict(self.difference),
            "error": None if failure is None else {"code": failure.code, "message": str(failure)},
        }

    def _series(self, setting: Setting) -> dict[str, Any]:
        runs = [run for run in self.runs if run.setting == setting.name]
        digests = sorted({run.digest.hex() for run in runs})
        return {**asdict(setting), "wanted": self.wanted, "runs": len(runs), "digests": digests}


def load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """An unencrypted P-256 private key in PEM. Raises `UsageError` (`usage.key`)."""
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as err:
        raise UsageError("--key: expected an unencrypted private key in PEM", code="usage.key") from err
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UsageError("--key: expected a P-256 key, for ES256, got another", code="usage.key")
    return key


def encode_report(report: Report, key: ec.EllipticCurvePrivateKey | None) -> bytes:
    """The file: a JWS when there is a key, else the plain JSON."""
    payload = _json(report.as_json(signed=key is not None))
    if key is None:
        return payload
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    kid = hashlib.sha256(public).hexdigest()
    protected = _base64(_json({"alg": "ES256", "cty": CONTENT_TYPE, "kid": kid}))
    body = _base64(payload)
    r, s = decode_dss_signature(key.sign(f"{protected}.{body}".encode(), ec.ECDSA(hashes.SHA256())))
    signature = r.to_bytes(32) + min(s, P256_ORDER - s).to_bytes(32)
    return _json({"payload": body, "protected": protected, "signature": _base64(signature)})


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
