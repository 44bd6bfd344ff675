"""Every single bit of our own claims is bound: flipped, the evidence is refused, by the parser or by report_data."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from countermark.appraise import Scope, appraise
from countermark.binding import verify_binding
from countermark.errors import CountermarkError
from countermark.formats.evidence import encode_evidence
from countermark.formats.quote import parse_quote
from countermark.formats.report_data import parse_claims
from sim_evidence import NOW, Scene, policy_for

FORMAT = ("cbor.", "claims.")


def test_every_bit_of_the_claims_is_refused() -> None:
    """By steps 1 and 7 as the appraisal calls them, which are all that looks at the claims' own bytes."""
    scene = Scene()
    evidence = scene.make()
    quoted, connection = parse_quote(evidence.quote).body.report_data, scene.connection()
    verify_binding(evidence, parse_claims(evidence.claims), quoted, connection)
    codes: Counter[str] = Counter()
    for position in range(8 * len(evidence.claims)):
        changed = flip(evidence.claims, position)
        with pytest.raises(CountermarkError) as err:
            verify_binding(replace(evidence, claims=changed), parse_claims(changed), quoted, connection)
        assert err.value.code == "claims.report_data" or err.value.code.startswith(FORMAT), (position, err.value.code)
        codes[err.value.code] += 1
    assert codes.total() == 8 * len(evidence.claims) > 4000
    assert codes["claims.report_data"] > 2000  # digests, names and numbers; the rest is keys, types and lengths


@pytest.mark.parametrize("scope", list(Scope))
def test_flipped_bits_of_the_claims_are_refused_by_the_appraisal(scope: Scope) -> None:
    """The same through the whole appraisal for every 41st bit (an odd stride: every place in a byte comes)."""
    scene = Scene()
    evidence, policy = scene.make(), policy_for(scene.state)
    connection = scene.connection() if scope is Scope.SESSION else None
    appraise(encode_evidence(evidence), policy, now=NOW, scope=scope, connection=connection)
    codes = set()
    for position in range(0, 8 * len(evidence.claims), 41):
        data = encode_evidence(replace(evidence, claims=flip(evidence.claims, position)))
        with pytest.raises(CountermarkError) as err:
            appraise(data, policy, now=NOW, scope=scope, connection=connection)
        assert err.value.code == "claims.report_data" or err.value.code.startswith(FORMAT), (position, err.value.code)
        assert err.value.step in ("1", "7", "7b")
        codes.add(err.value.code)
    assert "claims.report_data" in codes


def flip(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position // 8] ^= 1 << position % 8
    return bytes(changed)
