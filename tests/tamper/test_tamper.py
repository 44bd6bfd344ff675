"""Every tampered bundle is refused with exactly its code at exactly its step; whatever else there is to it holds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from countermark.bundle import parse_bundle
from countermark.checks import Status
from countermark.errors import CountermarkError
from countermark.explain import explain_code
from countermark.policy import encode_policy, parse_policy
from countermark.verify import verify_bundle
from tamper.variants import GROUPS, NOW, Scene, Variant, make_scene, variants

NAMES = [f"{group}: {name}" for group, rows in GROUPS.items() for name, *_ in rows]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("tamper"))


@pytest.fixture(scope="module")
def made(scene: Scene) -> dict[str, Variant]:
    return {f"{item.group}: {item.name}": item for item in variants(scene)}


def verify(item: Variant) -> object:
    """As from files: the policy read from its text, too."""
    policy = parse_policy(encode_policy(item.policy).encode())
    return verify_bundle(parse_bundle(item.bundle), policy, item.at)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_refused_where_it_must_be(made: dict[str, Variant], name: str) -> None:
    item = made[name]
    if not item.code:
        verify(item)
        return
    with pytest.raises(CountermarkError) as caught:
        verify(item)
    err = caught.value
    assert (err.code, err.step or "") == (item.code, item.step)
    if item.step:
        *before, last = err.checks
        assert (last.status, last.step, last.code) == (Status.FAIL, item.step, item.code)
        assert all(check.status is not Status.FAIL for check in before)
    assert explain_code(item.code) is not None


def test_there_are_many_and_each_is_another(made: dict[str, Variant], scene: Scene) -> None:
    assert len(NAMES) == len(set(NAMES)) == len(made)
    bad = [item for item in made.values() if item.code]
    assert len(bad) >= 200
    assert len({(item.bundle, encode_policy(item.policy)) for item in made.values()}) == len(made)
    steps = {item.step for item in bad}
    assert steps >= {"", *map(str, range(1, 7)), "7b", *map(str, range(8, 11)), *map(str, range(12, 21))}
    for group, least in (("container", 20), ("request", 20), ("accepted", 35), ("answer", 15), ("receipt", 40)):
        assert sum(item.group == group for item in bad) >= least
    for group, least in (("evidence", 60), ("manifest", 8), ("policy", 15), ("redaction", 20)):
        assert sum(item.group == group for item in bad) >= least


def test_the_whole_bundle_is_accepted_and_the_redacted_say_so(made: dict[str, Variant]) -> None:
    said = {name: verify(item).as_json()["redacted"] for name, item in made.items() if not item.code}  # type: ignore[attr-defined]
    assert list(said.values()) == [[], [], ["prompt"], ["output"], ["prompt", "output"], [], ["prompt"]]


def test_the_list_is_written_for_others(tmp_path: Path) -> None:
    script = Path(__file__).with_name("variants.py")
    done = subprocess.run(
        (sys.executable, str(script), str(tmp_path / "out")), capture_output=True, text=True, check=True, timeout=300
    )
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [f"{item['group']}: {item['name']}" for item in index] == NAMES
    assert f"{len(NAMES)} bundles" in done.stdout
    assert len(list((tmp_path / "out").iterdir())) == 2 * len(NAMES) + 1
    for number, item in enumerate(index):
        assert re.fullmatch(rf"{number:03}-[a-z0-9-]+\.cmk", item["file"])
        assert item["at"] == NOW
        assert {"accept": not item["code"], "reject": item["code"], "undecidable": item["code"]}[item["verdict"]]
        policy = parse_policy((tmp_path / "out" / item["policy"]).read_bytes())
        try:
            verify_bundle(parse_bundle((tmp_path / "out" / item["file"]).read_bytes()), policy, item["at"])
        except CountermarkError as err:
            assert (err.code, err.step or "") == (item["code"], item["step"]), item
        else:
            assert item["code"] == "", item
