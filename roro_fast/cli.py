"""`roro`: the command line. Bad input ends with one line on stderr and exit code 2, Ctrl-C with 130."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from roro_fast.config_io import load_config
from roro_fast.errors import ConfigError, RoroError
from roro_fast.runs import RunDirectory, export_parquet

console = Console()
errors = Console(stderr=True)


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C so that finished work is flushed."""


def _on_term(number: int, frame: FrameType | None) -> None:
    raise Terminated


class Group(TyperGroup):
    """Turns errors a user can act on into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        before = signal.signal(signal.SIGTERM, _on_term)
        try:
            return super().invoke(ctx)
        except RoroError as e:
            if ctx.params.get("debug"):
                raise
            errors.print("error:", str(e), style="red", highlight=False, markup=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as e:
            errors.print(
                "interrupted: everything that finished is stored; run the same command to go on",
                highlight=False,
                soft_wrap=True,
            )
            raise typer.Exit(143 if isinstance(e, Terminated) else 130) from None
        finally:
            signal.signal(signal.SIGTERM, before)


app = typer.Typer(cls=Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Config overrides, e.g. router.beta=0.2")
]
ConfigOption = Annotated[str, typer.Option("--config", "-c", help="A preset (nano, smol, qwen3, ...) or a YAML file.")]
RunOption = Annotated[Path | None, typer.Option("--run", "-r", help="Go on with this run directory and its config.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on where the run stopped. This is the default.")]
RedoOption = Annotated[
    list[str] | None, typer.Option("--redo", metavar="STAGE", help="Forget this stage and all later ones first.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from roro_fast import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Stepwise model routing: roll out, train, evaluate."""


