"""`countermark chat`: one prompt, or a conversation at the terminal; every answer is checked before the next turn.

A conversation is the client's: each turn sends all of it, and each receipt is over all of it. A turn that failed is
taken out again. When the connection ends, the next turn makes a new one, which is appraised like the first and said so.
What is typed is kept in memory for the arrow keys, never in a file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from countermark import arguments, endorsements_cli, terminal
from countermark.errors import CountermarkError, RequestError, Unavailable, UsageError
from countermark.files import read_file
from countermark.options import GenerateOptions
from countermark.policy import load_policy
from countermark.session import Answer, Session, connect

MAX_SCHEMA_BYTES: Final = 64 * 1024
_EXAMPLES: Final = """examples:
  countermark chat 127.0.0.1:9443 --policy policy.toml --bundle answer.cmk "Why is the sky blue?"
  countermark chat 127.0.0.1:9443 --policy policy.toml                      a conversation, when at a terminal
  countermark chat 127.0.0.1:9443 --policy policy.toml --json < prompt.txt  the prompt from a file"""
_HELP: Final = """/save FILE  the last answer with its proof   /checks  what was verified of it
/verdict  what the node proved   /new  forget the conversation   /quit or Ctrl-D   Ctrl-C stops an answer"""


def add_command(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `chat`. `command(commands, name, run, text, json_=..., examples=...)` makes one parser."""
    chat = command(
        commands, "chat", _chat, "send a prompt and print the checked answer", json_=True, examples=_EXAMPLES
    )
    chat.add_argument("address", metavar="HOST:PORT")
    chat.add_argument("prompt", nargs="?", help="default: read from stdin; at a terminal, a conversation")
    chat.add_argument("--policy", type=Path, required=True, help="what to accept; see `countermark policy`")
    chat.add_argument("--system", help="system message")
    chat.add_argument("--max-tokens", type=int, help="at most so many (default: the node's)")
    chat.add_argument("--temperature", type=float, help="0 is greedy (default)")
    chat.add_argument("--top-k", type=int, help="only the K likeliest")
    chat.add_argument("--top-p", type=float, help="only the likeliest that make up this share")
    chat.add_argument("--min-p", type=float, help="only what has this share of the likeliest one's")
    chat.add_argument("--seed", type=int, help="drawn by the node, and recorded, when absent")
    chat.add_argument("--stop", action="append", default=[], help="stop string; may be repeated")
    grammar = chat.add_mutually_exclusive_group()
    grammar.add_argument("--json-schema", type=Path, metavar="FILE", help="the answer must fit this JSON schema")
    grammar.add_argument("--regex", metavar="RE", help="the answer must match this regular expression")
    chat.add_argument(
        "--value",
        action="append",
        default=[],
        type=arguments.pair,
        metavar="NAME=TEXT",
        help="what the chat template would take from a clock, such as date_string; may be repeated",
    )
    chat.add_argument("--bundle", type=Path, help="save the answer with its proof to this file")
    chat.add_argument("--manifest", type=Path, help="signed measurement manifest to put into the bundle")
    arguments.add_key(chat)
    endorsements_cli.add_options(chat)


def _chat(args: argparse.Namespace) -> None:
    policy = load_policy(args.policy)
    manifest = read_file(args.manifest) if args.manifest else None
    talk = args.prompt is None and sys.stdin.isatty() and not args.json
    if talk and args.bundle is not None:
        raise UsageError("--bundle: expected a prompt beside it; in a conversation, /save FILE", code="usage.bundle")
    if manifest is not None and args.bundle is None and not talk:
        raise UsageError("--manifest: expected --bundle beside it, got none", code="usage.bundle")
    if args.bundle is not None and (args.bundle.is_dir() or not os.access(args.bundle.absolute().parent, os.W_OK)):
        raise UsageError(f"--bundle: expected a file in a folder we may write to, got {args.bundle}", code="usage.file")
    options = _options(args)

    key = arguments.key(args)

    def open_session() -> Session:
        session = connect(args.address, policy, endorsements=endorsements_cli.chosen(args), key=key)
        show_session(session)
        return session

    turns = [("system", args.system)] if args.system else []
    if talk:
        _Conversation(open_session, turns, options, manifest).run()
        return
    try:
        prompt = sys.stdin.read() if args.prompt is None else args.prompt
    except UnicodeDecodeError as err:
        raise RequestError("prompt: expected text on stdin", code="request.input") from err
    with open_session() as session:
        answer = _ask(session, [*turns, ("user", prompt)], options, show=not args.json)
    _show_receipt(answer)
    if args.bundle:
        answer.save(args.bundle, manifest=manifest)
        terminal.note(f"bundle: {args.bundle}")
    if args.json:
        found = {"answer": answer.text, "bundle": str(args.bundle or ""), "verdict": answer.verdict.as_json()}
        print(json.dumps(found))


