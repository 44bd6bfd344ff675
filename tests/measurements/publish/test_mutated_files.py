"""Thousands of mutated files for what reads an operator's files: a value, or a typed error with a known code."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from publisher import image_json, prediction, statement

from countermark.errors import FormatError
from countermark_measurements.corim import corim_of, encode_corim, parse_corim
from countermark_measurements.manifest import parse_image
from countermark_measurements.prediction import parse_json, to_json
from countermark_measurements.runtime import predict_runtime
from countermark_measurements.rvps import encode_rvps, parse_rvps, reference_values
from fuzz import mutator

INPUTS = 1500
CONFIG = b'[weights]\nroot = "' + b"aa" * 32 + b'"\n'
CASES: dict[str, tuple[Callable[[bytes], object], bytes, Callable[[random.Random, bytes, bytes], bytes], str]] = {
    "prediction": (parse_json, to_json(prediction()), mutator.mutate_json, "prediction"),
    "image.json": (parse_image, image_json(), mutator.mutate_json, "image"),
    "rvps": (parse_rvps, encode_rvps(reference_values(statement())), mutator.mutate_json, "rvps"),
    "corim": (parse_corim, encode_corim(corim_of(statement())), mutator.mutate_cbor, "corim"),
    "node.toml": (lambda data: predict_runtime(data, image_id=bytes(32)), CONFIG, mutator.mutate, "runtime"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_value_or_a_typed_error(name: str) -> None:
    parse, seed, inside, area = CASES[name]
    parse(seed)
    rng = random.Random(name)
    refused: Counter[str] = Counter()
    for number in range(INPUTS):
        data = (inside if number % 2 else mutator.mutate)(rng, seed, seed)
        try:
            parse(data)
        except FormatError as err:
            refused[err.code] += 1
    assert sum(refused.values()) > INPUTS // 10
    others = {"manifest", "cbor"}  # shapes and events; CoMIDs
    assert {code.partition(".")[0] for code in refused} <= {area} | others, refused
