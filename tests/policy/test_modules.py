"""The list of Intel's TDX modules against what genuine quotes report."""

from __future__ import annotations

import vectors
from countermark.formats.quote import parse_quote
from countermark.policy.modules import KNOWN_MRSEAM


def test_every_value_is_a_digest_of_its_own() -> None:
    assert {len(value) for value in KNOWN_MRSEAM} == {48}
    assert len(set(KNOWN_MRSEAM)) == len(KNOWN_MRSEAM) == 20


def test_the_modules_of_genuine_quotes_are_on_the_list() -> None:
    seen = {
        parse_quote(vectors.tdx(name).quote[: 4935 if name == "no-sept-ve" else None]).body.mrseam.hex()[:8]
        for name in vectors.TDX_AT
    }
    assert seen == {"2fd279c1", "5b38e33a", "7bf06328", "476a2997"}
    assert seen <= {value.hex()[:8] for value in KNOWN_MRSEAM}
