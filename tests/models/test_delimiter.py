from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from roro_fast.errors import ConfigError
from roro_fast.models import nano_tokenizer
from roro_fast.models.delimiter import delimiter_ids

BLANK = "\n\n"


def byte_level(tokens: list[str]) -> Tokenizer:
    """A byte-level vocabulary holding `tokens` whole, as GPT-2-style checkpoints store them."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {"".join(piece for piece, _ in spell.pre_tokenize_str(t)): i for i, t in enumerate(tokens)}
    tok = Tokenizer(models.WordLevel(vocab, unk_token=tokens[0]))
    tok.decoder = decoders.ByteLevel()
    return tok


def test_nano_has_one_blank_line_token():
    tok = nano_tokenizer.build()
    assert delimiter_ids(tok, BLANK) == {tok.token_to_id(BLANK)}


def test_transformers_and_tokenizers_agree(tmp_path):
    from transformers import AutoTokenizer

    nano_tokenizer.save(tmp_path)
    assert delimiter_ids(AutoTokenizer.from_pretrained(tmp_path), BLANK) == delimiter_ids(nano_tokenizer.build(), BLANK)


def test_every_token_that_contains_the_delimiter_counts():
    tok = byte_level(["x", "\n", "\n\n", ".\n\n", "\n\n  ", "\n\n\n", "\r\n", " \n", "é\n\n"])
    assert delimiter_ids(tok, BLANK) == {2, 3, 4, 5, 8}


def test_added_tokens_count_and_special_ones_do_not():
    tok = byte_level(["x", "\n"])
    tok.add_tokens(["\n\n"])
    tok.add_special_tokens(["<end>\n\n"])
    assert delimiter_ids(tok, BLANK) == {2}
    assert delimiter_ids(PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<end>\n\n"), BLANK) == {2}


@pytest.mark.parametrize("delimiter", ["", "\n\n\n\n\n\n", "<step>"])
def test_impossible_delimiter_names_the_field(delimiter):
    with pytest.raises(ConfigError, match=r"engine\.delimiter"):
        delimiter_ids(nano_tokenizer.build(), delimiter)
