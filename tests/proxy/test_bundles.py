"""The folder of bundles: its caps, its neighbours, what happens when it cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest
from net_appliance import Appliance
from proxy_helpers import Proxy

from countermark.errors import RequestError
from countermark.proxy.guard import Guard
from countermark.proxy.http import Request
from countermark.proxy.ledger import Keeper
from countermark.proxy.settings import Bundles


def test_the_oldest_go_by_number(appliance: Appliance, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "bundles"
    with Proxy.of(appliance, bundles=Bundles(folder=folder, keep=3, every=True)) as proxy:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "notes.txt").write_text("mine")
        (folder / "answer.cmk").write_text("mine too")
        names = [proxy.chat()[1]["countermark"]["bundle"] for _ in range(5)]
        assert {path.name for path in folder.iterdir()} == {*names[-3:], "notes.txt", "answer.cmk"}
        found = proxy.status()["bundles"]
        assert (found["count"], found["keep"]) == (3, 3)
        assert proxy.request("GET", f"/countermark/bundles/{names[0]}")[0] == 404
        assert proxy.request("GET", "/countermark/bundles/answer.cmk")[0] == 404


def test_the_oldest_go_by_bytes_and_the_newest_stays(appliance: Appliance, tmp_path: Path) -> None:
    with Proxy.of(appliance, bundles=Bundles(folder=tmp_path, keep_bytes=1, every=True)) as proxy:
        names = [proxy.chat()[1]["countermark"]["bundle"] for _ in range(3)]
        assert [path.name for path in tmp_path.iterdir()] == names[-1:]


def test_a_bundle_that_cannot_be_kept_is_said_to_be_missing(appliance: Appliance, tmp_path: Path) -> None:
    """The answer is verified all the same."""
    folder = tmp_path / "bundles"
    with Proxy.of(appliance, bundles=Bundles(folder=folder, every=True)) as proxy:
        folder.rmdir()
        status, found = proxy.chat()
        assert status == 200
        said = found["countermark"]
        assert (said["verified"], said["bundle"], said["bundle_error"]) == (True, None, "usage.file")
        assert proxy.status()["receipts"][0]["bundle"] is None


def test_no_folder(appliance: Appliance) -> None:
    with Proxy.of(appliance) as proxy:
        status, found = proxy.chat(headers={"x-countermark-bundle": "save"})
        assert (status, found["error"]["code"]) == (400, "proxy.header")
        assert proxy.chat(headers={"x-countermark-hold": "yes"})[1]["error"]["code"] == "proxy.header"
        assert proxy.request("GET", "/countermark/bundles/x")[0] == 404
        assert proxy.status()["bundles"] is None


@pytest.mark.parametrize(
    "where", ["../other/{}", "./{}", "{folder}/../other/{}", "{other}/{}", "{}/.", "%2e%2e/other/{}"]
)
def test_no_bundle_of_another_folder(tmp_path: Path, where: str) -> None:
    """A name is no path, not even to a file that could be one of ours."""
    folder, other = tmp_path / "bundles", tmp_path / "other"
    keeper = Keeper(Bundles(folder=folder))
    name = "20261122T190000.000000Z-0123456789abcdef.cmk"
    other.mkdir()
    for place in (folder, other):
        (place / name).write_bytes(b"")
    assert keeper.find(name) == keeper.find("0123456789abcdef") == folder / name
    with pytest.raises(RequestError) as caught:
        keeper.find(where.format(name, folder=folder, other=other))
    assert caught.value.code == "proxy.bundle"


def test_no_key_in_a_repr() -> None:
    guard, head = Guard(listen="127.0.0.1", key=b"sesame-open"), {"authorization": "Bearer sesame-open"}
    assert "sesame" not in repr(guard) + repr(Request(method="GET", path="/", headers=head, body=b"sesame"))
