"""Raw files of the simulated machine through the command line: every option, form of file, and end of the command."""

from __future__ import annotations

import base64
import json
import socket
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from countermark import x509chain
from countermark.appraise import TimeBasis, appraise
from countermark.cli import main
from countermark.errors import CountermarkError, PolicyError
from countermark.formats.evidence import Evidence as Made
from countermark.formats.evidence import GpuEvidence, encode_evidence
from countermark.genuine import (
    GpuFiles,
    Outcome,
    appraise_event_log_files,
    appraise_gpu_bundle,
    appraise_gpu_files,
    appraise_tdx_files,
    hex_or_binary,
)
from countermark.gpu.report import spki_digest
from countermark.policy import KNOWN_MRSEAM, Policy, encode_policy
from evidence.command import Evidence, statuses, write
from sim_evidence import NOW, Scene, machine, policy_for, resign

NONCE = b"\x11" * 32


@pytest.fixture(scope="module")
def made() -> Made:
    """Two GPUs that one nonce was for."""
    return two_gpus().make()


def two_gpus() -> Scene:
    return Scene(state=machine(2), gpus=lambda platform, _: platform.gpu_evidence(NONCE))


def policy(**changes: Any) -> Policy:
    return policy_for(machine(2), **changes)


@pytest.fixture
def folder(tmp_path: Path, made: Made) -> Path:
    """The files of a machine, named for what they are."""
    files = {
        "quote.bin": made.quote,
        "quote.hex": b"\n".join(made.quote.hex().encode()[i : i + 64] for i in range(0, 2 * len(made.quote), 64))
        + b"\n",
        "collateral.json": made.endorsements.tdx,
        "ccel.bin": made.ccel,
        "report.bin": made.gpu[0].report,
        "report.txt": made.gpu[0].report.hex().upper().encode() + b"\n",
        "chain.pem": pem(made.gpu[0]),
        "chain.der": b"".join(made.gpu[0].certs),
        "chain.hex": b"".join(made.gpu[0].certs).hex().encode(),
        "bundle.json": bundle(made.gpu),
        "root.der": machine(2).root_der,
        "policy.toml": encode_policy(policy()).encode(),
    }
    files |= {f"{number}.swidtag": data for number, data in enumerate(made.endorsements.gpu_rims)}
    files |= {f"{number}.crl": data for number, data in enumerate(made.endorsements.gpu_crls)}
    files |= {f"{number}.ocsp": data for number, data in enumerate(made.endorsements.gpu_ocsp)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def pem(gpu: GpuEvidence) -> bytes:
    chain = x509chain.parse_der_chain(gpu.certs, "gpu")
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain)


def bundle(gpus: tuple[GpuEvidence, ...], **common: Any) -> bytes:
    items = [
        {
            "arch": "HOPPER",
            "evidence": base64.b64encode(gpu.report).decode(),
            "certificate": base64.b64encode(pem(gpu)).decode(),
            "nonce": NONCE.hex(),
            **common,
        }
        for gpu in gpus
    ]
    return json.dumps(items).encode()


def gpu_options(folder: Path) -> list[object]:
    """RIMs and revocation input, each option with all of its files."""
    found: list[object] = []
    for option, pattern in (("--rim", "*.swidtag"), ("--crl", "*.crl"), ("--ocsp", "*.ocsp")):
        files = sorted(folder.glob(pattern))
        found += [option, *files] if files else []
    return found


@pytest.mark.parametrize("quote", ["quote.bin", "quote.hex"])
def test_a_quote_under_a_root_that_is_not_intels_is_simulated(quote: str, folder: Path, evidence: Evidence) -> None:
    call = ("tdx", folder / quote, "--collateral", folder / "collateral.json", "--at", NOW)
    strict, returned = evidence(*call)
    assert (strict["verdict"], strict["code"], returned) == ("reject", "quote.root", 10)
    root = write(folder / "root.pem", x509.load_der_x509_certificate(machine(2).root_der).public_bytes(Encoding.PEM))
    for path in (folder / "root.der", root):
        found, _ = evidence(*call, "--root-ca", path)
        assert found["simulated"]
        assert found["verdict"] == "accept"
        assert "SIMULATED" in evidence.said
    accepted, returned = evidence(*call, "--policy", folder / "policy.toml")
    assert (accepted["verdict"], accepted["simulated"], returned) == ("accept", True, 0)
    assert evidence(*call, "--policy", folder / "policy.toml", "--root-ca", folder / "root.der")[1] == 0


def test_made_evidence_may_state_a_module_of_intels(folder: Path, evidence: Evidence) -> None:
    scene = Scene(state=machine(2), quote=lambda platform, quote: resign(platform, quote, mrseam=KNOWN_MRSEAM[-1]))
    quote = write(folder / "intels.bin", scene.make().quote)
    call = ("tdx", quote, "--collateral", folder / "collateral.json", "--root-ca", folder / "root.der", "--at", NOW)
    result, returned = evidence(*call)
    assert (result["verdict"], result["simulated"], returned) == ("accept", True, 0)


