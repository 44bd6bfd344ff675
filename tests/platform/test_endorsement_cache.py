"""The appliance's cache of endorsements: what it takes, what it keeps, and what it does when nobody answers."""

from __future__ import annotations

import base64
import datetime
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

import vectors
from countermark.errors import ConfigError, CountermarkError, FormatError, Unavailable
from countermark.fetch import Validity, intel
from countermark.fetch.https import Service
from countermark.formats.evidence import GpuEvidence, encode_evidence, parse_evidence
from countermark.formats.quote import parse_quote
from countermark_appliance.config import parse_config
from countermark_appliance.platform import endorsements, sim
from countermark_appliance.platform.endorsements import (
    DAY_S,
    EndorsementCache,
    Item,
    Kind,
    folder_items,
    gpu_items,
    open_endorsements,
    rim_item,
    tdx_item,
)
from countermark_appliance.platform.sim import intel as sim_intel
from countermark_appliance.platform.sim import nvidia, rim
from countermark_appliance.platform.sim.intel import Collateral
from countermark_appliance.platform.sim.issue import YEAR_S, Issued, issue, issue_crl
from countermark_appliance.platform.sim.machine import SimPlatform
from sim_evidence import NOW, Scene, code_folder, machine, sha256
from vendor_service import Reply, Server, pccs_routes, serving

FMSPC = sim_intel.FMSPC.hex()
FILE = f"tdx-{FMSPC}-platform.json"
HOUR_S = 3600


def says(**changes: Any) -> bytes:
    return sim_intel.collateral_json(machine().vendor, Collateral(**{"issued": NOW - HOUR_S, **changes}))


@dataclass
class Clock:
    """The host's clock and the machine's own, which tests advance together unless they say otherwise."""

    now: float = NOW
    ticks: float = 1000

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.ticks += seconds


@dataclass
class World:
    """A service and a cache that asks it."""

    server: Server
    directory: Path
    clock: Clock = field(default_factory=Clock)

    def open(self) -> EndorsementCache:
        quote = sim.boot(machine(), roots=[code_folder()]).quote(bytes(64))
        source = intel.pccs(Service(url=self.server.url, timeout_s=5))
        item = tdx_item(quote, source, root=sha256(machine().root_der))
        return EndorsementCache(self.directory, [item], clock=lambda: self.clock.now, ticks=lambda: self.clock.ticks)

    def serve(self, collateral: bytes | None) -> None:
        self.server.routes.clear()
        if collateral is not None:
            self.server.routes.update(pccs_routes(collateral, fmspc=FMSPC))

    def asked(self) -> int:
        """Whole sets of four requests since the last call; an unanswered set is one request."""
        count = len(self.server.asked)
        self.server.asked.clear()
        return (count + 3) // 4


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with serving({}) as server:
        world = World(server, tmp_path / "cache")
        world.serve(says())
        yield world


def served(cache: EndorsementCache) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(cache.current().tdx)
    return value


def nothing(cache: EndorsementCache) -> bool:
    with pytest.raises(Unavailable) as err:
        cache.current()
    return err.value.code == "platform.endorsements"


def test_what_is_fetched_is_served_and_survives_a_restart(world: World) -> None:
    cache = world.open()
    assert nothing(cache)
    cache.refresh()
    assert served(cache) == json.loads(says_of(world))
    assert [path.name for path in world.directory.iterdir()] == [FILE]
    world.serve(None)
    assert served(world.open()) == served(cache)


def says_of(world: World) -> bytes:
    """What the service hands out now, fetched without the cache."""
    quote = sim.boot(machine(), roots=[code_folder()]).quote(bytes(64))
    return intel.fetch_collateral(quote, intel.pccs(Service(url=world.server.url)))


def test_evidence_with_what_is_served_is_accepted(world: World) -> None:
    cache = world.open()
    cache.refresh()
    state = replace(machine(), endorsements=replace(machine().endorsements, tdx=cache.current().tdx))
    assert Scene(state=state).appraise().simulated


def test_renewed_after_a_day_or_half_of_what_is_left(world: World) -> None:
    cache = world.open()
    assert cache.refresh() == pytest.approx(DAY_S, abs=2)
    assert world.asked() == 1
    world.clock.advance(DAY_S - 10)
    cache.refresh()
    assert world.asked() == 0
    world.clock.advance(20)
    world.serve(says(issued=int(world.clock.now) - 60, lifetime_s=4 * HOUR_S))
    assert cache.refresh() == pytest.approx(2 * HOUR_S, abs=60)
    assert world.asked() == 1


