"""All that the tests of appraisal and of bundles make, signed lies and genuine quotes, given to the page as well.

The page appraises in scope `bundle`, so what only a connection can show passes there; then the receipt, which is
another machine's, is refused, by both. Genuine quotes stand in a bundle of the simulated machine, judged up to step 4.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from judges import BEYOND, ROOT, Case, page_results, python_says, said

import vectors
from countermark.bundle import encode_bundle
from countermark.formats.evidence import PlatformName, encode_evidence, parse_evidence
from countermark.policy import Profile, Waiver, new_policy
from countermark.policy.value import ACCEPTABLE_STATUSES
from one_answer import World, make_world

SOURCES = (
    "tests/appraise/test_refusals.py::test_refused",
    "tests/appraise/test_matrix.py",
    "tests/tdx/test_tcb.py",
    "tests/tdx/test_endorsements.py",
    "tests/tdx/test_td.py",
    "tests/bundle/test_verify_bundle.py",
    "tests/bundle/test_redaction.py",
    "tests/bundle/test_retired_profile.py",
    "tests/net/test_witnessed.py::test_a_bundle_carries_what_witnesses_saw",
    "tests/net/test_witnessed.py::test_what_is_shown_of_an_epoch_is_checked",
    "tests/net/test_witnessed.py::test_every_byte_of_what_is_shown_matters",
    "tests/net/test_witnessed.py::test_a_receipts_witness_is_of_its_log_and_later",
)
# What only the client's second rating, by dcap-qvl, refuses: step 3 holds on the page then, and a later one decides.
SECOND = ("quote.refused", "tcb.status")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("answer"))


def bundle(world: World, evidence: bytes) -> bytes:
    """The evidence in a bundle whose other entries are the world's."""
    return encode_bundle(world.bundle(evidence=evidence))


def with_quote(world: World, quote: bytes, endorsements: bytes) -> bytes:
    base = parse_evidence(world.evidence)
    return encode_evidence(replace(base, quote=quote, endorsements=replace(base.endorsements, tdx=endorsements)))


def test_recorded_evidence(world: World, tmp_path: Path) -> None:
    kept, run = tmp_path / "kept", tmp_path / "run"
    kept.mkdir()
    run.mkdir()
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "recorder", "-p", "no:cacheprovider", "-m", "not slow", *SOURCES],
        cwd=ROOT,
        env={**os.environ, "COUNTERMARK_RECORD": str(kept), "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout[-2000:]  # what those tests find is theirs to say
    cases = []
    for path in sorted(kept.glob("*.json")):
        value = json.loads(path.read_text())
        names = ("bundle", "evidence", "quote", "endorsements")
        whole, evidence, quote, endorsements = (base64.b64decode(value.get(name, "")) for name in names)
        made = whole or bundle(world, evidence or with_quote(world, quote, endorsements))
        cases.append(Case(made, value["policy"], value["now"]))
    assert len(cases) > 450
    codes: Counter[str] = Counter()
    differing, second = [], 0
    for case, result in zip(cases, page_results(cases, run), strict=True):
        client, page = python_says(case), said(result)
        codes[client.code] += 1
        if client == page or client.code.startswith(BEYOND):
            continue
        if client.code in SECOND and ("3", "PASS") in page.checks:
            second += 1
        else:
            differing.append((client.code, client.step, page.code, page.step, result["message"]))
    assert not differing
    assert second <= 3
    assert len(codes) > 120
    decided = sum(count for code, count in codes.items() if not code.startswith(BEYOND))
    assert decided / len(cases) > 0.85


def test_genuine_quotes_are_rated_alike(world: World, tmp_path: Path) -> None:
    """Intel's own root, levels and signatures; the rating in words, with its advisories, is compared as well."""
    cases = []
    for name in vectors.TDX_AT:
        found = vectors.tdx(name)
        evidence = parse_evidence(with_quote(world, found.quote, found.collateral.encode()))
        encoded = encode_evidence(replace(evidence, platform=PlatformName.TDX))
        strict = new_policy(Profile.DEVELOPMENT, now=found.at)
        lax = replace(
            strict,
            accepted_statuses=tuple(Waiver(name=status, until=found.at) for status in ACCEPTABLE_STATUSES),
            endorsement_max_age_days=3000,
            min_tcb_evaluation_data_number=0,
        )
        cases += [Case(bundle(world, encoded), policy, found.at) for policy in (strict, lax)]
        cases.append(Case(bundle(world, encoded), lax, found.at + 40 * 86_400))
    results = page_results(cases, tmp_path)
    codes = set()
    for case, result in zip(cases, results, strict=True):
        client, page = python_says(case), said(result)
        assert page == client
        codes.add(client.code)
    assert len(codes) >= 5, codes


def test_flips_in_certificates(world: World, tmp_path: Path) -> None:
    """Another X.509 reader than the client's: one bit at a time, both refuse, with the same code where both can say."""
    evidence = parse_evidence(world.evidence)
    value = json.loads(evidence.endorsements.tdx)
    crl = bytes.fromhex(value["root_ca_crl"])
    certificate = evidence.gpu[0].certs[0]
    cases = []
    for offset in range(0, len(crl), 17):
        bent = crl[:offset] + bytes((crl[offset] ^ 4,)) + crl[offset + 1 :]
        tdx = json.dumps({**value, "root_ca_crl": bent.hex()}).encode()
        changed = replace(evidence, endorsements=replace(evidence.endorsements, tdx=tdx))
        cases.append(Case(bundle(world, encode_evidence(changed)), world.machine.policy, 1_800_000_000))
    for offset in range(0, len(certificate), 17):
        bent = certificate[:offset] + bytes((certificate[offset] ^ 4,)) + certificate[offset + 1 :]
        gpu = replace(evidence.gpu[0], certs=(bent, *evidence.gpu[0].certs[1:]))
        changed = replace(evidence, gpu=(gpu,))
        cases.append(Case(bundle(world, encode_evidence(changed)), world.machine.policy, 1_800_000_000))
    same = 0
    for case, result in zip(cases, page_results(cases, tmp_path), strict=True):
        client, page = python_says(case), said(result)
        assert client.verdict == page.verdict == "reject"
        same += client == page
    assert same / len(cases) > 0.9, f"{same} of {len(cases)}"
