"""Run directories that share their beginning: a variant of a run keeps the stages that it does not change."""

from __future__ import annotations

import shutil

from roro_fast.cli_stages import NAMES, STAGES
from roro_fast.config import Config
from roro_fast.runs import RunDirectory


def twin(source: RunDirectory, config: Config, first_changed: str) -> RunDirectory:
    """The run directory of `config`, with what `source` found in the stages before `first_changed`.

    A directory that exists is left as it is. What a kept stage ran under must be the same in `config`; the run refuses
    it otherwise.
    """
    run = RunDirectory.for_config(config)
    if run.path.exists():
        return run
    part = run.path.with_name(run.path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for stage in STAGES[: NAMES.index(first_changed)]:
        for name in (f"stages/{stage.name}.json", f"trajectories/{stage.name}", *stage.outputs):
            found, target = source.path / name, part / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if found.is_dir():
                shutil.copytree(found, target, dirs_exist_ok=True)
            elif found.is_file():
                shutil.copy(found, target)
    part.rename(run.path)
    return run
