"""Every genuine file gives the verdict and code that its row in the vectors' README expects, through the command line.

Not shown here: a genuine GPU accepted with all of its measurements compared, for no genuine driver RIM fits a report.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import vectors
from countermark.policy import Profile, Waiver, encode_policy, new_policy
from evidence.command import Evidence, statuses, write

NONCE_550 = "931d8dd0add203ac3d8b4fbde75e115278eefcdceac5b87671a748f32364dfcb"
NONCE_535 = "27a328247bf7935c993341cf587be6f05986ccce4fe7ba2c54100bd616a58f66"
VBIOS_RIM = "1010_0200_882_96005E0001_PROD.swidtag"
IN_2024 = 1_718_000_000  # inside the validity of every RIM signer of 2023


def tdx(evidence: Evidence, name: str, *options: object) -> tuple[dict, int]:  # type: ignore[type-arg]
    folder = vectors.directory() / "tdx" / name
    at = () if "--at" in options else ("--at", vectors.TDX_AT[name])
    return evidence("tdx", folder / "quote.bin", "--collateral", folder / "collateral.json", *at, *options)


def gpu(evidence: Evidence, name: str, nonce: str, *options: object) -> tuple[dict, int]:  # type: ignore[type-arg]
    folder = vectors.directory() / "nvidia" / name
    report, certs = folder / "hopperAttestationReport.txt", folder / "hopperCertChain.txt"
    return evidence("gpu", "--report", report, "--certs", certs, "--nonce", nonce, *options)


def rim(name: str) -> Path:
    return vectors.directory() / "nvidia" / "rim" / name


@pytest.mark.parametrize(
    ("name", "verdict", "code", "exit_code"),
    [
        ("dstack-90c06f", "accept", "", 0),
        ("phala-b0c06f", "accept", "", 0),
        ("debug-td", "reject", "tdx.debug", 12),
        ("outofdate-00a06d", "reject", "tcb.status", 11),
        ("no-sept-ve", "reject", "quote.trailing", 10),
    ],
)
def test_tdx_quotes(name: str, verdict: str, code: str, exit_code: int, evidence: Evidence) -> None:
    result, returned = tdx(evidence, name)
    assert (result["verdict"], result["code"], returned) == (verdict, code, exit_code)
    assert (result["scope"], result["simulated"]) == ("genuine", False)
    assert result["time"] == {"value": vectors.TDX_AT[name], "basis": "assumed"}
    assert "time: assumed" in evidence.said
    assert {"step", "name", "status", "detail", "code"} == set(result["checks"][0])
    if verdict == "accept":
        assert result["claims"]["tcb_status"] == "UpToDate"
        assert result["claims"]["quote"] == "verified"


def test_everything_that_is_wrong_is_listed(evidence: Evidence) -> None:
    result, _ = tdx(evidence, "no-sept-ve")
    codes = [check["code"] for check in result["checks"] if check["code"]]
    assert codes == ["quote.trailing", "tcb.no_level", "tdx.sept_ve_disable"]
    result, _ = tdx(evidence, "debug-td")
    assert [check["code"] for check in result["checks"] if check["code"]] == ["tdx.debug"]


def test_a_refused_platform_is_shown_with_its_rating(evidence: Evidence) -> None:
    claims = tdx(evidence, "outofdate-00a06d")[0]["claims"]
    assert (claims["tcb_status"], claims["fmspc"]) == ("OutOfDate", "00a06d080000")
    assert claims["quote"] == "signatures verify, and step 3 refuses the platform"
    claims = tdx(evidence, "no-sept-ve")[0]["claims"]
    assert (claims["tcb_status"], claims["quote"]) == (None, "not verified: step 3 did not pass")
    late = tdx(evidence, "dstack-90c06f", "--at", "now")[0]["claims"]  # endorsements that do not hold rate nobody
    assert (late["tcb_status"], late["quote"]) == (None, "not verified: step 3 did not pass")


def test_a_policy_may_allow_an_out_of_date_platform_until_a_date(tmp_path: Path, evidence: Evidence) -> None:
    at = vectors.TDX_AT["outofdate-00a06d"]
    strict = new_policy(Profile.PRODUCTION, now=at)
    for until, code in ((at, ""), (at - 1, "tcb.status")):
        policy = replace(strict, accepted_statuses=(Waiver(name="OutOfDate", until=until),))
        path = write(tmp_path / "policy.toml", encode_policy(policy).encode())
        assert tdx(evidence, "outofdate-00a06d", "--policy", path)[0]["code"] == code


def test_claims_of_a_quote(evidence: Evidence) -> None:
    claims = tdx(evidence, "dstack-90c06f")[0]["claims"]
    assert claims["fmspc"] == "90c06f000000"
    assert claims["evaluation_data_number"] == 18
    assert claims["report_data"].startswith("1234")
    assert claims["mrtd"].startswith("b24d3b24e9e3c160")
    assert len(claims["ppid"]) == 32
    assert {"mrconfigid", "mrowner", "mrownerconfig", "td_attributes", "xfam", "mrseam", "tee_tcb_svn"} <= claims.keys()
    assert {"rtmr0", "rtmr1", "rtmr2", "rtmr3", "advisory_ids", "quote_version", "quote_digest"} <= claims.keys()


def test_the_h100_with_driver_550_answers_its_nonce_and_no_other(evidence: Evidence) -> None:
    result, returned = gpu(evidence, "h100-550", NONCE_550)
    assert (result["verdict"], returned) == ("accept", 0)
    (claims,) = result["claims"]["gpu"]
    assert (claims["driver"], claims["vbios"], claims["mode"]) == ("550.90.07", "96.00.9F.00.01", "cc-on")
    assert claims["report"] == "verified"
    assert claims["measurements"] == dict.fromkeys(("driver", "vbios"), "not compared: no RIM given")
    result, returned = gpu(evidence, "h100-550", "00" * 32)
    assert (result["verdict"], result["code"], returned) == ("reject", "gpu.nonce", 14)


def test_the_h100_with_driver_535_has_no_firmware_identifier_and_its_measurements_match(evidence: Evidence) -> None:
    result, returned = gpu(evidence, "h100-535", NONCE_535, "--rim", rim(VBIOS_RIM), "--at", IN_2024)
    assert (result["verdict"], result["code"], returned) == ("reject", "gpu.fwid_missing", 14)
    assert [check["code"] for check in result["checks"] if check["code"]] == ["gpu.fwid_missing"]
    compared = result["claims"]["gpu"][0]["measurements"]
    assert (compared["vbios"]["matched"], compared["vbios"]["active"], compared["vbios"]["failed"]) == (12, 12, [])
    assert compared["driver"] == "not compared: no RIM of its version given"


@pytest.mark.parametrize(
    ("name", "at"),
    [
        (VBIOS_RIM, IN_2024),
        ("1010_0200_882_96005E0001_test_no_gpu.swidtag", IN_2024),
        ("1010_0205_862_96005E0002_PROD.swidtag", IN_2024),
        ("Driver_RIM_test_no_gpu.swidtag", IN_2024),
        ("NV_GPU_DRIVER_GH100_550.144.03.xml", 1_768_000_000),
    ],
)
def test_rims(name: str, at: int, evidence: Evidence) -> None:
    result, _ = gpu(evidence, "h100-550", NONCE_550, "--rim", rim(name), "--at", at)
    found = statuses(result)
    assert found["RIM: signature"] == found["RIM: signer's certificate chain to the RIM root"] == "PASS"
    assert result["code"] == "gpu.rim_version"  # none of them is of this report's driver or VBIOS
    late, _ = gpu(evidence, "h100-550", NONCE_550, "--rim", rim(name), "--at", 2_000_000_000)
    found = statuses(late)
    assert found["RIM: signer's certificate chain to the RIM root"] == late["code"] == "gpu.rim_expired"
    assert found["RIM: signature"] == "PASS"


def test_rtmr0_to_3_of_the_dstack_quote_replay_from_its_log(evidence: Evidence) -> None:
    folder = vectors.directory() / "tdx" / "dstack-90c06f"
    result, returned = evidence("eventlog", folder / "quote-report.json", "--quote", folder / "quote.bin")
    assert (result["verdict"], returned) == ("accept", 0)
    registers = result["claims"]["registers"]
    assert {name: register["matches"] for name, register in registers.items()} == dict.fromkeys(
        ("rtmr0", "rtmr1", "rtmr2", "rtmr3"), True
    )
    assert result["claims"]["quote"] == "not verified: no endorsements given"


def test_a_log_that_is_not_the_quotes_is_refused(tmp_path: Path, evidence: Evidence) -> None:
    folder = vectors.directory() / "tdx" / "dstack-90c06f"
    events = json.loads(vectors.dstack_report()["event_log"])
    for changed, code in (
        (events[1:], "eventlog.rtmr0"),
        ([events[1], events[0], *events[2:]], "eventlog.rtmr0"),
        ([event for event in events if event["imr"] != 3], "eventlog.rtmr3"),
        ([*events, events[-1]], "eventlog.rtmr3"),
    ):
        log = write(tmp_path / "log.json", json.dumps(changed).encode())
        result, returned = evidence("eventlog", log, "--quote", folder / "quote.bin")
        assert (result["verdict"], result["code"], returned) == ("reject", code, 12)


def test_the_genuine_ccel_parses_and_belongs_to_none_of_the_quotes(evidence: Evidence) -> None:
    log = vectors.directory() / "ccel" / "dstack" / "ccel.bin"
    for name in vectors.TDX_AT:
        result, returned = evidence("eventlog", log, "--quote", vectors.directory() / "tdx" / name / "quote.bin")
        assert statuses(result)["the event log parses"] == "PASS"
        assert (result["verdict"], returned) == ("reject", 10 if result["code"].startswith("quote") else 12)
        assert result["claims"]["form"] == "ccel"
        assert len(result["claims"]["events"]) == 18
