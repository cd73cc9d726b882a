from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from roro_fast.errors import ConfigError
from roro_fast.models import nano_tokenizer
from roro_fast.tasks.base import Query
from roro_fast.tasks.ledger import Ledger
from roro_fast.tasks.prompting import INSTRUCTION, Prompt, encode_prompt, encode_prompts
from tests.two_tokenizers import byte_fallback

QUERY = Query("q", "What is 1 + 1?", "2", "gsm8k")
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def plain():
    """A byte-level tokenizer that adds <bos> to everything unless told not to."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(["<bos>", "<eos>"])
    tok.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", tok.token_to_id("<bos>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture
def chat(plain):
    tok = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer, bos_token="<bos>", eos_token="<eos>")
    tok.chat_template = TEMPLATE
    return tok


def opened(tok, opening):
    out = PreTrainedTokenizerFast(tokenizer_object=tok.backend_tokenizer, bos_token="<bos>", eos_token="<eos>")
    out.chat_template = TEMPLATE.replace("'<|assistant|>'", f"'<|assistant|>{opening}'")
    return out


def test_a_pool_of_tokenizers_gets_a_prompt_each(plain, chat):
    ids = encode_prompts([chat, plain, byte_fallback()], QUERY, instruction="", system="S")
    assert isinstance(ids, Prompt) and len(ids.others) == 2
    assert ids == encode_prompt(chat, QUERY, instruction="", system="S")
    assert plain.decode(ids.others[0][1:]) == byte_fallback().decode(ids.others[1][1:]) == "S\n\nWhat is 1 + 1?\n\n"
    assert ids.others[1][0] == byte_fallback().bos_token_id
    ledger = Ledger().queries("test", 1)[0]
    assert plain.decode(encode_prompts([chat, plain], ledger, instruction="x").others[0]) == ledger.prompt


def test_all_begin_inside_the_thought_that_one_template_opens(plain, chat):
    r1 = opened(plain, "<think>\\n")
    ids = encode_prompts([chat, r1, opened(plain, "<think>\\n\\n</think>")], QUERY, instruction="")
    texts = [chat.decode(p) for p in (ids, *ids.others)]
    assert texts[0].endswith("<|assistant|><think>\n") and texts[1].endswith("<|assistant|><think>\n")
    assert texts[2].endswith("</think><think>\n")
    assert not chat.decode(encode_prompts([chat, chat], QUERY)).endswith("<think>\n")


def test_a_chat_variable_goes_to_the_templates_that_read_it(plain, chat):
    switch = opened(plain, "' + ('x' if enable_thinking else 'y') + '")
    for value, end in ((True, "x"), (False, "y")):
        ids = encode_prompts([chat, switch], QUERY, chat={"enable_thinking": value})
        assert chat.decode(ids).endswith("<|assistant|>") and chat.decode(ids.others[0]).endswith(end)
    with pytest.raises(ConfigError, match=r"task\.chat\.nonsense: .*does not read it"):
        encode_prompts([chat, switch], QUERY, chat={"nonsense": 1})


def test_ledger_prompts_are_bare(plain, chat, tmp_path):
    from transformers import AutoTokenizer

    query = Ledger().queries("test", 1)[0]
    backend = nano_tokenizer.build()
    want = backend.encode(query.prompt).ids
    nano_tokenizer.save(tmp_path)
    nano = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        encode_prompt(backend, query)
        == encode_prompt(nano, query, system="x")
        == nano(query.prompt)["input_ids"]
        == want
    )
    for tok in (plain, chat):
        ids = encode_prompt(tok, query, system="be brief", few_shot=[("a", "b")])
        assert tok.decode(ids) == query.prompt and tok.bos_token_id not in ids


def test_plain_text_begins_as_the_tokenizer_begins_any_text(plain):
    bos, *ids = encode_prompt(plain, QUERY)
    assert plain.decode(ids) == f"What is 1 + 1?\n\n{INSTRUCTION}\n\n"
    assert bos == plain.bos_token_id and bos not in ids
    assert encode_prompt(plain.backend_tokenizer, QUERY) == ids
    text = plain.decode(encode_prompt(plain, QUERY, system="S", instruction="", few_shot=[("p", "s")])[1:])
    assert text == "S\n\np\n\ns\n\nWhat is 1 + 1?\n\n"


def test_the_chat_template_is_applied_once(chat):
    text = chat.decode(encode_prompt(chat, QUERY, instruction=""))
    assert text == "<|user|>What is 1 + 1?<eos><|assistant|>"
    ids = encode_prompt(chat, QUERY, system="S", instruction="I", few_shot=[("p", "s")])
    assert chat.decode(ids) == (
        "<|system|>S<eos><|user|>p\n\nI<eos><|assistant|>s<eos><|user|>What is 1 + 1?\n\nI<eos><|assistant|>"
    )
    assert ids.count(chat.eos_token_id) == 4 and chat.bos_token_id not in ids
    assert all(type(i) is int for i in ids)


def test_a_template_that_refuses_names_the_field(chat):
    chat.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ConfigError, match="prompt: .*no system role.*drop prompt.system"):
        encode_prompt(chat, QUERY, system="S")


def test_template_variables_are_passed_and_unknown_ones_refused(chat, plain):
    from tests import chat as tiny

    tok = tiny.tokenizer()
    text = tok.decode(encode_prompt(tok, QUERY, instruction="", chat={"enable_thinking": False}))
    assert text == "<|user|>What is 1 + 1?<eos><|assistant|><think>\n\n</think>\n\n"
    thinking = tok.decode(encode_prompt(tok, QUERY, instruction="", chat={"enable_thinking": True}))
    assert thinking == "<|user|>What is 1 + 1?<eos><|assistant|>" and thinking in text
    with pytest.raises(ConfigError, match=r"task\.chat\.enable_thinking: .*does not read it"):
        encode_prompt(chat, QUERY, chat={"enable_thinking": False})
    with pytest.raises(ConfigError, match=r"task\.chat\.enable_thinking: .*is missing"):
        encode_prompt(plain, QUERY, chat={"enable_thinking": False})
    with pytest.raises(ConfigError, match=r"task\.chat\.add_generation_prompt: is an argument of the tokenizer"):
        encode_prompt(tok, QUERY, chat={"add_generation_prompt": False})
    ledger = Ledger().queries("test", 1)[0]
    assert tok.decode(encode_prompt(tok, ledger, chat={"nonsense": 1})) == ledger.prompt
