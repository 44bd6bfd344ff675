"""The TCB level: every condition of Intel's quote verification that a vendor's or a host's lie can break.

Ratings are compared with dcap-qvl's, an independent implementation, over every combination of statuses and over random
SVNs and levels; refusals by their code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lies
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.errors import CountermarkError, TcbError
from countermark.formats.quote import encode_enclave_report, encode_quote, parse_quote
from countermark.policy import Waiver
from countermark.tdx import tcb
from countermark.tdx.endorsements import parse_endorsements
from countermark.tdx.quote import Platform
from countermark.tdx.tcb import PlatformTcb, Rating, rate
from countermark_appliance.platform.sim import intel
from countermark_appliance.platform.sim.machine import TdLaunch
from sim_evidence import NOW, machine, policy_for

Document = dict[str, Any]
OTHER = "5a"
CPU_SVN, PCE_SVN = bytes(intel.SGX_TCB), intel.PCE_SVN
DATE = "2026-01-01T00:00:00Z"


def rated(quote: bytes, endorsements: bytes) -> Rating:
    parsed, vendor = parse_quote(quote), parse_endorsements(endorsements)
    return rate(parsed.body, parsed.qe_report, PlatformTcb(cpu_svn=CPU_SVN, pce_svn=PCE_SVN), vendor.tcb, vendor.qe)


def refusal(appraise: Callable[[], Any]) -> str:
    with pytest.raises(CountermarkError) as err:
        appraise()
    assert err.value.step in ("1", "3")
    return err.value.code


def components(*svns: int) -> list[Document]:
    return [{"svn": svn} for svn in (*svns, *[0] * (16 - len(svns)))]


def svn_level(svn: int, status: str, *advisories: str) -> Document:
    return {"tcb": {"isvsvn": svn}, "tcbDate": DATE, "tcbStatus": status, "advisoryIDs": list(advisories)}


# --- ratings


STATUSES = (*tcb._PLATFORM,)


@pytest.mark.parametrize("platform", STATUSES)
def test_three_ratings_combine_as_another_implementation_combines_them(platform: str) -> None:
    quote = lies.quote_of()
    for module, enclave in itertools.product(("UpToDate", "OutOfDate", "Revoked"), repeat=2):

        def info(value: Document, module: str = module) -> None:
            value["tcbLevels"][0] |= {"tcbStatus": platform, "advisoryIDs": ["P-1", "SHARED"]}
            value["tdxModuleIdentities"][0]["tcbLevels"] = [svn_level(0, module, "M-1", "SHARED")]

        def identity(value: Document, enclave: str = enclave) -> None:
            value["tcbLevels"] = [svn_level(0, enclave, "Q-1")]

        endorsements = lies.collateral(tcb_info=info, qe_identity=identity)
        ours, theirs = rated(quote, endorsements), lies.second_opinion(quote, endorsements)
        assert ours.advisories == ("M-1", "P-1", "Q-1", "SHARED")
        if ours.status == "Revoked":
            assert theirs == "Verification failed: TCB status is invalid: Revoked"
            assert "Revoked" in (platform, module, enclave)
        else:
            assert theirs == (ours.status, frozenset(ours.advisories))


SVN = st.integers(0, 4)
LEVEL = st.builds(
    lambda sgx, at, pce, tdx, status, number: {
        "tcb": {
            "sgxtcbcomponents": [{"svn": sgx if i == at else svn} for i, svn in enumerate(intel.SGX_TCB)],
            "pcesvn": pce,
            "tdxtcbcomponents": components(*tdx),
        },
        "tcbDate": DATE,
        "tcbStatus": status,
        "advisoryIDs": [f"P-{number}"],
    },
    sgx=st.integers(0, 9),
    at=st.integers(0, 40),  # mostly none of the 16
    pce=st.sampled_from((5, 13, 13, 14)),
    tdx=st.tuples(SVN, st.sampled_from((0, 0, 1)), SVN, st.sampled_from((0, 0, 0, 1))),
    status=st.sampled_from([status for status in STATUSES if status != "Revoked"]),
    number=st.integers(0, 99),
)
SVN_LEVELS = st.lists(
    st.builds(svn_level, st.integers(0, 7), st.sampled_from(("UpToDate", "UpToDate", "OutOfDate"))),
    min_size=1,
    max_size=3,
    unique_by=lambda level: level["tcb"]["isvsvn"],
)


def by_rank(levels: list[Document]) -> list[Document]:
    """As the vendor lists them, and without two of one rank, between which nothing would decide."""
    ranks = {}
    for level in levels:
        svns = {
            name: tuple(item["svn"] for item in level["tcb"][name]) for name in ("sgxtcbcomponents", "tdxtcbcomponents")
        }
        ranks[svns["sgxtcbcomponents"], level["tcb"]["pcesvn"], svns["tdxtcbcomponents"]] = level
    return list(ranks.values())


@settings(max_examples=120, deadline=None)
@given(
    svn=st.tuples(SVN, st.sampled_from((0, 1, 1, 3)), SVN),
    version=st.sampled_from((4, 5)),
    levels=st.lists(LEVEL, min_size=1, max_size=4).map(by_rank),
    modules=st.dictionaries(st.sampled_from(("TDX_01", "TDX_02", "tdx_03")), SVN_LEVELS, max_size=3),
    enclave=SVN_LEVELS,
)
def test_levels_are_chosen_as_another_implementation_chooses_them(
    svn: tuple[int, ...],
    version: int,
    levels: list[Document],
    modules: dict[str, list[Document]],
    enclave: list[Document],
) -> None:
    def info(value: Document) -> None:
        value["tcbLevels"] = levels
        value["tdxModuleIdentities"] = [
            {**value["tdxModule"], "id": name, "tcbLevels": by_svn(known)} for name, known in modules.items()
        ]

    def by_svn(known: list[Document]) -> list[Document]:
        return sorted(known, key=lambda level: level["tcb"]["isvsvn"], reverse=True)

    launch = TdLaunch(version=version, tee_tcb_svn=bytes(svn) + bytes(13))
    quote = lies.quote_of(launch)
    endorsements = lies.collateral(tcb_info=info, qe_identity=lambda value: value.update(tcbLevels=by_svn(enclave)))
    theirs = lies.second_opinion(quote, endorsements)
    try:
        ours = rated(quote, endorsements)
    except TcbError as err:
        assert isinstance(theirs, str), err
        wanted = {"tcb.no_level": "No matching", "tcb.module": "TDX module", "tcb.qe_identity": "QE ISVSVN"}[err.code]
        assert wanted in theirs or (err.code == "tcb.module" and "No matching" in theirs)
    else:
        assert theirs == (ours.status, frozenset(ours.advisories))


def test_levels_have_intels_order_whatever_the_documents() -> None:
    """By SGX components, then PCE SVN, then TDX components: the level of the higher PCE SVN is the newer one here."""
    tdx_newer = (4, "OutOfDate", components(0, 0, intel.TDX_TCB[2]))
    pce_newer = (intel.PCE_SVN, "ConfigurationNeeded", components(0, 0, 1))
    quote = lies.quote_of()
    for order in ((tdx_newer, pce_newer), (pce_newer, tdx_newer)):

        def info(value: Document, order: tuple[Any, ...] = order) -> None:
            first = value["tcbLevels"][0]
            value["tcbLevels"] = [
                {**first, "tcbStatus": status, "tcb": {**first["tcb"], "pcesvn": pce, "tdxtcbcomponents": tdx}}
                for pce, status, tdx in order
            ]

        endorsements = lies.collateral(tcb_info=info)
        assert rated(quote, endorsements).status == "ConfigurationNeeded"
        assert lies.second_opinion(quote, endorsements) == ("ConfigurationNeeded", frozenset())


@pytest.mark.parametrize("document", ["tcb_info", "qe_identity"])
def test_levels_of_one_svn_are_ordered_too(document: str) -> None:
    backwards = [svn_level(0, "OutOfDate"), svn_level(3, "UpToDate")]

    def change(value: Document) -> None:
        (value if document == "qe_identity" else value["tdxModuleIdentities"][0])["tcbLevels"] = backwards

    changes: dict[str, Any] = {document: change}
    assert rated(lies.quote_of(), lies.collateral(**changes)).status == "UpToDate"


# --- TD 1.5: the module under a running TD


def two_generations(value: Document) -> None:
    value["tdxModuleIdentities"] = [
        {**value["tdxModule"], "id": "TDX_03", "tcbLevels": [svn_level(5, "UpToDate"), svn_level(3, "OutOfDate")]},
        {**value["tdxModule"], "id": "TDX_01", "tcbLevels": [svn_level(6, "UpToDate"), svn_level(4, "OutOfDate")]},
    ]
    newest = value["tcbLevels"][0]
    oldest = {**newest, "tcb": {**newest["tcb"], "tdxtcbcomponents": components(5, 0, 2)}, "tcbStatus": "OutOfDate"}
    newest["tcb"]["tdxtcbcomponents"] = components(5, 0, 3)
    newest["tcb"]["sgxtcbcomponents"] = components(*intel.SGX_TCB)
    oldest["tcb"]["sgxtcbcomponents"] = components(2, *intel.SGX_TCB[1:])
    value["tcbLevels"] = [newest, oldest]


@pytest.mark.parametrize(
    ("launched", "running", "status"),
    [
        ((6, 1, 3), (6, 1, 3), "UpToDate"),
        ((6, 1, 3), (5, 3, 3), "UpToDate"),
        ((4, 1, 3), (4, 1, 3), "OutOfDate"),
        ((4, 1, 3), (5, 1, 3), "OutOfDate"),
        ((4, 1, 3), (6, 1, 3), "TDRelaunchAdvised"),
        ((4, 1, 3), (5, 3, 3), "TDRelaunchAdvised"),
        ((4, 1, 2), (6, 1, 3), "TDRelaunchAdvised"),
        ((4, 1, 2), (6, 1, 2), "OutOfDate"),
    ],
)
def test_a_td_that_outlived_its_module_is_advised_to_relaunch(
    launched: tuple[int, ...], running: tuple[int, ...], status: str
) -> None:
    svns = {"tee_tcb_svn": bytes(launched) + bytes(13), "tee_tcb_svn2": bytes(running) + bytes(13)}
    quote, endorsements = lies.quote_of(TdLaunch(version=5), **svns), lies.collateral(tcb_info=two_generations)
    assert rated(quote, endorsements).status == status
    assert lies.second_opinion(quote, endorsements) == (status, frozenset())


def test_no_relaunch_helps_a_platform_that_is_out_of_date_itself() -> None:
    def info(value: Document) -> None:
        two_generations(value)
        value["tcbLevels"][0]["tcb"]["sgxtcbcomponents"] = components(intel.SGX_TCB[0] + 1, *intel.SGX_TCB[1:])

    svns = {"tee_tcb_svn": bytes((4, 1, 3)) + bytes(13), "tee_tcb_svn2": bytes((6, 1, 3)) + bytes(13)}
    quote, endorsements = lies.quote_of(TdLaunch(version=5), **svns), lies.collateral(tcb_info=info)
    assert rated(quote, endorsements).status == "OutOfDate"
    assert lies.second_opinion(quote, endorsements) == ("OutOfDate", frozenset())


def test_a_relaunch_that_also_needs_configuration_says_so() -> None:
    def info(value: Document) -> None:
        two_generations(value)
        value["tcbLevels"][0]["tcbStatus"] = "ConfigurationNeeded"

    svns = {"tee_tcb_svn": bytes((4, 1, 3)) + bytes(13), "tee_tcb_svn2": bytes((6, 1, 3)) + bytes(13)}
    quote, endorsements = lies.quote_of(TdLaunch(version=5), **svns), lies.collateral(tcb_info=info)
    assert rated(quote, endorsements).status == "TDRelaunchAdvisedConfigurationNeeded"
    assert lies.second_opinion(quote, endorsements) == ("TDRelaunchAdvisedConfigurationNeeded", frozenset())
    assert refusal(lambda: lies.appraised(quote, endorsements)) == "tcb.status"
    waiver = Waiver(name="TDRelaunchAdvisedConfigurationNeeded", until=NOW)
    assert isinstance(lies.appraised(quote, endorsements, policy_for(machine(), accepted_statuses=(waiver,))), Platform)


def test_the_policy_must_accept_both_ratings() -> None:
    """One of the few things the two read differently: only the platform part of TEE_TCB_SVN is behind at launch."""
    svns = {"tee_tcb_svn": bytes((6, 1, 2)) + bytes(13), "tee_tcb_svn2": bytes((6, 1, 3)) + bytes(13)}
    quote, endorsements = lies.quote_of(TdLaunch(version=5), **svns), lies.collateral(tcb_info=two_generations)
    assert rated(quote, endorsements).status == "OutOfDate"
    assert lies.second_opinion(quote, endorsements) == ("TDRelaunchAdvised", frozenset())
    waivers = tuple(Waiver(name=name, until=NOW) for name in ("OutOfDate", "TDRelaunchAdvised"))
    for accepted in (waivers[:1], waivers[1:]):
        policy = policy_for(machine(), accepted_statuses=accepted)
        assert refusal(lambda policy=policy: lies.appraised(quote, endorsements, policy)) == "tcb.status"
    platform = lies.appraised(quote, endorsements, policy_for(machine(), accepted_statuses=waivers))
    assert platform.tcb_status == "OutOfDate"


@pytest.mark.parametrize("running", [(9, 2, 3), (3, 1, 3), (2, 3, 3), (6, 1, 1)])
def test_a_module_nobody_rated_may_not_run_the_td_either(running: tuple[int, ...]) -> None:
    svns = {"tee_tcb_svn": bytes((6, 1, 3)) + bytes(13), "tee_tcb_svn2": bytes(running) + bytes(13)}
    quote, endorsements = lies.quote_of(TdLaunch(version=5), **svns), lies.collateral(tcb_info=two_generations)
    assert refusal(lambda: rated(quote, endorsements)) == ("tcb.no_level" if running[2] == 1 else "tcb.module")
    assert "current TDX TCB" in str(lies.second_opinion(quote, endorsements))


# --- refusals


def module(**members: Any) -> Callable[[Document], None]:
    return lambda value: value["tdxModuleIdentities"][0].update(members)


def plain_module(**members: Any) -> Callable[[Document], None]:
    return lambda value: value["tdxModule"].update(members)


def level(**members: Any) -> Callable[[Document], None]:
    return lambda value: value["tcbLevels"][0].update(members)


def level_tcb(**members: Any) -> Callable[[Document], None]:
    return lambda value: value["tcbLevels"][0]["tcb"].update(members)


def sgx_above(position: int) -> Callable[[Document], None]:
    svns = [svn + (index == position) for index, svn in enumerate(intel.SGX_TCB)]
    return level_tcb(sgxtcbcomponents=components(*svns))


def tdx_above(position: int) -> Callable[[Document], None]:
    svns = [0, 0, *intel.TDX_TCB[2:]]
    svns[position] += 1
    return level_tcb(tdxtcbcomponents=components(*svns))


OLD_MODULE = TdLaunch(tee_tcb_svn=bytes((6, 0, 4)) + bytes(13))
TCB_INFO = [
    *((f"SGX component {i} below", "tcb.no_level", sgx_above(i)) for i in range(16)),
    *((f"TDX component {i} below", "tcb.no_level", tdx_above(i)) for i in range(2, 16)),
    ("PCE SVN below", "tcb.no_level", level_tcb(pcesvn=intel.PCE_SVN + 1)),
    ("module not in the list", "tcb.module", module(id="TDX_02")),
    ("no module in the list", "tcb.module", lambda value: value.pop("tdxModuleIdentities")),
    ("module below all levels", "tcb.module", module(tcbLevels=[svn_level(intel.TDX_TCB[0] + 1, "UpToDate")])),
    ("module of another signer", "tcb.module", module(mrsigner=OTHER * 48)),
    ("module with other attributes", "tcb.module", module(attributes=OTHER * 8)),
    ("module out of date", "tcb.status", module(tcbLevels=[svn_level(0, "OutOfDate")])),
    ("module revoked", "tcb.status", module(tcbLevels=[svn_level(0, "Revoked")])),
    ("module with an open advisory", "tcb.advisory", module(tcbLevels=[svn_level(0, "UpToDate", "INTEL-SA-1")])),
    ("another PCE", "tcb.pce_id", lambda value: value.update(pceId="0001")),
    ("another family", "tcb.fmspc", lambda value: value.update(fmspc="5a" * 6)),
    ("a status nobody knows", "tcb.unknown_status", level(tcbStatus="Excellent")),
    ("a status in other case", "tcb.unknown_status", level(tcbStatus="uptodate")),
    ("a result's status as a level's", "tcb.unknown_status", level(tcbStatus="TDRelaunchAdvised")),
    ("a module status nobody knows", "tcb.unknown_status", module(tcbLevels=[svn_level(0, "SWHardeningNeeded")])),
    ("no levels", "endorsements.malformed", lambda value: value.update(tcbLevels=[])),
    ("levels that are none", "endorsements.malformed", lambda value: value.update(tcbLevels=[1])),
    ("a level without a TCB", "endorsements.malformed", level(tcb=None)),
    ("15 components", "endorsements.malformed", level_tcb(sgxtcbcomponents=components()[:15])),
    ("17 components", "endorsements.malformed", level_tcb(tdxtcbcomponents=[*components(), {"svn": 0}])),
    ("no TDX components", "endorsements.malformed", lambda v: v["tcbLevels"][0]["tcb"].pop("tdxtcbcomponents")),
    ("a component above 255", "endorsements.malformed", level_tcb(sgxtcbcomponents=components(256))),
    ("a component that is true", "endorsements.malformed", level_tcb(sgxtcbcomponents=[{"svn": True}] * 16)),
    ("a PCE SVN above 65535", "endorsements.malformed", level_tcb(pcesvn=1 << 16)),
    ("an advisory that is a number", "endorsements.malformed", level(advisoryIDs=[1])),
    ("a level's date that is none", "endorsements.malformed", level(tcbDate="yesterday")),
    ("another TCB type", "endorsements.malformed", lambda value: value.update(tcbType=1)),
    ("version 2", "endorsements.malformed", lambda value: value.update(version=2)),
    ("version 4", "endorsements.malformed", lambda value: value.update(version=4)),
    ("SGX", "endorsements.malformed", lambda value: value.update(id="SGX")),
    ("no module", "endorsements.malformed", lambda value: value.pop("tdxModule")),
    (
        "a module twice",
        "endorsements.malformed",
        lambda v: v["tdxModuleIdentities"].append(v["tdxModuleIdentities"][0]),
    ),
    ("a signer of 47 bytes", "endorsements.malformed", module(mrsigner="00" * 47)),
    ("a mask that is no hex", "endorsements.malformed", module(attributesMask="z" * 16)),
    ("a family of 5 bytes", "endorsements.malformed", lambda value: value.update(fmspc="00" * 5)),
    ("no PCE id", "endorsements.malformed", lambda value: value.pop("pceId")),
    ("no issue date", "endorsements.malformed", lambda value: value.pop("issueDate")),
    ("a next update without a zone", "endorsements.malformed", lambda v: v.update(nextUpdate="2027-02-01T00:00:00")),
    ("no evaluation number", "endorsements.malformed", lambda value: value.pop("tcbEvaluationDataNumber")),
    ("an evaluation number in text", "endorsements.malformed", lambda v: v.update(tcbEvaluationDataNumber="1000")),
    ("a negative evaluation number", "endorsements.malformed", lambda v: v.update(tcbEvaluationDataNumber=-1)),
]


@pytest.mark.parametrize(("code", "change"), [pytest.param(*row[1:], id=row[0]) for row in TCB_INFO])
def test_a_tcb_info_that_does_not_fit_is_refused(code: str, change: Callable[[Document], Any]) -> None:
    quote = lies.quote_of()
    assert refusal(lambda: lies.appraised(quote, lies.collateral(tcb_info=change))) == code
    assert isinstance(lies.appraised(quote, lies.collateral()), Platform)


def test_the_unversioned_module_is_rated_by_the_platforms_levels() -> None:
    quote = lies.quote_of(OLD_MODULE)
    assert isinstance(lies.appraised(quote, lies.collateral(tcb_info=lambda v: v.pop("tdxModuleIdentities"))), Platform)
    assert (
        refusal(lambda: lies.appraised(quote, lies.collateral(tcb_info=plain_module(mrsigner=OTHER * 48))))
        == "tcb.module"
    )
    assert (
        refusal(lambda: lies.appraised(quote, lies.collateral(tcb_info=plain_module(attributes=OTHER * 8))))
        == "tcb.module"
    )
    above = level_tcb(tdxtcbcomponents=components(7))
    assert refusal(lambda: lies.appraised(quote, lies.collateral(tcb_info=above))) == "tcb.no_level"


def qe(**members: Any) -> Callable[[Document], Any]:
    return lambda value: value.update(members)


QE_IDENTITY = [
    ("another signer", "tcb.qe_identity", qe(mrsigner=OTHER * 32)),
    ("another product", "tcb.qe_identity", qe(isvprodid=intel.QE_PROD_ID + 1)),
    ("another miscselect", "tcb.qe_identity", qe(miscselect="01000000")),
    ("miscselect outside its mask", "tcb.qe_identity", qe(miscselect="01000000", miscselectMask="00000000")),
    ("other attributes", "tcb.qe_identity", qe(attributes="13" + "00" * 15)),
    ("attributes outside their mask", "tcb.qe_identity", qe(attributes="15" + "00" * 15)),
    ("below all levels", "tcb.qe_identity", qe(tcbLevels=[svn_level(intel.QE_SVN + 1, "UpToDate")])),
    ("out of date", "tcb.status", qe(tcbLevels=[svn_level(intel.QE_SVN, "OutOfDate")])),
    ("revoked", "tcb.status", qe(tcbLevels=[svn_level(0, "Revoked")])),
    ("open advisory", "tcb.advisory", qe(tcbLevels=[svn_level(0, "UpToDate", "INTEL-SA-1")])),
    ("a status nobody knows", "tcb.unknown_status", qe(tcbLevels=[svn_level(0, "ConfigurationNeeded")])),
    ("no levels", "endorsements.malformed", qe(tcbLevels=[])),
    ("of SGX", "endorsements.malformed", qe(id="QE")),
    ("of the verification enclave", "endorsements.malformed", qe(id="QVE")),
    ("version 1", "endorsements.malformed", qe(version=1)),
    ("a mask of 3 bytes", "endorsements.malformed", qe(miscselectMask="FFFFFF")),
    ("attributes of 15 bytes", "endorsements.malformed", qe(attributes="11" + "00" * 14)),
    ("a product above 65535", "endorsements.malformed", qe(isvprodid=1 << 16)),
]


@pytest.mark.parametrize(("code", "change"), [pytest.param(*row[1:], id=row[0]) for row in QE_IDENTITY])
def test_a_qe_identity_that_does_not_fit_is_refused(code: str, change: Callable[[Document], Any]) -> None:
    assert refusal(lambda: lies.appraised(lies.quote_of(), lies.collateral(qe_identity=change))) == code


QE_REPORT = [
    ("another signer", "tcb.qe_identity", lambda report: replace(report, mrsigner=bytes(32))),
    ("another product", "tcb.qe_identity", lambda report: replace(report, isv_prod_id=1)),
    ("misc select bit", "tcb.qe_identity", lambda report: replace(report, misc_select=1)),
    ("attribute bit", "tcb.qe_identity", lambda report: replace(report, attributes=b"\x35" + report.attributes[1:])),
    ("debug", "tcb.qe_identity", lambda report: replace(report, attributes=b"\x17" + report.attributes[1:])),
    ("older", "tcb.qe_identity", lambda report: replace(report, isv_svn=intel.QE_SVN - 1)),
    ("another key", "quote.qe_binding", lambda report: replace(report, report_data=bytes(64))),
    ("more in report_data", "quote.qe_binding", lambda r: replace(r, report_data=r.report_data[:63] + b"\1")),
]


@pytest.mark.parametrize(("code", "change"), [pytest.param(*row[1:], id=row[0]) for row in QE_REPORT])
def test_a_quoting_enclave_that_is_not_intels_is_refused(code: str, change: Callable[[Any], Any]) -> None:
    assert refusal(lambda: lies.appraised(lies.quote_of(qe=change), lies.collateral())) == code


def test_a_debug_quoting_enclave_is_refused_whatever_its_identity_masks() -> None:
    quote = lies.quote_of(qe=lambda report: replace(report, attributes=b"\x17" + report.attributes[1:]))
    lax = lies.collateral(qe_identity=qe(attributes="00" * 16, attributesMask="00" * 16))
    assert refusal(lambda: lies.appraised(quote, lax)) == "tcb.qe_identity"


def test_what_lies_beyond_a_mask_does_not_count() -> None:
    quote = lies.quote_of(qe=lambda report: replace(report, attributes=b"\x11" + bytes(14) + b"\xff"))
    assert isinstance(lies.appraised(quote, lies.collateral()), Platform)
    quote = lies.quote_of(qe=lambda report: replace(report, misc_select=0x00010000))
    assert isinstance(lies.appraised(quote, lies.collateral(qe_identity=qe(miscselectMask="FFFF0000"))), Platform)
    wanted = lies.collateral(qe_identity=qe(miscselect="00000100"))  # in the byte order of the report
    assert isinstance(lies.appraised(quote, wanted), Platform)
    swapped = lies.collateral(qe_identity=qe(miscselectMask="0000FFFF"))
    assert refusal(lambda: lies.appraised(quote, swapped)) == "tcb.qe_identity"


def test_what_the_second_verifier_alone_refuses_is_refused() -> None:
    """Another length of authentication data is no rule of ours; Intel's quoting enclave always writes 32 bytes."""
    platform = lies.booted()
    parsed = parse_quote(platform.quote(bytes(64)))
    data = parsed.qe_auth_data + b"more"
    bound = hashlib.sha256(parsed.attestation_key + data).digest() + bytes(32)
    report = replace(parsed.qe_report, report_data=bound)
    signature = intel.sign_raw(machine().vendor.pck.key, encode_enclave_report(report))
    quote = encode_quote(replace(parsed, qe_auth_data=data, qe_report=report, qe_report_signature=signature))
    assert refusal(lambda: lies.appraised(quote, lies.collateral())) == "quote.refused"


def test_uppercase_hex_is_the_same_as_lowercase() -> None:
    upper = lies.collateral(tcb_info=lambda value: value.update(fmspc=value["fmspc"].upper()))
    members = json.loads(upper)
    for name in ("root_ca_crl", "pck_crl", "tcb_info_signature", "qe_identity_signature"):
        members[name] = members[name].upper()
    assert isinstance(lies.appraised(lies.quote_of(), json.dumps(members).encode()), Platform)
