"""docs/formats.md and docs/codes.md say what the code says: fields, keys, constants, caps, steps, codes, classes.

The page is written by hand; these tests read it as tables and compare it with the source in both directions. Its known
answers are computed again with hashlib and hand-written CBOR, so that page and code are compared with something else.
"""

from __future__ import annotations

import ast
import hashlib
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from countermark import appraise, errors
from countermark.anchors.bitcoin import LEAST_WORK_BITS
from countermark.bundle import ENTRIES, MAX_BUNDLE_BYTES, Bundle, encode_bundle
from countermark.formats import anchors, boot_events, evidence, manifest, ots, quote, receipt, records, report_data
from countermark.formats.evidence import Evidence
from countermark.policy import Profile, encode_policy, new_policy
from countermark.policy import toml as policy_file
from countermark.replayer import Part
from countermark.tlog import checkpoint, merkle
from countermark.wire import codec, tls
from countermark.wire import countermark_v1_pb2 as pb
from countermark_appliance.engine.weights import artefact, modeljson, verity
from countermark_kernels import fingerprint

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
BODY, _, _ = PAGE.partition("## Appendix B. Error codes")
APPENDIX = (ROOT / "docs" / "codes.md").read_text(encoding="utf-8")
CLIENT = ROOT / "client" / "countermark"
APPLIANCE = ROOT / "appliance" / "countermark_appliance"
MEASUREMENTS = ROOT / "measurements" / "countermark_measurements"
CODE = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")

# A code that is put together at run time: its expression in the source, and every code that can come of it.
CHAIN = (
    *("root", "short", "ca", "extension", "chain_signature", "not_yet_valid", "expired"),
    *("crl_issuer", "crl_signature", "crl_extension"),
)
SETTINGS = (
    *("temperature", "top_k", "top_p_20bit", "min_p_20bit", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "logit_bias", "max_tokens", "stop", "ignore_eos", "logprobs", "model"),
)
JSON_TEXTS = ("manifest", "eventlog", "endorsements", "nvidia_evidence", "prediction", "image", "rvps")
FAMILIES: dict[str, tuple[str, ...]] = {
    "claims.{name}": tuple(
        f"claims.{name}"
        for name in ("purpose", "nonce", "exporter", "tls_spki", "image_id", "weights_root", "config", "keys")
    ),
    "replay.{at.part.value}": tuple(f"replay.{part.value}" for part in Part),
    "anchor.{reason}": tuple(f"anchor.{reason}" for reason in CHAIN[:7]),
    "endorsements.{code}": tuple(f"endorsements.{reason}" for reason in CHAIN),
    "tcb.{name}": ("tcb.fmspc", "tcb.pce_id"),
    "tcb.{code}": ("tcb.unknown_status", "tcb.qe_identity", "tcb.module", "tcb.no_level"),
    "quote.{code}": tuple(f"quote.{reason}" for reason in CHAIN),
    "gpu.{code}": (
        *(f"gpu.{reason}" for reason in CHAIN),
        *("gpu.missing", "gpu.count", "gpu.digest", "gpu.freshness", "gpu.duplicate", "gpu.device_key", "gpu.mode"),
        *("gpu.devtools", "gpu.crl_stranger", "gpu.revoked", "gpu.nonce", "gpu.field", "gpu.signature"),
        *("gpu.fwid", "gpu.fwid_missing", "gpu.rim_signature", "gpu.rim_version", "gpu.rim_conflict"),
        *("gpu.measurement", "gpu.ocsp_stranger", "gpu.ocsp_responder", "gpu.ocsp_signature", "gpu.ocsp_unknown"),
        *("gpu.ocsp_not_yet_valid", "gpu.ocsp_expired", "gpu.rim_root", "gpu.rim_chain", "gpu.rim_not_yet_valid"),
        "gpu.rim_expired",
    ),
    "{_WHAT}.{code}": tuple(
        f"nvidia_evidence.{code}" for code in ("form", "field", "count", "arch", "version", "too_long")
    ),
    "policy.{code}": ("policy.root", "policy.validity", "policy.value", "policy.contradiction", "policy.image"),
    "measurement.{name}": tuple(
        f"measurement.{name}"
        for name in (
            *("mrtd", "rtmr0", "rtmr1", "rtmr2", "mrconfigid", "mrowner", "mrownerconfig", "td_attributes", "xfam"),
        )
    ),
    "eventlog.{result.name}": tuple(f"eventlog.rtmr{i}" for i in range(4)),
    "receipt.setting.{name}": tuple(f"receipt.setting.{name}" for name in SETTINGS),
    "receipt.{name}": (
        *("receipt.es256", "receipt.ml_dsa_65", "receipt.output_tokens", "receipt.output_text"),
        "receipt.fingerprints",
    ),
    "request.{name}": tuple(
        f"request.{name}"
        for name in (
            *("model", "prompt", "max_tokens", "ignore_eos", "logprobs", "temperature", "top_k", "top_p", "min_p"),
            *("repetition_penalty", "presence_penalty", "frequency_penalty", "seed"),
        )
    ),
    "server.{status.name.lower()}": (),  # section 3 of the page: `server.<status>`
    # `what` is an argument: the callers in the client give these.
    "{what}.field": tuple(
        f"{what}.field"
        for what in (
            *("evidence", "claims", "leaf", "salts", "accepted", "answer", "receipt"),
            *("operator_leaf", "witnessed", "receipt_witness", "epoch", "anchors", "measured"),
        )
    ),
    "log.fetch.{reason}": tuple(f"log.fetch.{reason}" for reason in ("connection", "timeout", "status", "too_long")),
    "{what}.too_long": tuple(f"{what}.too_long" for what in JSON_TEXTS),
    "{what}.json": tuple(f"{what}.json" for what in JSON_TEXTS),
    "{what}.pem": ("quote.pem", "endorsements.pem", "nvidia_evidence.pem"),
    "{what}.chain": ("quote.chain", "endorsements.chain", "gpu.chain", "anchor.chain"),
    "{what}.crl": ("endorsements.crl", "gpu.crl"),
    "{self.what}.truncated": tuple(
        f"{what}.truncated" for what in ("quote", "eventlog", "tpmlog", "spdm", "pe", "tdvf")
    ),
    "{self.what}.trailing": ("quote.trailing", "eventlog.trailing", "tpmlog.trailing", "spdm.trailing"),
    "{self.what}.{name}": (),  # `Reader.expect`: collected from its calls, see `reader_codes`
}


