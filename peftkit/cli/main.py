"""`peftkit`: the commands, and how their errors end the process.

Exit codes: 0 done, 1 an error that the message explains, 2 wrong usage, 130 interrupted (state saved).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

# Before transformers or huggingface_hub are imported: no telemetry, no advice about tokenizer threads.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import typer

import peftkit
from peftkit.cli import (
    adapters,
    base,
    chat,
    combine,
    data,
    diff,
    doctor,
    evaluate,
    exchange,
    explain,
    export,
    few_shot,
    generate,
    merge,
    plan,
    predict,
    preview,
    recipes,
    reproduce,
    runs,
    serve,
    sweep,
    train,
    versions,
)
from peftkit.cli.console import console, harmless
from peftkit.cli.entry import terminate_like_ctrl_c
from peftkit.errors import PeftkitError
from peftkit.process_group import process_name
from peftkit.recipe import Interrupted

app = typer.Typer(
    help="Fine-tune large language models on one consumer GPU; keep, compare and swap the adapters.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("plan")(plan.plan)
app.command("sweep")(sweep.sweep)
app.command("few-shot")(few_shot.few_shot)
app.add_typer(recipes.app, name="recipes")
app.add_typer(data.app, name="data")
app.add_typer(runs.app, name="runs")
app.command("report")(runs.report)
app.command("list")(adapters.list_adapters)
app.command("show")(adapters.show_adapter)
app.command("path")(adapters.path)
app.command("log")(adapters.log)
app.command("diff")(diff.diff)
app.command("preview")(preview.preview)
app.command("combine")(combine.combine)
app.command("merge")(merge.merge)
app.command("tag")(versions.tag)
app.command("restore")(versions.restore)
app.command("rm")(versions.rm)
app.command("gc")(versions.gc)
app.command("verify")(versions.verify)
app.command("import")(exchange.import_adapter_command)
app.command("export")(export.export_adapter)
app.command("push")(exchange.push)
app.command("pull")(exchange.pull)
app.command("reproduce")(reproduce.reproduce)
app.command("generate")(generate.generate)
app.command("predict")(predict.predict)
app.command("explain")(explain.explain)
app.command("eval")(evaluate.evaluate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.add_typer(base.app, name="base")
app.command("doctor")(doctor.doctor)


# Typer 0.29 carries its own copy of click, older ones used the package; its public names lead to either.
_ClickError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _version(value: bool) -> None:
    if value:
        console().print(f"peftkit {peftkit.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Options of every command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = ["--debug", *(a for a in given if a != "--debug")] if debug else given
    terminate_like_ctrl_c()
    try:
        code = app(args=given, prog_name="peftkit", standalone_mode=False)
        if code == 130:  # what Typer makes of Ctrl-C
            _print_error("interrupted")
        return code if isinstance(code, int) else 0
    except typer.Exit as done:
        return done.exit_code
    except _ClickError as error:
        error.show()
        return 2
    except (Interrupted, KeyboardInterrupt, typer.Abort) as error:
        _print_error(str(error) or "interrupted")
        return 130
    except PeftkitError as error:
        if debug:
            raise
        _print_error(str(error))
        return 1
    except BrokenPipeError:  # `peftkit list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _print_error(f"{error.strerror or error}{where}")
        return 1
    except MemoryError as error:
        if debug:
            raise
        what = f"this process ran out of memory{f': {error}' if str(error) else ''}"
        _print_error(
            f"{what}\n  to mend it: close other programs, take a smaller base, or fewer rows at once (--budget)"
        )
        return 1
    except Exception as error:
        if debug:
            raise
        what = str(error).strip() or "no message"
        _print_error(
            f"{type(error).__name__}: {what}\n  this is a bug in peftkit; --debug shows where, please report it"
        )
        return 1


def run_recipe(path: str) -> int:
    """Run a recipe file the way `python recipes/qlora_sft.py key=value …` does; returns the exit code."""
    return main(["train", path, *sys.argv[1:]])


def _print_error(text: str) -> None:
    console(stderr=True).print(harmless(f"peftkit{process_name()}: {text}"), markup=False)