def show_session(session: Session) -> None:
    """What a node proved, check by check, the banner first where nothing was."""
    if session.verdict.simulated:
        terminal.show_simulated()
    terminal.show_checks(session.witnessed.checks)


def _options(args: argparse.Namespace) -> GenerateOptions:
    options = GenerateOptions(
        max_tokens=args.max_tokens,
        stop=tuple(args.stop),
        values=dict(args.value),
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        regex=args.regex,
    )
    if args.json_schema is not None:
        try:
            options["json_schema"] = read_file(args.json_schema, max_bytes=MAX_SCHEMA_BYTES).decode()
        except UnicodeDecodeError as err:
            raise RequestError(f"--json-schema: expected text in {args.json_schema}", code="request.grammar") from err
    return options


def _ask(session: Session, turns: list[tuple[str, str]], options: GenerateOptions, *, show: bool) -> Answer:
    asked = options.copy()
    asked["messages"] = turns
    stream = session.generate(**asked)
    try:
        for text in stream:
            if show:
                terminal.write_text(text)
    except BaseException:
        stream.cancel()
        if show:
            print(flush=True)
        raise
    if show:
        print(flush=True)
    return stream.result()


def _show_receipt(answer: Answer) -> None:
    terminal.show_checks(answer.receipt.checks[len(answer.verdict.checks) :])


class _Conversation:
    """The prompt at a terminal, its commands, and what was said so far."""

    def __init__(
        self,
        open_session: Callable[[], Session],
        turns: list[tuple[str, str]],
        options: GenerateOptions,
        manifest: bytes | None,
    ) -> None:
        self._open = open_session
        self._begin = turns
        self._turns = list(turns)
        self._options = options
        self._manifest = manifest
        self._answer: Answer | None = None
        with contextlib.suppress(ImportError):  # line editing and history, where Python was built with it
            import readline  # noqa: F401, PLC0415  its import changes `input`

    def run(self) -> None:
        """Until /quit, Ctrl-D, or evidence that is refused."""
        session = self._open()
        terminal.note(_HELP)
        try:
            while (line := self._read(session)) is not None:
                if line.startswith("/"):
                    if not self._command(line, session):
                        return
                elif line:
                    if session.is_over:
                        terminal.note("the connection has ended: connecting, and appraising, again")
                        session.close()
                        session = self._open()
                    self._turn(session, line)
        finally:
            session.close()

    def _read(self, session: Session) -> str | None:
        verdict = session.verdict
        kind = "SIMULATED" if verdict.simulated else verdict.platform.value
        try:
            return input(f"{kind} {len(verdict.checks)} checks, TCB {verdict.tcb_status}> ").strip()
        except KeyboardInterrupt:
            print()
            return ""
        except EOFError:
            print()
            return None

    def _turn(self, session: Session, text: str) -> None:
        turns = [*self._turns, ("user", text)]
        try:
            answer = _ask(session, turns, self._options, show=True)
        except KeyboardInterrupt:
            terminal.note("stopped: the node records that; nothing of this answer was verified")
            return
        except (RequestError, Unavailable) as err:  # what was refused otherwise ends the conversation
            terminal.show_error(err, explain=True)
            return
        self._turns, self._answer = [*turns, ("assistant", answer.text)], answer
        checks = len(answer.receipt.checks) - len(answer.verdict.checks)
        leaf = answer.receipt.accepted.acceptance.leaf_index
        terminal.note(f"verified: {checks} checks of the receipt, leaf {leaf} of the log")

    def _command(self, line: str, session: Session) -> bool:
        """False to end."""
        try:
            name, *values = shlex.split(line)
        except ValueError:
            name, values = line, []
        match name, values:
            case "/quit" | "/exit", []:
                return False
            case "/new", []:
                self._turns, self._answer = list(self._begin), None
                terminal.note("forgotten: the next prompt is the first")
            case "/verdict", []:
                show_session(session)
            case "/checks", [] if self._answer is not None:
                _show_receipt(self._answer)
            case "/save", [path] if self._answer is not None:
                try:
                    terminal.note(f"bundle: {self._answer.save(path, manifest=self._manifest)}")
                except CountermarkError as err:
                    terminal.show_error(err)
            case ("/save", [_]) | ("/checks", []):
                terminal.note("no answer yet")
            case _:
                terminal.note(_HELP)
        return True