@app.command()
def doctor(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="A pool to check; with --config, overrides of its keys."),
    ] = None,
    config: Annotated[str, typer.Option("--config", "-c", help="Check what a run with this config needs.")] = "",
    delimiter: Annotated[str, typer.Option(help="Step delimiter to check; \\n is a line break.")] = "\\n\\n",
    device: Annotated[str, typer.Option(help="Device the ops are asked about.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Dtype the ops are asked about.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say what is usable on this machine and why the rest is not; with models, whether they can be one pool.

    With --config, all that a run with it would be refused for: its pool, task, Rubricor, Judge and arms.
    """
    from roro_fast import cli_doctor

    if config:
        found = cli_doctor.findings_of(load_config(config, models or ()))
    else:
        found = cli_doctor.findings(models or [], delimiter.replace("\\n", "\n"), device, dtype)
    if as_json:
        sys.stdout.write(json.dumps([asdict(f) for f in found]) + "\n")
    else:
        cli_doctor.show(console, found)
    if any(f.status == "fault" for f in found):
        raise typer.Exit(1)


def _open(config: str, run: Path | None, overrides: list[str] | None) -> RunDirectory:
    """The run directory a command works on: an existing one with its own config, or the one a config names."""
    if run is None:
        return RunDirectory.for_config(load_config(config, overrides or ()))
    opened = RunDirectory(run)
    return RunDirectory(run, load_config(opened.config, overrides or ()))


@app.command()
def rollout(
    overrides: Overrides = None,
    config: ConfigOption = "nano",
    run: RunOption = None,
    resume: ResumeOption = True,
    redo: RedoOption = None,
    parquet: Annotated[Path | None, typer.Option(help="Also write all trajectories to this Parquet file.")] = None,
) -> None:
    """Collect routed trajectories of every arm over the training queries."""
    directory = _execute("collect", config, run, overrides, redo)
    if parquet is not None:
        count = export_parquet(directory.store("collect"), parquet)
        console.print(f"{count} trajectories written to {parquet}", highlight=False, soft_wrap=True)


def _stages_up_to(last: str, name: str, about: str, show: Sequence[str] = ()) -> None:
    """A command that runs the stages up to `last` and shows the tables of `show` (default: of `last`)."""

    def command(
        overrides: Overrides = None,
        config: ConfigOption = "nano",
        run: RunOption = None,
        resume: ResumeOption = True,
        redo: RedoOption = None,
    ) -> None:
        _execute(last, config, run, overrides, redo, show)

    app.command(name, help=about)(command)


_stages_up_to("pairs", "pairs", "Build preference pairs; collects first where that is not done.")
_stages_up_to(
    "outcome_only",
    "train",
    "Train Judge and Rubricor, then the router; does first what is missing before that.",
    ("rubric", "router", "outcome_only"),
)


@app.command("eval")
def evaluate(
    overrides: Overrides = None,
    config: ConfigOption = "nano",
    run: RunOption = None,
    resume: ResumeOption = True,
    redo: RedoOption = None,
    suite: Annotated[str, typer.Option(help="Measure on this suite of benchmarks instead: math5 or gym.")] = "",
    data: Annotated[Path | None, typer.Option(help="With --suite: directory of <benchmark>.jsonl files.")] = None,
    limit: Annotated[int | None, typer.Option(help="With --suite: queries per benchmark; 0 for all.")] = None,
    router: Annotated[list[Path] | None, typer.Option(help="With --suite: directory of a trained router.")] = None,
) -> None:
    """Calibrate the routers and measure every arm on the test split; trains first where that is not done.

    With --suite, measure the pool's arms and the given routers on every benchmark of the suite; trains nothing.
    """
    flags: dict[str, Any] = {
        "data_dir": data and str(data),
        "limit": limit,
        "routers": router and [str(r) for r in router],
    }
    given = [f"suite.{k}={json.dumps(v)}" for k, v in flags.items() if v is not None]
    if not suite:
        if given:
            raise ConfigError("--suite: is empty, but --data, --limit and --router are for a suite; name math5 or gym")
        _execute("evaluate", config, run, overrides, redo)
        return
    from roro_fast import cli_suite

    if not cli_suite.run_suite(_open(config, run, [*(overrides or ()), *given]), suite, console, redo or ()):
        raise typer.Exit(1)


_stages_up_to("report", "report", "Write report.html; evaluates first where that is not done.", ("evaluate",))


@app.command()
def project(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the fitted map.")],
    overrides: Overrides = None,
    config: ConfigOption = "nano",
    source: Annotated[str, typer.Option(help="Label of the model whose KV is read.")] = "small",
    target: Annotated[str, typer.Option(help="Label of the model whose KV is filled.")] = "large",
) -> None:
    """Fit an approximate KV handoff between two models; refused when it moves next-token probabilities too far."""
    from roro_fast import cli_tables
    from roro_fast.train.projection import fit_projection
    from roro_fast.train.setup import Workbench

    settings = load_config(config, overrides or ())
    fitted = fit_projection(Workbench(settings), source, target)
    fitted.save(out)
    console.print(cli_tables.projection(fitted))
    use = f"projection.maps=[{out}] projection.max_kl={settings.projection.max_kl:g}"
    console.print(f"use it with {use}; answers are then approximate", highlight=False, markup=False, soft_wrap=True)


_stages_up_to(
    "report",
    "quickstart",
    "The whole loop on the packaged models: rollouts, pairs, Rubricor and Judge, router, frontier, report.",
    ("rubric", "evaluate"),
)


def _execute(
    last: str,
    config: str,
    run: Path | None,
    overrides: list[str] | None,
    redo: list[str] | None,
    show: Sequence[str] = (),
) -> RunDirectory:
    from roro_fast import cli_stages, cli_tables

    directory = _open(config, run, overrides)
    summaries = cli_stages.run_stages(directory, last, console, redo or ())
    for stage in show or (last,):
        if stage in summaries:
            cli_tables.show(console, stage, summaries[stage])
    console.print(f"run directory: {directory.path}", highlight=False, soft_wrap=True)
    if "report" in summaries:
        console.print(f"report: {directory.path / 'report.html'}", highlight=False, soft_wrap=True)
    return directory
