"""Other people's clients, unchanged, each in its own process: LangChain, llm, and OpenAI's npm package.

They are installed by `make clients` into places of their own (build/clients, tests/proxy/npm/node_modules).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from proxy_helpers import Proxy

pytestmark = pytest.mark.system
ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / "build" / "clients" / "bin" / "python"
NPM = Path(__file__).parent / "npm"


def run(*command: str, **more: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(program: str, served: Proxy, **environment: str) -> dict[str, Any]:
    """What a program prints as JSON, run where the clients are; `URL` is the proxy's."""
    if not PYTHON.exists():
        pytest.skip("no build/clients: LangChain and llm were NOT run against the proxy (make clients)")
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    found: dict[str, Any] = json.loads(run(str(PYTHON), "-c", program, env=kept | {"URL": served.url} | environment))
    return found


LANGCHAIN = """
import json, os
import openai
from langchain_openai import ChatOpenAI

model = ChatOpenAI(model="countermark", base_url=os.environ["URL"], api_key="none", max_tokens=12, seed=7,
                   temperature=0.8)
first, second = model.invoke("Name three colours."), model.invoke([("user", "Name three colours.")])
chunks = list(model.stream("Name three colours."))
logprobs = model.bind(logprobs=True, top_logprobs=2).invoke("Name three colours.").response_metadata["logprobs"]

def add(a: int, b: int) -> int:
    "Adds."
    return a + b

try:
    model.bind_tools([add]).invoke("What is 1 + 1?")
    refused = None
except openai.BadRequestError as err:
    refused = [err.code, err.param]
print(json.dumps({
    "first": first.content,
    "second": second.content,
    "fingerprints": [first.response_metadata["system_fingerprint"], second.response_metadata["system_fingerprint"]],
    "streamed": "".join(chunk.content for chunk in chunks),
    "tokens": first.usage_metadata["output_tokens"],
    "logprobs": len(logprobs["content"]),
    "refused": refused,
}))
"""


def test_langchain(served: Proxy) -> None:
    found = python(LANGCHAIN, served)
    assert found["first"] == found["second"] == found["streamed"] != ""
    assert len(set(found["fingerprints"])) == 1
    assert found["tokens"] == found["logprobs"]
    assert found["refused"] == ["proxy.unsupported", "tools"]


LLM = """
import json, os
import llm
from llm.default_plugins.openai_models import Chat

model = Chat("countermark", model_name="countermark", api_base=os.environ["URL"])
options = dict(stream=False, key="none", max_tokens=12, seed=7, temperature=0.8)
whole = [model.prompt("Name three colours.", **options).text() for _ in range(2)]
streamed = list(model.prompt("Name three colours.", **(options | {"stream": True})))
print(json.dumps({"whole": whole, "streamed": "".join(streamed), "pieces": len(streamed)}))
"""


def test_llm(served: Proxy, tmp_path: Path) -> None:
    found = python(LLM, served, LLM_USER_PATH=str(tmp_path))
    assert found["whole"][0] == found["whole"][1] == found["streamed"] != ""


NODE = """
import OpenAI from "openai";
const client = new OpenAI({baseURL: process.env.URL, apiKey: "none"});
const ask = {model: "countermark", messages: [{role: "user", content: "Name three colours."}], max_tokens: 12, seed: 7,
             temperature: 0.8, logprobs: true, top_logprobs: 2};
const first = await client.chat.completions.create(ask), second = await client.chat.completions.create(ask);
let streamed = "", receipt = null;
for await (const chunk of await client.chat.completions.create({...ask, stream: true})) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  if (chunk.countermark) receipt = chunk.countermark;
}
const helper = client.chat.completions.stream(ask);
const helped = await helper.finalContent();
let refused = null;
try {
  await client.chat.completions.create({...ask, tools: [{type: "function", function: {name: "f", parameters: {}}}]});
} catch (err) {
  refused = [err.status, err.code, err.param];
}
const models = [];
for await (const model of client.models.list()) models.push(model.id);
console.log(JSON.stringify({
  first: first.choices[0], second: second.choices[0], streamed, receipt, helped, refused, models,
  fingerprints: [first.system_fingerprint, second.system_fingerprint],
}));
"""


def test_the_npm_package(served: Proxy) -> None:
    node = shutil.which("node")
    if node is None or not (NPM / "node_modules" / "openai").is_dir():
        pytest.skip("no tests/proxy/npm/node_modules: the npm client was NOT run against the proxy (make clients)")
    environment = os.environ | {"URL": served.url}
    found = json.loads(run(node, "--input-type=module", "-e", NODE, cwd=NPM, env=environment))
    assert found["first"] == found["second"]
    assert found["first"]["message"]["content"] == found["streamed"] == found["helped"] != ""
    assert len(set(found["fingerprints"])) == 1
    assert found["receipt"]["verified"] is True
    assert found["refused"] == [400, "proxy.unsupported", "tools"]
    assert found["models"][0] == "countermark"
