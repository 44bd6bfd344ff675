"""Bundles that differ from a good one in one thing each: every part of the file, by its structure.

A variant is made from the good bundle's entries and packed again by Python's `zipfile`, with a `manifest.cbor` that
fits, so that what is wrong is the one thing its name says; variants of the container change the packed bytes. Nothing
is signed again here: lies under the appliance's own keys are the rows of tests/receipt and tests/appraise.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from countermark.bundle import encode_bundle, parse_bundle, redact
from countermark.formats import cbor
from countermark.formats.receipt import P256_ORDER
from countermark.wire import countermark_v1_pb2 as pb

Entries = dict[str, bytes]
Make = Callable[[bytes], bytes]


def unpack(data: bytes) -> Entries:
    """The entries by name, without the manifest."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    del entries["manifest.cbor"]
    return entries


def manifest_of(entries: Entries) -> bytes:
    files = [[name, len(data), hashlib.sha256(data).digest()] for name, data in entries.items()]
    return cbor.encode({"v": 1, "type": "countermark/bundle/v1", "files": files})


def zipped(entries: list[tuple[str, bytes]]) -> bytes:
    """Stored entries at the first date a ZIP can have, mode 0600."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in entries:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.create_system = 0o600 << 16, 3
            archive.writestr(info, data)
    return out.getvalue()


def pack(entries: Entries) -> bytes:
    return zipped([("manifest.cbor", manifest_of(entries)), *entries.items()])


def entries(change: Callable[[Entries], Any]) -> Make:
    def make(data: bytes) -> bytes:
        found = unpack(data)
        changed = change(found)
        return pack(changed if isinstance(changed, dict) else found)

    return make


def entry(name: str, change: Callable[[bytes], bytes]) -> Make:
    """Change one entry's bytes."""
    return entries(lambda found: found.__setitem__(name, change(found[name])))


def edit(name: str, change: Callable[[Any], Any]) -> Make:
    """Change the value an entry encodes."""

    def bend(data: bytes) -> bytes:
        value = cbor.decode(data)
        changed = change(value)
        return cbor.encode(value if changed is None else changed)

    return entry(name, bend)


def flip(data: bytes, at: int = 0, bit: int = 1) -> bytes:
    at %= len(data)
    return data[:at] + bytes((data[at] ^ bit,)) + data[at + 1 :]


