"""docs/proxy.md against the code: options, parameters, caps, headers, statuses."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from countermark.cli import _parser
from countermark.proxy import spoken
from countermark.proxy.guard import _EXPOSED
from countermark.proxy.http import Limits
from countermark.proxy.settings import NodeLimits, Settings
from countermark.proxy.wanted import _SAMPLING, NEUTRAL

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "proxy.md").read_text()
SECTIONS = dict(part.split("\n", 1) for part in PAGE.split("\n## ")[1:])


def proxy_options() -> set[str]:
    actions = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    found = {option for action in actions.choices["proxy"]._actions for option in action.option_strings}
    return {option for option in found if option.startswith("--")} - {"--help"}


def test_every_option_named_exists() -> None:
    named = set(re.findall(r"--[a-z][a-z-]+", PAGE))
    assert len(named) > 10
    assert named <= proxy_options()


def test_every_command_parses() -> None:
    commands = re.findall(r"^countermark (.*?)(?:\s+#.*)?$", PAGE, re.M)
    assert len(commands) == 2
    for command in commands:
        _parser().parse_args(command.split())


def test_every_parameter_has_its_row() -> None:
    rows = "\n".join(line.split("|")[1] for line in SECTIONS["Parameters"].splitlines() if line.startswith("|"))
    named = set(re.findall(r"`([a-z_]+)", rows))
    for name in (*_SAMPLING, *NEUTRAL, "max_tokens", "stop", "logprobs", "response_format", "stream", "messages"):
        assert name in named, name


def test_statuses_and_types() -> None:
    text = SECTIONS["Errors"]
    for status in {*spoken._HTTP.values(), 400, 429, 502, 503}:
        assert str(status) in text, status
    for kind in ("invalid_request_error", "authentication_error", "rate_limit_error", "verification_error"):
        assert f"`{kind}`" in text


def test_headers() -> None:
    for name in re.findall(r"x-countermark-[a-z]+", _EXPOSED):
        assert f"| `{name}` |" in PAGE


def test_caps() -> None:
    limits, text = Limits(), SECTIONS["Who may ask"]
    assert f"{limits.connections:,} connections" in text
    assert f"headers of {limits.head_bytes // 1024} KiB within {limits.head_s:g} s" in text
    assert f"bodies of {limits.body_bytes >> 20} MiB within {limits.body_s:g} s" in text
    assert f"{limits.idle_s:g} s between requests, {limits.write_s:g} s to take" in text
    defaults = {field: Settings.__dataclass_fields__[field].default for field in ("streams", "timeout_s", "wait_s")}
    assert f"{defaults['streams']} answers at a time" in text
    assert f"{defaults['timeout_s']:g} s for an answer" in text
    assert f"(`--reattest` ({NodeLimits().reattest_s:g} s)"[1:] in PAGE
    assert f"after {NodeLimits().refused_s[0]:g} s at first" in PAGE
    assert f"up to {NodeLimits().refused_s[1] / 60:g} minutes" in PAGE


def test_links_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
