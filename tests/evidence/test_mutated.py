"""Whatever is in the files, appraising them gives a result: no exception leaves, and nothing changed is taken as new.

What may change and still be accepted is outside every signature: PEM, JSON and XML white space, zero bytes at the end.
"""

from __future__ import annotations

import random

import pytest

from countermark.genuine import (
    FileAppraisal,
    GpuFiles,
    Outcome,
    appraise_event_log_files,
    appraise_gpu_bundle,
    appraise_gpu_files,
    appraise_tdx_files,
)
from evidence.test_files import NONCE, bundle, pem, policy, two_gpus
from fuzz.mutator import mutate, mutate_json
from sim_evidence import NOW


@pytest.fixture(scope="module")
def good() -> dict[str, bytes]:
    made = two_gpus().make()
    return {
        "quote": made.quote,
        "collateral": made.endorsements.tdx,
        "ccel": made.ccel,
        "report": made.gpu[0].report,
        "chain": pem(made.gpu[0]),
        "bundle": bundle(made.gpu),
        "rim": made.endorsements.gpu_rims[0],
        "crl": made.endorsements.gpu_crls[0],
        "ocsp": made.endorsements.gpu_ocsp[0],
    }


def appraisals(files: dict[str, bytes]) -> dict[str, FileAppraisal]:
    beside = GpuFiles(rims=(files["rim"],), crls=(files["crl"],), ocsp=(files["ocsp"],))
    return {
        "tdx": appraise_tdx_files(files["quote"], files["collateral"], policy(), now=NOW),
        "log": appraise_event_log_files(files["ccel"], files["quote"], now=NOW),
        "gpu": appraise_gpu_files(files["report"], files["chain"], NONCE, policy(), now=NOW, files=beside),
        "bundle": appraise_gpu_bundle(files["bundle"], NONCE, policy(), now=NOW, files=beside),
    }


@pytest.mark.filterwarnings("ignore:Parsed a serial number:Warning")
@pytest.mark.parametrize("seed", range(60))
def test_any_file_may_be_anything(seed: int, good: dict[str, bytes]) -> None:
    rng = random.Random(seed)
    name = rng.choice(list(good))
    change = rng.choice((mutate, mutate, mutate_json)) if name in ("collateral", "bundle") else mutate
    changed = change(rng, good[name], good[rng.choice(list(good))])
    before, found = appraisals(good), appraisals({**good, name: changed})
    for kind, result in found.items():
        assert result.verdict in Outcome
        assert (result.code == "") == (result.verdict is Outcome.ACCEPT)
        assert result.exit_code == 0 or result.failure is not None
        if result.verdict is Outcome.ACCEPT:
            assert result.claims == before[kind].claims, (name, kind)


def test_the_good_ones_are_accepted(good: dict[str, bytes]) -> None:
    found = appraisals(good)
    assert {kind: result.verdict for kind, result in found.items() if kind in ("tdx", "log")} == {
        "tdx": Outcome.ACCEPT,
        "log": Outcome.ACCEPT,
    }
    assert {found[kind].code for kind in ("gpu", "bundle")} <= {"", "gpu.revocation_missing"}
