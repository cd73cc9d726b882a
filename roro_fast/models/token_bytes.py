"""A tokenizer as bytes: what its ids stand for, and ids that stand for any bytes, so that nothing is lost on the way.

Models of different tokenizers can write one text only if each can be told, byte for byte, what the other wrote: half a
character, text that looks like a control token, and spaces that a tokenizer would rather normalise included.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from roro_fast.errors import ConfigError
from roro_fast.models.delimiter import special_ids

_SPACE = "▁"  # SentencePiece's letter for a space; a text that holds one itself can only be spelled
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_STRAY = "\udc80-\udcff"  # what is not UTF-8, as `surrogateescape` decodes it
_NEEDED = {0x0A, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1)}  # bytes of ordinary text
_UNKNOWN = "\ufffd".encode()


class TokenBytes:
    """Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2), and BPE with byte fallback (Gemma, Mistral, Llama 2).

    Control tokens, `silent` ones and ids past the vocabulary stand for no bytes. `encode` never gives a control token,
    puts no space or BOS in front and does not normalise: `decode(encode(data)) == data`, except that a byte without a
    token becomes U+FFFD; that may be so of control characters and of bytes that are no text (SmolLM2 lacks 21).

    Raises:
        ConfigError: the tokenizer is of another kind, or lacks a token for a byte of text. `name` says whose it is.
    """

    def __init__(self, tokenizer: Any, silent: Iterable[int] = (), name: str = "tokenizer") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(backend, "to_str"):
            raise ConfigError(f"{name}: has no tokenizer.json, so its text cannot be handed to another tokenizer")
        spec = json.loads(backend.to_str())
        kinds = _types(spec.get("decoder"))
        added = {a["id"]: a["content"] for a in spec["added_tokens"]}
        self._silent = special_ids(tokenizer) | frozenset(silent)
        if "ByteLevel" in kinds:
            apart = ""
            spelled = {letter: bytes([b]) for b, letter in _letters().items()}
            single = {bytes([b]): letter for b, letter in _letters().items()}
        elif "ByteFallback" in kinds:
            apart = _SPACE
            spelled, single = {}, {bytes([b]): f"<0x{b:02X}>" for b in range(256)}
        else:
            raise ConfigError(
                f"{name}: its text cannot be handed over byte for byte; models of different tokenizers can share a "
                "pool if each is byte-level BPE or BPE with byte fallback"
            )
        self._bytes: dict[int, bytes] = {}
        for token, i in tokenizer.get_vocab().items():
            if i not in self._silent:
                self._bytes[i] = added[i].encode() if i in added else _spell(token, spelled)
        vocabulary = spec["model"]["vocab"]
        missing = {b[0] for b, token in single.items() if token not in vocabulary}
        if lacking := missing & _NEEDED:
            raise ConfigError(
                f"{name}: has no token for byte 0x{min(lacking):02X}; it cannot share a text with another"
            )
        own = {b[0]: vocabulary[token] for b, token in single.items() if b[0] not in missing}
        self._bytes |= {i: bytes([b]) for b, i in own.items()}
        unknown = [own[b] for b in _UNKNOWN]
        self._single = [[own[b]] if b in own else unknown for b in range(256)]
        controls = "".join(re.escape(chr(b)) for b in sorted(missing) if b < 0x80)
        self._apart = re.compile(f"([{_STRAY}{apart}{controls}]+)")
        self._encoder = _plain(spec)

    def decode(self, ids: Iterable[int]) -> bytes:
        table = self._bytes
        return b"".join([table.get(i, b"") for i in ids])

    def encode(self, data: bytes) -> list[int]:
        out: list[int] = []
        for i, piece in enumerate(self._apart.split(data.decode("utf-8", "surrogateescape"))):
            raw = piece.encode("utf-8", "surrogateescape")
            ids = [] if i % 2 else self._encoder.encode(piece, add_special_tokens=False).ids
            out += ids if self.decode(ids) == raw else [i for b in raw for i in self._single[b]]
        return out


def _letters() -> dict[int, str]:
    """The printable letter that byte-level tokenizers write for each byte (Radford et al. 2019, `bytes_to_unicode`)."""
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    hidden = [b for b in range(256) if b not in set(shown)]
    letters = {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(hidden)}
    assert set(letters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return letters


def _spell(token: str, letters: dict[str, bytes]) -> bytes:
    if letters:  # a token with a letter from outside the alphabet stands for itself
        return b"".join(letters[c] for c in token) if all(c in letters for c in token) else token.encode()
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()


def _types(part: Any) -> set[str]:
    """Types of a decoder and of all parts it is made of."""
    if isinstance(part, dict):
        return {str(part.get("type"))}.union(*map(_types, part.values()))
    return set().union(*map(_types, part)) if isinstance(part, list) else set()


def _plain(spec: dict[str, Any]) -> Tokenizer:
    """The tokenizer without what changes a text: normal forms, a space or BOS in front, truncation."""
    kept = {**spec, "post_processor": None, "truncation": None, "padding": None}
    kept["normalizer"] = _keep(spec.get("normalizer"), ("Replace",))
    kept["pre_tokenizer"] = _no_space_in_front(spec.get("pre_tokenizer"))
    out = Tokenizer.from_str(json.dumps(kept))
    out.encode_special_tokens = True
    return out


def _keep(normalizer: Any, allowed: Sequence[str]) -> Any:
    if not normalizer:
        return None
    if normalizer["type"] == "Sequence":
        parts = [p for p in (_keep(n, allowed) for n in normalizer["normalizers"]) if p]
        return {"type": "Sequence", "normalizers": parts} if parts else None
    return normalizer if normalizer["type"] in allowed else None


def _no_space_in_front(part: Any) -> Any:
    if isinstance(part, list):
        return [_no_space_in_front(p) for p in part]
    if not isinstance(part, dict):
        return part
    out = {k: _no_space_in_front(v) for k, v in part.items()}
    if "add_prefix_space" in out:
        out["add_prefix_space"] = False
    if "prepend_scheme" in out:
        out["prepend_scheme"] = "never"
    return out
