"""`microlm lineage`, `microlm runs` and `microlm doctor`: what is on this disk and on this machine."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
Root = Annotated[Path, typer.Argument(help="the folder that holds the runs")]
RootOption = Annotated[Path, typer.Option("--root", help="the folder that holds the runs")]

runs_app = typer.Typer(no_args_is_help=True, help="List, remove and sweep up runs.")


def register(app: typer.Typer) -> None:
    """Add the three commands."""
    app.command("lineage")(lineage)
    app.command("doctor")(doctor)
    app.add_typer(runs_app, name="runs")


def lineage(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="an artifact, or a run with several")],
    as_json: AsJson = False,
) -> None:
    """Show the family tree of an artifact and check every byte of it.

    Every file is compared with its manifest, every input with what it was when it was used. Exit code 1 when
    something is damaged.

    \b
    Example:
      microlm lineage runs/quickstart
    """
    from microlm.core import lineage as tree

    nodes = tree.forest(directory)
    typer.echo(json.dumps(tree.to_json(nodes), ensure_ascii=False) if as_json else tree.render(nodes))
    if not tree.is_intact(nodes):
        bad = {p.url: p.problems[0] for n in nodes for p in n.walk() if p.problems}
        url, problem = next(iter(bad.items()))
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        typer.echo(f"damaged: {url}: {problem}{more}", err=True)
        raise typer.Exit(1)


@runs_app.command("list")
def list_runs(root: Root = Path("runs"), as_json: AsJson = False) -> None:
    """Show every stage under ROOT, its state and size.

    \b
    Example:
      microlm runs list
    """
    from microlm.core import runs

    none_yet = root == Path("runs") and not root.exists()
    found = [] if none_yet else runs.list_runs(root)
    if as_json:
        rows = [vars(r) | {"digest": r.digest or None} for r in found]
        typer.echo(json.dumps({"schema": 1, "runs": rows}, ensure_ascii=False))
        return
    if not found:
        typer.echo(f"{root}: no runs yet; 'microlm run recipes/quickstart.yaml' makes one", err=True)
        return
    width = max(len(r.name) for r in found)
    for r in found:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(r.finished)) if r.finished else "-"
        took = f"{r.seconds:.1f} s" if r.seconds is not None else "-"
        columns = f"{r.name:<{width}}  {r.kind:<11} {r.state:<10} {r.digest[:12] or '-':<12}"
        typer.echo(f"{columns}  {_size(r.bytes):>9}  {took:>9}  {when}")


@runs_app.command("rm")
def remove_run(
    run: Annotated[str, typer.Argument(metavar="RUN/STAGE", help="a stage, or a run with all its stages")],
    root: RootOption = Path("runs"),
    force: Annotated[
        bool, typer.Option("--force", help="also when another artifact was made from it")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a stage's artifact, unless another artifact was made from it.

    \b
    Example:
      microlm runs rm quickstart/report
    """
    from microlm.core import runs

    gone = [str(p) for p in runs.remove(run, root, force=force)]
    if as_json:
        typer.echo(json.dumps({"schema": 1, "removed": gone}, ensure_ascii=False))
        return
    for path in gone:
        typer.echo(f"removed {path}")


@runs_app.command("gc")
def collect(
    root: Root = Path("runs"),
    yes: Annotated[bool, typer.Option("--yes", help="delete; without it they are only listed")] = False,
    as_json: AsJson = False,
) -> None:
    """Find what interrupted stages left; with --yes delete it.

    What a living process holds is left alone. An unfinished stage that you mean to continue is among
    them: its next run would start anew.

    \b
    Example:
      microlm runs gc --yes
    """
    from microlm.core import runs

    found = runs.collect(root) if yes else runs.leftovers(root)
    total = sum(item.bytes for item in found)
    if as_json:
        rows = [{"path": str(item.path), "bytes": item.bytes} for item in found]
        typer.echo(json.dumps({"schema": 1, "deleted": yes, "bytes": total, "leftovers": rows}))
        return
    for item in found:
        typer.echo(f"{'deleted' if yes else 'would delete'} {item.path}  {_size(item.bytes)}")
    hint = "" if yes or not found else f"; 'microlm runs gc {root} --yes' deletes what is listed"
    count = f"{len(found)} leftover{'' if len(found) == 1 else 's'}"
    typer.echo(f"{count}, {_size(total)}{hint}", err=True)


class Check(NamedTuple):
    """One line of `doctor`. `ok` None: only a fact, or something that can be done without."""

    name: str
    value: str
    ok: bool | None
    hint: str = ""


def doctor(as_json: AsJson = False) -> None:
    """Say what this machine offers, and what is missing. Exit code 1 when MicroLM cannot run.

    \b
    Example:
      microlm doctor
    """
    checks = _checks()
    if as_json:
        rows = [c._asdict() for c in checks]
        typer.echo(json.dumps({"schema": 1, "ok": all(c.ok is not False for c in checks), "checks": rows}))
    else:
        for c in checks:
            mark = {True: "ok", False: "MISSING", None: ""}[c.ok]
            typer.echo(f"{c.name:<10} {c.value:<44} {mark:<8} {c.hint}".rstrip())
    if any(c.ok is False for c in checks):
        raise typer.Exit(1)


def _checks() -> list[Check]:
    from microlm import __version__
    from microlm.core import runtime

    torch_version = runtime.package_version("torch")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    slow = "works without, about three times slower; install g++"
    return [
        Check("microlm", __version__, None),
        Check("python", platform.python_version(), sys.version_info >= (3, 11)),
        Check(
            "torch",
            torch_version or "not installed",
            bool(torch_version),
            "" if torch_version else "pip install torch",
        ),
        *(_device_checks() if torch_version else []),
        Check("cores", str(cores), None, "" if cores > 1 else "one process: set parallel.processes=1"),
        Check(
            "memory",
            _size(memory),
            None if memory < 4e9 else True,
            "the quickstart wants 4 GB" if memory < 4e9 else "",
        ),
        Check("compiler", compiler or "none", True if compiler else None, "" if compiler else slow),
        _cache_check(runtime.cache_dir()),
    ]


def _device_checks() -> list[Check]:
    import torch

    from microlm.core import runtime

    device = runtime.device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    fast = runtime.has_fast_bfloat16()
    hint = "" if fast else "no native bf16: float32 is the faster choice here"
    return [Check("device", name, None), Check("bf16", "native" if fast else "emulated", fast or None, hint)]


def _cache_check(folder: Path) -> Check:
    place = folder
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return Check("cache", str(folder), False, "not writable; set MICROLM_CACHE to a folder that is")
    return Check("cache", f"{folder} ({_size(shutil.disk_usage(place).free)} free)", True)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
