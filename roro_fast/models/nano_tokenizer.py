"""The tokenizer of the nano tier: one token per word, number and line mark, as a real `tokenizers` file.

Words carry their leading space, as in byte-level BPE, so decoding is plain concatenation and encode/decode round-trips
for every text the ledger task and the rubric grammar can produce.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from roro_fast.tasks import ledger

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
PUNCTUATION = ("\n\n", "\n", " ", "'s", ":", ".", "?", ",", "-", "=", ";")
RUBRIC_TAGS = ("[Hard Rule]", "[Principle]", "(timely escalation)", "(effective recovery)", "(efficient allocation)")
RUBRIC_WORDS = (
    "Rubric", "Query", "Trajectory", "Verdict", "Judge", "the", "a", "no", "small", "medium", "large", "model",
    "models", "writes", "line", "lines", "every", "first", "last", "after", "before", "until", "takes", "over",
    "at", "most", "least", "switch", "switches", "cost", "true", "false", "yes", "only", "right", "when", "is",
    "are", "and", "or", "not", "with", "share", "percent", "total", "back", "to", "of",
)  # fmt: skip
_PATTERN = r"\n\n|\n|'s|\[[A-Za-z ]+\]|\([A-Za-z ]+\)| ?#\d+| ?\d+| ?[A-Za-z]+|[^\s\w]| "


def vocabulary() -> list[str]:
    """All tokens in id order."""
    words = ["ledger", "of", "starts", "at", "gives", "Total", *ledger.ITEMS, *ledger.KIND_OF_VERB, *RUBRIC_WORDS]
    spaced = [f" {w}" for w in dict.fromkeys(words)]
    numbers = [f" {i}" for i in range(ledger.MODULUS + 1)]
    marks = [f" #{i}" for i in range(ledger.MAX_LINES + 2)]
    heads = ["Rubric", "Query", "Trajectory", "Verdict"]
    return list(dict.fromkeys([*SPECIAL, *PUNCTUATION, *numbers, *marks, *ledger.NAMES, *spaced, *RUBRIC_TAGS, *heads]))


def build() -> Tokenizer:
    vocab = {t: i for i, t in enumerate(vocabulary())}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated")
    tok.decoder = decoders.Fuse()
    tok.add_special_tokens(list(SPECIAL))
    return tok


def save(directory: str | Path) -> None:
    """Write tokenizer.json and its config so that `AutoTokenizer.from_pretrained(directory)` loads it."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=build(),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.save_pretrained(directory)
