"""The command line `python -m pipeline NAME [--key value ...]`: validate the config, import and run the entry point."""

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from pipeline.config.strict_config import Config, keys, keys_in_unions, load, nearest
from pipeline.entries import Entry, entry_names, find_entry
from pipeline.errors import UserError
from pipeline.runtime import process_rank as ranks
from pipeline.runtime.console import open_standard_streams
from pipeline.runtime.importing import import_reference
from pipeline.runtime.interrupts import Interrupted, interruptible
from pipeline.runtime.text import visible
from pipeline.tasks.registry import ROOT, config_class, declarations, task_factory, task_names

LONGEST_LINE = 3000  # characters of an error message

# Torch's threads spin while they wait for each other. On two cores, one of them busy with another process, a step of
# 9 ms takes 39 ms; with limited spinning it takes 12 ms. Must be set before torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def command(name: str, entry: Entry) -> click.Command:
    """Make the click command of an entry point, with one option per config key."""
    model: type[Config] = config_class(name) if entry.trains else import_reference(entry.config)
    short: dict[str, str] = getattr(model, "short", {})
    every = [key for key in (*keys(model), *keys_in_unions(model)) if key.path != "config"]  # --config names a file
    names: dict[str, list[str]] = {}
    for alias, path in short.items():
        names.setdefault(path, []).append(alias)
    file = click.Option(["--config"], metavar="FILE", help=f"YAML file  [default: {entry.file}]")
    options = [
        click.Option(
            [f"--{alias}" for alias in [*names.get(key.path, []), key.path]] + [_identifier(key.path)],
            metavar="VALUE",
            help=f"{key.field.description or key.path}  [{key.allowed}; default: {key.default}]",
        )
        for key in every
    ]

    def run(config: str | None, **texts: str | None) -> None:
        if config is not None:
            _refuse_empty("--config", config, "a YAML file")
        paths = {_identifier(key.path): key.path for key in every}
        overrides = {paths[name]: text for name, text in texts.items() if text is not None}
        source = Path(config) if config else ROOT / entry.file if entry.file else None
        shown = {path: names[path][0] for path in overrides if path in names}
        validated = load(model, source, overrides, shown_as=shown)
        if not entry.trains and ranks.world_size() > 1:
            raise UserError(f"{name}: found WORLD_SIZE {ranks.world_size()}, allowed: 1 (torchrun is for "
                            f"{' and '.join(task_names())})")  # fmt: skip
        if entry.trains:
            _train(validated, name, frozenset(overrides))
            return
        target = import_reference(entry.target)
        if entry.passes_on:
            target(validated, source, _pairs(click.get_current_context().args))
        else:
            target(validated, frozenset(overrides))

    settings = {"max_content_width": 120}
    if entry.passes_on:
        settings |= {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(name, params=[file, *options], callback=run, help=entry.about, context_settings=settings)


def _filled(_: click.Context, parameter: click.Parameter, value: str) -> str:
    """Refuse an empty argument: as a path it would mean the working directory."""
    _refuse_empty(str(parameter.name), value, "a path or an id")
    return value


@click.command("sync", help="Deliver the journals of runs to the store in MLFLOW_TRACKING_URI.")
@click.argument("folder", callback=_filled)
@click.option("--again", is_flag=True, help="Deliver everything again, for a store restored from a backup.")
def sync_command(folder: str, again: bool) -> None:
    import_reference("pipeline.tracking.sync:sync")(Path(folder), again)


@click.command("doctor", help="Compare journal, store and checkpoints of a run, and say how to repair differences.")
@click.argument("run", callback=_filled)
@click.option("--output_dir", default="outputs", show_default=True, callback=_filled,
              help="Folder of the runs' own files.")  # fmt: skip
def doctor_command(run: str, output_dir: str) -> None:
    import_reference("pipeline.tracking.doctor:doctor")(run, Path(output_dir))


@click.command("verify", help="Check every file of a prepared folder against its schema.json.")
@click.argument("folder", callback=_filled)
def verify_command(folder: str) -> None:
    schema = import_reference("pipeline.data.contract:verify")(Path(folder))
    rows = sum(split.rows for split in schema.splits.values())
    click.echo(visible(f"{folder}: as its schema.json says, {rows} rows, digest {schema.digest}"))


@click.command("ui", help="Open MLflow on the newest sweep of the store in MLFLOW_TRACKING_URI, else ./mlflow.db.")
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="Where to serve.")
def ui_command(port: int) -> None:
    import_reference("pipeline.tracking.ui:ui")(port, lambda task: declarations(task).charts)