def sources(folder: Path) -> dict[Path, ast.Module]:
    """Every hand-written module below `folder`, parsed."""
    paths = [path for path in sorted(folder.rglob("*.py")) if not path.name.endswith("_pb2.py")]
    assert len(paths) > 10
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


CLIENT_SOURCES = sources(CLIENT)


def rows(text: str) -> list[list[str]]:
    """The cells of every table row."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]


def section(heading: str) -> str:
    """The page from this heading to the next one of any level."""
    match = re.search(rf"^#+ (?:\d+\. )?{re.escape(heading)}\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert match is not None, heading
    return match[1]


def first_cells(text: str) -> set[str]:
    """What stands in backticks in the first column."""
    return {name for row in rows(text) for name in re.findall(r"`([^`]+)`", row[0])}


def code_table() -> dict[str, str]:
    """Code -> the class cell of its row."""
    found: dict[str, str] = {}
    for cells in rows(APPENDIX):
        if cells[0] == "code":
            continue
        for code in re.findall(r"`([^`]+)`", cells[0]):
            assert code not in found, f"{code} stands twice"
            found[code] = cells[1]
    return found


CODES = code_table()


def pattern(node: ast.expr) -> str | None:
    """A string, or an f-string with its expressions in braces, as in the source."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (
            "{" + ast.unparse(part.value) + "}" if isinstance(part, ast.FormattedValue) else str(part.value)
            for part in node.values
            if isinstance(part, ast.FormattedValue | ast.Constant)
        )
        return "".join(parts)
    return None