def test_the_firmwares_log_replays_and_is_silent_on_rtmr3(folder: Path, evidence: Evidence) -> None:
    result, returned = evidence("eventlog", folder / "ccel.bin", "--quote", folder / "quote.hex")
    assert (result["verdict"], returned) == ("accept", 0)
    assert statuses(result)["rtmr3 replays"] == "SKIP"
    assert result["claims"]["registers"]["rtmr3"]["matches"] is None


@pytest.mark.parametrize(("report", "chain"), [("bin", "pem"), ("txt", "der"), ("bin", "hex")])
def test_one_report_with_everything_beside_it(report: str, chain: str, folder: Path, evidence: Evidence) -> None:
    files = ("--report", folder / f"report.{report}", "--certs", folder / f"chain.{chain}", "--nonce", NONCE.hex())
    call = ("gpu", *files, "--policy", folder / "policy.toml", "--at", NOW)
    result, returned = evidence(*call, *gpu_options(folder))
    assert (result["verdict"], returned) == ("accept", 0)
    assert result["simulated"]
    assert set(statuses(result).values()) == {"PASS"}
    compared = result["claims"]["gpu"][0]["measurements"]
    assert all(item["matched"] == item["active"] > 0 for item in compared.values())
    alone, returned = evidence(*call)
    assert (alone["verdict"], returned) == ("accept", 0)
    assert statuses(alone)["revocation"] == statuses(alone)["measurements"] == "SKIP"
    other, returned = evidence(*(NONCE.hex().replace("1", "2") if part == NONCE.hex() else part for part in call))
    assert (other["code"], returned) == ("gpu.nonce", 14)


def test_several_gpus_must_be_several_and_answer_one_nonce(made: Made) -> None:
    def judged(data: bytes, nonce: bytes | None = NONCE) -> tuple[str, list[str]]:
        found = appraise_gpu_bundle(data, nonce, policy(), now=NOW)
        return found.code, [check.code for check in found.checks if check.code]

    assert judged(bundle(made.gpu)) == ("", [])
    assert judged(bundle((made.gpu[0], made.gpu[0]))) == ("gpu.duplicate", ["gpu.duplicate"])
    other = Scene(state=machine(2), gpus=lambda platform, _: platform.gpu_evidence(bytes(32))).make().gpu
    assert judged(bundle((made.gpu[0], other[1]))) == ("gpu.nonce", ["gpu.nonce"])
    assert judged(bundle(made.gpu), bytes(32)) == ("gpu.nonce", ["gpu.nonce", "gpu.nonce"])
    assert judged(bundle(made.gpu), None) == ("", [])
    assert judged(bundle((made.gpu[0], other[1])), None) == ("gpu.nonce", ["gpu.nonce"])
    assert judged(bundle(made.gpu, nonce=bytes(32).hex()), None) == ("gpu.nonce", ["gpu.nonce", "gpu.nonce"])
    found = appraise_gpu_bundle(bundle(made.gpu), None, policy(), now=NOW)
    assert "freshness is not shown" in next(check.detail for check in found.checks if check.name == "GPU 0: nonce")
    assert "freshness is not shown" in found.claims["nonce"]
    assert appraise_gpu_bundle(bundle(made.gpu), NONCE, policy(), now=NOW).claims["nonce"] == "as given"
    assert [check.name for check in found.checks].count("GPU 1: report signature") == 1


def test_a_bundle_through_the_command_line(folder: Path, evidence: Evidence) -> None:
    call = ("gpu", "--bundle", folder / "bundle.json", "--policy", folder / "policy.toml", "--at", NOW)
    result, returned = evidence(*call, *gpu_options(folder))
    assert (result["verdict"], returned, len(result["claims"]["gpu"])) == ("accept", 0, 2)
    assert evidence(*call, "--nonce", "00" * 32)[1] == 14
    assert evidence("gpu", "--bundle", folder / "quote.bin", "--at", NOW)[0]["code"] == "nvidia_evidence.json"


def test_requests_of_nvidias_first_verifiers_have_hex_in_base64(made: Made) -> None:
    items = json.loads(bundle(made.gpu))
    for item in items:
        item["evidence"] = base64.b64encode(base64.b64decode(item["evidence"]).hex().encode()).decode()
    for value in ({"nonce": NONCE.hex(), "arch": "HOPPER", "evidence_list": items}, items[0]):
        found = appraise_gpu_bundle(json.dumps(value).encode(), NONCE, policy(), now=NOW)
        assert (found.verdict, found.code) == (Outcome.ACCEPT, "")


