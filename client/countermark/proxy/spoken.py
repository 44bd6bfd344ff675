"""Answers, pieces of answers and errors in OpenAI's words; beside them our own member `countermark`.

A stream's last chunk with a choice, the one with the finish reason, is sent only after the receipt has been verified,
and carries it: a chunk of a form of its own would break clients that read `choices[0]` of each. Tokens of log
probabilities are named `token_id:N`, as vLLM does on request: the client has no tokenizer, so it knows ids, not texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from countermark.appraise import Verdict
from countermark.errors import CountermarkError, RequestError, Unavailable
from countermark.explain import explain_code
from countermark.formats import cbor, strict_json
from countermark.formats.records import Intent
from countermark.proxy.wanted import Wanted, param_of
from countermark.receipt import Accepted, CheckedReceipt
from countermark.session import TokenLogprob

DONE: Final = b"data: [DONE]\n\n"
BUSY: Final = (
    *("engine.busy", "service.busy", "attest.rate", "proxy.busy"),
    *("quota.rate", "quota.concurrent", "quota.tokens"),
)
"""Codes of a refusal before anything was recorded, to be asked again after a while."""
_HTTP: Final[Mapping[str, int]] = {
    "proxy.key": 401,
    "proxy.host": 403,
    "proxy.origin": 403,
    "proxy.path": 404,
    "proxy.bundle": 404,
    "request.model": 404,
    "proxy.method": 405,
    "proxy.slow": 408,
    "proxy.body": 413,
    "request.too_long": 413,
    "access.key": 502,
    "proxy.media": 415,
    "proxy.headers": 431,
}
_REASONS: Final = {"eos": "stop", "stop": "stop", "length": "length"}


def fingerprint(verdict: Verdict) -> str:
    """`system_fingerprint`: the same where the same request and seed give the same bytes.

    Over what was measured and decides every bit: weights root (tokenizer and chat template are in it), numerics
    profile, kernels, image.
    """
    what = ("countermark/system-fingerprint/v1", verdict.weights_root, verdict.profile, verdict.kernel_digest)
    return "fp_" + hashlib.sha256(cbor.encode([*what, verdict.image_id])).hexdigest()[:32]


def receipt_id(accepted: Accepted) -> str:
    """What the INTENT calls the request: known before the first token, and the same in receipt and bundle."""
    return accepted.intent.request_id.hex()


class Speech:
    """The words of one answer."""

    def __init__(self, wanted: Wanted, accepted: Accepted) -> None:
        self._wanted = wanted
        intent: Intent = accepted.intent
        self._chat = wanted.chat
        self._at = 0
        kind = "chat.completion" if wanted.chat else "text_completion"
        self._common: dict[str, Any] = {
            "id": ("chatcmpl-" if wanted.chat else "cmpl-") + receipt_id(accepted),
            "object": kind + (".chunk" if wanted.chat and wanted.stream else ""),
            "created": intent.accepted_us // 1_000_000,
            "model": intent.stack.model,
            "system_fingerprint": fingerprint(accepted.verdict),
        }
        self._head = self._common | ({"usage": None} if wanted.usage else {})

    def first(self) -> bytes:
        """What a chat stream begins with: the role."""
        return self._chunk({"role": "assistant", "content": ""}, "") if self._chat else b""

    def piece(self, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        """The next text, with the log probabilities of the tokens that it ends."""
        chunk = self._chunk({"content": text}, text, logprobs)
        self._at += len(text)
        return chunk

    def last(self, receipt: CheckedReceipt, said: Mapping[str, Any], logprobs: Sequence[TokenLogprob]) -> bytes:
        """The end of a stream whose receipt has been verified. `logprobs`: of tokens that have no text."""
        reason = _REASONS[receipt.outcome.finish_reason]
        end = self._chunk({}, "", logprobs, reason=reason, countermark=said)
        if self._wanted.usage:
            end += _event(self._common | {"choices": [], "usage": usage(receipt)})
        return end + DONE

    def whole(
        self, text: str, receipt: CheckedReceipt, said: Mapping[str, Any], logprobs: Sequence[TokenLogprob]
    ) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": _REASONS[receipt.outcome.finish_reason]}
        choice |= {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        choice["logprobs"] = self._logprobs(logprobs)
        return self._common | {"choices": [choice], "usage": usage(receipt), "countermark": dict(said)}

    def _chunk(
        self,
        delta: Mapping[str, Any],
        text: str,
        logprobs: Sequence[TokenLogprob] = (),
        *,
        reason: str | None = None,
        **more: Any,
    ) -> bytes:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": self._logprobs(logprobs)}
        choice |= {"delta": dict(delta)} if self._chat else {"text": text}
        return _event(self._head | {"choices": [choice]} | more)

    def _logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        top = self._wanted.top
        if top is None or not found:
            return None
        if self._chat:
            return {
                "content": [
                    _entry(one.token, one.logprob) | {"top_logprobs": [_entry(*likely) for likely in one.top[:top]]}
                    for one in found
                ],
                "refusal": None,
            }
        return {
            "tokens": [_name(one.token) for one in found],
            "token_logprobs": [one.logprob for one in found],
            "top_logprobs": [{_name(token): number for token, number in one.top[:top]} for one in found]
            if top
            else None,
            "text_offset": [self._at for _ in found],
        }


def usage(receipt: CheckedReceipt) -> dict[str, Any]:
    """Counts as the OUTCOME has them."""
    outcome = receipt.outcome
    return {
        "prompt_tokens": outcome.prompt_count,
        "completion_tokens": outcome.output_count,
        "total_tokens": outcome.prompt_count + outcome.output_count,
        "prompt_tokens_details": {"cached_tokens": outcome.cached_count},
    }


def error_body(err: CountermarkError, *, receipt: str | None = None) -> dict[str, Any]:
    """An error object: message, type, param and our stable code; `countermark` has step, checks and what to do."""
    advice = explain_code(err.code)
    more: dict[str, Any] = {
        "step": err.step,
        "checks": [check.as_json() for check in err.checks],
        "meaning": advice.meaning if advice else None,
        "todo": advice.todo if advice else None,
        "receipt": receipt,
        "verified": False,
    }
    param = param_of(err)
    if param is None and isinstance(err, RequestError) and err.code.startswith("request."):
        param = err.code.partition(".")[2]
    kind = _kind(err)
    return {"error": {"message": str(err), "type": kind, "param": param, "code": err.code, "countermark": more}}


def error_event(err: CountermarkError, *, receipt: str | None = None) -> bytes:
    """What a stream that is withheld ends with; OpenAI's libraries raise it as their APIError."""
    return _event(error_body(err, receipt=receipt))


def http_status(err: CountermarkError) -> int:
    """The status of a response that is an error."""
    if err.code in _HTTP:
        return _HTTP[err.code]
    if isinstance(err, Unavailable):
        return 429 if err.code in BUSY else 503
    return 400 if isinstance(err, RequestError) else 502


def _kind(err: CountermarkError) -> str:
    if isinstance(err, RequestError):
        return "authentication_error" if err.code in ("proxy.key", "access.key") else "invalid_request_error"
    if isinstance(err, Unavailable):
        return "rate_limit_error" if err.code in BUSY else "unavailable_error"
    return "verification_error"


def _name(token: int) -> str:
    return f"token_id:{token}"


def _entry(token: int, logprob: float) -> dict[str, Any]:
    return {"token": _name(token), "bytes": None, "logprob": logprob}


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + strict_json.dump(value) + b"\n\n"
