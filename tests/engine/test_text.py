"""Streaming text: against decoding everything at once, and against searching the whole text for stop strings."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from countermark_appliance.engine.text import TextStream


def stream(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[str, bool]:
    text = TextStream(stop)
    out = ""
    for piece in pieces:
        out += text.push(piece)
        if text.stopped:
            break
    return out + text.finish(), text.stopped


@given(st.lists(st.binary(max_size=6), max_size=12))
def test_any_cut_gives_the_text_of_the_whole(pieces: list[bytes]) -> None:
    assert stream(pieces)[0] == b"".join(pieces).decode(errors="replace")


@given(st.text(max_size=20), st.integers(1, 3))
def test_nothing_is_released_that_could_change(text: str, size: int) -> None:
    data = text.encode()
    out, live = "", TextStream(())
    for i in range(0, len(data), size):
        out += live.push(data[i : i + size])
        assert text.startswith(out)
    assert out + live.finish() == text


@given(
    st.text(alphabet="abc", max_size=30),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_one_character_at_a_time(text: str, stops: list[str]) -> None:
    out, stopped = stream([c.encode() for c in text], tuple(stops))
    # The first moment a stop string is complete, it ends there; the longest one complete then begins earliest.
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stops)]
    if not ends:
        assert (out, stopped) == (text, False)
    else:
        seen = text[: ends[0]]
        assert (out, stopped) == (seen[: min(seen.index(s) for s in stops if s in seen)], True)


@given(st.lists(st.text(alphabet="ab", max_size=5), max_size=8), st.text(alphabet="ab", min_size=1, max_size=5))
def test_one_stop_string_over_any_tokens_ends_the_text_before_it(pieces: list[str], stop: str) -> None:
    whole = "".join(pieces)
    out, stopped = stream([p.encode() for p in pieces], (stop,))
    assert stopped == (stop in whole)
    assert out == whole.split(stop)[0]


def test_a_tail_that_may_become_a_stop_string_is_held_back() -> None:
    text = TextStream(("STOP",))
    assert [text.push(p) for p in (b"go S", b"TO", b"X ST", b"OP more")] == ["go ", "", "STOX ", ""]
    assert text.stopped
    assert text.push(b"later") == ""
    assert text.finish() == ""


def test_a_stop_string_that_never_completes_is_released_at_the_end() -> None:
    text = TextStream(("STOP",))
    assert text.push(b"STO") == ""
    assert text.finish() == "STO"


def test_a_stop_string_may_split_a_multi_byte_character() -> None:
    text = TextStream(("né",))
    assert [text.push(p) for p in (b"a", b"n", b"\xc3", b"\xa9")] == ["a", "", "", ""]
    assert text.stopped