def test_what_is_wrong_in_one_file_does_not_hide_what_is_wrong_in_another(made: Made) -> None:
    files = GpuFiles(rims=made.endorsements.gpu_rims, crls=(b"0",))
    report = made.gpu[0].report
    found = appraise_gpu_files(
        report[:-1] + bytes((report[-1] ^ 1,)), pem(made.gpu[0]), NONCE, policy(), now=NOW, files=files
    )
    assert [check.code for check in found.checks if check.code] == ["gpu.crl", "gpu.signature"]
    assert found.claims["gpu"][0]["report"].startswith("not verified")
    found = appraise_gpu_files(b"", b"", NONCE, policy(), now=NOW)
    assert [check.code for check in found.checks if check.code] == ["spdm.truncated", "gpu.chain"]
    found = appraise_tdx_files(b"", b"{}", policy(), now=NOW)
    assert [check.code for check in found.checks if check.code] == ["quote.truncated", "endorsements.crl_missing"]
    assert found.exit_code == 10
    found = appraise_event_log_files(b"", made.quote, now=NOW)
    assert (found.code, found.exit_code) == ("eventlog.truncated", 12)


def test_a_crl_that_is_refused_in_step_2_is_refused_in_step_3_too(made: Made) -> None:
    vendor = machine(2).vendor
    good = x509.load_der_x509_crl(bytes.fromhex(json.loads(made.endorsements.tdx)["pck_crl"]))
    assert good.next_update_utc is not None
    delta = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(good.issuer)
        .last_update(good.last_update_utc)
        .next_update(good.next_update_utc)
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(x509.DeltaCRLIndicator(1), critical=True)
        .sign(vendor.pck_ca.key, hashes.SHA256())
    )
    members = json.loads(made.endorsements.tdx) | {"pck_crl": delta.public_bytes(Encoding.DER).hex()}
    found = appraise_tdx_files(made.quote, json.dumps(members).encode(), policy(), now=NOW)
    assert [c.code for c in found.checks if c.code] == ["endorsements.crl_extension", "quote.crl_extension"]


def test_partly_covered_revocation_is_undecidable_where_the_policy_requires_it(made: Made) -> None:
    crl = made.endorsements.gpu_crls[:1]
    found = appraise_gpu_files(made.gpu[0].report, pem(made.gpu[0]), NONCE, policy(), now=NOW, files=GpuFiles(crls=crl))
    assert (found.verdict, found.code, found.exit_code) == (Outcome.UNDECIDABLE, "gpu.revocation_missing", 40)


def test_a_policy_that_names_machines_is_asked_about_files_too(made: Made) -> None:
    tdx = made.quote, made.endorsements.tdx
    ppid = bytes.fromhex(appraise_tdx_files(*tdx, policy(), now=NOW).claims["ppid"])
    chips = tuple(spki_digest(x509chain.parse_der_chain(gpu.certs, "gpu")[1]) for gpu in made.gpu)
    ours = policy(any_hardware=False, ppids=(ppid,), gpu_chips=chips)
    assert appraise_tdx_files(*tdx, ours, now=NOW).verdict is Outcome.ACCEPT
    assert appraise_gpu_bundle(bundle(made.gpu), NONCE, ours, now=NOW).verdict is Outcome.ACCEPT
    for others in (policy(any_hardware=False), policy(any_hardware=False, ppids=(bytes(16),), gpu_chips=chips[:1])):
        found = appraise_tdx_files(*tdx, others, now=NOW)
        assert (found.verdict, found.code, found.exit_code) == (Outcome.REJECT, "hardware.ppid", 12)
        found = appraise_gpu_bundle(bundle(made.gpu), NONCE, others, now=NOW)
        assert (found.verdict, found.code) == (Outcome.REJECT, "hardware.gpu")
    unrated = appraise_tdx_files(bytes(10), made.endorsements.tdx, ours, now=NOW)
    assert statuses(unrated.as_json())["hardware allow-list"] == "SKIP"


def test_an_expired_policy_judges_nothing(made: Made) -> None:
    late = policy().not_after + 1
    for call in (
        lambda: appraise_tdx_files(made.quote, made.endorsements.tdx, policy(), now=late),
        lambda: appraise_gpu_files(made.gpu[0].report, b"", NONCE, policy(), now=late),
        lambda: appraise_gpu_bundle(b"[]", None, policy(), now=late),
    ):
        with pytest.raises(PolicyError) as err:
            call()
        assert err.value.code == "policy.expired"