def test_the_last_ones_are_served_until_they_expire_when_nobody_answers(world: World) -> None:
    cache = world.open()
    cache.refresh()
    world.serve(None)
    waits = []
    for _ in range(12):
        world.clock.advance(2.6 * DAY_S)
        waits.append(cache.refresh())
        if world.clock.now <= NOW - HOUR_S + 30 * DAY_S:
            assert served(cache)
        else:
            assert nothing(cache)
    assert nothing(cache)
    assert waits[:4] == pytest.approx([60, 120, 240, 480])
    assert max(waits) == pytest.approx(3600)
    world.serve(says(issued=int(world.clock.now)))
    world.clock.advance(3601)
    cache.refresh()
    assert served(cache)


@pytest.mark.parametrize(
    ("name", "older"),
    [
        ("issued a day before", {"issued": NOW - DAY_S}),
        ("of a lower number", {"evaluation_number": 999}),
        ("newer, of a lower number", {"issued": NOW, "evaluation_number": 999}),
    ],
)
def test_older_ones_are_not_taken(world: World, name: str, older: dict[str, Any]) -> None:
    cache = world.open()
    cache.refresh()
    before = cache.current()
    world.serve(says(**older))
    world.clock.advance(DAY_S + 1)
    cache.refresh()
    assert world.asked() == 2
    assert cache.current() == before, name
    assert (world.directory / FILE).read_bytes() == before.tdx
    again = world.open()  # also not after a restart, because the disk still has the newer ones
    again.refresh()
    assert again.current() == before


def test_one_part_that_is_older_is_enough_to_refuse_all(world: World) -> None:
    cache = world.open()
    cache.refresh()
    before = cache.current()
    old, new = json.loads(says(issued=NOW - DAY_S)), json.loads(says(issued=NOW))
    world.serve(json.dumps(new | {"pck_crl": old["pck_crl"]}).encode())
    world.clock.advance(DAY_S + 1)
    cache.refresh()
    assert cache.current() == before


def test_newer_ones_and_a_higher_number_are_taken(world: World) -> None:
    cache = world.open()
    cache.refresh()
    world.serve(says(issued=NOW, evaluation_number=1001))
    world.clock.advance(DAY_S + 1)
    cache.refresh()
    assert json.loads(served(cache)["tcb_info"])["tcbEvaluationDataNumber"] == 1001


def other_vendor() -> bytes:
    return sim_intel.collateral_json(sim_intel.make_vendor(now=NOW), Collateral(issued=NOW - HOUR_S))


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("expired", lambda: says(issued=NOW - 31 * DAY_S)),
        ("of the future", lambda: says(issued=NOW + DAY_S)),
        ("of another family", lambda: says(fmspc=b"OTHERS")),
        ("of another root", other_vendor),
    ],
)
def test_what_no_verifier_would_take_is_not_kept(world: World, name: str, answer: Callable[[], bytes]) -> None:
    world.serve(answer())
    cache = world.open()
    assert cache.refresh() == pytest.approx(60)
    assert nothing(cache), name
    assert not list(world.directory.iterdir())


@pytest.mark.parametrize(
    "reply", [Reply(b"<html>"), Reply(bytes(2 << 20)), Reply(status=302, headers={"Location": "/"}), Reply(status=404)]
)
def test_garbage_oversize_redirects_and_errors_leave_what_is_held(world: World, reply: Reply) -> None:
    cache = world.open()
    cache.refresh()
    before = cache.current()
    for path in list(world.server.routes):
        world.server.routes[path] = reply
    world.clock.advance(DAY_S + 1)
    assert cache.refresh() == pytest.approx(60)
    assert cache.current() == before


@pytest.mark.parametrize("bad", [b"", b"{}", b"\0" * 100, b"x" * (1 << 20) + b"x", None])
def test_a_spoiled_file_is_fetched_anew(world: World, bad: bytes | None) -> None:
    world.open().refresh()
    good = (world.directory / FILE).read_bytes()
    if bad is None:
        (world.directory / FILE).unlink()
        (world.directory / FILE).mkdir()
    else:
        (world.directory / FILE).write_bytes(bad)
    cache = world.open()
    assert nothing(cache)
    cache.refresh()
    assert cache.current().tdx == good
    if bad is not None:
        assert (world.directory / FILE).read_bytes() == good


