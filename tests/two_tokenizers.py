"""Two small tokenizers that cut the same text differently: byte-level BPE, and BPE with byte fallback as Gemma has."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.tiny import save_random

TEXT = [
    "The answer is 12 + 30 = 42.\n\nSo x equals 42, and y is 7 more.\n\n",
    "Let us think.\n\n\nFirst we add 3 and 4:  3 + 4 = 7.\n\n  Then we stop.\n",
    "Prices: 5 €, 7 £, naïve café, 東京 and 🙂 🙂🙃.\n\nDone.\n",
] * 3
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@cache
def byte_level() -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|end|>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(TEXT, trainer)
    tok.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    out = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|end|>", pad_token="<pad>")
    out.chat_template = CHAT
    return out


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """Puts a BOS in front of a text, writes spaces as a letter, and knows few characters that are not ASCII."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=160, limit_alphabet=70, show_progress=False)
    trained.train_from_iterator(TEXT, trainer)
    spec = json.loads(trained.to_str())["model"]
    bytes_ = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256))]
    learnt = sorted(spec["vocab"], key=spec["vocab"].__getitem__)
    vocab = {t: i for i, t in enumerate(dict.fromkeys([*bytes_, *learnt]))}
    merges = [tuple(m) for m in spec["merges"]]
    tok = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tok.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    tok.add_tokens([AddedToken("\n\n", special=False, normalized=False)])
    tok.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
    )


def save_pair(root: Path, template: str = "", context: int = 640) -> tuple[Path, Path]:
    """(small, large) directories of random models, the small one's tokenizer byte-level; `template` is the large's."""
    out = []
    for name, tok, hidden in (("small", byte_level(), 16), ("large", byte_fallback(), 32)):
        tok.save_pretrained(root / name)
        if template and name == "large":
            (root / name / "chat_template.jinja").write_text(template)
        sizes = {"hidden": hidden, "layers": 1, "seed": hidden, "context": context}
        out.append(save_random(root / name, len(tok), tok.eos_token_id, **sizes))
    return out[0], out[1]
