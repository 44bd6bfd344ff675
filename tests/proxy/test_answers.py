"""What the proxy answers: bodies, streams, log probabilities, usage, receipts; against a node with a scripted model."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from net_appliance import Appliance
from proxy_helpers import Proxy, text_of

from countermark.bundle import read_bundle
from countermark.formats.records import Kind
from countermark.proxy.spoken import fingerprint
from countermark.verify import verify_bundle
from countermark_appliance.engine.request import DoneEvent, Event, Finish
from one_answer import NOW

WORDS = "one two three "


def test_a_whole_answer(proxy: Proxy, appliance: Appliance) -> None:
    status, found = proxy.chat(seed=7)
    assert status == 200
    assert found["object"] == "chat.completion"
    assert found["model"] == "tiny"
    (choice,) = found["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": WORDS, "refusal": None},
        "finish_reason": "length",
        "logprobs": None,
    }
    assert found["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    said = found["countermark"]
    assert (said["verified"], said["simulated"], said["seed"], said["seed_origin"]) == (True, True, 7, "client")
    assert found["id"] == f"chatcmpl-{said['receipt']}"
    with appliance.connect() as session:
        assert found["system_fingerprint"] == fingerprint(session.verdict)


def test_a_stream_ends_with_its_receipt(proxy: Proxy) -> None:
    events = proxy.stream(seed=7)
    assert events[-1] == "[DONE]"
    assert text_of(events) == WORDS
    *before, last = events[:-1]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in events[:-1])
    assert all(chunk["choices"][0]["finish_reason"] is None and "countermark" not in chunk for chunk in before)
    assert last["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "length", "logprobs": None}
    assert last["countermark"]["verified"] is True
    assert len({chunk["id"] for chunk in events[:-1]}) == 1
    assert len({chunk["system_fingerprint"] for chunk in events[:-1]}) == 1


def test_usage_comes_last_where_it_is_asked_for(proxy: Proxy) -> None:
    *chunks, done = proxy.stream(stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 5
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


@pytest.mark.parametrize("top", [0, 2])
def test_log_probabilities(proxy: Proxy, top: int) -> None:
    _, found = proxy.chat(logprobs=True, top_logprobs=top)
    content = found["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["token_id:10", "token_id:11", "token_id:12"]
    assert [entry["logprob"] for entry in content] == [-2.5, -2.75, -3.0]
    likely = [("token_id:1000", 0.0), ("token_id:1001", -0.5)][:top]
    assert all([(one["token"], one["logprob"]) for one in entry["top_logprobs"]] == likely for entry in content)
    streamed = [
        entry
        for event in proxy.stream(logprobs=True, top_logprobs=top)
        if isinstance(event, dict) and event["choices"][0]["logprobs"]
        for entry in event["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == content


def test_completions(proxy: Proxy) -> None:
    body = {"model": "countermark", "prompt": "raw text", "max_tokens": 3, "logprobs": 1}
    status, headers, data = proxy.request("POST", "/v1/completions", body)
    found = json.loads(data)
    assert (status, found["object"]) == (200, "text_completion")
    (choice,) = found["choices"]
    assert (choice["text"], choice["finish_reason"]) == (WORDS, "length")
    assert choice["logprobs"]["tokens"] == ["token_id:10", "token_id:11", "token_id:12"]
    assert choice["logprobs"]["top_logprobs"][0] == {"token_id:1000": 0.0}
    assert headers["x-countermark-receipt"] == found["countermark"]["receipt"]


def test_the_receipt_names_the_record(proxy: Proxy, appliance: Appliance) -> None:
    body = {"messages": [{"role": "user", "content": "which"}], "max_tokens": 2}
    _, headers, data = proxy.request("POST", "/v1/chat/completions", body)
    receipt = headers["x-countermark-receipt"]
    assert json.loads(data)["countermark"]["receipt"] == receipt
    assert headers["x-countermark-node"] == appliance.address
    assert headers["x-countermark-simulated"] == "true"
    assert proxy.status()["receipts"][0]["receipt"] == receipt
    assert appliance.kinds()[-1] is Kind.OUTCOME


def test_a_bundle_on_request_verifies(proxy: Proxy, appliance: Appliance) -> None:
    assert proxy.settings.bundles is not None
    folder = proxy.settings.bundles.folder
    before = len(list(folder.iterdir()))
    _, unasked = proxy.chat()
    assert "bundle" not in unasked["countermark"]
    assert len(list(folder.iterdir())) == before
    _, found = proxy.chat("keep this one", headers={"x-countermark-bundle": "save"})
    path = folder / found["countermark"]["bundle"]
    assert path.stat().st_mode & 0o777 == 0o600
    verified = verify_bundle(read_bundle(path), appliance.machine.policy, NOW)
    assert verified.receipt.as_json()["request_id"] == found["countermark"]["receipt"]
    for name in (path.name, found["countermark"]["receipt"]):
        status, _, data = proxy.request("GET", f"/countermark/bundles/{name}")
        assert (status, data) == (200, path.read_bytes())
    for name in ("../../etc/passwd", "x.cmk", "ab" * 16, "%2e%2e/policy.toml", ".."):
        assert proxy.request("GET", f"/countermark/bundles/{name}")[0] == 404
    events = proxy.stream(headers={"x-countermark-bundle": "save"})
    assert (folder / events[-2]["countermark"]["bundle"]).is_file()


def test_models(proxy: Proxy) -> None:
    proxy.chat()
    listed = json.loads(proxy.request("GET", "/v1/models")[2])
    assert [model["id"] for model in listed["data"]] == ["countermark", "tiny"]
    (node,) = listed["data"][1]["countermark"]
    assert (node["simulated"], node["profile"]) == (True, "exact-v1")
    assert json.loads(proxy.request("GET", "/v1/models/tiny")[2]) == listed["data"][1]
    status, _, data = proxy.request("GET", "/v1/models/other")
    assert (status, json.loads(data)["error"]["code"]) == (404, "request.model")


def test_a_model_nobody_serves(proxy: Proxy) -> None:
    status, found = proxy.chat(model="other")
    assert (status, found["error"]["code"], found["error"]["param"]) == (404, "request.model", "model")


def test_a_node_refuses_before_anything_is_recorded(proxy: Proxy, appliance: Appliance) -> None:
    before = len(appliance.kinds())
    status, found = proxy.chat("", max_tokens=2)
    assert (status, found["error"]["code"]) == (400, "request.prompt_empty")
    assert len(appliance.kinds()) == before


def test_a_form_that_leads_nowhere_is_the_requests_fault(
    proxy: Proxy, appliance: Appliance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may ask could else have a node left alone for minutes, for everybody."""
    genuine = appliance.engine.submit

    def submit(prepared: Any, sink: Any, *rest: Any) -> Any:
        def end(event: Event) -> None:
            stuck = isinstance(event, DoneEvent)
            sink(replace(event, reason=Finish.ERROR, detail="grammar: stuck", by_grammar=True) if stuck else event)

        return genuine(prepared, end, *rest)

    withheld = proxy.status()["nodes"][0]["withheld"]
    with monkeypatch.context() as patch:
        patch.setattr(appliance.engine, "submit", submit)
        status, found = proxy.chat()
        assert (status, found["error"]["code"], found["error"]["type"]) == (
            400,
            "generation.grammar",
            "invalid_request_error",
        )
        *_, last, cut = proxy.stream()
        assert (last["error"]["code"], cut) == ("generation.grammar", "cut")
    assert proxy.chat()[0] == 200
    node = proxy.status()["nodes"][0]
    assert (node["state"], node["withheld"]) == ("verified", withheld)
    assert proxy.status()["receipts"][1]["state"] == "ended"


def test_held_back_until_all_of_it_is_verified(proxy: Proxy) -> None:
    events = proxy.stream(headers={"x-countermark-hold": "true"})
    assert (text_of(events), events[-1]) == (WORDS, "[DONE]")


def test_many_at_once(proxy: Proxy) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda i: proxy.stream(f"number {i}", max_tokens=6), range(48)))
    assert all(events[-1] == "[DONE]" for events in found)
    assert len({events[0]["id"] for events in found}) == 48
    assert proxy.status()["nodes"][0]["appraisals"] >= 2  # a node takes eight answers on one connection
