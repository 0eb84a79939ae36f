"""Rows of the engine alone, in process: forks and snapshots, many forks, opening. `benches/engine`
measures; here it is run in the places that matter, and held to its promises."""

import json

from . import media
from .cells import at_most, say
from .procs import BACKEND_CPU, BenchError, COMMANDS, pinned, run

FORK_US = 300
FLAT = 1.10
SMALLEST, SHALLOWEST = "1 MiB mapped", "depth 1"


class Engine:
    """The program `benches/engine`."""

    def __init__(self, binary):
        self.binary = binary

    def __call__(self, command, pool, **options):
        """Runs one command; its figures by name."""
        argv = [self.binary, command, "--pool", pool]
        for name, value in options.items():
            argv += [f"--{name}", value]
        argv = pinned(argv, f"0,{BACKEND_CPU}")
        COMMANDS.note(argv)
        lines = [json.loads(line) for line in run(argv, timeout=1800).splitlines()]
        return {line["name"]: line for line in lines}


def together(runs):
    """The figures of several runs that measured each once."""
    figures = []
    for name, first in runs[0].items():
        values = sorted(run[name]["p50"] for run in runs)
        count = len(values)
        figures.append({"name": name, "unit": first["unit"], "n": count, "p50": values[(count - 1) // 2],
                        "p90": values[-(-count * 9 // 10) - 1], "max": values[-1]})
    return figures


def cell(row, label, figures, limits):
    say(f"  {row} {label}: " + ", ".join(f"{f['name']} {f['p50']:.4g} {f['unit']}" for f in figures))
    return {"row": row, "label": label, "runs": {}, "bars": [], "figures": figures, "limits": limits}


def places(suite, name):
    """The work file system and, as root, a journaled one: (what it is, a directory on it)."""
    yield "work file system", media.directory(suite.work, name)
    yield "ext4 on a loop device", media.journaled(suite.work, "ext4", 2)


def latency_limits(figures):
    """Every fork and snapshot is quick, and the largest and deepest as quick as the least."""
    names = [figure["name"] for figure in figures]
    limits = []
    for kind in ("fork", "snapshot"):
        subjects = [name.removeprefix(f"{kind}, ") for name in names if name.startswith(f"{kind}, ")]
        limits += [at_most(f"{kind}, {subject}", FORK_US) for subject in subjects]
        for least, word in ((SMALLEST, "mapped"), (SHALLOWEST, "depth")):
            most = [subject for subject in subjects if word in subject][-1]
            limits.append(at_most(f"{kind}, {most}", FLAT, f"{kind}, {least}"))
    return limits


def fork_latency(suite):
    """Durable forks and snapshots of disks of many sizes and depths, in process."""
    for place, maker in places(suite, "latency"):
        try:
            with maker as work:
                COMMANDS.name(work, "$WORK")
                found = suite.engine("latency", work / "pool", mapped="1G" if suite.quick else "1T",
                                     depth=10 if suite.quick else 1000, rounds=50 if suite.quick else 300)
        except BenchError as error:
            if "needs root" not in str(error):
                raise
            say(f"  fork-latency, {place}: skipped, {error}")
            continue
        figures = list(found.values())
        yield cell("fork-latency", place, figures, latency_limits(figures))


def many_forks(suite):
    """A thousand forks of one disk: time and memory, in process."""
    count = 100 if suite.quick else 1000
    with media.directory(suite.work, "many") as work:
        COMMANDS.name(work, "$WORK")
        runs = [suite.engine("many", work / "pool", forks=count) for _ in range(suite.rounds)]
    limits = [at_most(f"{count} forks {how}", count / 1000) for how in ("at once", "one by one")]
    limits += [at_most(f"memory of a fork made {how}", 64) for how in ("at once", "one by one")]
    yield cell("many-forks", "work file system", together(runs), limits)


def open_time(suite):
    """Opening a pool with a large map, each time in a new process; its checkpoint image."""
    terabytes = 1 / 16 if suite.quick else 1
    for order in ("sequential", "random"):
        for journal in ("short", "long"):
            with media.directory(suite.work, "open") as work:
                COMMANDS.name(work, "$WORK")
                pool = work / "pool"
                made = suite.engine("map", pool, mapped=f"{int(terabytes * 1024)}G", order=order, journal=journal)
                opened = [suite.engine("open", pool) for _ in range(suite.rounds)]
            figures = [*made.values(), *together(opened)]
            # A map so small says nothing: opening it is all journal.
            limits = [] if suite.quick else [at_most("open", made["mapped"]["p50"])]
            yield cell("open", f"{order} map, {journal} journal", figures, limits)


ROWS = {"fork-latency": fork_latency, "many-forks": many_forks, "open": open_time}
