"""Results to docs/BENCHMARKS.md and docs/fork-depth.svg."""

import re

from . import plot
from .cells import METRICS, is_met, metric_of, ratio, summary

METRIC_NAMES = {"iops": "IOPS", "cpu": "CPU per I/O", "p50": "p50", "p99": "p99", "flush_p50": "flush p50"}

TITLES = {
    "noise": ("Noise", "The same backend against itself. A ratio elsewhere that lies within this spread means nothing."),
    "ram": ("Data in RAM", "4 KiB random, through vhost-user-blk. On tmpfs both the pool and the raw file lie on tmpfs; "
            "in the page cache, both backends read the same raw file, which to tidepool is the base of a disk."),
    "direct": ("Data on the disk", "4 KiB random, O_DIRECT. fio reads and writes a raw file itself, with no guest and "
               "no backend between."),
    "fork-write": ("First writes into a fresh fork", "4 KiB, every block of the disk once in random order, O_DIRECT, no "
                   "flush. Every round gets a fork or an overlay that nobody has written to."),
    "durable": ("Durable first writes", "As above with flushes. A request is a write; flushes are not counted as I/O, "
                "but take their time."),
    "depth": ("Reads at fork depth", "4 KiB random reads at QD 32 on tmpfs. Every layer holds 16 clusters of its own over "
              "the layers below. The layers of tidepool are forks of forks, all in one pool and served by one daemon."),
    "fork-latency": ("Durable forks and snapshots", "In process, with the pool's background thread. Each is durable when "
                     "it returns. Disks take turns, so what else the machine did hits all of them. Maps are made without "
                     "the data: the engine does all it would do otherwise. In the last rows a 4 KiB write precedes "
                     "each fork, whose flush it then pays."),
    "many-forks": ("Many forks of one disk", "In process. The memory is the growth of the resident set."),
    "open": ("Opening", "Each opening in a new process. A sequential map compresses best in the checkpoint image, a random "
             "map not at all. The journal is short just after an image came into force, and as long as it gets just "
             "before the next. Of the journal, what the image does not cover is replayed."),
}


def number(value):
    if value is None:
        return "-"
    if value >= 10000:
        return f"{value / 1000:.0f}k"
    if value >= 1000:
        return f"{value / 1000:.1f}k"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def spread(value):
    if value is None:
        return "-"
    return f"{number(value['median'])} ({number(value['min'])}..{number(value['max'])})"


def spread_ratio(value):
    return "-" if value is None else f"{value['median']:.2f} ({value['min']:.2f}..{value['max']:.2f})"


def table(lines):
    head, *body = lines
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in body)]


def cell_lines(cell):
    subject = cell.get("subject", "tidepool")
    has_flush = any(v for name in cell["runs"] for v in metric_of(cell, name, "flush_p50"))
    for name in cell["runs"]:
        against = ratio(cell, subject, name, "iops") if name != subject else None
        line = [cell["label"], name, *(spread(summary(metric_of(cell, name, m))) for m in ("iops", "p50", "p99", "cpu"))]
        if has_flush:
            line[3] += f", flush {number(summary(metric_of(cell, name, 'flush_p50'))['median'])}"
        yield [*line, spread_ratio(against)]


def figure_lines(cell):
    for figure in cell.get("figures", []):
        yield [cell["label"], figure["name"], *(number(figure[q]) for q in ("p50", "p90", "max")), figure["unit"],
               str(figure["n"])]


def promise(one):
    sign = ">=" if METRICS[one["metric"]][1] else "<="
    return f"{one['of']} {sign} {one['limit']:g} x {one['against']}, {METRIC_NAMES[one['metric']]}"


def limit_lines(cell):
    """As `verdicts`, for figures of the engine."""
    figures = {figure["name"]: figure for figure in cell.get("figures", [])}
    for one in cell.get("limits", []):
        unit, value = figures[one["of"]]["unit"], figures[one["of"]]["p50"]
        text = f"{one['of']} <= {one['limit']:g} {unit}"
        if one["against"]:
            value /= figures[one["against"]]["p50"]
            text, unit = f"{one['of']} <= {one['limit']:g} x {one['against']}", ""
        is_kept = round(value, 2) <= one["limit"]
        yield [cell["label"], text, f"{number(value)} {unit}".strip(), "met" if is_kept else "**MISSED**"]


def verdicts(row):
    """One line a bar: (label, promise, measured, verdict)."""
    for cell in row["cells"]:
        yield from limit_lines(cell)
        for one in cell["bars"]:
            value = ratio(cell, one["of"], one["against"], one["metric"])
            if value is not None:
                yield [cell["label"], promise(one), spread_ratio(value), "met" if is_met(one, value) else "**MISSED**"]


