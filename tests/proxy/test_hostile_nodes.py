"""Nodes that are not what they should be: no prompt leaves, or the answer is withheld, each with its code."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store
from net_appliance import Appliance, running, start_front_end
from net_helpers import Relay, make_identity
from proxy_helpers import Proxy, text_of, wait_until
from test_hostile import Change, diverted, finished, flip, tokens

import one_answer
from countermark.formats.records import Kind
from countermark.wire import countermark_v1_pb2 as pb
from countermark_appliance.connections import Connections
from countermark_appliance.frontend import FrontEnd
from countermark_appliance.generation import Generation

SECRET = "the crown jewels are under the stairs"


def web_certificate() -> tuple[bytes, bytes, x509.Certificate, x509.Certificate]:
    """Key and certificate of a server that a browser would trust, with that certificate and its authority's."""
    now = datetime.datetime.now(datetime.UTC)
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def builder(name: str, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "web authority")]))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=30))
        )

    usage = {"content_commitment": False, "key_encipherment": False, "data_encipherment": False, "key_agreement": False}
    usage |= {"encipher_only": False, "decipher_only": False}
    root = (
        builder("web authority", root_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=False, key_cert_sign=True, crl_sign=True, **usage), critical=True
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(root_key.public_key()), critical=False)
        .sign(root_key, hashes.SHA256())
    )
    certificate = (
        builder("127.0.0.1", key.public_key())
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        .sign(root_key, hashes.SHA256())
    )
    der = key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return der, certificate.public_bytes(serialization.Encoding.DER), certificate, root


def refused(proxy: Proxy) -> tuple[int, dict[str, Any]]:
    status, found = proxy.chat(SECRET)
    assert status >= 500
    assert "choices" not in found
    return status, found["error"]


def listening(key: bytes, certificate: bytes) -> Callable[[Connections, int], FrontEnd]:
    def start(connections: Connections, port: int) -> FrontEnd:
        return FrontEnd.start(
            host="127.0.0.1",
            port=0,
            private_key=key,
            certificate=certificate,
            upstream_port=port,
            connections=connections,
        )

    return start


def test_a_man_in_the_middle_with_a_valid_web_certificate(appliance: Appliance) -> None:
    key, der, certificate, root = web_certificate()
    verifier = (
        PolicyBuilder().store(Store([root])).build_server_verifier(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    )
    assert verifier.verify(certificate, [])  # what the web's own rules say of it
    with diverted(appliance, listening(key, der)) as (address, handler):
        with Proxy((address,), appliance.connect) as proxy:
            status, error = refused(proxy)
        assert (status, error["code"]) == (502, "claims.exporter")
        assert error["type"] == "verification_error"
        assert error["countermark"]["step"] == "7"
        assert handler.prompts == []
        assert SECRET not in proxy.log.getvalue()


def test_the_same_with_the_nodes_own_key(appliance: Appliance) -> None:
    def start(connections: Connections, port: int) -> FrontEnd:
        return start_front_end(appliance.machine, connections, port)

    with diverted(appliance, start) as (address, handler), Proxy((address,), appliance.connect) as proxy:
        assert refused(proxy)[1]["code"] == "claims.exporter"
        assert handler.prompts == []


def test_a_measurement_that_is_not_in_the_policy(appliance: Appliance) -> None:
    policy = appliance.machine.policy
    (image,) = policy.images
    shapes = tuple(replace(shape, mrtd=flip(shape.mrtd)) for shape in image.shapes)
    other = replace(policy, images=(replace(image, shapes=shapes),))
    before = appliance.kinds()
    with Proxy.of(appliance, policy=other) as proxy:
        status, error = refused(proxy)
        assert (status, error["code"], error["countermark"]["step"]) == (502, "measurement.mrtd", "5")
        assert [check["status"] for check in error["countermark"]["checks"]] == ["PASS"] * 4 + ["FAIL"]
        assert error["countermark"]["todo"]
        (node,) = proxy.status()["nodes"]
        assert (node["state"], node["refusal"]["code"]) == ("refused", "measurement.mrtd")
        assert proxy.request("GET", "/healthz")[0] == 503
    assert appliance.kinds() == before


@contextlib.contextmanager
def relayed(appliance: Appliance, **settings: Any) -> Iterator[tuple[Proxy, Relay]]:
    host, _, port = appliance.address.rpartition(":")
    relay = Relay((host, int(port)))
    try:
        with Proxy((relay.address,), appliance.connect, **settings) as proxy:
            yield proxy, relay
    finally:
        relay.close()


def test_a_key_that_changes_mid_session(appliance: Appliance) -> None:
    """The connection is cut, and who answers the next one holds another key."""
    identity = make_identity()
    with (
        diverted(appliance, listening(identity.key, identity.certificate)) as (address, handler),
        relayed(appliance) as (proxy, relay),
    ):
        assert proxy.chat()[0] == 200
        host, _, port = address.rpartition(":")
        relay.target = (host, int(port))
        relay.cut()
        wait_until(lambda: not any(node.is_ready for node in proxy.app.upstream.nodes))
        assert refused(proxy)[1]["code"] == "claims.exporter"
        assert handler.prompts == []
        assert proxy.status()["nodes"][0]["state"] == "refused"


def test_a_key_that_changes_while_an_answer_streams(appliance: Appliance) -> None:
    """The answer is not finished over another connection, and never claimed to be verified."""
    identity = make_identity()
    with (
        diverted(appliance, listening(identity.key, identity.certificate)) as (address, handler),
        relayed(appliance) as (proxy, relay),
    ):
        host, _, port = address.rpartition(":")
        appliance.engine.delay_s = 0.05
        try:
            with openai.OpenAI(base_url=proxy.url, api_key="none") as client:
                stream = client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": SECRET}], max_tokens=100, stream=True
                )
                seen = [next(stream), next(stream)]
                relay.target = (host, int(port))
                relay.cut()
                with pytest.raises(openai.APIError) as caught:
                    seen += list(stream)
        finally:
            appliance.engine.delay_s = 0.0
        assert caught.value.code in ("channel.lost", "channel.closed")
        assert not any(chunk.choices[0].finish_reason for chunk in seen)
        assert handler.prompts == []
        assert proxy.status()["receipts"][0]["state"] == "ended"


