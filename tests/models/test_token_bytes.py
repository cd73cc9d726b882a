"""Any bytes can be written in any supported tokenizer, and come back."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from roro_fast.errors import ConfigError
from roro_fast.models import nano_tokenizer
from roro_fast.models.token_bytes import TokenBytes
from tests.two_tokenizers import byte_fallback, byte_level

MAKERS = {"byte-level": byte_level, "byte-fallback": byte_fallback}
TEXTS = [
    "So 3 + 4 = 7.\n\n",
    " leading and trailing ",
    "\n\n\n  x",
    "naïve café 東京 🙂🙃 e\u0301",
    "a ▁ that is no space",
    "<|end|><eos><bos><pad><unk><think></think><0x0A>",
    "",
]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_and_no_control_token_is_made(kind: str, text: str) -> None:
    tok = MAKERS[kind]()
    codec = TokenBytes(tok)
    ids = codec.encode(text.encode())
    assert codec.decode(ids) == text.encode()
    assert not set(ids) & set(tok.all_special_ids)


@pytest.mark.parametrize("kind", MAKERS)
@given(data=st.binary(max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_bytes_come_back(kind: str, data: bytes) -> None:
    codec = TokenBytes(MAKERS[kind]())
    assert codec.decode(codec.encode(data)) == data


@pytest.mark.parametrize("kind", MAKERS)
def test_ordinary_text_gets_the_tokenizers_own_ids(kind: str) -> None:
    tok = MAKERS[kind]()
    for text in ("So 3 + 4 = 7.\n\n", "The answer is 42 €.", "<think>\nLet us"):
        assert TokenBytes(tok).encode(text.encode()) == tok(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", MAKERS)
def test_bytes_of_ids_are_what_the_tokenizer_decodes(kind: str) -> None:
    tok, draw = MAKERS[kind](), random.Random(0)
    codec = TokenBytes(tok)
    seen_broken = False
    for _ in range(200):
        ids = [draw.randrange(len(tok)) for _ in range(draw.randrange(1, 12))]
        mine = codec.decode(ids)
        theirs = tok.backend_tokenizer.decode(ids, skip_special_tokens=True)
        try:
            assert mine.decode() == theirs
        except UnicodeDecodeError:
            seen_broken = True
            # byte fallback replaces a whole run of bytes where one of them is wrong
            assert kind == "byte-fallback" or mine.decode(errors="replace") == theirs
    assert seen_broken


def test_a_character_may_be_cut_anywhere() -> None:
    whole = "€🙂".encode()
    for tok in (byte_level(), byte_fallback()):
        codec = TokenBytes(tok)
        for cut in range(len(whole) + 1):
            both = codec.encode(whole[:cut]) + codec.encode(whole[cut:])
            assert codec.decode(both) == whole
            assert tok.decode(both) == "€🙂"


def test_what_changes_a_text_is_left_out() -> None:
    tok = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    tok.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tok.enable_truncation(3)
    codec = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=tok))
    text = "The Answer is e\u0301"
    assert codec.decode(codec.encode(text.encode())).decode() == text
    assert max(codec.encode(b" The answer")) > 258, "spelled byte by byte"


def test_silent_ids_and_ids_past_the_vocabulary_say_nothing() -> None:
    tok = byte_level()
    a = tok("a", add_special_tokens=False)["input_ids"]
    assert TokenBytes(tok).decode([*a, tok.eos_token_id, 10**6, *a]) == b"aa"
    assert TokenBytes(tok, silent=a).decode(tok("xa", add_special_tokens=False)["input_ids"]) in (b"x", b"xa")


def test_other_kinds_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="reader: .*byte"):
        TokenBytes(nano_tokenizer.build(), name="reader")
    spec = byte_fallback().backend_tokenizer.to_str().replace("<0x41>", "<0xZZ>")
    with pytest.raises(ConfigError, match="0x41"):
        TokenBytes(Tokenizer.from_str(spec))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_byte_without_a_token_becomes_the_replacement_character(kind: str) -> None:
    """As in SmolLM2's vocabulary, which lacks control characters and bytes that no text has."""
    spec = json.loads(MAKERS[kind]().backend_tokenizer.to_str())
    vocabulary = spec["model"]["vocab"]
    letters = {4: ("\u0104", "<0x04>"), 0xF1: ("\u00f1", "<0xF1>"), 0xC0: ("\u00c0", "<0xC0>")}
    for letter in letters.values():
        vocabulary[f"gone{letter[0]}"] = vocabulary.pop(letter[kind == "byte-fallback"])
    codec = TokenBytes(Tokenizer.from_str(json.dumps(spec)))
    assert codec.decode(codec.encode(b"x\x04 = 7\xc0\xc3")) == b"x\xef\xbf\xbd = 7\xef\xbf\xbd\xc3"
    assert codec.encode(b"The answer\x04")[:2] == codec.encode(b"The answer")[:2]
    assert b"\xef\xbf\xbd\x80" in codec.decode(codec.encode("\U00040000 é".encode()))