def others(row):
    """CPUs that neither client nor backend used, run by run: the kernel's threads and other work."""
    for cell in row["cells"]:
        for run in (run for runs in cell["runs"].values() for run in runs):
            if "machine_without_client" in run["cpu_us"]:
                rest = run["cpu_us"]["machine_without_client"] - run["cpu_us"]["backend"]
                yield max(0.0, rest * run["iops"] / 1e6)


def about(row):
    rest = summary(others(row))
    quick = " A smoke test: the figures mean little." if row["quick"] else ""
    if rest is None:
        return f"Commit {row['commit']}, {row['date']}.{quick}"
    return (f"Commit {row['commit']}, {row['date']}: medians of {row['rounds']} interleaved rounds of {row['seconds']:g} s "
            f"on {row['span_mib']} MiB (least..most). Kernel threads and other work took {rest['median']:.2f} CPUs "
            f"({rest['min']:.2f}..{rest['max']:.2f}).{quick}")


def section(name, row):
    title, text = TITLES[name]
    lines = [f"## {title}", "", text, "", about(row), ""]
    if any(cell.get("figures") for cell in row["cells"]):
        head = ["Where", "What", "p50", "p90", "Most", "Unit", "Times"]
        lines += table([head, *(line for cell in row["cells"] for line in figure_lines(cell))])
    else:
        subject = next((c.get("subject", "tidepool") for c in row["cells"] if c["runs"]), "tidepool")
        head = ["Workload", "Backend", "IOPS", "p50 us", "p99 us", "CPU us per I/O", f"{subject} : this"]
        lines += table([head, *(line for cell in row["cells"] for line in cell_lines(cell))])
    lines += [""] + [f"{cell['label']}: {cell['note']}.\n" for cell in row["cells"] if cell.get("note")]
    bars = list(verdicts(row))
    if bars:
        lines += [*table([["Workload", "Promise", "Measured", "Verdict"], *bars]), ""]
    if name == "depth":
        lines += ["![IOPS over fork depth](fork-depth.svg)", ""]
    lines += ["<details><summary>Commands</summary>", "", "```", *row["commands"], "```", "", "</details>", ""]
    return lines


PREAMBLE = """# Benchmarks

Written by `scripts/bench`; do not edit. Trust ratios, not absolutes: contenders take turns within seconds of each
other, and a ratio is formed round by round, so what else the machine did cancels out.

The client is `benches/loadgen`, a closed loop on one virtqueue as a guest has it, pinned to CPU 0; it spins on the used
ring unless a row says otherwise, so that its own wake-ups are not in the latency. Backends are pinned to CPU 1.
CPU per I/O is the user and system time of all threads of the backend, without the kernel's own threads.
qemu-storage-daemon runs its export in an iothread, its fastest way here. A promise is judged by the median.
"""


def series_of(results):
    """Fork-depth points: {series: [(depth, iops summary)]}."""
    found = {}
    for cell in results["rows"].get("depth", {}).get("cells", []):
        for name in cell["runs"]:
            match = re.fullmatch(r"(\S+) depth (\d+)", name)
            if match:
                iops = summary(metric_of(cell, name, "iops"))
                found.setdefault(match[1], []).append((int(match[2]), iops))
    return {name: sorted(points, key=lambda p: p[0]) for name, points in found.items()}


def absent_of(results):
    """Fork-depth points without a figure: [(series, depth, why)]."""
    cells = results["rows"].get("depth", {}).get("cells", [])
    found = [(re.fullmatch(r"(\S+) depth (\d+)", cell["label"]), cell.get("note")) for cell in cells]
    return [(match[1], int(match[2]), note) for match, note in found if match and note]


def write(results, docs, order):
    """Writes the documents; returns the number of promises missed."""
    done = [name for name in order if name in results["rows"]]
    lines = [PREAMBLE]
    if done:
        machine = results["rows"][done[-1]]["machine"]
        lines += [*table([["Machine", ""], *([k, str(v)] for k, v in machine.items())]), ""]
    all_bars = [line for name in done for line in verdicts(results["rows"][name])]
    missed = [line for line in all_bars if line[-1] != "met"]
    lines += [f"{len(all_bars) - len(missed)} of {len(all_bars)} promises met.", ""] if all_bars else []
    if missed:
        lines += [*table([["Missed", "Promise", "Measured", "Verdict"], *missed]), ""]
    for name in done:
        lines += section(name, results["rows"][name])
    (docs / "BENCHMARKS.md").write_text("\n".join(lines))
    series = series_of(results)
    if series:
        (docs / "fork-depth.svg").write_text(plot.depth_plot(series, absent_of(results)))
    return len(missed)
