"""Load and save configs: YAML or preset + dotted overrides, unknown keys refused with a suggestion."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from roro_fast.config import Config
from roro_fast.errors import ConfigError
from roro_fast.files import write_text

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*$", re.IGNORECASE)
_SIZE_KEYS = ("engine.kv_bytes",)


def parse_size(value: int | str, key: str = "size") -> int:
    """Bytes of 268435456, '256MiB', '1.5GB', '512k' (decimal unless the unit has an i)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    m = _SIZE.match(str(value))
    if m is None:
        raise ConfigError(f"{key}: {value!r} is not a size; write e.g. 268435456 or '256MiB'")
    return int(float(m.group(1)) * _UNITS[(m.group(2) or "").lower()])


def presets() -> list[str]:
    """Names of the packaged configs."""
    folder = files("roro_fast") / "assets" / "configs"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_config(source: str | Path | Config = "nano", overrides: Sequence[str] = ()) -> Config:
    """A config from a packaged preset name, a YAML file or another config, with `section.key=value` overrides in order.

    A file may start from another with a top-level `extends: <preset or path>` (paths relative to the file).
    Raises ConfigError naming the key for anything unknown, mistyped or out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.structured(Config)
    below = [("config", to_dict(source))] if isinstance(source, Config) else _layers(str(source))
    layers = [*below, *_overrides(overrides)]
    for origin, layer in layers:
        for key, value in _leaves(layer, origin):
            if key in _SIZE_KEYS:
                value = parse_size(value, key)
            if _type_name(key).startswith("list") and not isinstance(value, list):
                raise ConfigError(f"{key}: is a list, got {value!r} in {origin}; write {key}=[{value},...]")
            try:
                OmegaConf.update(merged, key, value, merge=isinstance(value, Mapping))
            except OmegaConfBaseException as e:
                reason = str(e).splitlines()[0]
                raise ConfigError(f"{key}: {reason} (in {origin}; expected {_type_name(key)})") from e
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as e:
        raise ConfigError(f"{getattr(e, 'full_key', None) or 'config'}: {str(e).splitlines()[0]}") from e
    assert isinstance(config, Config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict of a config."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """YAML that `load_config` reads back to an equal config."""
    import yaml

    return str(yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=120))


def save_config(config: Config, path: str | Path) -> None:
    """Write `to_yaml` atomically."""
    write_text(Path(path), to_yaml(config))


def _layers(source: str, seen: tuple[str, ...] = ()) -> list[tuple[str, Mapping[str, Any]]]:
    """(origin, mapping) of `source` preceded by what it extends."""
    import yaml

    if source in seen:
        raise ConfigError(f"extends: {' -> '.join((*seen, source))} goes round in a circle; remove one")
    if source in presets():
        path = Path(str(files("roro_fast") / "assets" / "configs" / f"{source}.yaml"))
    else:
        path = Path(source)
    if not path.is_file():
        raise ConfigError(f"config: no file or preset {source!r}; presets are {', '.join(presets())}")
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(e).split())})") from e
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds a {type(data).__name__}; a config is a mapping of sections")
    parent = data.pop("extends", None)
    below: list[tuple[str, Mapping[str, Any]]] = []
    if parent is not None:
        beside = path.parent / str(parent)
        below = _layers(str(beside) if beside.is_file() else str(parent), (*seen, source))
    return [*below, (str(path), data)]


def _overrides(overrides: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import yaml

    for text in overrides:
        key, eq, raw = text.partition("=")
        if not eq or not key:
            raise ConfigError(f"override {text!r}: write section.key=value")
        try:
            value = yaml.safe_load(raw) if raw else ""
        except yaml.YAMLError as e:
            raise ConfigError(f"{key}: {raw!r} is not a YAML value ({' '.join(str(e).split())})") from e
        nested: Any = value
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        yield f"override {text!r}", nested


def _leaves(layer: Mapping[str, Any], origin: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; refuses unknown sections and keys by name."""
    sections = {f.name: f.default_factory for f in dataclasses.fields(Config)}
    for section, values in layer.items():
        if section not in sections:
            raise _unknown(str(section), list(sections), origin)
        if not isinstance(values, Mapping):
            raise ConfigError(f"{section}: is a section, got {values!r} in {origin}; write {section}.<key>=<value>")
        known = _keys(section)
        for name, value in values.items():
            if name not in known:
                raise _unknown(f"{section}.{name}", [f"{section}.{k}" for k in known], origin)
            takes = _type_name(f"{section}.{name}").startswith("dict")
            if takes and not isinstance(value, Mapping):
                raise ConfigError(
                    f"{section}.{name}: is a mapping, got {value!r} in {origin}; write {section}.{name}.<key>=<value>"
                )
            if isinstance(value, Mapping) and not takes:
                raise ConfigError(f"{section}.{name}: has no sub-keys, got {dict(value)} in {origin}")
            if value is None:
                raise ConfigError(
                    f"{section}.{name}: has no value in {origin}; expected {_type_name(f'{section}.{name}')}"
                )
            yield f"{section}.{name}", value


def _keys(section: str) -> list[str]:
    return [f.name for f in dataclasses.fields(getattr(Config(), section))]


def _type_name(key: str) -> str:
    section, name = key.split(".")
    return next(str(f.type) for f in dataclasses.fields(getattr(Config(), section)) if f.name == name)


def _unknown(key: str, beside: list[str], origin: str) -> ConfigError:
    """Unknown-key error with the nearest known key: same section first, then the same name in another section."""
    everywhere = [f"{f.name}.{k}" for f in dataclasses.fields(Config) for k in _keys(f.name)]
    leaf = key.rpartition(".")[2]
    close = difflib.get_close_matches(key, beside, 1, 0.75) or [k for k in everywhere if k.endswith(f".{leaf}")][:1]
    close = close or difflib.get_close_matches(key, everywhere, 1, 0.6)
    hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(beside)}"
    return ConfigError(f"{key}: unknown key in {origin}; {hint}")
