"""Configs: presets load, overrides apply, and every bad key or value is refused by name with a fix."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from roro_fast.config import Config
from roro_fast.config_io import load_config, parse_size, presets, save_config
from roro_fast.errors import ConfigError
from roro_fast.eval.stages import check
from roro_fast.train.setup import Workbench


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_survives_a_save(name, tmp_path):
    config = load_config(name)
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize("name", [n for n in presets() if not n.startswith("qwen3")])  # whose questions are on the hub
def test_a_preset_asks_only_for_arms_that_its_task_can_give(name):
    pytest.importorskip("reasoning_gym")
    bench = Workbench(load_config(name, ["task.n_test=4", "task.n_calibrate=4"]))
    check(bench)
    with pytest.raises(ConfigError, match=r"eval\.arms: 'oracle' needs a task that verifies steps"):
        check(
            Workbench(
                load_config(bench.config, ["task.name=gym:gsm_symbolic", "eval.arms=[all_small, all_large, oracle]"])
            )
        )


def test_default_preset_is_nano_and_extends_reaches_the_child():
    assert load_config().run.name == "nano"
    study = load_config("nano_study")
    assert study.models == load_config("nano").models
    assert study.task.n_test > load_config("nano").task.n_test


def test_overrides_apply_in_order_and_are_typed():
    c = load_config(
        "nano", ["router.lr=1e-4", "router.steps=3", "router.steps=4", "collect.arms=[all_small, all_large]"]
    )
    assert (c.router.lr, c.router.steps, c.collect.arms) == (1e-4, 4, ["all_small", "all_large"])
    again = load_config(c, ["router.width=7"])
    assert again.router == dataclasses.replace(c.router, width=7)
    assert c.router.width != 7


def test_delimiter_keeps_its_line_breaks(tmp_path):
    assert load_config("nano", ['engine.delimiter="\\n"']).engine.delimiter == "\n"
    save_config(Config(), tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml").engine.delimiter == "\n\n"


@pytest.mark.parametrize(
    ("text", "size"),
    [("256MiB", 256 << 20), ("1.5GiB", 3 << 29), ("2k", 2000), ("7", 7), (9, 9), ("1 GB", 10**9), ("64kib", 65536)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("router.bta=0.1", ["router.bta", "router.beta"]),
        ("rotuer.beta=0.1", ["rotuer", "router"]),
        ("beta=0.1", ["beta", "did you mean router.beta"]),
        ("router.steps=many", ["router.steps", "int"]),
        ("router.steps=2.5", ["router.steps", "2.5"]),
        ("router.hidden=perhaps", ["router.hidden", "bool"]),
        ("router=3", ["router", "section"]),
        ("router.lr.x=3", ["router.lr", "sub-keys"]),
        ("router.lr=null", ["router.lr", "no value"]),
        ("collect.thresholds=[a]", ["collect.thresholds", "Float"]),
        ("engine.kv_bytes=lots", ["engine.kv_bytes", "256MiB"]),
        ("router.steps", ["section.key=value"]),
        ("models.paths=[only]", ["models.paths", "at least two models"]),
        ("models.labels=[a, a]", ["models.labels", "repeats"]),
        ("models.labels=[a, b, c]", ["models.labels", "3 labels for 2"]),
        ("models.dtype=int8", ["models.dtype", "bfloat16"]),
        ("models.layers=[1]", ["models.layers", "1 entries for 2"]),
        ("models.layers=[[0,x],0]", ["models.layers", "[0, 'x']", "[0, 1, 28, 29]"]),
        ("models.layers=[[],0]", ["models.layers", "list of their numbers"]),
        ("models.layers=[-1,0]", ["models.layers", "-1"]),
        ("router.beta=0.5", ["router.beta", "[0, 0.5)", "outweigh"]),
        ("router.beta=-0.1", ["router.beta"]),
        ("router.action_space=jump", ["router.action_space", "regenerate"]),
        ("router.process_reward=vibes", ["router.process_reward", "fixed_rubric"]),
        ("router.group_size=1", ["router.group_size", "2 or more"]),
        ("router.clip_high=0.1", ["router.clip_high", "clip_low"]),
        ("router.lr=0", ["router.lr", "greater than 0"]),
        ("router.queries_per_step=99999", ["router.queries_per_step", "task.n_train"]),
        ("rubric.order=both", ["rubric.order", "judge_first"]),
        ("rubric.max_criteria=9", ["rubric.max_criteria", "3..6"]),
        ("pairs.weights=[1, 1, 1]", ["pairs.weights", "sum to 1"]),
        ("pairs.weights=[1.0]", ["pairs.weights", "3"]),
        ("pairs.cost_margin=2", ["pairs.cost_margin", "[0, 1]"]),
        ("pairs.holdout=1", ["pairs.holdout"]),
        ("collect.arms=[]", ["collect.arms", "empty"]),
        ("collect.arms=[all_small, all_small]", ["collect.arms", "repeats"]),
        ("collect.arms=[allsmall]", ["collect.arms", "all_small"]),
        ("collect.arms=[policy]", ["collect.policy", "router directory"]),
        ("collect.thresholds=[]", ["collect.thresholds", "confidence"]),
        ("collect.n_queries=99999", ["collect.n_queries", "task.n_train"]),
        ("calibrate.budgets=[0.5, 0.2]", ["calibrate.budgets", "rise"]),
        ("eval.budgets=[0]", ["eval.budgets", "(0, 1]"]),
        ("eval.n_boot=0", ["eval.n_boot"]),
        ("engine.delimiter=", ["engine.delimiter", "empty"]),
        ("engine.delimiter=\\n\\n", ["engine.delimiter", "backslash"]),
        ("engine.top_p=0", ["engine.top_p"]),
        ("engine.temperature=-1", ["engine.temperature"]),
        ("engine.page_size=0", ["engine.page_size"]),
        ("task.n_test=0", ["task.n_test"]),
        ("task.name=", ["task.name"]),
        ("run.name=a/b", ["run.name", "run.dir"]),
        ("run.seed=-1", ["run.seed"]),
        ("run.name=[x", ["run.name", "YAML"]),
    ],
)
def test_bad_override_names_key_and_fix(override, words):
    with pytest.raises(ConfigError) as e:
        load_config("nano", [override])
    message = str(e.value)
    assert "\n" not in message
    for w in words:
        assert w in message


def test_a_router_must_see_something():
    assert load_config("nano", ["router.signals=false", "router.hidden=true"]).router.signals is False
    with pytest.raises(ConfigError, match=r"router\.signals: .*router\.hidden"):
        load_config("nano", ["router.signals=false", "router.hidden=false"])


def test_regenerate_needs_a_pair():
    three = ["models.paths=[a, b, c]", "models.labels=[x, y, z]", "router.action_space=next"]
    assert load_config("nano", three).router.action_space == "next"
    with pytest.raises(ConfigError, match="router.action_space"):
        load_config("nano", [*three, "router.action_space=regenerate"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("router: {bta: 1}", ["router.bta", "bad.yaml"]),
        ("- a\n- b", ["mapping"]),
        ("router: [", ["not valid YAML"]),
        ("extends: nowhere", ["nowhere", "presets are"]),
        ("extends: bad.yaml", ["circle"]),
        ("router: {lr:}", ["router.lr"]),
    ],
)
def test_bad_file(tmp_path, text, words):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError) as e:
        load_config(tmp_path / "bad.yaml")
    for w in words:
        assert w in str(e.value)


def test_missing_file_lists_presets():
    with pytest.raises(ConfigError, match="presets are .*nano"):
        load_config("no/such.yaml")


def test_file_extends_a_neighbour(tmp_path):
    (tmp_path / "base.yaml").write_text("extends: nano\nrouter: {steps: 7}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nrun: {name: child}\n")
    c = load_config(tmp_path / "child.yaml")
    assert (c.router.steps, c.run.name) == (7, "child")


def test_saved_yaml_is_plain():
    from roro_fast.config_io import to_yaml

    assert yaml.safe_load(to_yaml(Config()))["router"]["beta"] == Config().router.beta


@pytest.mark.parametrize("override", ["models.paths=nano/small", "models.layers=2", "eval.arms=oracle"])
def test_a_list_is_asked_for_as_a_list(override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(ConfigError, match=rf"{key}: is a list, got .*{value}.*; write {key}=\["):
        load_config("nano", [override])


def test_chat_variables_add_up_over_layers_and_survive_the_disk(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("extends: nano\ntask: {chat: {enable_thinking: true, effort: low}}\n")
    config = load_config(str(path), ["task.chat.enable_thinking=false", "task.chat.depth=3"])
    assert config.task.chat == {"enable_thinking": False, "effort": "low", "depth": 3}
    save_config(config, tmp_path / "again.yaml")
    assert load_config(str(tmp_path / "again.yaml")) == config
    assert load_config("nano").task.chat == {}
    with pytest.raises(ConfigError, match=r"task\.chat: is a mapping, got True.*task\.chat\.<key>=<value>"):
        load_config("nano", ["task.chat=on"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (["models.prices=[1]"], "models.prices: 1 prices for 2 models"),
        (["models.prices=[1, -1]"], "models.prices: .* negative"),
        (["models.read_prices=[1, 1]"], "models.read_prices: needs models.prices"),
        (["suite.arms=[all_small]"], "suite.arms: lacks 'all_large'"),
        (["suite.arms=[all_large, oracle]"], "suite.arms: 'oracle' is not one of"),
        (["suite.shares=[]"], "suite.shares: is empty"),
        (["suite.thresholds=[2]"], r"suite.thresholds: 2.* is not in \[0, 1\]"),
        (["suite.limit=-1"], "suite.limit"),
    ],
)
def test_bad_prices_and_suites_name_the_key(override, words):
    with pytest.raises(ConfigError, match=words):
        load_config("nano", override)
