"""Text that comes in pieces is the text that comes at once, with no half characters on the way."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qoqc.serve.http.text import UNKNOWN, Detokenizer, StopScanner

WORDS = "naïve café 東京 🙂👩‍👩‍👧 ß a\u0301 end"


@pytest.fixture(scope="module")
def bytewise() -> Any:
    """A tokenizer whose tokens are single bytes: every character beyond ASCII is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="module")
def sentencepiece_like() -> Any:
    """Llama-2's kind: words with a mark for the space before them, and bytes as a fallback."""
    pieces = ["<unk>", "\u2581once", "\u2581a", "\u2581time", "s", "\u2581"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = [(piece, -1.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def pieces_of(tokenizer: Any, ids: list[int], sizes: list[int]) -> list[str]:
    """What a stream shows when tokens come in deliveries of these sizes, over and over."""
    detokenizer = Detokenizer(tokenizer)
    pieces, at, turn = [], 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        pieces.append(detokenizer.push(ids[at : at + size]))
        at, turn = at + size, turn + 1
    return [*pieces, detokenizer.finish()]


def whole(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def test_characters_come_whole(bytewise: Any) -> None:
    ids = bytewise(WORDS)["input_ids"]
    assert len(ids) == len(WORDS.encode())
    pieces = pieces_of(bytewise, ids, [1])
    assert "".join(pieces) == WORDS
    assert all(UNKNOWN not in piece for piece in pieces)
    # and as early as they can: nothing is left for the end
    assert pieces[-1] == "" and pieces[0] == "n"


@pytest.mark.parametrize("name", ["bytewise", "bundled"])
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_pieces_join_to_the_whole(
    request: pytest.FixtureRequest, name: str, seed: int, sizes: list[int]
) -> None:
    """Random tokens, most of them no valid UTF-8, in random deliveries."""
    found = request.getfixturevalue(name)
    tokenizer = found[1] if name == "bundled" else found
    rng = random.Random(seed)
    ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(40))]
    assert "".join(pieces_of(tokenizer, ids, sizes)) == whole(tokenizer, ids)


def spelled(tokenizer: Any, text: str) -> list[int]:
    """The tokens of the bytes of a text."""
    ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in text.encode()])
    return [int(token) for token in ids]


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.one_of(st.text(max_size=4), st.integers(1, 5)), max_size=10),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
)
def test_fallback_bytes_join_to_the_whole(
    sentencepiece_like: Any, parts: list[str | int], sizes: list[int]
) -> None:
    """Characters spelled in bytes, between words."""
    spelling = [
        spelled(sentencepiece_like, part.replace(UNKNOWN, "")) if isinstance(part, str) else [part]
        for part in parts
    ]
    ids = [token for tokens in spelling for token in tokens]
    joined = "".join(pieces_of(sentencepiece_like, ids, sizes))
    assert joined == whole(sentencepiece_like, ids)


def test_a_wrong_byte_does_not_take_back_characters(sentencepiece_like: Any) -> None:
    wrong = spelled(sentencepiece_like, "ß")[:1]
    ids = [1, *spelled(sentencepiece_like, "東"), *wrong, 2]
    assert whole(sentencepiece_like, ids) == f"once{4 * UNKNOWN} a"  # what the decoder makes of it
    assert "".join(pieces_of(sentencepiece_like, ids, [1])) == f"once東{UNKNOWN} a"


def test_a_space_before_a_character_in_parts_stays(sentencepiece_like: Any) -> None:
    """A run of bytes is no text until it is whole, and texts lose the space they begin with."""
    ids = spelled(sentencepiece_like, "0 \x80")
    assert pieces_of(sentencepiece_like, ids, [1, 2]) == ["0", "", " \x80", ""]


def test_text_that_is_cut_within_a_character_shows_so_at_the_end_only(bytewise: Any) -> None:
    ids = bytewise("a 🙂")["input_ids"][:-1]
    pieces = pieces_of(bytewise, ids, [1])
    assert pieces[-1] == UNKNOWN
    assert "".join(pieces[:-1]) == "a "


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_stop_strings_in_any_pieces(text: str, stops: list[str], cuts: list[int]) -> None:
    scanner = StopScanner(stops)
    shown, at, turn, stopped = "", 0, 0, False
    while at < len(text) and not stopped:
        size = cuts[turn % len(cuts)]
        piece, stopped = scanner.push(text[at : at + size])
        shown, at, turn = shown + piece, at + size, turn + 1
    # the first place at which a stop string is complete ends the text, whatever the pieces
    seen = text[:at]
    found = [seen.find(stop) for stop in stops if stop in seen]
    assert stopped == bool(found)
    if stopped:
        assert shown == seen[: min(found)]
    else:
        assert shown + scanner.finish() == text


def test_scanner_holds_back_no_more_than_it_must() -> None:
    scanner = StopScanner(["END"])
    assert scanner.push("the E") == ("the ", False)
    assert scanner.push("N") == ("", False)
    assert scanner.push("T") == ("ENT", False)
    assert StopScanner([]).push("END") == ("END", False)
