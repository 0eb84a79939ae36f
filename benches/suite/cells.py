"""A cell: one workload, several contenders, interleaved rounds, medians, spread, bars."""

import contextlib
import statistics
import sys

METRICS = {
    "iops": (lambda run: run["iops"], True),
    "p50": (lambda run: run["latency_us"]["p50"], False),
    "p99": (lambda run: run["latency_us"]["p99"], False),
    "cpu": (lambda run: run["cpu_us"]["backend"], False),
    "flush_p50": (lambda run: (run.get("flush_us") or {}).get("p50"), False),
}


def say(text):
    print(text, file=sys.stderr, flush=True)


def bar(of, against, metric, limit):
    """A promise: the median over rounds of `of`/`against`, at least `limit` where more is better
    and at most `limit` where less is."""
    return {"of": of, "against": against, "metric": metric, "limit": limit}


def at_most(of, limit, against=None):
    """A promise about figures of the engine: the median of `of` is at most `limit` in its unit or,
    with `against`, times the median of that."""
    return {"of": of, "against": against, "limit": limit}


def summary(values):
    """Median, least and most; none when there is nothing."""
    values = [v for v in values if v is not None]
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def metric_of(cell, contender, metric):
    read, _ = METRICS[metric]
    return [read(run) for run in cell["runs"].get(contender, [])]


def ratio(cell, of, against, metric):
    """Ratios round by round: what the machine did meanwhile cancels out."""
    pairs = zip(metric_of(cell, of, metric), metric_of(cell, against, metric))
    return summary([a / b for a, b in pairs if a and b])


def is_met(one, value):
    """Whether a bar is met; the median decides, rounded as it is printed."""
    more_is_better = METRICS[one["metric"]][1]
    median = round(value["median"], 2)
    return median >= one["limit"] if more_is_better else median <= one["limit"]


def measure(row, label, contenders, rounds, bars=(), **about):
    """Runs every contender once a round, in turn, and returns the cell.

    `contenders` maps a name to a function of the round that makes one run. The order turns round
    every other round, so that nobody always runs on what another left behind.
    """
    cell = {"row": row, "label": label, "runs": {name: [] for name in contenders}, "bars": list(bars), **about}
    for index in range(rounds):
        names = list(contenders)
        for name in names if index % 2 == 0 else reversed(names):
            cell["runs"][name].append(contenders[name](index))
    parts = []
    for name in contenders:
        iops, cpu = summary(metric_of(cell, name, "iops")), summary(metric_of(cell, name, "cpu"))
        parts.append(f"{name} {iops['median']:.0f}" + (f" ({cpu['median']:.1f} us)" if cpu else ""))
    say(f"  {row} {label}: " + ", ".join(parts))
    return cell


@contextlib.contextmanager
def opened(makers):
    """Enters every context manager of a dictionary and leaves all of them."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(maker) for name, maker in makers.items()}