def raised(tree: ast.Module) -> list[tuple[str, str]]:
    """(called name, code or pattern) of every call with a `code=` that is written out."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            for keyword in node.keywords:
                text = pattern(keyword.value) if keyword.arg == "code" else None
                if text is not None:
                    found.append((node.func.id, text))
    return found


def reader_codes() -> set[str]:
    """`<what>.<name>` of every `expect` on a `Reader`, by the `what` its module uses."""
    found = set()
    for path, tree in CLIENT_SOURCES.items():
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        whats = {
            node.args[1].value
            for node in calls
            if isinstance(node.func, ast.Name) and node.func.id == "Reader" and isinstance(node.args[1], ast.Constant)
        }
        names = [
            node.args[2].value
            for node in calls
            if isinstance(node.func, ast.Attribute)
            and node.func.attr == "expect"
            and len(node.args) == 3
            and isinstance(node.args[2], ast.Constant)
        ]
        assert len(whats) == 1 or not names, path
        found |= {f"{next(iter(whats))}.{name}" for name in names}
    assert len(found) > 10
    return found


def literals(folder: Path) -> set[str]:
    """Every string in the sources that has the form of a code, and every code of a family."""
    texts = {
        node.value
        for tree in sources(folder).values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value)
    }
    return texts | reader_codes() | {code for codes in FAMILIES.values() for code in codes}


def test_every_code_the_client_raises_is_in_the_table() -> None:
    missing = []
    for path, tree in CLIENT_SOURCES.items():
        for _, text in raised(tree):
            expanded = FAMILIES[text] if "{" in text else (text,)
            missing += [(path.name, code) for code in expanded if code not in CODES]
    assert not missing
    assert reader_codes() <= CODES.keys()


def test_codes_given_by_position_are_in_the_table() -> None:
    """Helpers take a code as a plain argument: whatever begins like a known family must be known."""
    prefixes = {code.partition(".")[0] for code in CODES}
    not_codes = {"grpc.enable_retries", "demo.log"}
    strings = {
        node.value
        for tree in CLIENT_SOURCES.values()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for node in call.args
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    strings |= {
        item.value
        for tree in CLIENT_SOURCES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Tuple)
        for item in node.elts
        if isinstance(item, ast.Constant) and isinstance(item.value, str)
    }
    codes = {
        text
        for text in strings
        if CODE.fullmatch(text) and text.partition(".")[0] in prefixes and text not in not_codes
    }
    assert len(codes) > 20
    names_of_keys = {key for key in policy_keys() if "." in key} | {
        "endorsements.min_tcb_evaluation_data_number",
        "gpu.count",
    }
    assert codes - CODES.keys() - names_of_keys - ENTRIES.keys() == set()


def test_every_code_in_the_table_exists() -> None:
    known = literals(CLIENT) | literals(APPLIANCE) | literals(MEASUREMENTS)
    known |= {f"generation.{reason}" for reason in records.ABORT_REASONS}
    assert CODES.keys() - known == set()


def test_the_class_of_a_code_is_the_one_that_raises_it() -> None:
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    wrong = []
    for path, tree in CLIENT_SOURCES.items():
        helpers = {
            node.name: ast.unparse(node.returns)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.returns is not None
        }
        for called, text in raised(tree):
            name = helpers.get(called, called)
            if name in classes:
                codes = FAMILIES[text] if "{" in text else (text,)
                shared = text.startswith("claims.{")  # one family, two classes
                wrong += [(path.name, name, code) for code in codes if name not in CODES.get(code, "") and not shared]
    assert not wrong


def test_exit_codes() -> None:
    listed = {
        name: int(cells[0]) for cells in rows(section("Appendix A. Exit codes"))[1:] for name in cells[1].split(", ")
    }
    del listed[""]
    ours = {
        name: value.exit_code
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.CountermarkError)
    }
    assert listed == ours


@pytest.mark.parametrize(
    ("heading", "cls"),
    [
        ("EPOCH", records.Epoch),
        ("INTENT", records.Intent),
        ("OUTCOME", records.Outcome),
        ("ABORT", records.Abort),
        ("CRASHED", records.Crashed),
        ("REPLAY", records.Replay),
        ("Divergence", records.Divergence),
        ("Stack", records.Stack),
        ("Sampling", records.Sampling),
        ("Retrieval", records.Retrieval),
        ("Grammar", records.Grammar),
        ("Previous", records.Previous),
    ],
)
def test_record_fields(heading: str, cls: type) -> None:
    assert first_cells(section(heading)) == {field.name for field in fields(cls)}


def test_anchors() -> None:
    text = section("Anchors")
    assert {field.name for field in fields(anchors.Anchor)} <= first_cells(text)
    assert all(f"`{kind}`" in text for kind in anchors.AnchorKind)
    assert f"1 to {anchors.MAX_ANCHORS} maps" in text
    assert f"at most {anchors.MAX_TOKEN_BYTES // 1024} KiB" in text
    assert ENTRIES["anchors.cbor"] >= anchors.MAX_ANCHORS_BYTES
    said = (f"at most {ots.MAX_ITEMS} of them, {ots.MAX_DEPTH} behind", f"at most {ots.MAX_MESSAGE_BYTES} bytes")
    assert all(part in " ".join(text.split()) for part in said)
    assert f"`{LEAST_WORK_BITS:08x}`" in text


def test_record_tables_name_what_may_be_null_and_the_choices() -> None:
    of = {"EPOCH": records.Epoch, "INTENT": records.Intent, "OUTCOME": records.Outcome, "REPLAY": records.Replay}
    for heading, cls in of.items():
        kinds = {row[0].strip("`"): row[1] for row in rows(section(heading))[1:]}
        assert {name for name, kind in kinds.items() if "null" in kind} == {
            field.name for field in fields(cls) if "None" in str(field.type)
        }
    for names, heading in (
        (records.FINISH_REASONS, "OUTCOME"),
        (records.ABORT_REASONS, "ABORT"),
        (records.REPLAY_MODES + records.REPLAY_RESULTS, "REPLAY"),
        (records.REPLAY_PARTS, "Divergence"),
        ((records.EXACT_TIER, *records.EXACT_CLAIMS), "Stack"),
    ):
        assert all(f"`{name}`" in section(heading) for name in names)
    for name in (*records.INTENT_FIELDS, *records.OUTCOME_FIELDS):
        assert f"`{name}`" in section("Commitments, leaves, tree")
        assert f"| `{name}` | commitment |" in PAGE
    assert all(f"`type` `{kind.value}`" in PAGE for kind in records.Kind)


def test_fields_of_evidence_claims_leaf_and_receipt() -> None:
    claims = {field.name for field in fields(report_data.Claims)} - {"gpu_digest", "gpu_freshness"}
    assert first_cells(section("Claims, keys, report_data")) == {*claims, "v", "gpu", *report_data.ROLES}
    assert first_cells(section("Evidence")) == {field.name for field in fields(Evidence)} | {"v"}
    leaf = {field.name for field in fields(records.Leaf)} - {"kind"}
    names = first_cells(section("Commitments, leaves, tree"))
    assert names >= {*leaf, "v", "type"}
    assert first_cells(section("Receipt")) == {field.name for field in fields(receipt.Payload)} | {"v"}
    for field in fields(receipt.Proven):
        assert f"`{field.name}`" in section("Receipt")


def test_roles_and_algorithms() -> None:
    order = [row for row in rows(section("Claims, keys, report_data")) if row[0].strip("`") in report_data.ROLES]
    assert [row[0].strip("`") for row in order] == list(report_data.ROLES)
    for row, algorithm in zip(order, report_data.ROLES.values(), strict=True):
        assert f"({algorithm.value})" in row[1]


def test_rtmr3_events_in_order() -> None:
    table = rows(section("Event logs and RTMR3"))[1:]
    assert [row[1].strip("`") for row in table] == list(boot_events.NAMES)
    assert f"0x{boot_events.EVENT_TYPE:X}" in section("Event logs and RTMR3")
    assert all(f"`{mode.value}`" in section("Event logs and RTMR3") for mode in boot_events.GpuMode)


def test_every_message_and_field_of_the_calls() -> None:
    text = section("Calls")
    for name, message in pb.DESCRIPTOR.message_types_by_name.items():
        assert f"`{name}`" in text or name == "Sampling", name
        for field in message.fields:
            found = any(f"`{form}`" in text for form in (field.name, f"sampling.{field.name}"))
            assert found or field.name in ("sampling", "accepted", "tokens", "finished"), f"{name}.{field.name}"
    for name in (
        "GenerateRequest",
        "Chat",
        "Message",
        "Sampling",
        "Retrieval",
        "Chunk",
    ):  # a verifier decodes these from a bundle
        numbered = ", ".join(
            f"{field.name} {field.number}" for field in pb.DESCRIPTOR.message_types_by_name[name].fields
        )
        assert f"`{name}` {numbered}" in " ".join(text.split())
    for service in pb.DESCRIPTOR.services_by_name.values():
        assert all(f"`{method.name}`" in text for method in service.methods)
    assert f"`{codec.CODE_KEY}`" in text
    assert f"`{codec.RETRY_KEY}`" in text


def policy_keys() -> set[str]:
    """Every key of a policy file, dotted; the tables of waivers and images by hand."""
    keys = set()
    for name, value in tomllib.loads(encode_policy(new_policy(Profile.TEST, now=0))).items():
        keys |= {f"{name}.{key}" for key in value} if isinstance(value, dict) else {name}
    return keys | {"image.statement"}


def test_policy_keys() -> None:
    assert first_cells(section("Policy file")) == policy_keys()


def test_manifest_members() -> None:
    text = section("Measurement manifest")
    derived = {"simulated"}
    own = {field.name for field in fields(manifest.Manifest)} - {"subjects"}
    assert first_cells(text) == own | derived
    for cls in (manifest.Shape, manifest.PredictedEvent):
        assert all(f"`{field.name}`" in text for field in fields(cls))
    for constant in (manifest.STATEMENT_TYPE, manifest.PREDICATE_TYPE, manifest.PAYLOAD_TYPE):
        assert f"`{constant}`" in text
    assert manifest.pae(b"{}") == b"DSSEv1 28 application/vnd.in-toto+json 2 {}"
    assert '"DSSEv1 28 application/vnd.in-toto+json "' in text


def test_bundle_entries_in_order() -> None:
    empty = receipt.Acceptance(
        record=b"", leaf_salt=b"", field_salts=b"", leaf_index=0, proof=(), checkpoint=b"", prompt_tokens=()
    )
    answer = receipt.Answer(tokens=(), text="", fingerprints=(), field_salts=b"")
    data = encode_bundle(
        Bundle(
            request=b"",
            receipt=b"",
            evidence=b"",
            manifest=b"{}",
            acceptance=empty,
            answer=answer,
            epoch=b"",
            witness=b"",
            anchors=b"",
        )
    )
    names = [
        match[1].decode()
        for match in re.finditer(rb"PK\x03\x04.{22}(?:.{4})([a-z.]+?\.(?:cbor|bin|cose|json))", data, re.S)
    ]
    table = rows(section("Bundle").partition("**Redaction**")[0])
    assert [row[0].strip("`") for row in table[1:]] == names
    assert len(names) == 10
    for name, most in ENTRIES.items():
        (shown,) = [row[2] for row in table if row[0] == f"`{name}`"]
        size = f"{most // 1024} KiB" if most % (1 << 20) else f"{most >> 20} MiB"
        assert shown.partition(" (")[0] == size, name
    for cls in (receipt.Acceptance, receipt.Answer):
        assert all(f"`{field.name}`" in section("Bundle") for field in fields(cls))


def test_weights_members_and_parameters() -> None:
    text = section("Weights artefact")
    assert first_cells(text) >= {artefact.IMAGE, artefact.TREE, artefact.SIDECAR}
    order = [text.index(f"`{name}`") for name in (artefact.MANIFEST, *artefact.TEXTS)]
    assert order == sorted(order)
    assert all(f"`{key}`" in text for key in modeljson._KEYS)
    assert verity.SALT.hex() in text
    assert verity.UUID.hex() in text
    for context in ("salt", "uuid"):
        assert f"`countermark/weights/verity/{context}/v1`" in PAGE


def test_contexts_and_constants() -> None:
    listed = first_cells(section("Rules for every format"))
    used = {
        found
        for tree in (*CLIENT_SOURCES.values(), *sources(APPLIANCE / "engine" / "weights").values())
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, bytes | str)
        for found in [node.value if isinstance(node.value, str) else node.value.decode("latin-1")]
        if re.fullmatch(r"countermark/[a-z/-]+/v1", found)
    }
    assert listed >= used
    assert len(used) >= 9
    for constant in (
        f"label `{tls.EXPORTER_LABEL.decode()}`",
        tls.GROUP,
        f"`{tls.ALPN.decode()}`",
        evidence.PASSPORT_OID,
        f"tag {evidence.PASSPORT_TAG}",
        receipt.CONTENT_TYPE,
        receipt.EXTERNAL_AAD.decode(),
    ):
        assert constant in BODY, constant


def test_caps() -> None:
    mib, kib = 1 << 20, 1 << 10
    cells = [cell for row in rows(section("Rules for every format")) if len(row) == 4 for cell in row]
    caps = dict(zip(cells[::2], cells[1::2], strict=True))
    assert caps["bundle"] == f"{MAX_BUNDLE_BYTES // mib} MiB"
    assert caps["evidence"] == f"{evidence.MAX_EVIDENCE_BYTES // mib} MiB"
    assert caps["quote"] == f"{quote.MAX_QUOTE_BYTES // kib} KiB"
    assert caps["claims"] == f"{report_data.MAX_CLAIMS_BYTES} bytes"
    assert caps["signed note"] == f"{checkpoint.MAX_NOTE_BYTES // kib} KiB"
    assert caps["record"] == f"{records.MAX_RECORD_BYTES // kib} KiB"
    assert caps["leaf"] == f"{records.MAX_LEAF_BYTES} bytes"
    assert caps["receipt"] == f"{receipt.MAX_RECEIPT_BYTES // kib} KiB"
    assert caps["manifest (envelope and statement)"] == f"{manifest.MAX_MANIFEST_BYTES // mib} MiB"
    assert caps["policy file"] == f"{policy_file.MAX_BYTES // mib} MiB"
    assert caps["proof"] == f"{merkle.MAX_PROOF} hashes"
    assert caps["request; response message"] == (
        f"{codec.MAX_REQUEST_BYTES // mib} MiB; {codec.MAX_RESPONSE_BYTES // mib} MiB"
    )
    assert records.MAX_TOKENS == 1 << 20


def test_every_numbered_step_has_a_row() -> None:
    made = set(appraise.STEPS)
    for name in ("receipt.py", "verify.py", "witness.py"):
        for node in ast.walk(CLIENT_SOURCES[CLIENT / name]):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("step", "skip")
            ):
                made |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    listed = [row[0] for row in rows(section("Verification steps").partition("A result over")[0])[1:]]
    assert listed == [*map(str, range(1, 8)), "7b", *map(str, range(8, 22))]
    assert made == set(listed)


def test_codes_in_the_text_are_in_the_table() -> None:
    prefixes = {code.partition(".")[0] for code in CODES}
    shown = {text for text in re.findall(r"`([a-z0-9_.]+)`", section("Verification steps")) if "." in text}
    shown |= set(re.findall(r"`((?:stream|channel)\.[a-z_]+)`", BODY))
    assert len(shown) > 25
    assert {text for text in shown if text.partition(".")[0] in prefixes} - CODES.keys() - policy_keys() == set()


def test_known_answers_by_hand() -> None:
    """The formulas of the page, in hashlib alone."""
    zero, sha256 = bytes(32), hashlib.sha256

    def text(value: str) -> bytes:
        return bytes([0x60 + len(value)]) + value.encode()

    leaf = b"".join(
        (
            b"\xa6" + text("v") + b"\x01" + text("type") + text("intent"),
            text("boot_id") + b"\x58\x20" + zero + text("sequence") + b"\x01",
            text("commitment") + b"\x58\x20" + zero + text("intent_leaf") + b"\xf6",
        )
    )
    answers = {
        "field commitment": sha256(b"countermark/field/v1" + b"\x06prompt" + zero),
        "leaf commitment": sha256(b"countermark/leaf/v1" + b"intent" + zero),
        "leaf hash": sha256(b"\x00" + leaf),
        "GPU nonce": sha256(b"countermark/gpu/v1" + zero + zero),
        "gpu.digest of": sha256(b"countermark/gpu-evidence/v1" + b"\x80"),
        "digest of the event": hashlib.sha384(b"\x82" + text("system-ready") + b"\xf6"),
    }
    table = [row for row in rows(section("Commitments, leaves, tree")) if len(row) == 2 and row[0] != "what"]
    assert len(table) == len(answers)
    for (what, shown), (name, expected) in zip(table, answers.items(), strict=True):
        assert what.startswith(name)
        assert shown == f"`{expected.hexdigest()}`"
    # and the code agrees with both
    made = records.Leaf(kind=records.Kind.INTENT, boot_id=zero, sequence=1, intent_leaf=None, commitment=zero)
    assert records.encode_leaf(made) == leaf
    assert records.field_commitment("prompt", zero, b"").hex() in PAGE
    assert records.commitment(records.Kind.INTENT, zero, b"").hex() in PAGE
    assert report_data.gpu_nonce(zero, zero).hex() in PAGE


def test_fingerprint_by_hand() -> None:
    """The page's formula for logits (1, -2), whose binary32 patterns are 0x3f800000 and 0xc0000000."""

    def split_mix(seed: int) -> int:
        z = seed + 0x9E3779B97F4A7C15
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    lanes = [
        sum(bits * (split_mix(2 * i + lane) | 1) for i, bits in enumerate((0x3F800000, 0xC0000000))) % 2**64
        for lane in (0, 1)
    ]
    expected = b"".join(lane.to_bytes(8, "little") for lane in lanes)
    assert fingerprint.encode(fingerprint.reference(torch.tensor([[1.0, -2.0]]), 2)) == [expected]
    assert "lane 0 || lane 1, u64 each and here **little-endian**" in " ".join(PAGE.split())