def test_a_file_with_another_byte_is_not_served(world: World) -> None:
    world.open().refresh()
    values = json.loads((world.directory / FILE).read_bytes())
    values["tcb_info"] = values["tcb_info"].replace("UpToDate", "Revoked!", 1)
    (world.directory / FILE).write_text(json.dumps(values))
    assert nothing(world.open())


def test_expired_files_are_not_served(world: World) -> None:
    world.open().refresh()
    world.serve(None)
    world.clock.advance(31 * DAY_S)
    assert nothing(world.open())


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_disk_that_takes_nothing_does_not_keep_anything_from_being_served(world: World) -> None:
    cache = world.open()
    world.directory.chmod(0o500)
    cache.refresh()
    assert served(cache)


def test_a_disk_that_takes_nothing_is_said_and_what_was_fetched_is_served(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = world.open()
    (world.directory).rmdir()
    cache.refresh()
    assert served(cache)
    assert "not written: usage.file" in caplog.text


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as err:
        EndorsementCache(tmp_path / "file" / "cache", [])
    assert err.value.code == "platform.endorsements_dir"


def test_log_lines_have_no_content_and_no_path(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.serve(other_vendor())
    world.open().refresh()
    world.serve(None)
    world.open().refresh()
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert lines == [
        "endorsements: tdx not renewed, NONE: endorsements.root",
        "endorsements: tdx not renewed, NONE: 127.0.0.1: expected status 200, got 404",
    ]


def test_a_clock_that_the_host_sets_back_does_not_stop_renewal(world: World) -> None:
    cache = world.open()
    cache.refresh()
    world.clock.now -= 10 * DAY_S
    world.clock.ticks += DAY_S + 1
    cache.refresh()
    assert world.asked() == 2


def test_it_renews_by_itself_and_stops(world: World) -> None:
    renewed = threading.Event()
    item = world.open()._kept[FILE].item

    def fetch() -> bytes:
        renewed.set()
        return item.fetch()

    cache = EndorsementCache(world.directory, [replace(item, fetch=fetch)], clock=lambda: NOW)
    cache.start()
    assert renewed.wait(5)
    for _ in range(100):
        if (world.directory / FILE).exists():
            break
        time.sleep(0.05)
    assert served(cache)
    cache.close()
    for _ in range(100):
        if not any(thread.name == "endorsements" for thread in threading.enumerate()):
            break
        time.sleep(0.05)
    assert not any(thread.name == "endorsements" for thread in threading.enumerate())


def test_a_slow_service_does_not_hold_those_who_ask_for_what_is_there(tmp_path: Path) -> None:
    hold, entered = threading.Event(), threading.Event()
    data = says()

    def slow() -> bytes:
        entered.set()
        assert hold.wait(10)
        return data

    def validity(_data: bytes, _now: int) -> Validity:
        return Validity(issued=NOW, until=NOW + DAY_S)

    quick = Item(kind=Kind.TDX, file="a", fetch=lambda: data, read=validity)
    cache = EndorsementCache(
        tmp_path, [quick, Item(kind=Kind.RIM, file="b", fetch=slow, read=validity)], clock=lambda: NOW
    )
    cache.start()
    assert entered.wait(5)
    started = time.monotonic()
    assert cache.current().tdx == data
    assert time.monotonic() - started < 1
    hold.set()
    cache.close()


# GPUs


def rim_answer(rim_id: str, data: bytes) -> Reply:
    return Reply(json.dumps({"id": rim_id, "rim": base64.b64encode(data).decode()}).encode())


def ocsp_answer(issuer: Issued, *, start: int = NOW, hours: int = 24) -> Callable[[bytes], Reply]:
    """A responder that is the issuer, for whatever serial number is asked about."""

    def reply(body: bytes) -> Reply:
        asked = ocsp.load_der_ocsp_request(body)
        first = datetime.datetime.fromtimestamp(start, datetime.UTC)
        builder = ocsp.OCSPResponseBuilder().add_response_by_hash(
            issuer_name_hash=asked.issuer_name_hash,
            issuer_key_hash=asked.issuer_key_hash,
            serial_number=asked.serial_number,
            algorithm=hashes.SHA384(),
            cert_status=ocsp.OCSPCertStatus.GOOD,
            this_update=first,
            next_update=first + datetime.timedelta(hours=hours),
            revocation_time=None,
            revocation_reason=None,
        )
        builder = builder.responder_id(ocsp.OCSPResponderEncoding.HASH, issuer.certificate)
        return Reply(builder.sign(issuer.key, hashes.SHA384()).public_bytes(Encoding.DER))

    return reply


def simulated_gpus() -> tuple[GpuEvidence, ...]:
    platform: SimPlatform = sim.boot(machine(), roots=[code_folder()])
    return platform.gpu_evidence(bytes(32))


def tdx_of(data: bytes) -> Item:
    return Item(
        kind=Kind.TDX,
        file="tdx.json",
        fetch=lambda: data,
        read=lambda _data, _now: Validity(issued=NOW - 1, until=NOW + 30 * DAY_S),
    )


def test_a_genuine_manifest_brings_the_responders_word_on_its_signers(tmp_path: Path) -> None:
    rim_id = "NV_GPU_DRIVER_GH100_550.144.03"
    data = vectors.read(f"nvidia/rim/{rim_id}.xml")
    now = 1_750_000_000
    clock = Clock(now=now)
    with serving({f"/v1/rim/{rim_id}": rim_answer(rim_id, data)}) as server:
        server.routes["/ocsp"] = ocsp_answer(machine().gpu_vendor.rim_root, start=now)
        item = rim_item(rim_id, Service(url=server.url), Service(url=server.url + "/ocsp"))
        cache = EndorsementCache(
            tmp_path,
            [replace(tdx_of(b"{}"), read=lambda _data, _now: Validity(issued=0, until=1 << 40)), item],
            clock=lambda: clock.now,
            ticks=lambda: clock.ticks,
        )
        assert cache.refresh() == pytest.approx(12 * HOUR_S, abs=1)
        current = cache.current()
        assert current.gpu_rims == (data,)
        serials = [ocsp.load_der_ocsp_response(one).serial_number for one in current.gpu_ocsp]
        chain = x509.load_pem_x509_certificates(signer_pems(data))
        assert sorted(serials) == sorted(certificate.serial_number for certificate in chain[:-1])
        again = EndorsementCache(tmp_path, [tdx_of(b"{}"), item], clock=lambda: clock.now, ticks=lambda: clock.ticks)
        assert sorted(again._kept) == sorted(cache._kept)
        server.routes.clear()
        clock.advance(25 * HOUR_S)
        cache.refresh()
        assert cache.current().gpu_rims == (data,)  # holds as long as its signer's certificates
        assert cache.current().gpu_ocsp == ()  # what has expired would be refused, also where none is required


def test_a_manifest_signed_anew_takes_the_word_on_its_old_signer_with_it(tmp_path: Path) -> None:
    """A verifier refuses a response about a certificate of nobody (`gpu.ocsp_stranger`), and with it all evidence."""
    vendor, clock = machine().gpu_vendor, Clock()
    times = {"not_before": NOW - HOUR_S, "not_after": NOW + YEAR_S}
    signer = issue("RIM signer", vendor.rim_root, **times, curve=ec.SECP384R1(), ca=False)
    first, second = (
        rim.make_rim(one, nvidia.DRIVER_VERSION, nvidia.DRIVER_INDEXES)
        for one in (vendor, replace(vendor, rim_signer=signer))
    )
    with serving({"/v1/rim/DRIVER": rim_answer("DRIVER", first)}) as server:
        server.routes["/ocsp"] = ocsp_answer(vendor.rim_root, hours=72)
        root = sha256(machine().rim_root_der)
        item = rim_item("DRIVER", Service(url=server.url), Service(url=server.url + "/ocsp"), root=root)
        cache = EndorsementCache(tmp_path, [tdx_of(b"{}"), item], clock=lambda: clock.now, ticks=lambda: clock.ticks)
        for data, certificate in ((first, vendor.rim_signer.certificate), (second, signer.certificate)):
            server.routes["/v1/rim/DRIVER"] = rim_answer("DRIVER", data)
            cache.refresh()
            assert cache.current().gpu_rims == (data,)
            (answer,) = cache.current().gpu_ocsp
            assert ocsp.load_der_ocsp_response(answer).serial_number == certificate.serial_number
            clock.advance(DAY_S + 1)
        server.asked.clear()
        cache.refresh()
        assert len(server.asked) == 2  # nobody asks about the old signer again


def test_no_word_on_the_signer_of_a_manifest_that_is_not_handed_out(tmp_path: Path) -> None:
    clock = Clock()
    data = b"rim"
    held = Item(
        kind=Kind.OCSP, file="o", fetch=lambda: b"ocsp", read=lambda _data, _now: Validity(issued=NOW, until=1 << 40)
    )
    short = Item(
        kind=Kind.RIM,
        file="r",
        fetch=lambda: data,
        read=lambda _data, _now: Validity(issued=NOW, until=NOW + HOUR_S),
        asks_for=lambda _data: [held],
    )
    cache = EndorsementCache(tmp_path, [tdx_of(b"{}"), short], clock=lambda: clock.now, ticks=lambda: clock.ticks)
    cache.refresh()
    assert (cache.current().gpu_rims, cache.current().gpu_ocsp) == ((data,), (b"ocsp",))
    clock.advance(2 * HOUR_S)
    assert (cache.current().gpu_rims, cache.current().gpu_ocsp) == ((), ())


def signer_pems(rim: bytes) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in endorsements.nvidia.parse_rim(rim).chain)


def test_the_gpus_of_a_machine_lead_to_their_manifests_and_chains() -> None:
    gpus = tuple(
        GpuEvidence(
            report=vectors.gpu_report(name),
            certs=tuple(
                certificate.public_bytes(Encoding.DER)
                for certificate in x509.load_pem_x509_certificates(vectors.gpu_chain_pem(name))
            ),
        )
        for name in vectors.GPU_SETS
    )
    items = gpu_items(gpus, Service(url="https://a.example"), Service(url="https://b.example"))
    rims = [item.file for item in items if item.kind is Kind.RIM]
    assert rims == [
        "rim-NV_GPU_DRIVER_GH100_550.90.07.xml",
        "rim-NV_GPU_VBIOS_1010_0200_882_96009F0001.xml",
        "rim-NV_GPU_DRIVER_GH100_535.86.09.xml",
        "rim-NV_GPU_VBIOS_1010_0200_882_96005E0001.xml",
    ]
    assert len([item for item in items if item.kind is Kind.OCSP]) == 2 * 3
    assert len({item.file for item in items if item.kind is Kind.OCSP}) == 2 + 2  # two chips, shared above them


def test_a_manifest_under_another_root_is_not_kept(tmp_path: Path) -> None:
    rim_id = "NV_GPU_DRIVER_GH100_1"
    data = machine().endorsements.gpu_rims[0]
    with serving({f"/v1/rim/{rim_id}": rim_answer(rim_id, data)}) as server:
        where = Service(url=server.url)
        for root, kept in ((sha256(machine().rim_root_der), 1), (bytes(32), 0)):
            item = rim_item(rim_id, where, where, root=root)
            cache = EndorsementCache(tmp_path / str(kept), [tdx_of(b"{}"), item], clock=lambda: NOW)
            cache.refresh()
            assert len(cache.current().gpu_rims) == kept


def test_what_an_operator_puts_into_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "gpu"
    folder.mkdir()
    state = machine()
    crl = issue_crl(state.gpu_vendor.root, this_update=NOW - 1, next_update=NOW + DAY_S)
    (folder / "a.xml").write_bytes(state.endorsements.gpu_rims[0])
    (folder / "b.swidtag").write_bytes(b"no manifest")
    (folder / "c.crl").write_bytes(crl)
    (folder / "d.crl").write_bytes(issue_crl(state.gpu_vendor.root, this_update=NOW - 9, next_update=NOW - 1))
    (folder / "README").write_text("not ours")
    items = folder_items(folder, root=sha256(state.rim_root_der))
    cache = EndorsementCache(tmp_path / "cache", [tdx_of(b"{}"), *items], clock=lambda: NOW)
    cache.refresh()
    assert cache.current().gpu_rims == (state.endorsements.gpu_rims[0],)
    assert cache.current().gpu_crls == (crl,)
    with pytest.raises(ConfigError) as err:
        folder_items(tmp_path / "none")
    assert err.value.code == "platform.endorsements_dir"


def test_all_of_it_fits_into_evidence(tmp_path: Path) -> None:
    scene = Scene().make()
    rims = tuple(
        Item(
            kind=kind,
            file=f"{kind.value}{index}",
            fetch=lambda kind=kind, index=index: bytes([index]) * 1000,  # type: ignore[misc]
            read=lambda _data, _now: Validity(issued=NOW, until=NOW + DAY_S),
        )
        for kind in (Kind.RIM, Kind.CRL, Kind.OCSP)
        for index in range(16)
    )
    cache = EndorsementCache(tmp_path, [tdx_of(scene.endorsements.tdx), *rims], clock=lambda: NOW)
    cache.refresh()
    evidence = replace(scene, endorsements=cache.current())
    assert parse_evidence(encode_evidence(evidence)) == evidence


def test_a_quote_without_a_pck_chain_is_refused() -> None:
    genuine = vectors.tdx("dstack-90c06f").quote
    source = intel.pccs(Service(url="https://example.com"))
    assert tdx_item(genuine, source).file == "tdx-90c06f000000-platform.json"
    chain = parse_quote(genuine).pck_chain_pem
    broken = genuine.replace(chain, b"x" * len(chain))
    assert broken != genuine
    with pytest.raises(FormatError):
        tdx_item(broken, source)


def test_genuine_endorsements_are_kept(tmp_path: Path) -> None:
    item = vectors.tdx("dstack-90c06f")
    wanted = intel.wanted_by(parse_quote(item.quote).pck_chain_pem)
    with serving(pccs_routes(item.collateral.encode(), fmspc=wanted.fmspc.hex(), ca=wanted.ca)) as server:
        cache = EndorsementCache(
            tmp_path, [tdx_item(item.quote, intel.pccs(Service(url=server.url)))], clock=lambda: item.at
        )
        cache.refresh()
    values = json.loads(cache.current().tdx)
    assert values == {key: json.loads(item.collateral)[key] for key in values}


def test_items_need_no_order_and_errors_of_one_do_not_touch_another(tmp_path: Path) -> None:
    def fails() -> bytes:
        raise Unavailable("service: down", code="endorsements.fetch.status")

    def validity(_data: bytes, _now: int) -> Validity:
        return Validity(issued=NOW, until=NOW + DAY_S)

    broken = Item(kind=Kind.RIM, file="b", fetch=fails, read=validity)
    for items in ([broken, tdx_of(b"{}")], [tdx_of(b"{}"), broken]):
        cache = EndorsementCache(tmp_path / str(len(list(tmp_path.iterdir()))), items, clock=lambda: NOW)
        assert cache.refresh() == pytest.approx(60, abs=1)
        assert cache.current().tdx == b"{}"


def test_refusals_are_typed() -> None:
    for code in ("platform.endorsements_dates", "platform.endorsements_older"):
        old = Validity(issued=NOW, until=NOW + 9, ages=(5,))
        new = replace(old, ages=(4,)) if code.endswith("older") else replace(old, until=NOW - 1)
        with pytest.raises(CountermarkError) as err:
            endorsements._supersedes(new, old, NOW)
        assert err.value.code == code


def test_a_configuration_opens_a_filled_cache_that_renews(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tdx_item.__kwdefaults__, "root", sha256(machine().root_der))
    monkeypatch.setattr(EndorsementCache.__init__, "__kwdefaults__", {"clock": lambda: NOW, "ticks": time.monotonic})
    text = NODE.format(url=world.server.url, root="00" * 32)
    config = parse_config(text.encode(), base=world.directory.parent)
    quote = sim.boot(machine(), roots=[code_folder()]).quote(bytes(64))
    cache = open_endorsements(config, quote, ())
    try:
        assert served(cache)
        assert (world.directory / FILE).exists()
        assert any(thread.name == "endorsements" for thread in threading.enumerate())
    finally:
        cache.close()
    with pytest.raises(ConfigError) as err:
        open_endorsements(replace(config, endorsements_dir=None), quote, ())
    assert err.value.code == "config.missing"


NODE = """[node]
operator = "test.example"
[platform]
name = "tdx"
[endorsements]
dir = "cache"
pccs_url = "{url}/sgx/certification/v4/"
[weights]
dir = "weights"
root = "{root}"
[log]
dir = "log"
"""