@pytest.mark.parametrize(
    ("argv", "code", "names"),
    [
        (("tdx", "none.bin", "--collateral", "collateral.json"), "usage.file", "none.bin"),
        (("tdx", "quote.bin", "--collateral", "none.json"), "usage.file", "none.json"),
        (("tdx", "big.bin", "--collateral", "collateral.json"), "usage.too_long", "big.bin"),
        (("tdx", ".", "--collateral", "collateral.json"), "usage.file", "."),
        (("tdx", "quote.bin", "--collateral", "collateral.json", "--root-ca", "quote.bin"), "usage.root", "quote.bin"),
        (("eventlog", "none.bin", "--quote", "quote.bin"), "usage.file", "none.bin"),
        (("gpu", "--report", "report.bin", "--nonce", "11" * 32), "usage.gpu", "--certs"),
        (("gpu", "--report", "report.bin", "--certs", "chain.pem"), "usage.gpu", "--nonce"),
        (("gpu", "--bundle", "bundle.json", "--certs", "chain.pem"), "usage.gpu", "--certs"),
        (("gpu", "--bundle", "bundle.json", "--rim", "none.xml"), "usage.file", "none.xml"),
    ],
)
def test_usage_errors_name_the_file(
    argv: tuple[str, ...], code: str, names: str, folder: Path, evidence: Evidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with Path("big.bin").open("wb") as big:
        big.truncate((16 << 20) + 1)
    result, returned = evidence(*argv)
    assert (result["verdict"], result["code"], returned) == ("undecidable", code, 1)
    assert names in evidence.said


def test_a_root_beside_a_policy_that_names_another_is_a_usage_error(folder: Path, evidence: Evidence) -> None:
    other = replace(policy(), tdx_root=bytes(32))
    path = write(folder / "other.toml", encode_policy(other).encode())
    call = ("tdx", folder / "quote.bin", "--collateral", folder / "collateral.json", "--at", NOW)
    result, returned = evidence(*call, "--policy", path, "--root-ca", folder / "root.der")
    assert (result["code"], returned) == ("usage.root", 1)


def test_people_get_checks_and_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["evidence", "tdx", str(folder / "quote.bin"), "--collateral", str(folder / "collateral.json")]
    assert main([*call, "--policy", str(folder / "policy.toml"), "--at", str(NOW)]) == 0
    seen = capsys.readouterr()
    assert seen.out.startswith("SIMULATED accept, as far as files were given")
    assert seen.out.count("\n") == 1
    assert "time: assumed" in seen.err
    assert main(call) == 10
    seen = capsys.readouterr()
    assert seen.out.startswith("reject (quote.root): quote root: expected Intel's SGX root")
    assert "time: now" in seen.err


@pytest.mark.parametrize(
    ("data", "meant"),
    [
        (b"0aFF", b"\x0a\xff"),
        (b" 0a\nff\r\n", b"\x0a\xff"),
        (b"0a f", b"0a f"),
        (b"0x0a\r\nFF\r\n", b"\x0a\xff"),
        (b"0X0a", b"\x0a"),
        (b"0x", b"0x"),
        (b"0x0x0a", b"0x0x0a"),
        (b"", b""),
        (b"\x04\x00", b"\x04\x00"),
    ],
)
def test_hex_text_is_what_it_spells(data: bytes, meant: bytes) -> None:
    assert hex_or_binary(data) == meant


@pytest.mark.parametrize("data", [b"ab" * (1 << 20), b"a " * (1 << 20), b"ab" * (1 << 20) + b"."])
def test_a_large_file_takes_little_more_memory_than_its_size(data: bytes) -> None:
    tracemalloc.start()
    try:
        hex_or_binary(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(data)


def test_nothing_in_an_appraisal_touches_the_network(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was asked for")

    scene = Scene()
    data = encode_evidence(scene.make())
    for name in ("socket", "create_connection", "getaddrinfo", "socketpair"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr("_socket.socket", refuse)
    appraise(data, policy_for(scene.state), now=NOW, connection=scene.connection())
    ends = made.endorsements
    files = GpuFiles(rims=ends.gpu_rims, crls=ends.gpu_crls, ocsp=ends.gpu_ocsp)
    assert appraise_tdx_files(made.quote, ends.tdx, policy(), now=NOW).verdict is Outcome.ACCEPT
    assert appraise_gpu_bundle(bundle(made.gpu), NONCE, policy(), now=NOW, files=files).verdict is Outcome.ACCEPT
    assert appraise_event_log_files(made.ccel, made.quote, now=NOW).verdict is Outcome.ACCEPT
    with pytest.raises(AssertionError, match="socket"):
        socket.create_connection(("127.0.0.1", 1))


def test_a_result_says_what_it_is() -> None:
    with pytest.raises(CountermarkError):
        appraise(b"", policy(), now=NOW)  # no file appraisal stands in for evidence of a session
    found = appraise_tdx_files(b"", b"", policy(), now=NOW, basis=TimeBasis.ASSUMED)
    assert list(found.as_json()) == ["verdict", "scope", "code", "checks", "claims", "simulated", "time"]
    assert found.as_json()["time"] == {"value": NOW, "basis": "assumed"}