def test_another_boot_under_another_key_is_appraised_anew(
    appliance: Appliance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_answer, "make", lambda **_: appliance.machine.state)
    with running(tmp_path) as rebooted, relayed(appliance) as (proxy, relay):
        assert proxy.chat()[0] == 200
        host, _, port = rebooted.address.rpartition(":")
        relay.target = (host, int(port))
        relay.cut()
        wait_until(lambda: not proxy.app.upstream.nodes[0].is_ready)
        assert proxy.chat()[0] == 200
        (node,) = proxy.status()["nodes"]
        assert (node["state"], node["key_changes"], node["appraisals"]) == ("verified", 1, 2)
        assert node["verdict"]["boot_id"] == rebooted.machine.recorder.epoch.boot_id.hex()
        assert "node_key_changed" in proxy.log.getvalue()
        assert rebooted.kinds()[1] is Kind.INTENT


@pytest.fixture
def tamper(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """Change the messages of every stream on their way out."""
    genuine = Generation.messages

    def install(change: Change) -> None:
        async def messages(self: Generation) -> AsyncIterator[bytes]:
            number = 0
            async for data in genuine(self):
                for message in change(number, pb.GenerateResponse.FromString(data)):
                    yield message.SerializeToString()
                number += 1

        monkeypatch.setattr(Generation, "messages", messages)

    return install


def lying(part: pb.Tokens) -> None:
    part.text = part.text.upper()


WITHHELD = [
    (tokens(lying), "receipt.output_text", "17"),
    (finished(lambda last: setattr(last, "receipt", flip(last.receipt))), "receipt.ml_dsa_65", "15"),
    (lambda _, message: [] if message.WhichOneof("event") == "finished" else [message], "stream.order", None),
]


@pytest.mark.parametrize(("change", "code", "step"), WITHHELD)
def test_an_answer_whose_receipt_does_not_verify_is_withheld(
    appliance: Appliance, tamper: Callable[[Change], None], change: Change, code: str, step: str | None
) -> None:
    with Proxy.of(appliance) as proxy:
        tamper(change)
        status, found = proxy.chat(SECRET)
        assert (status, found["error"]["code"], found["error"]["countermark"]["step"]) == (502, code, step)
        assert "ONE" not in str(found["error"]["message"]) or code == "receipt.output_text"
        assert found["error"]["countermark"]["verified"] is False
        entry = proxy.status()["receipts"][0]
        assert (entry["state"], entry["code"]) == ("withheld", code)
        assert entry["receipt"] == found["error"]["countermark"]["receipt"]
        assert SECRET not in proxy.log.getvalue()


@pytest.mark.parametrize(("change", "code", "step"), WITHHELD)
def test_a_stream_whose_receipt_does_not_verify_ends_with_an_error_and_no_end(
    appliance: Appliance, tamper: Callable[[Change], None], change: Change, code: str, step: str | None
) -> None:
    with Proxy.of(appliance) as proxy:
        tamper(change)
        *chunks, error, cut = proxy.stream(SECRET)
        assert cut == "cut"
        assert error["error"]["code"] == code
        assert not any(chunk["choices"][0]["finish_reason"] for chunk in chunks)
        assert not any("countermark" in chunk for chunk in chunks)
    with Proxy.of(appliance) as proxy:
        tamper(change)
        with openai.OpenAI(base_url=proxy.url, api_key="none") as client, pytest.raises(openai.APIError) as caught:
            list(client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], stream=True))
        assert caught.value.code == code


