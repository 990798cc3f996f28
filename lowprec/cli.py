"""The command line: `lowprec` or `python -m lowprec`. Reads words, calls, prints.

A wrong word is answered by one line, not a traceback. What a command needs is imported inside it, so that none waits
for what another one needs.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from lowprec.formats import BlockFormat, FloatFormat

app = typer.Typer(
    help="Low-precision numerics for PyTorch: formats, casts, studies and benches.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def _console() -> Console:
    return Console(highlight=False)


def _fail(message: str, code: int = 2) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        from lowprec import __version__

        typer.echo(f"lowprec {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Low-precision numerics for PyTorch: formats, casts, studies and benches."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without these characters gets question marks


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Say what is compiled, which devices there are, which kernel would run where, and whether it is right.

    Exits with 1 when the self-check finds a wrong result.
    """
    from lowprec import doctor as surgery

    facts = surgery.examine()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        surgery.show(facts, _console())
    raise typer.Exit(0 if facts["ok"] else 1)


@app.command()
def formats(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Names, or any 1-e-m[:key=value,...].")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Save the picture too, as PNG; several formats share one.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="List P3109's names too; leave out no binade.")] = False,
) -> None:
    """List the named formats, or show what the given ones hold: properties, a picture and a table of values.

    The picture in the terminal has one mark for each column that holds a value; --png draws it in full.
    """
    chosen = {name: _format(name) for name in names or ()}
    if png is not None and not chosen:
        _fail("--png needs the name of a format to draw")
    if png is not None:
        _save_picture(chosen, png)
    console = _console()
    if not chosen:
        _list_formats(console, everything)
    for name, fmt in chosen.items():
        _show_format(console, name, fmt, everything)
    if png is not None:
        typer.echo(f"picture: {png}")


def _format(name: str) -> FloatFormat | BlockFormat:
    from lowprec.formats import BLOCK_NAMES, NAMES
    from lowprec.formats import format as lookup

    try:
        return lookup(name)
    except ValueError as error:
        if str(error).startswith("unknown format"):
            _fail(f"unknown format {name!r}: {_instead(name, [*NAMES, *BLOCK_NAMES])}")
        _fail(str(error))


def _instead(name: str, known: Iterable[str]) -> str:
    """What the user may have meant, or all that there is."""
    names = [each for each in known if not each.startswith("p3109") or name.lower().startswith("p")]
    near = difflib.get_close_matches(name.lower(), names, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"


def _list_formats(console: Console, everything: bool) -> None:
    from lowprec import tables

    console.print(tables.listing(console.width, everything))
    console.print(tables.blocks())
    if not everything:
        console.print(tables.P3109)
    console.print(tables.OTHERS)
    console.print(tables.BFP)


def _show_format(console: Console, name: str, fmt: FloatFormat | BlockFormat, everything: bool) -> None:
    from lowprec import ruler, tables
    from lowprec.formats import BlockFormat

    console.rule(f"[bold]{name}", align="left")
    if isinstance(fmt, BlockFormat):
        console.print(tables.block_properties(name, fmt))
        _show_format(console, f"elements: {tables.name_of(fmt.element)}", fmt.element, everything)
        return
    console.print(tables.properties(name, fmt))
    width = max(console.width, 40)
    for line in (*ruler.near_zero(fmt, width), *ruler.whole_range(fmt, width)):
        console.print(line)
    console.print(tables.codes(fmt) if fmt.bits <= 8 else tables.binades(fmt, everything))


def _save_picture(chosen: dict[str, FloatFormat | BlockFormat], png: Path) -> None:
    from lowprec import chart
    from lowprec.formats import BlockFormat

    elements = {name: fmt.element if isinstance(fmt, BlockFormat) else fmt for name, fmt in chosen.items()}
    try:
        chart.draw_formats(elements, png)
    except OSError as error:
        _fail(f"the picture cannot be saved: {_reason(error)}", 1)


@app.command()
def patterns(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Names, or NAME:key=value[,...].", show_default="all")
    ] = None,
    inputs: Annotated[int, typer.Option(help="Input blocks.")] = 64,
    outputs: Annotated[int | None, typer.Option(help="Output blocks.", show_default="as many")] = None,
    density: Annotated[float, typer.Option(help="Share of the blocks that are present.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the patterns that are random.")] = 0,
    steps: Annotated[int, typer.Option(help="How far mixing is followed.")] = 5,
    png: Annotated[Path | None, typer.Option(help="Save a picture of the masks and their mixing, as PNG.")] = None,
) -> None:
    """Compare patterns of block-sparse layers: blocks, connections of neurons, and how fast a signal spreads."""
    from lowprec.sparse import patterns as known
    from lowprec.sparse.patterns.listing import listing

    try:
        chosen = dict.fromkeys(names or known.NAMES)
        masks = {name: _mask(name, inputs, outputs or inputs, density, seed) for name in chosen}
        console = _console()
        console.print(listing(masks, steps))
    except ValueError as error:
        _fail(str(error))
    if png is not None:
        _save_patterns(masks, steps, png)
        typer.echo(f"picture: {png}")