TOOLS = {str(tool.name): tool for tool in (sync_command, doctor_command, verify_command, ui_command)}


class Entries(click.Group):
    """Command group that imports only the command that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return [*entry_names(), *TOOLS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        return command(cmd_name, find_entry(cmd_name)) if cmd_name in entry_names() else TOOLS.get(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Entry points"):
            formatter.write_dl([(name, _about(name)) for name in entry_names()])
        with formatter.section("Tools"):
            formatter.write_dl([(name, str(tool.help)) for name, tool in TOOLS.items()])


def _about(name: str) -> str:
    """What an entry point does, or why it cannot be used."""
    try:
        return find_entry(name).about
    except UserError as error:
        return visible(f"cannot be used: {error}")


def _train(config: Any, name: str, given: frozenset[str]) -> None:
    """Train one run. The writer process starts first, so that it imports mlflow while this process imports torch."""
    with import_reference("pipeline.tracking.writer_client:writer_for")(config.tracking) as writer:
        import_reference("pipeline.runs.launch:launch")(config, task_factory(name), given, writer)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run an entry point and exit. User errors are reported in one line, with exit code 2."""
    open_standard_streams()
    group = Entries("pipeline", help="Tune focal losses, with every loss component of every run in MLflow.")
    try:
        with interruptible():
            group.main(arguments, prog_name="python -m pipeline", standalone_mode=False)
    except click.NoSuchOption as error:
        candidates = [opt.lstrip("-") for param in error.ctx.command.params for opt in param.opts] if error.ctx else []
        name = error.option_name.lstrip("-")
        _fail(f"unknown key {name}{nearest(name, candidates)}", 2)
    except click.NoSuchCommand as error:
        hint = nearest(str(error.command_name), [*entry_names(), *TOOLS])
        _fail(f"unknown entry point {error.command_name}{hint}", 2)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except UserError as error:
        _fail(str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        stopped = error if isinstance(error, Interrupted) else error.__cause__
        _fail(str(stopped or "stopped"), getattr(stopped, "exit_code", 130))
    sys.exit(0)


def _pairs(arguments: list[str]) -> dict[str, str]:
    """Parse options written as `--key value` or `--key=value`."""
    pairs, rest = dict[str, str](), list(arguments)
    while rest:
        name = rest.pop(0)
        if not name.startswith("--"):
            raise UserError(f"found {name}, allowed: --key value")
        key, equals, value = name[2:].partition("=")
        if not equals and not rest:
            raise UserError(f"--{key} needs a value")
        pairs[key] = value if equals else rest.pop(0)
        _refuse_empty(f"--{key}", pairs[key], "a value, or null")
    return pairs


def _refuse_empty(name: str, text: str, allowed: str) -> None:
    """Refuse an empty value, for example from an unset shell variable."""
    if not text.strip():
        raise UserError(f"{name}: found {text!r}, allowed: {allowed}")


def _identifier(path: str) -> str:
    """A key as the name of a Python parameter; `lambda` is a Python keyword."""
    return path.replace(".", "__").replace("lambda", "lambda_")


def _fail(message: str, code: int) -> NoReturn:
    line = visible(" ".join(message.split()))  # click's messages quote raw input
    prefix = f"rank {ranks.rank()}: " if ranks.world_size() > 1 and not line.startswith("rank ") else ""
    print(f"error: {prefix}{line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + ' ...'}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