def test_held_back_no_word_of_it_is_given_out(appliance: Appliance, tamper: Callable[[Change], None]) -> None:
    with Proxy.of(appliance, hold=True) as proxy:
        tamper(WITHHELD[1][0])
        body = {"messages": [{"role": "user", "content": SECRET}], "stream": True, "max_tokens": 3}
        status, headers, data = proxy.request("POST", "/v1/chat/completions", body)
        assert (status, headers["x-should-retry"]) == (502, "false")
        assert b"one" not in data.partition(b'"message"')[2].partition(b'"')[0]
        assert b"one two" not in data


def test_the_receipt_of_another_session(appliance: Appliance, tamper: Callable[[Change], None]) -> None:
    """What ended the answer of one session, sent as the end of another's to the same question."""
    kept: list[pb.GenerateResponse] = []

    def change(_: int, message: pb.GenerateResponse) -> list[pb.GenerateResponse]:
        if message.WhichOneof("event") == "finished":
            kept.append(message)
            return [kept[0]]
        return [message]

    tamper(change)
    with Proxy.of(appliance) as first, Proxy.of(appliance) as second:
        assert first.chat(SECRET, seed=7)[0] == 200
        status, found = second.chat(SECRET, seed=7)
        assert (status, found["error"]["code"]) == (502, "receipt.intent")
        events = first.stream(SECRET, seed=7)
        assert events[-2]["error"]["code"] == "receipt.intent"


def test_a_commitment_that_does_not_verify_gives_no_token(
    appliance: Appliance, tamper: Callable[[Change], None]
) -> None:
    def change(number: int, message: pb.GenerateResponse) -> list[pb.GenerateResponse]:
        if number == 0:
            message.accepted.record = flip(message.accepted.record)
        return [message]

    with Proxy.of(appliance) as proxy:
        tamper(change)
        body = {"messages": [{"role": "user", "content": SECRET}], "stream": True}
        status, headers, data = proxy.request("POST", "/v1/chat/completions", body)
        assert (status, headers["x-should-retry"]) == (502, "false")
        assert headers["content-type"] == "application/json"
        assert b"one two" not in data


def test_after_a_lie_a_node_is_left_alone_until_it_is_appraised_again(
    appliance: Appliance, tamper: Callable[[Change], None]
) -> None:
    with Proxy.of(appliance) as proxy:
        with pytest.MonkeyPatch.context() as patch:
            genuine = Generation.messages

            async def messages(self: Generation) -> AsyncIterator[bytes]:
                async for data in genuine(self):
                    message = pb.GenerateResponse.FromString(data)
                    if message.WhichOneof("event") == "finished":
                        message.finished.receipt = flip(message.finished.receipt)
                    yield message.SerializeToString()

            patch.setattr(Generation, "messages", messages)
            assert proxy.chat()[1]["error"]["code"] == "receipt.ml_dsa_65"
        before = len(appliance.kinds())
        status, found = proxy.chat(SECRET)
        assert (status, found["error"]["code"]) == (502, "receipt.ml_dsa_65")
        assert len(appliance.kinds()) == before  # nothing was sent
        wait_until(lambda: proxy.status()["nodes"][0]["state"] == "verified")
        assert text_of(proxy.stream()) == "one two three "
        assert proxy.status()["nodes"][0]["withheld"] == 1