def _mask(name: str, inputs: int, outputs: int, density: float, seed: int) -> Tensor:
    from lowprec.sparse import patterns as known

    fixed = name == "dense" or "groups=" in name
    return known.build(name, inputs, outputs, None if fixed else density, seed)


def _save_patterns(masks: dict[str, Tensor], steps: int, png: Path) -> None:
    from lowprec.sparse.patterns.picture import draw_patterns

    try:
        draw_patterns(masks, png, steps=steps)
    except OSError as error:
        _fail(f"the picture cannot be saved: {_reason(error)}", 1)


@app.command()
def study(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which study; `list` names them all.")],
    words: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings of the study.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The small version: minutes on two CPU cores.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for results.", show_default="runs/NAME[-quick]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run into the same folder stopped.")] = False,
    engine: Annotated[str, typer.Option(help="What runs the parts of the study; only `local` so far.")] = "local",
) -> None:
    """Run a study: a question, answered by a table, a picture and data on disk.

    Exits with 2 when it cannot start as asked, 1 when it fails on the way, 130 after Ctrl-C.
    """
    from lowprec import studies

    known = dict(studies.names())
    if name == "list":
        _list(known)
        return
    if name not in known:
        _fail(f"unknown study {name!r}: {_instead(name, known)}")
    options = _options(words or [])
    if engine != "local":
        _fail(f"engine {engine!r} is not available in this version: only local")
    folder = out or Path("runs", f"{name}-quick" if quick else name)
    with _explained(_command(name, out, quick)):
        studies.run(name, options, out=folder, quick=quick, resume=resume, engine=engine)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which bench; `list` names them all.")],
    quick: Annotated[bool, typer.Option("--quick", help="Smaller tensors, fewer rounds.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the record.", show_default="runs/bench-NAME")] = None,
    device: Annotated[str | None, typer.Option(help="Only `cpu` or only `cuda`.", show_default="every device")] = None,
    only: Annotated[str, typer.Option(metavar="PATTERN", help="Only the rows that this names, or is part of.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print the record instead of tables.")] = False,
) -> None:
    """Time kernels beside peers and the device's own limits: tables, a picture and a record.

    Exits with 2 when it cannot start as asked, 1 when a row of ours fails or the record cannot be written, 130 after
    Ctrl-C.
    """
    from lowprec import benches

    known = dict(benches.names())
    if name == "list":
        _list(known)
        return
    if name not in known:
        _fail(f"unknown bench {name!r}: {_instead(name, known)}")
    folder = out or Path("runs", f"bench-{name}")
    try:
        devices = benches.DEVICES if device is None else (device,)
        console = Console(stderr=True, highlight=False)
        record = benches.run(name, benches.Settings(folder, devices, quick, only, console=console))
    except KeyboardInterrupt:
        _fail("stopped; no record was written", INTERRUPTED)
    except _CANNOT_START as error:
        _fail(_reason(error))
    except OSError as error:
        _fail(_reason(error), 1)
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    else:
        benches.show(name, record, folder, _console())
    raise typer.Exit(0 if record["ok"] else 1)


_CANNOT_START = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


@contextlib.contextmanager
def _explained(again: str) -> Iterator[None]:
    """Turn what a study raises into a line and an exit code; `again` is the command that goes on with it.

    Other errors are faults of the program: they keep their traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; what was finished is saved. To go on:\n  {again}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except _CANNOT_START as error:
        _fail(_reason(error))
    except (OSError, MemoryError) as error:
        _fail(f"{_reason(error)}\nwhat was finished is saved. To go on:\n  {again}", 1)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _options(words: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            _fail(f"expected key=value, got {word!r}")
        if key in options:
            _fail(f"{key} is given twice: {options[key]!r} and {value!r}")
        options[key] = value
    return options


def _command(name: str, out: Path | None, quick: bool) -> str:
    """The command that resumes a run; its settings are saved with it."""
    return shlex.join(
        ["lowprec", "study", name, *["--quick"] * quick, *(["--out", str(out)] if out else []), "--resume"]
    )


def _list(known: dict[str, str]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    for row in known.items():
        table.add_row(*row)
    _console().print(table)
