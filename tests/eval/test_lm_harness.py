"""The real lm-evaluation-harness on a tiny pool and local tasks: generation, stop strings, scoring, command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from roro_fast.errors import ConfigError
from roro_fast.models.token_bytes import TokenBytes
from tests import two_tokenizers
from tests.chat import save_pair

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed; pip install 'roro-fast[eval]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from roro_fast.eval.lm_harness import RoroLM  # noqa: E402

TASKS = {
    "tiny_generate": """
task: tiny_generate
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "tiny_choice": """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["one", "two"]
doc_to_target: 0
metric_list: [{metric: acc}]
""",
}
PROMPTS = ["What is one?", "Say two.", "abc"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


def model(pair, **changes) -> RoroLM:
    settings = "engine.kv_bytes=8MiB;engine.max_num_seqs=4"
    return RoroLM(**{"small": str(pair[0]), "large": str(pair[1]), "settings": settings, **changes})


@pytest.fixture(scope="module")
def large(pair) -> RoroLM:
    return model(pair)


def ask(lm: RoroLM, prompts=PROMPTS, **kwargs) -> list[str]:
    kinds = [Instance("generate_until", {}, (p, {"until": [], "max_gen_toks": 40, **kwargs}), 0) for p in prompts]
    return lm.generate_until(kinds)


def write_tasks(folder: Path) -> Path:
    data = folder / "data.json"
    rows = [{"question": p, "answer": "1"} for p in PROMPTS]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    return folder


def test_all_large_is_what_transformers_generates(pair, large):
    theirs = AutoModelForCausalLM.from_pretrained(pair[1]).float()
    for prompt, text in zip(PROMPTS, ask(large), strict=True):
        ids = torch.tensor([large.tok_encode(prompt)])
        out = theirs.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert text == large.tokenizer.decode(out, skip_special_tokens=True)


def test_stop_strings_end_an_answer_early_and_where_it_says(large):
    whole = ask(large)
    stop = whole[0][3:5]
    before = len(large.costs)
    cut = ask(large, until=[stop])
    assert cut == [t.partition(stop)[0] for t in whole] and len(cut[0]) <= 3
    spent = [
        sum(sum(c.generated_tokens) for c in part) for part in (large.costs[before - 3 : before], large.costs[before:])
    ]
    assert spent[1] < spent[0] - 15  # what would have been cut off was not written first
    assert not large.engine.has_work


def test_a_draft_that_is_thrown_away_stops_nothing(pair):
    """Every draft is rewritten here: what only the small model would have said must end no answer."""
    lm = model(pair, router="confidence:1.0")
    whole, drafts = ask(lm), ask(model(pair, router="all_small"))
    stop = next(c for d in drafts for c in d[:20] if not any(c in t for t in whole))
    assert ask(lm, until=[stop]) == whole
    assert all(c.discarded_tokens for c in lm.costs)
    stop = whole[1][2:4]
    assert ask(lm, until=[stop]) == [t.partition(stop)[0] for t in whole]


def test_sampling_is_seeded_and_repeats_differ(large):
    hot = {"do_sample": True, "temperature": 1.0}
    a, b = ask(large, ["abc", "abc"], **hot), ask(large, ["abc", "abc"], **hot)
    assert a == b and a[0] != a[1]
    assert ask(large, ["abc"], temperature=1.0, do_sample=False) == ask(large, ["abc"])


def test_a_router_writes_with_both_models(pair):
    lm = model(pair, router="random:0.5")
    ask(lm, [f"What is {i}?" for i in range(12)])
    info = lm.get_model_info()["roro"]
    assert 0 < info["large_share"] < 1 and info["answers"] == 12 and info["total_flops"] > info["generated_flops"] > 0
    other = model(pair, router="all_small")
    assert ask(other) != ask(model(pair)) and other.get_model_info()["roro"]["large_share"] == 0


def test_only_what_follows_the_thought_counts(large):
    lm = large
    lm.think_end_token = "</think>"
    try:
        assert lm._answer("a\n\nb") == "" and lm._answer("a\n\n</think>c\n\nd") == "c\n\nd"
    finally:
        lm.think_end_token = None


def test_the_template_gets_its_variables(pair):
    lm = model(pair, settings="task.chat.enable_thinking=false")
    text = lm.apply_chat_template([{"role": "user", "content": "x"}])
    assert text == "<|user|>x<eos><|assistant|><think>\n\n</think>\n\n"
    with pytest.raises(ConfigError, match=r"task\.chat\.enable_thought.*does not read it"):
        model(pair, settings="task.chat.enable_thought=false")


OPENS = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] <think>\\n' }}{% endif %}"
)


