"""Endorsements and PCK certificates: forms that writers differ in, times, CRLs, and whose certificate may say what."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lies
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

import vectors
from countermark.errors import CountermarkError
from countermark.formats.quote import encode_quote, parse_quote
from countermark.policy import DAY_S, Profile, new_policy
from countermark.tdx.endorsements import parse_endorsements
from countermark.tdx.quote import Platform, verify_quote
from countermark_appliance.platform.sim import intel
from countermark_appliance.platform.sim.issue import issue_crl
from sim_evidence import NOW, machine, policy_for


def refusal(appraise: Callable[[], Any]) -> tuple[str, str | None]:
    with pytest.raises(CountermarkError) as err:
        appraise()
    return err.value.code, err.value.step


def both_ends_of(good: bytes, at: int) -> tuple[bool, bool, bool]:
    """Whether it is accepted a second before, at, and a second after a time."""

    def accepted(now: int) -> bool:
        try:
            lies.appraised(lies.quote_of(), good, now=now)
        except CountermarkError:
            return False
        return True

    return accepted(at - 1), accepted(at), accepted(at + 1)


# --- the chain that newer writers add


def test_a_pck_chain_beside_the_quote_must_be_the_quotes_own() -> None:
    vendor, quote, good = machine().vendor, lies.quote_of(), lies.collateral()
    own = vendor.pck_chain_pem.decode()
    for same in (own, own.replace("\n", "\r\n"), own + "\0", own.rstrip("\n")):
        assert isinstance(lies.appraised(quote, lies.edited(good, pck_certificate_chain=same)), Platform)
    members = json.loads(good) | {"pck_certificate_chain": None}
    assert isinstance(lies.appraised(quote, json.dumps(members).encode()), Platform)
    other = lies.with_pck().vendor.pck_chain_pem.decode()
    for wrong in (
        other,
        vendor.pck.pem,
        vendor.pck.pem + vendor.root.pem,
        vendor.root.pem + own,
        own + vendor.root.pem,
    ):
        appraised = lambda wrong=wrong: lies.appraised(quote, lies.edited(good, pck_certificate_chain=wrong))  # noqa: E731
        assert refusal(appraised) == ("quote.pck_chain", "3")
    for broken, code in (("", "endorsements.pem"), ("x", "endorsements.pem"), (7, "endorsements.malformed")):
        appraised = lambda broken=broken: lies.appraised(quote, lies.edited(good, pck_certificate_chain=broken))  # noqa: E731
        assert refusal(appraised)[0] == code


def test_genuine_endorsements_take_it_too() -> None:
    item, other = vectors.tdx("dstack-90c06f"), vectors.tdx("phala-b0c06f")
    quote, policy = parse_quote(item.quote), new_policy(Profile.PRODUCTION, now=item.at)
    for source, code in ((item, ""), (other, "quote.pck_chain")):
        chain = parse_quote(source.quote).pck_chain_pem.rstrip(b"\0").decode()
        both = parse_endorsements(lies.edited(item.collateral.encode(), pck_certificate_chain=chain))
        if code:
            assert refusal(lambda both=both: verify_quote(item.quote, quote, both, policy, now=item.at)) == (code, "3")
        else:
            assert verify_quote(item.quote, quote, both, policy, now=item.at).tcb_status == "UpToDate"


# --- times


def test_endorsements_hold_from_their_first_second_to_their_last() -> None:
    issued, life = NOW - 100, 200
    assert both_ends_of(lies.collateral(issued=issued, lifetime_s=life), issued) == (False, True, True)
    crls = lies.collateral(issued=issued, lifetime_s=life)
    assert both_ends_of(crls, issued + life) == (True, False, False)
    longer = json.loads(lies.collateral(issued=issued, lifetime_s=life + 60))
    documents = lies.edited(crls, root_ca_crl=longer["root_ca_crl"], pck_crl=longer["pck_crl"])
    assert both_ends_of(documents, issued + life) == (True, True, False)


@pytest.mark.parametrize("name", ["tcb_info", "qe_identity"])
@pytest.mark.parametrize(
    ("issue", "update", "code"),
    [
        (1, DAY_S, "endorsements.not_yet_valid"),
        (-2 * DAY_S, -1, "endorsements.expired"),
        (-31 * DAY_S, DAY_S, "endorsements.too_old"),
        (DAY_S, -DAY_S, "endorsements.not_yet_valid"),
    ],
)
def test_each_document_is_held_to_its_own_dates(name: str, issue: int, update: int, code: str) -> None:
    def dates(value: dict[str, Any]) -> None:
        value |= {"issueDate": intel._iso(NOW + issue), "nextUpdate": intel._iso(NOW + update)}

    changes: dict[str, Any] = {name: dates}
    assert refusal(lambda: lies.appraised(lies.quote_of(), lies.collateral(**changes))) == (code, "2")


@pytest.mark.parametrize("name", ["tcb_info", "qe_identity"])
def test_neither_document_may_be_rolled_back(name: str) -> None:
    floor = policy_for(machine()).min_tcb_evaluation_data_number
    for number, accepted in ((floor, True), (floor - 1, False)):
        changes: dict[str, Any] = {name: lambda value, number=number: value.update(tcbEvaluationDataNumber=number)}
        endorsements = lies.collateral(**changes)
        if accepted:
            platform = lies.appraised(lies.quote_of(), endorsements)
            assert platform.evaluation_data_number == floor
        else:
            code = refusal(lambda endorsements=endorsements: lies.appraised(lies.quote_of(), endorsements))
            assert code == ("endorsements.rolled_back", "2")


# --- CRLs


def crl(issuer: Any, extension: x509.ExtensionType | None = None, *, number: bool = True) -> str:
    good = x509.load_der_x509_crl(issue_crl(issuer, this_update=NOW - 60, next_update=NOW + DAY_S))
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(good.issuer)
        .last_update(good.last_update_utc)
        .next_update(good.next_update_utc)
    )
    if number:
        builder = builder.add_extension(x509.CRLNumber(1), critical=False)
    if extension is not None:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(issuer.key, hashes.SHA256()).public_bytes(Encoding.DER).hex()


@pytest.mark.parametrize("name", ["root_ca_crl", "pck_crl"])
def test_a_crl_of_a_part_is_refused(name: str) -> None:
    issuer = machine().vendor.root if name == "root_ca_crl" else machine().vendor.pck_ca
    delta = lies.edited(lies.collateral(), **{name: crl(issuer, x509.DeltaCRLIndicator(1))})
    assert refusal(lambda: lies.appraised(lies.quote_of(), delta)) == ("endorsements.crl_extension", "2")
    plain = lies.edited(lies.collateral(), **{name: crl(issuer)})
    assert isinstance(lies.appraised(lies.quote_of(), plain), Platform)
    unnumbered = lies.edited(lies.collateral(), **{name: crl(issuer, number=False)})
    assert refusal(lambda: lies.appraised(lies.quote_of(), unnumbered)) == ("endorsements.crl_number", "2")


@pytest.mark.parametrize("name", ["root_ca_crl", "pck_crl"])
@pytest.mark.parametrize("value", ["", None])
def test_an_absent_crl_is_refused(name: str, value: str | None) -> None:
    endorsements = lies.edited(lies.collateral(), **{name: value})
    assert refusal(lambda: lies.appraised(lies.quote_of(), endorsements)) == ("endorsements.crl_missing", "1")


def test_swapped_crls_are_refused() -> None:
    members = json.loads(lies.collateral())
    swapped = lies.edited(lies.collateral(), root_ca_crl=members["pck_crl"], pck_crl=members["root_ca_crl"])
    assert refusal(lambda: lies.appraised(lies.quote_of(), swapped)) == ("endorsements.crl_issuer", "2")


def test_a_pck_crl_of_another_ca_under_the_same_root_is_refused() -> None:
    other = lies.with_pck_ca("SGX PCK Processor CA")
    endorsements = lies.collateral(state=other)
    assert refusal(lambda: lies.appraised(lies.quote_of(), endorsements)) == ("quote.crl_issuer", "3")
    assert isinstance(lies.appraised(lies.quote_of(state=other), endorsements), Platform)


# --- who may sign what


def test_the_signers_name_must_be_the_tcb_signers() -> None:
    state = lies.with_pck_ca("SGX PCK Platform CA")
    times = {"not_before": NOW - 3600, "not_after": NOW + DAY_S}
    for name in ("SGX PCK Certificate", "TCB Signing", "sgx tcb signing"):
        signer = lies.issue(name, state.vendor.root, **times, curve=lies.ec.SECP256R1(), ca=False)
        vendor = replace(state.vendor, tcb_signing=signer)
        endorsements = lies.collateral(state=replace(state, vendor=vendor))
        refused = refusal(lambda endorsements=endorsements: lies.appraised(lies.quote_of(state=state), endorsements))
        assert refused == ("endorsements.signer", "2")


@pytest.mark.parametrize("name", ["SGX Root CA", "SGX PCK CA", "Platform CA"])
def test_the_pck_ca_must_be_one_by_name(name: str) -> None:
    state = lies.with_pck_ca(name)
    endorsements = lies.collateral(state=state)
    assert refusal(lambda: lies.appraised(lies.quote_of(state=state), endorsements)) == ("quote.pck_name", "3")


@pytest.mark.parametrize("name", ["SGX TCB Signing", "PCK Certificate"])
def test_the_pck_certificate_must_be_one_by_name(name: str) -> None:
    state = lies.with_pck(name=name)
    assert refusal(lambda: lies.appraised(lies.quote_of(state=state), lies.collateral())) == ("quote.pck_name", "3")


@pytest.mark.parametrize(
    ("code", "extension"),
    [
        ("tcb.pce_id", {"pce_id": b"\0\1"}),
        ("tcb.fmspc", {"fmspc": b"OTHERS"}),
        ("quote.pck_extension", {"pce_id": bytes(3)}),
        ("quote.pck_extension", {"fmspc": b"SIMUL"}),
    ],
)
def test_what_the_pck_certificate_states_must_fit(code: str, extension: dict[str, bytes]) -> None:
    state = lies.with_pck(sgx=intel.sgx_extension(**extension))
    assert refusal(lambda: lies.appraised(lies.quote_of(state=state), lies.collateral())) == (code, "3")


def test_a_critical_extension_of_a_pck_certificate_is_refused() -> None:
    state = lies.with_pck(critical=True)
    assert refusal(lambda: lies.appraised(lies.quote_of(state=state), lies.collateral())) == ("quote.extension", "3")


def test_a_chain_that_shows_a_certificate_twice_is_refused() -> None:
    vendor = machine().vendor
    quote = parse_quote(lies.quote_of())
    pem = (vendor.pck.pem + vendor.pck_ca.pem + vendor.pck_ca.pem + vendor.root.pem).encode()
    longer = encode_quote(replace(quote, pck_chain_pem=pem))
    assert refusal(lambda: lies.appraised(longer, lies.collateral())) == ("quote.short", "3")


# --- whatever the vendor's JSON holds

JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def members_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in [(*path, key), *members_of(inner, (*path, key))]]


@settings(max_examples=250, deadline=None)
@given(data=st.data(), name=st.sampled_from(("tcb_info", "qe_identity")), bad=JSON_VALUE, gone=st.booleans())
def test_any_member_may_be_anything(data: st.DataObject, name: str, bad: Any, gone: bool) -> None:
    """A document with a member replaced or removed is refused with one of our codes, or appraised as before."""

    def change(value: dict[str, Any]) -> None:
        *path, last = data.draw(st.sampled_from(members_of(value)))
        for key in path:
            value = value[key]
        if gone:
            del value[last]
        else:
            value[last] = bad

    changes: dict[str, Any] = {name: change}
    endorsements = lies.collateral(**changes)
    try:
        platform = lies.appraised(lies.quote_of(), endorsements)
    except CountermarkError as err:
        assert err.code.partition(".")[0] in ("endorsements", "tcb"), err
    else:
        assert (platform.tcb_status, platform.advisory_ids) == ("UpToDate", ())