def put(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda found: found.__setitem__(key, value)


def flipped(key: str, at: int = 0, bit: int = 1) -> Callable[[dict[str, Any]], None]:
    """One bit of a byte string in a map."""
    return lambda found: found.__setitem__(key, flip(found[key], at, bit))


def inner(key: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    """Change the value that a byte string in a map encodes."""

    def bend(found: dict[str, Any]) -> None:
        value = cbor.decode(found[key])
        changed = change(value)
        found[key] = cbor.encode(value if changed is None else changed)

    return bend


def request(change: Callable[[pb.GenerateRequest], object]) -> Make:
    def bend(data: bytes) -> bytes:
        message = pb.GenerateRequest.FromString(data)
        change(message)
        encoded: bytes = message.SerializeToString(deterministic=True)
        return encoded

    return entry("request.bin", bend)


def cose(change: Callable[[list[Any]], object]) -> Make:
    """Change the receipt's [protected, unprotected, payload, signatures]."""

    def bend(data: bytes) -> bytes:
        parts = cbor.decode(data[2:])
        change(parts)
        return data[:2] + cbor.encode(parts)

    return entry("receipt.cose", bend)


def payload(change: Callable[[dict[str, Any]], Any]) -> Make:
    def bend(parts: list[Any]) -> None:
        value = cbor.decode(parts[2])
        change(value)
        parts[2] = cbor.encode(value)

    return cose(bend)


def high_s(parts: list[Any]) -> None:
    signature = parts[3][0][2]
    parts[3][0][2] = signature[:32] + (P256_ORDER - int.from_bytes(signature[32:], "big")).to_bytes(32, "big")


def evidence(change: Callable[[dict[str, Any]], Any]) -> Make:
    return edit("evidence.cbor", change)


def endorsements(change: Callable[[dict[str, Any]], Any]) -> Make:
    def bend(found: dict[str, Any]) -> None:
        value = json.loads(found["endorsements"]["tdx"])
        change(value)
        found["endorsements"]["tdx"] = json.dumps(value).encode()

    return evidence(bend)


def dsse(change: Callable[[dict[str, Any]], Any]) -> Make:
    """Change the measurement manifest's envelope."""

    def bend(data: bytes) -> bytes:
        value = json.loads(data)
        change(value)
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    return entry("measurements.json", bend)


def statement(old: str, new: str) -> Make:
    def bend(envelope: dict[str, Any]) -> None:
        text = base64.b64decode(envelope["payload"]).decode()
        assert old in text
        envelope["payload"] = base64.b64encode(text.replace(old, new).encode()).decode()

    return dsse(bend)


def base64_flip(text: str) -> str:
    return base64.b64encode(flip(base64.b64decode(text))).decode()


def raw(change: Callable[[bytes], bytes]) -> Make:
    return change


def at(name: str, offset: int, bit: int = 1) -> Make:
    """Flip a bit of the packed file, `offset` bytes after where the entry's local header starts."""
    return lambda data: flip(data, data.index(b"PK\3\4", 0) + _start(data, name) + offset, bit)


def _start(data: bytes, name: str) -> int:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.getinfo(name).header_offset


def without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda found: found.pop(key)


def local_size(data: bytes) -> bytes:
    """The first entry says it is larger than the file."""
    return data[:18] + struct.pack("<II", 1 << 31, 1 << 31) + data[26:]


def reordered(found: Entries) -> Entries:
    names = list(found)
    return {name: found[name] for name in (names[1], names[0], *names[2:])}


def twice_named(data: bytes) -> bytes:
    found = list(unpack(data).items())
    return data[: data.index(b"PK\1\2")] + zipped([found[0]])[: 30 + len(found[0][0]) + len(found[0][1])]


CONTAINER: dict[str, Make] = {
    "empty file": lambda _data: b"",
    "not a ZIP": lambda _data: b"%PDF-1.7 nothing of ours",
    "cut in half": lambda data: data[: len(data) // 2],
    "cut inside the first header": lambda data: data[:20],
    "last byte missing": lambda data: data[:-1],
    "byte behind the end": lambda data: data + b"\0",
    "byte before the start": lambda data: b"\0" + data,
    "archive comment": lambda data: data[:-2] + b"\5\0hello",
    "header version": at("request.bin", 4),
    "header flags": at("request.bin", 6),
    "header method": at("request.bin", 8, 8),
    "header time": at("request.bin", 10),
    "header date": at("request.bin", 12),
    "header CRC": at("request.bin", 14),
    "header packed size": at("request.bin", 18),
    "entry size beyond the file": local_size,
    "entry name": at("accepted.cbor", 30),
    "entry content": at("answer.cbor", 60),
    "receipt content": at("receipt.cose", 400),
    "evidence content": at("evidence.cbor", 5000),
    "central directory": lambda data: flip(data, data.index(b"PK\1\2") + 4),
    "central offset": lambda data: flip(data, data.index(b"PK\1\2") + 42),
    "file mode": lambda data: flip(data, data.index(b"PK\1\2") + 40),
    "end record count": lambda data: flip(data, len(data) - 12),
    "entries in another order": entries(reordered),
    "entry renamed": entries(lambda f: {("request.txt" if k == "request.bin" else k): v for k, v in f.items()}),
    "entry left out": entries(without("evidence.cbor")),
    "entry added": entries(put("notes.txt", b"hello")),
    "entry named twice": twice_named,
    "all names in one": lambda data: zipped([("\n".join(["manifest.cbor", *list(unpack(data))[1:5]]), b"")]),
    "no manifest of the entries": lambda data: zipped(list(unpack(data).items())),
    "manifest of another size": lambda data: zipped(
        [("manifest.cbor", manifest_of({**unpack(data), "request.bin": b""})), *unpack(data).items()]
    ),
    "manifest with a wrong digest": lambda data: zipped(
        [("manifest.cbor", manifest_of(unpack(data))[:-1] + b"\0"), *unpack(data).items()]
    ),
    "receipt too long": entry("receipt.cose", lambda data: data + bytes(1 << 20)),
}


def retrieved(message: pb.GenerateRequest, **change: Any) -> None:
    """What was retrieved, well-formed but for `change`."""
    found = message.retrieval
    chunk = {"id": "page 1", "start": 3, "end": 9, "score": 0.5}
    whole = {"corpus_root": bytes(32), "embedder": bytes(32), "query": bytes(32), "index_parameters": b"k=4"}
    for name, value in (whole | {key: value for key, value in change.items() if key in whole}).items():
        setattr(found, name, value)
    found.chunks.add(**(chunk | {key: value for key, value in change.items() if key in chunk}))


REQUEST: dict[str, Make] = {
    "request nonce": request(lambda r: setattr(r, "nonce", bytes(32))),
    "request nonce short": request(lambda r: setattr(r, "nonce", b"x")),
    "question": request(lambda r: setattr(r.chat.messages[0], "content", "Which city is the capital of Spain?")),
    "role": request(lambda r: setattr(r.chat.messages[0], "role", "system")),
    "role unknown": request(lambda r: setattr(r.chat.messages[0], "role", "tool")),
    "turn added": request(lambda r: r.chat.messages.add(role="user", content="And of Spain?")),
    "prompt instead of messages": request(lambda r: setattr(r, "prompt", "Paris is")),
    "no input": request(lambda r: r.ClearField("chat")),
    "temperature": request(lambda r: setattr(r.sampling, "temperature", 0.25)),
    "seed": request(lambda r: setattr(r.sampling, "seed", 8)),
    "top-p out of range": request(lambda r: setattr(r.sampling, "top_p", 1.5)),
    "stop string": request(lambda r: r.stop.append("Spain")),
    "request cut": entry("request.bin", lambda data: data[:-1]),
    "request with an unknown field": entry("request.bin", lambda data: data + b"\xa0\x06\x01"),
    "request with an unknown group": entry("request.bin", lambda data: data + b"\xa3\x06\xa4\x06"),
    "request with an open group": entry("request.bin", lambda data: data + b"\xa3\x06"),
    "request of another wire type": entry("request.bin", lambda data: data + b"\x09" + bytes(8)),
    "request with an endless number": entry("request.bin", lambda data: data + b"\x28" + b"\xff" * 11),
    "request with the field zero": entry("request.bin", lambda data: data + b"\x00\x00"),
    "request with text that is none": entry("request.bin", lambda data: data + b"\x12\x02\xff\xfe"),
    "request with a setting twice": entry("request.bin", lambda data: data + b"\x28\x09"),
    "request with a value for the template": request(lambda r: r.chat.values.update(date="today")),
    "request with a value of a bad name": request(lambda r: r.chat.values.update({"da te": "today"})),
    "request with a long value": request(lambda r: r.chat.values.update(date="x" * 257)),
    "request with many values": request(lambda r: r.chat.values.update({f"v{i}": "" for i in range(17)})),
    "request with what was retrieved": request(retrieved),
    "request with a short corpus root": request(lambda r: retrieved(r, corpus_root=b"x")),
    "request with long index parameters": request(lambda r: retrieved(r, index_parameters=bytes(4097))),
    "request with a chunk that ends first": request(lambda r: retrieved(r, end=1)),
    "request with a chunk without id": request(lambda r: retrieved(r, id="")),
    "request with a score that is none": request(lambda r: retrieved(r, score=float("inf"))),
    "request with a schema": request(lambda r: setattr(r, "json_schema", "{}")),
    "request with an expression": request(lambda r: setattr(r, "regex", "é*")),
    "request with an empty expression": request(lambda r: setattr(r, "regex", "")),
    "request with a schema too long": request(lambda r: setattr(r, "json_schema", "é" * (32 * 1024 + 1))),
    "request with an expression too long": request(lambda r: setattr(r, "regex", "a" * (8 * 1024 + 1))),
    "request with both, the long one first": entry(
        "request.bin", lambda d: d + b"\x62\x81\x40" + b"a" * 8193 + b"\x5a\x02{}"
    ),
    "request with an empty retrieval": request(lambda r: r.retrieval.SetInParent()),
    "request empty": entry("request.bin", lambda _data: b""),
}
ACCEPTED: dict[str, Make] = {
    "INTENT record": edit("accepted.cbor", flipped("record", 40)),
    "INTENT record's last byte": edit("accepted.cbor", flipped("record", -1)),
    "INTENT of another boot": edit("accepted.cbor", inner("record", flipped("boot_id"))),
    "INTENT on another quote": edit("accepted.cbor", inner("record", flipped("quote_digest"))),
    "INTENT of another nonce": edit("accepted.cbor", inner("record", flipped("nonce"))),
    "INTENT time": edit("accepted.cbor", inner("record", put("accepted_us", 1))),
    "INTENT model": edit("accepted.cbor", inner("record", lambda r: r["stack"].__setitem__("model", "huge"))),
    "INTENT that says of no grammar": edit("accepted.cbor", inner("record", put("grammar", None))),
    "INTENT of a strange grammar": edit("accepted.cbor", inner("record", put("grammar", {"kind": "lark"}))),
    "INTENT weights": edit(
        "accepted.cbor", inner("record", lambda r: r["stack"].__setitem__("weights_root", bytes(32)))
    ),
    "INTENT temperature as integer": edit(
        "accepted.cbor", inner("record", lambda r: r["sampling"].__setitem__("temperature", 1))
    ),
    "INTENT of another type": edit("accepted.cbor", inner("record", put("type", "outcome"))),
    "INTENT with a field more": edit("accepted.cbor", inner("record", put("note", "x"))),
    "INTENT with a field less": edit("accepted.cbor", inner("record", without("stop"))),
    "leaf salt": edit("accepted.cbor", flipped("leaf_salt")),
    "leaf salt short": edit("accepted.cbor", put("leaf_salt", b"salt")),
    "field salt": edit("accepted.cbor", inner("field_salts", flipped("prompt"))),
    "field salt of the request": edit("accepted.cbor", inner("field_salts", flipped("raw_request"))),
    "field salt missing": edit("accepted.cbor", inner("field_salts", without("prompt_tokens"))),
    "field salt short": edit("accepted.cbor", inner("field_salts", put("prompt", b""))),
    "leaf index": edit("accepted.cbor", put("leaf_index", 0)),
    "leaf index beyond the log": edit("accepted.cbor", put("leaf_index", 99)),
    "leaf index negative": edit("accepted.cbor", put("leaf_index", -1)),
    "leaf index huge": edit("accepted.cbor", put("leaf_index", 1 << 63)),
    "inclusion proof": edit("accepted.cbor", lambda a: a["proof"].__setitem__(0, bytes(32))),
    "inclusion proof missing": edit("accepted.cbor", put("proof", [])),
    "inclusion proof longer": edit("accepted.cbor", lambda a: a["proof"].append(bytes(32))),
    "inclusion proof of short hashes": edit("accepted.cbor", put("proof", [b"x"])),
    "prompt token": edit("accepted.cbor", lambda a: a["prompt_tokens"].__setitem__(1, 18)),
    "prompt token added": edit("accepted.cbor", lambda a: a["prompt_tokens"].append(3)),
    "prompt token beyond 32 bits": edit("accepted.cbor", put("prompt_tokens", [1 << 32])),
    "checkpoint size": edit(
        "accepted.cbor", lambda a: put("checkpoint", a["checkpoint"].replace(b"\n2\n", b"\n3\n"))(a)
    ),
    "checkpoint origin": edit("accepted.cbor", flipped("checkpoint")),
    "checkpoint Ed25519 signature": edit(
        "accepted.cbor", lambda a: put("checkpoint", signature_line(a["checkpoint"], 0))(a)
    ),
    "checkpoint ML-DSA-44 signature": edit(
        "accepted.cbor", lambda a: put("checkpoint", signature_line(a["checkpoint"], 1))(a)
    ),
    "checkpoint without its second signature": edit(
        "accepted.cbor", lambda a: put("checkpoint", b"".join(a["checkpoint"].splitlines(True)[:-1]))(a)
    ),
    "checkpoint signed twice": edit(
        "accepted.cbor", lambda a: put("checkpoint", a["checkpoint"] + a["checkpoint"].splitlines(True)[-1])(a)
    ),
    "checkpoint with an extension": edit(
        "accepted.cbor", lambda a: put("checkpoint", a["checkpoint"].replace(b"\n\n", b"\nmore\n\n", 1))(a)
    ),
    "checkpoint that is no note": edit("accepted.cbor", put("checkpoint", b"hello")),
    "version of the acceptance": edit("accepted.cbor", put("v", 2)),
}


def signature_line(note: bytes, which: int) -> bytes:
    """Flip a bit of one signature, whose line stays canonical base64."""
    lines = note.splitlines(True)
    at_line = len(lines) - 2 + which
    head, _, encoded = lines[at_line].rstrip(b"\n").rpartition(b" ")
    lines[at_line] = head + b" " + base64.b64encode(flip(base64.b64decode(encoded), 40)) + b"\n"
    return b"".join(lines)


def shorter(found: dict[str, Any]) -> None:
    found["tokens"].pop()
    found["fingerprints"] = found["fingerprints"][:-16]


ANSWER: dict[str, Make] = {
    "answer token": edit("answer.cbor", lambda a: a["tokens"].__setitem__(0, 13)),
    "answer cut short": edit("answer.cbor", shorter),
    "answer text": edit("answer.cbor", put("text", "Madrid.")),
    "answer text with a space": edit("answer.cbor", put("text", "Paris. ")),
    "fingerprint": edit("answer.cbor", flipped("fingerprints", 20)),
    "fingerprint missing": edit("answer.cbor", lambda a: put("fingerprints", a["fingerprints"][:-16])(a)),
    "answer salt": edit("answer.cbor", inner("field_salts", flipped("output_tokens"))),
    "text salt": edit("answer.cbor", inner("field_salts", flipped("output_text"))),
    "fingerprint salt": edit("answer.cbor", inner("field_salts", flipped("fingerprints"))),
    "answer without salts": edit("answer.cbor", put("field_salts", b"")),
    "answer field more": edit("answer.cbor", put("logprobs", [])),
}
RECEIPT: dict[str, Make] = {
    "ES256 signature": cose(lambda p: p[3][0].__setitem__(2, flip(p[3][0][2], 5))),
    "ML-DSA-65 signature": cose(lambda p: p[3][1].__setitem__(2, flip(p[3][1][2], 500))),
    "ES256 high s": cose(high_s),
    "ES256 r of zero": cose(lambda p: p[3][0].__setitem__(2, bytes(32) + p[3][0][2][32:])),
    "signature short": cose(lambda p: p[3][1].__setitem__(2, p[3][1][2][:-1])),
    "first signature missing": cose(lambda p: p[3].pop(0)),
    "second signature missing": cose(lambda p: p[3].pop(1)),
    "no signature": cose(lambda p: p[3].clear()),
    "third signature": cose(lambda p: p[3].append(p[3][1])),
    "signatures in another order": cose(lambda p: p[3].reverse()),
    "one signature twice": cose(lambda p: p[3].__setitem__(1, p[3][0])),
    "another kid": cose(lambda p: other_kid(p, 0)),
    "another kid of ML-DSA": cose(lambda p: other_kid(p, 1)),
    "kid short": cose(lambda p: p[3][0].__setitem__(0, cbor.encode({1: -7, 4: b"kid"}))),
    "another algorithm": cose(lambda p: p[3][1].__setitem__(0, cbor.encode({1: -48, 4: bytes(32)}))),
    "signer header more": cose(lambda p: p[3][1].__setitem__(0, cbor.encode({1: -49, 4: bytes(32), 5: b"iv"}))),
    "unprotected header": cose(lambda p: p[1].__setitem__(4, b"kid")),
    "unprotected signer header": cose(lambda p: p[3][0][1].__setitem__(1, -7)),
    "content type": cose(lambda p: p.__setitem__(0, p[0].replace(b"countermark.receipt", b"countermark.replays"))),
    "one signer required": cose(lambda p: p.__setitem__(0, required(p[0], 1))),
    "not critical": cose(lambda p: p.__setitem__(0, cbor.encode(_less(cbor.decode(p[0]), 2)))),
    "detached payload": cose(lambda p: p.__setitem__(2, None)),
    "COSE_Sign of three parts": cose(lambda p: p.pop()),
    "COSE_Sign1": entry("receipt.cose", lambda data: b"\xd2" + data[2:]),
    "no tag": entry("receipt.cose", lambda data: data[2:]),
    "receipt cut": entry("receipt.cose", lambda data: data[:-1]),
    "receipt longer": entry("receipt.cose", lambda data: data + b"\0"),
    "receipt empty": entry("receipt.cose", lambda _data: b""),
    "payload INTENT salt": payload(lambda v: flipped("salt")(v["intent"])),
    "payload INTENT index": payload(lambda v: put("index", 0)(v["intent"])),
    "payload OUTCOME record": payload(lambda v: flipped("record", -1)(v["outcome"])),
    "payload OUTCOME proof": payload(lambda v: put("proof", [])(v["outcome"])),
    "payload checkpoint": payload(flipped("checkpoint")),
    "payload consistency proof": payload(put("from_accepted", [])),
    "payload version": payload(put("v", 2)),
    "payload field more": payload(put("more", 1)),
    "payload hash short": payload(put("from_attested", [b"x"])),
}


def other_kid(parts: list[Any], which: int) -> None:
    """A kid of somebody else, in both places it stands in."""
    header = cbor.decode(parts[0])
    old = header["required"][which][1]
    parts[0] = parts[0].replace(old, bytes(32))
    parts[3][which][0] = parts[3][which][0].replace(old, bytes(32))


def required(protected: bytes, count: int) -> bytes:
    header = cbor.decode(protected)
    return cbor.encode({**header, "required": header["required"][:count]})


def _less(value: dict[Any, Any], key: object) -> dict[Any, Any]:
    return {name: item for name, item in value.items() if name != key}


EVIDENCE: dict[str, Make] = {
    "evidence version": evidence(put("v", 2)),
    "evidence platform": evidence(put("platform", "tdx")),
    "evidence platform vtpm": evidence(put("platform", "vtpm")),
    "evidence platform unknown": evidence(put("platform", "sev")),
    "evidence field more": evidence(put("more", 1)),
    "evidence field less": evidence(without("ccel")),
    "evidence field of another type": evidence(put("claims", "text")),
    **{
        f"quote byte {offset}": evidence(flipped("quote", offset))
        for offset in (0, 2, 4, 8, 12, 30, 50, 70, 120, 168, 170, 176, 190, 240, 300, 380, 430, 480, 530, 580, 620)
    },
    **{f"quote byte {offset}": evidence(flipped("quote", offset)) for offset in (640, 700, 766, 780, 900, 1100, 1220)},
    "quote cut": evidence(lambda e: put("quote", e["quote"][:-1])(e)),
    "quote longer": evidence(lambda e: put("quote", e["quote"] + b"\1")(e)),
    "quote PEM": evidence(lambda e: put("quote", e["quote"].replace(b"-----BEGIN", b"-----BEGUN", 1))(e)),
    "quote certificate": evidence(flipped("quote", -900)),
    "CCEL digest": evidence(flipped("ccel", 100)),
    "CCEL cut": evidence(lambda e: put("ccel", e["ccel"][:200])(e)),
    "CCEL without its last event": evidence(lambda e: put("ccel", e["ccel"][:65])(e)),
    "CCEL with bytes behind": evidence(lambda e: put("ccel", e["ccel"] + b"\1")(e)),
    "CCEL empty": evidence(put("ccel", b"")),
    "RTMR3 log digest": evidence(flipped("rtmr3_log", 90)),
    "RTMR3 log value": evidence(flipped("rtmr3_log", -1)),
    "RTMR3 log cut": evidence(lambda e: put("rtmr3_log", e["rtmr3_log"][:65])(e)),
    "RTMR3 log is the firmware's": evidence(lambda e: put("rtmr3_log", e["ccel"])(e)),
    "claims nonce": evidence(inner("claims", flipped("nonce"))),
    "claims exporter": evidence(inner("claims", flipped("exporter"))),
    "claims purpose": evidence(inner("claims", put("purpose", "replay"))),
    "claims purpose unknown": evidence(inner("claims", put("purpose", "party"))),
    "claims log size": evidence(inner("claims", put("log_size", 0))),
    "claims log origin": evidence(inner("claims", put("log_origin", "another"))),
    "claims log origin with a line": evidence(inner("claims", put("log_origin", "a\nb"))),
    "claims digest short": evidence(inner("claims", put("image_id", b"x"))),
    "claims GPU digest": evidence(inner("claims", lambda c: flipped("digest")(c["gpu"]))),
    "key handed over": evidence(lambda e: flipped(-1)(e["keys"][2][1])),  # type: ignore[arg-type]
    "key off its curve": evidence(lambda e: flipped(-2)(e["keys"][1][1])),  # type: ignore[arg-type]
    "key of another role": evidence(lambda e: e["keys"].reverse()),
    "key missing": evidence(lambda e: e["keys"].pop()),
    "key with a member more": evidence(lambda e: e["keys"][3][1].__setitem__(4, 1)),
    "key of another algorithm": evidence(lambda e: e["keys"][3][1].__setitem__(3, -7)),
    "GPU report": evidence(lambda e: flipped("report", -1)(e["gpu"][0])),
    "GPU report nonce": evidence(lambda e: flipped("report", 5)(e["gpu"][0])),
    "GPU report cut": evidence(lambda e: put("report", e["gpu"][0]["report"][:-1])(e["gpu"][0])),
    "GPU certificate": evidence(lambda e: e["gpu"][0]["certs"].pop()),
    "GPU left out": evidence(put("gpu", [])),
    "endorsements without a CRL": endorsements(without("pck_crl")),
    "endorsements member more": endorsements(put("more", "")),
    "endorsements CRL": endorsements(lambda v: put("root_ca_crl", flip_hex(v["root_ca_crl"], -5))(v)),
    "endorsements CRL not hex": endorsements(put("pck_crl", "zz")),
    "TCB info": endorsements(lambda v: put("tcb_info", v["tcb_info"].replace("UpToDate", "Revoked", 1))(v)),
    "TCB info signature": endorsements(lambda v: put("tcb_info_signature", flip_hex(v["tcb_info_signature"]))(v)),
    "TCB info signature short": endorsements(put("tcb_info_signature", "00")),
    "TCB info not JSON": endorsements(put("tcb_info", "{")),
    "TCB info with a member twice": endorsements(lambda v: put("tcb_info", '{"id":"TDX",' + v["tcb_info"][1:])(v)),
    "QE identity": endorsements(lambda v: put("qe_identity", v["qe_identity"].replace("TD_QE", "QE"))(v)),
    "QE identity signature": endorsements(
        lambda v: put("qe_identity_signature", flip_hex(v["qe_identity_signature"]))(v)
    ),
    "issuer chain": endorsements(lambda v: put("tcb_info_issuer_chain", v["pck_crl_issuer_chain"])(v)),
    "issuer chain not PEM": endorsements(put("qe_identity_issuer_chain", "x")),
    "endorsements not JSON": evidence(lambda e: put("tdx", b"[]")(e["endorsements"])),
}


def _unsorted(data: bytes) -> bytes:
    value = cbor.decode(data)
    pairs = [cbor.encode(key) + cbor.encode(item) for key, item in value.items()]
    return data[:1] + b"".join(sorted(pairs, reverse=True))


def flip_hex(text: str, position: int = 0) -> str:
    return flip(bytes.fromhex(text), position).hex()


# What `bundle redact` makes, and what is redacted by half, or as nobody but a forger would.
PROMPT_NULLS = {"field_salts": None, "prompt_tokens": None}
OUTPUT_NULLS = {"tokens": None, "text": None, "fingerprints": None, "field_salts": None}


def nulls(name: str, values: dict[str, Any]) -> Make:
    return edit(name, lambda found: found.update(values))


def redacted(*, prompt: bool = False, output: bool = False) -> Make:
    return lambda data: encode_bundle(redact(parse_bundle(data), prompt=prompt, output=output))


def then(*steps: Make) -> Make:
    def make(data: bytes) -> bytes:
        for step in steps:
            data = step(data)
        return data

    return make


def anchors(**change: object) -> bytes:
    item = {"kind": "ots", "checkpoint": b"", "proof": [], "token": b"", **change}
    return cbor.encode({"v": 1, "anchors": [item]})


REDACTED: dict[str, Make] = {
    "without the prompt": redacted(prompt=True),
    "without the output": redacted(output=True),
    "without both": redacted(prompt=True, output=True),
    "request left out alone": entries(without("request.bin")),
    "prompt left out, request kept": nulls("accepted.cbor", PROMPT_NULLS),
    "prompt tokens left out alone": nulls("accepted.cbor", {"prompt_tokens": None}),
    "prompt salts left out alone": nulls("accepted.cbor", {"field_salts": None}),
    "fingerprints left out alone": nulls("answer.cbor", {"fingerprints": None}),
    "fingerprints kept without the output": nulls("answer.cbor", {"tokens": None, "text": None, "field_salts": None}),
    "text left out alone": nulls("answer.cbor", {"text": None}),
    "output left out by hand": nulls("answer.cbor", OUTPUT_NULLS),
    "prompt left out, fingerprint salt kept": then(
        entries(without("request.bin")),
        nulls("accepted.cbor", PROMPT_NULLS),
        nulls("answer.cbor", {"fingerprints": None}),
    ),
    "prompt left out, fingerprints kept": then(entries(without("request.bin")), nulls("accepted.cbor", PROMPT_NULLS)),
    "redacted, INTENT changed": then(
        redacted(prompt=True), edit("accepted.cbor", inner("record", put("max_tokens", 9)))
    ),
    "redacted, INTENT of another boot": then(
        redacted(prompt=True), edit("accepted.cbor", inner("record", flipped("boot_id")))
    ),
    "redacted, answer changed": then(redacted(prompt=True), edit("answer.cbor", put("text", "Madrid."))),
    "redacted, receipt changed": then(
        redacted(prompt=True, output=True), cose(lambda p: p[3][0].__setitem__(2, flip(p[3][0][2], 5)))
    ),
    "redacted, index changed": then(redacted(output=True), edit("accepted.cbor", put("leaf_index", 0))),
    "EPOCH that is none": entries(put("epoch.cbor", b"x")),
    "EPOCH empty": entries(put("epoch.cbor", b"")),
    "witness that is none": entries(put("witness.cbor", cbor.encode({"v": 1}))),
    "witness of another version": entries(put("witness.cbor", cbor.encode({"v": 2, "checkpoint": b"", "proof": []}))),
    "no anchors": entries(put("anchors.cbor", cbor.encode({"v": 1, "anchors": []}))),
    "anchors of another version": entries(put("anchors.cbor", cbor.encode({"v": 2, "anchors": []}))),
    "anchor of another kind": entries(put("anchors.cbor", anchors(kind="sundial"))),
    "anchor with a short hash": entries(put("anchors.cbor", anchors(proof=[b"x"]))),
    "anchor with a long token": entries(put("anchors.cbor", anchors(token=bytes(65537)))),
    "anchor with a field more": entries(put("anchors.cbor", anchors(more=1))),
    "anchors before the witness": entries(lambda f: f.update({"anchors.cbor": b"x", "witness.cbor": b"y"})),
}
MANIFEST: dict[str, Make] = {
    "manifest left out": entries(without("measurements.json")),
    "manifest payload": statement('"version":1', '"version":2'),
    "manifest image": statement('"image_id":"', '"image_id":"0'),
    "manifest ES256 signature": dsse(lambda m: put("sig", base64_flip(m["signatures"][0]["sig"]))(m["signatures"][0])),
    "manifest ML-DSA signature": dsse(lambda m: put("sig", base64_flip(m["signatures"][1]["sig"]))(m["signatures"][1])),
    "manifest signers swapped": dsse(lambda m: m["signatures"].reverse()),
    "manifest signer missing": dsse(lambda m: m["signatures"].pop()),
    "manifest key id": dsse(lambda m: put("keyid", "00" * 32)(m["signatures"][0])),
    "manifest key": dsse(lambda m: put("publicKey", base64_flip(m["signatures"][0]["publicKey"]))(m["signatures"][0])),
    "manifest type": dsse(put("payloadType", "text/plain")),
    "manifest member more": dsse(put("more", 1)),
    "manifest with spaces": entry("measurements.json", lambda data: json.dumps(json.loads(data)).encode()),
    "manifest not JSON": entry("measurements.json", lambda data: data[:-1]),
    "manifest not base64": dsse(put("payload", "*")),
}
# RFC 8949: other encodings of the same or almost the same value, none of them deterministic or none of ours.
ODD: dict[str, Make] = {
    "CBOR map of indefinite length": entry("answer.cbor", lambda data: b"\xbf" + data[1:] + b"\xff"),
    "CBOR number with a long head": entry("answer.cbor", lambda data: data.replace(b"\x61v\x01", b"\x61v\x18\x01")),
    "CBOR text with a long head": entry("answer.cbor", lambda data: data.replace(b"\x64text", b"\x78\x04text")),
    "CBOR map head of two bytes": entry("answer.cbor", lambda data: b"\xb8\x05" + data[1:]),
    "CBOR bytes of indefinite length": entry(
        "answer.cbor", lambda data: data.replace(b"\x64text", b"\x7f\x64text\xff")
    ),
    "CBOR keys in another order": entry("answer.cbor", _unsorted),
    "CBOR key twice": entry("answer.cbor", lambda data: b"\xa6" + data[1:4] + data[1:]),
    "CBOR byte behind the end": entry("accepted.cbor", lambda data: data + b"\xf6"),
    "CBOR cut": entry("accepted.cbor", lambda data: data[:-1]),
    "CBOR empty": entry("accepted.cbor", lambda _data: b""),
    "CBOR reserved head": entry("accepted.cbor", lambda data: b"\x1c" + data[1:]),
    "CBOR break alone": entry("accepted.cbor", lambda _data: b"\xff"),
    "CBOR undefined": entry("answer.cbor", lambda data: data.replace(b"\x61v\x01", b"\x61v\xf7")),
    "CBOR simple value": entry("answer.cbor", lambda data: data.replace(b"\x61v\x01", b"\x61v\xe0")),
    "CBOR float for a number": entry("answer.cbor", lambda data: data.replace(b"\x61v\x01", b"\x61v\xf9\x3c\x00")),
    "CBOR float of eight bytes": entry(
        "answer.cbor", lambda data: data.replace(b"\x61v\x01", b"\x61v\xfb" + struct.pack(">d", 1.0))
    ),
    "CBOR not a number": entry("answer.cbor", lambda data: data.replace(b"\x61v\x01", b"\x61v\xf9\x7e\x00")),
    "CBOR infinity": entry("answer.cbor", lambda data: data.replace(b"\x61v\x01", b"\x61v\xf9\x7c\x00")),
    "CBOR big number": entry("answer.cbor", lambda data: data.replace(b"\x61v\x01", b"\x61v\xc2\x41\x01")),
    "CBOR tag around it all": entry("answer.cbor", lambda data: b"\xd9\xd9\xf7" + data),
    "CBOR true for one": entry("answer.cbor", lambda data: data.replace(b"\x61v\x01", b"\x61v\xf5")),
    "CBOR key that is true": entry("answer.cbor", lambda data: data.replace(b"\x61v\x01", b"\xf5\x01")),
    "CBOR key that is bytes": entry("answer.cbor", lambda data: data.replace(b"\x61v\x01", b"\x41v\x01")),
    "CBOR text that is not UTF-8": entry("answer.cbor", lambda data: data.replace(b"Paris.", b"Par\xffs.")),
    "CBOR surrogate in text": entry("answer.cbor", lambda data: data.replace(b"Paris.", b"Pa\xed\xa0\x80.")),
    "CBOR byte-order mark in text": entry(
        "answer.cbor", lambda data: data.replace(b"\x66Paris.", b"\x66\xef\xbb\xbfris")
    ),
    "CBOR nested deep": entry("answer.cbor", lambda _data: b"\x81" * 40 + b"\x00"),
    "CBOR list of 2^60": entry("answer.cbor", lambda _data: b"\x9b\x10" + bytes(7)),
    "CBOR bytes of 2^63": entry("answer.cbor", lambda _data: b"\x5b\x80" + bytes(7)),
    "CBOR of two million items": entry("answer.cbor", lambda _data: b"\x9a\x00\x20\x00\x00" + bytes(1 << 21)),
    "COSE protected header as map": cose(lambda p: p.__setitem__(0, cbor.decode(p[0]))),
    "COSE signer header empty": cose(lambda p: p[3][0].__setitem__(0, b"")),
    "COSE signer header with a long head": cose(
        lambda p: p[3][0].__setitem__(0, p[3][0][0].replace(b"\x58\x20", b"\x59\x00\x20"))
    ),
    "COSE payload as text": cose(lambda p: p.__setitem__(2, "text")),
    "COSE tag with a long head": entry("receipt.cose", lambda data: b"\xd9\x00\x62" + data[2:]),
}


VARIANTS: dict[str, Make] = {
    "good": lambda data: data,
    **CONTAINER,
    **REQUEST,
    **ACCEPTED,
    **ANSWER,
    **RECEIPT,
    **EVIDENCE,
    **REDACTED,
    **MANIFEST,
    **ODD,
}