def test_each_model_of_two_tokenizers_gets_the_question_in_its_own_template(tmp_path):
    paths = two_tokenizers.save_pair(tmp_path, OPENS)
    turn = [{"role": "user", "content": "What is one?"}]
    for at, router in enumerate(("all_small", "all_large")):
        lm = model(paths, router=router)
        context = lm.apply_chat_template(turn)
        assert context == "[user] What is one?[assistant] <think>\n"
        told = ["<|user|>What is one?<|end|><|assistant|><think>\n", context]
        prompts = lm._prompt(context, 600), *lm._prompt(context, 600).others
        tok = lm.bench.tokenizers[at]
        assert list(prompts[at]) == tok(told[at])["input_ids"]
        theirs = AutoModelForCausalLM.from_pretrained(paths[at]).float()
        out = theirs.generate(torch.tensor([prompts[at]]), max_new_tokens=40, do_sample=False, pad_token_id=0)
        whole = TokenBytes(tok).decode(out[0, len(prompts[at]) :].tolist()).decode(errors="replace")
        assert ask(lm, [context]) == [whole]
        stop = whole[len(whole) // 2 :][:2]
        assert ask(lm, [context], until=[stop]) == [whole.partition(stop)[0]]
    assert ask(lm, [context]) != ask(model(paths, router="random:0.5"), PROMPTS[:1])
    ids = lm.tok_encode("abc")
    assert ids[0] == lm.tokenizer.bos_token_id == lm.prefix_token_id
    ((logprob, _),) = lm.loglikelihood([Instance("loglikelihood", {}, ("a", "bc"), 0)], disable_tqdm=True)
    with torch.no_grad():
        logp = theirs(torch.tensor([ids])).logits.log_softmax(-1)[0]
    n = len(ids) - len(lm.tok_encode("a"))
    want = sum(float(logp[i - 1, ids[i]]) for i in range(len(ids) - n, len(ids)))
    assert logprob == pytest.approx(want, abs=1e-3)
    with pytest.raises(ConfigError, match="control tokens.*--cache_requests"):
        ask(lm, ["What<eos>?"])


def test_log_likelihoods_are_the_large_models(pair, large):
    theirs = AutoModelForCausalLM.from_pretrained(pair[1]).float()
    pairs = [("What is one?", " two"), ("", "abc"), ("a", "b" * 30)]
    found = large.loglikelihood([Instance("loglikelihood", {}, p, 0) for p in pairs], disable_tqdm=True)
    for (context, target), (logprob, greedy) in zip(pairs, found, strict=True):
        before = large.tok_encode(context) or [large.prefix_token_id]
        ids = torch.tensor([before + large.tok_encode(target)])
        with torch.no_grad():
            logp = theirs(ids).logits.log_softmax(-1)[0, len(before) - 1 : -1]
        want = logp.gather(1, ids[0, len(before) :, None]).sum()
        assert logprob == pytest.approx(float(want), abs=1e-3)
        assert greedy == bool((logp.argmax(-1) == ids[0, len(before) :]).all())
    rolling = large.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("abc",), 0)])
    assert rolling == [pytest.approx(found[1][0], abs=1e-4)]
    long = "xyz" * 1500  # more than the context of 2048
    assert large.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (long,), 0)])[0] < -1000


def test_the_harness_runs_it(pair, tmp_path):
    manager = TaskManager(include_path=str(write_tasks(tmp_path)), include_defaults=False)
    args = {"small": str(pair[0]), "large": str(pair[1]), "router": "confidence:0.9"}
    out = lm_eval.simple_evaluate("roro", args, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    assert set(out["results"]) == set(TASKS) and out["config"]["roro"]["answers"] == len(PROMPTS)
    answers = [s["resps"][0][0] for s in out["samples"]["tiny_generate"]]
    assert answers == [t.partition("\n\n")[0] for t in ask(model(pair, router="confidence:0.9"), max_gen_toks=12)]


def test_the_command_line_knows_the_model(pair, tmp_path):
    command = [sys.executable, "-m", "roro_fast.eval.lm_harness", "run", "--model", "roro", "--model_args"]
    command += [f"small={pair[0]},large={pair[1]},router=all_large", "--tasks", "tiny_generate"]
    command += ["--include_path", str(write_tasks(tmp_path)), "--output_path", str(tmp_path / "out"), "--limit", "2"]
    env = {**os.environ, "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    result = json.loads(path.read_text())
    assert "exact_match,none" in result["results"]["tiny_generate"] and result["config"]["roro"]["answers"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"router": "nowhere"}, "router: 'nowhere' is no directory"),
        ({"router": "random:often"}, "needs a number"),
        ({"large": ""}, "give both models"),
        ({"settings": "engine.color=red"}, "engine.color"),
    ],
)
def test_bad_arguments_are_one_clear_error(pair, changes, words):
    with pytest.raises(ConfigError, match=words):
        model(pair, **changes)


def test_bad_generation_arguments_are_named(large):
    with pytest.raises(ConfigError, match=r"gen_kwargs\.num_beams: not supported"):
        ask(large, num_beams=4)
    with pytest.raises(ConfigError, match=r"gen_kwargs\.max_gen_toks: 9999 leaves no room"):
        ask(large, max_gen_toks=9999)
    assert not large.engine.has_work
