"""The rows: what is measured, against what, and what was promised (docs/SPECIFICATION.md).

A row is a generator of cells. `Suite` holds what all of them need.
"""

import os
import time

from . import backends, engine, media
from .backends import Tidepool, fio, qsd_raw
from .cells import bar, measure, opened, say
from .procs import BenchError, COMMANDS, run

DEPTHS = (1, 32, 128)
MIB = 1 << 20
GIB = 1 << 30


class Suite:
    """Sizes, times and programs of one run."""

    def __init__(self, work, tmpfs, tidepool, loadgen, program, quick):
        self.work, self.tmpfs, self.tidepool, self.quick = work, tmpfs, tidepool, quick
        self.loadgen, self.engine = loadgen, engine.Engine(program)
        self.rounds = 2 if quick else 5
        self.seconds = 0.5 if quick else 3.0
        self.warmup = 0.1 if quick else 0.5
        self.span = 128 * MIB if quick else 1 * GIB
        self.loop_gigabytes = 2 if quick else 14

    def steady(self, endpoint, **options):
        """A contender that runs against what is already there."""
        def one(index):
            return self.loadgen(endpoint, warmup=self.warmup, seconds=self.seconds, span=self.span,
                                seed=index + 1, **options)
        return one

    def raw(self, path, direct=True):
        """Makes `path` a raw image full of data, written through qemu-storage-daemon."""
        with open(path, "wb") as image:
            image.truncate(self.span)
        filler = qsd_raw(path.parent, path.name + "-fill", path, direct)
        seen = COMMANDS.take()
        with filler.serve() as endpoint:
            self.loadgen.fill(endpoint)
        COMMANDS.take()
        COMMANDS.seen = seen
        return path

    def pool(self, work, name="bench", room=4):
        """A pool of `room` times the span with the disk `full`, full of data."""
        pool = Tidepool(self.tidepool, work, name, self.span * room + GIB)
        pool.create("full", self.span)
        with pool.serve() as endpoint:
            self.loadgen.fill(endpoint("full"))
            # A fast backend that loses data is worth nothing: look before measuring.
            self.loadgen(endpoint("full"), note=False, rw="mix", depth=32, verify=True, ops=10000, flush_every=50,
                         seconds=60)
        return pool


def name_paths(work, tmpfs=None):
    COMMANDS.name(work, "$WORK")
    if tmpfs is not None:
        COMMANDS.name(tmpfs, "$TMPFS")


def noise(suite):
    """One and the same backend twice: what difference means nothing."""
    for place, parent, direct in (("tmpfs", suite.tmpfs, False), ("O_DIRECT", suite.work, True)):
        with media.directory(parent, "noise") as work:
            name_paths(work)
            makers = {}
            for name in ("qsd A", "qsd B"):
                path = suite.raw(work / f"{name[-1]}.raw", direct)
                makers[name] = qsd_raw(work, name[-1], path, direct).serve()
            with opened(makers) as ends:
                for rw in ("read", "write"):
                    for depth in DEPTHS:
                        yield measure(
                            "noise", f"{place}, {rw}, QD {depth}",
                            {name: suite.steady(end, rw=rw, depth=depth, wait="spin") for name, end in ends.items()},
                            suite.rounds, subject="qsd A")


def ram(suite):
    """Data in RAM: pool and raw file on tmpfs; and a shared raw base in the page cache."""
    bars = [bar("tidepool", "qsd raw", "iops", 1.5), bar("tidepool", "qsd raw", "cpu", 0.6)]
    with media.directory(suite.tmpfs, "ram") as work:
        name_paths(work)
        raw = suite.raw(work / "raw", direct=False)
        pool = suite.pool(work)
        with pool.serve() as disk, qsd_raw(work, "qsd", raw, False).serve() as qsd:
            ends = {"tidepool": disk("full"), "qsd raw": qsd}
            for rw in ("read", "write"):
                for depth in DEPTHS:
                    yield measure(
                        "ram", f"tmpfs, {'read' if rw == 'read' else 'overwrite'}, QD {depth}",
                        {n: suite.steady(e, rw=rw, depth=depth, wait="spin") for n, e in ends.items()},
                        suite.rounds, bars)
            yield measure("ram", "tmpfs, read, QD 1, client asleep between requests",
                          {n: suite.steady(e, rw="read", depth=1, wait="block") for n, e in ends.items()},
                          suite.rounds)
    with media.directory(suite.work, "base") as work:
        name_paths(work)
        raw = suite.raw(work / "base.raw")
        pool = Tidepool(suite.tidepool, work, "bench", suite.span + GIB)
        pool.create("view", suite.span, base=raw)
        warm(raw)
        # Read-only, and blind to the lock that keeps writers from a base.
        nodes = [backends.file_node(raw, False, "top", **{"read-only": True, "locking": "off"})]
        peer = backends.Qsd(work, "qsd", nodes, writable=False)
        with pool.serve() as disk, peer.serve() as qsd:
            ends = {"tidepool": disk("view"), "qsd raw": qsd}
            for depth in DEPTHS:
                yield measure(
                    "ram", f"page cache (tidepool: shared raw base), read, QD {depth}",
                    {n: suite.steady(e, rw="read", depth=depth, wait="spin") for n, e in ends.items()},
                    suite.rounds, bars)


def warm(path):
    """Reads a file into the page cache."""
    with open(path, "rb", buffering=0) as file:
        while file.read(MIB):
            pass


def direct(suite):
    """Data on the disk, O_DIRECT, the file written out before."""
    with media.directory(suite.work, "direct") as work:
        name_paths(work)
        raw, floor = suite.raw(work / "raw"), suite.raw(work / "fio.raw")
        pool = suite.pool(work)
        with pool.serve() as disk, qsd_raw(work, "qsd", raw, True).serve() as qsd:
            for rw in ("read", "write"):
                for depth in DEPTHS:
                    bars = [bar("tidepool", "qsd raw", "iops", 1.0), bar("tidepool", "qsd raw", "cpu", 0.6)]
                    if depth >= 32:
                        bars.append(bar("tidepool", "fio", "iops", 0.95))
                    contenders = {n: suite.steady(e, rw=rw, depth=depth, wait="spin")
                                  for n, e in (("tidepool", disk("full")), ("qsd raw", qsd))}
                    contenders["fio"] = lambda index, rw=rw, depth=depth: fio(
                        floor, rw, depth, max(1, round(suite.seconds)), suite.span)
                    yield measure("direct", f"{'read' if rw == 'read' else 'overwrite'}, QD {depth}", contenders,
                                  suite.rounds, bars)


class FirstWrites:
    """Contenders that write a fresh fork or overlay, and those that overwrite full images."""

    def __init__(self, suite, work, forks):
        """`forks` names the tidepool forks to prepare: no daemon may own the pool then."""
        self.suite, self.work = suite, work
        self.base = suite.raw(work / "base.raw")
        self.full_raw = suite.raw(work / "raw")
        self.full_qcow2 = work / "full.qcow2"
        backends.qcow2_create(self.full_qcow2, suite.span)
        with self.qcow2([self.full_qcow2], None).serve() as endpoint:
            suite.loadgen.fill(endpoint)
        self.pool = suite.pool(work, room=2 + len(forks))
        for index, fork in enumerate(forks):
            self.pool.fork("full", fork, note=index == 0)

    def qcow2(self, layers, base, name="qcow2"):
        return backends.Qsd(self.work, name, backends.qcow2_nodes(layers, base, True))

    def once(self, endpoint, index, depth, flush_every):
        return self.suite.loadgen(endpoint, rw="write", order="once", depth=depth, seconds=self.suite.seconds,
                                  span=self.suite.span, seed=index + 1, wait="spin",
                                  flush_every=flush_every or None)

    def overlay(self, index, depth, flush_every, options=None):
        """A new overlay each time, with a daemon of its own."""
        path = self.work / "overlay.qcow2"
        backends.qcow2_create(path, self.suite.span, self.base, options=options)
        try:
            with self.qcow2([path], self.base, "overlay").serve() as endpoint:
                return self.once(endpoint, index, depth, flush_every)
        finally:
            os.unlink(path)

    def contenders(self, disk, raw, full, depth, flush_every=0):
        """`raw` and `full` are the endpoints of the full images."""
        return {
            "tidepool fork": lambda i: self.once(disk(f"f{depth}-{i}"), i, depth, flush_every),
            "qsd raw": lambda i: self.once(raw, i, depth, flush_every),
            "qcow2 overlay": lambda i: self.overlay(i, depth, flush_every),
            "qcow2 overlay, extended_l2": lambda i: self.overlay(
                i, depth, flush_every, "extended_l2=on,cluster_size=128k"),
            "qcow2 full": lambda i: self.once(full, i, depth, flush_every),
        }

    def cells(self, row, label, depths, flush_every=0, bars=()):
        with (self.pool.serve() as disk,
              qsd_raw(self.work, "qsd", self.full_raw, True).serve() as raw,
              self.qcow2([self.full_qcow2], None, "full").serve() as full):
            for depth in depths:
                yield measure(row, f"{label}QD {depth}", self.contenders(disk, raw, full, depth, flush_every),
                              self.suite.rounds, bars, subject="tidepool fork")


def fork_write(suite):
    """First writes into a fresh fork, O_DIRECT, every block once, no flush."""
    with media.directory(suite.work, "fork") as work:
        name_paths(work)
        forks = [f"f{depth}-{index}" for depth in DEPTHS for index in range(suite.rounds)]
        first = FirstWrites(suite, work, forks)
        yield from first.cells("fork-write", "", DEPTHS, bars=[bar("tidepool fork", "qsd raw", "iops", 0.8)])


def durable(suite):
    """First writes made durable, on the work file system and on journaled ones.

    A flush after every write at QD 1, after every 32 at QD 32."""
    for kind in (None, "ext4", "xfs"):
        maker = (media.journaled(suite.work, kind, suite.loop_gigabytes) if kind
                 else media.directory(suite.work, "durable"))
        try:
            with maker as work:
                name_paths(work)
                forks = [f"f{depth}-{index}" for depth in (1, 32) for index in range(suite.rounds)]
                first = FirstWrites(suite, work, forks)
                place = f"{kind} on a loop device, " if kind else "work file system, "
                for depth in (1, 32):
                    yield from first.cells("durable", f"{place}flush every {depth}, ", [depth], flush_every=depth)
        except BenchError as error:
            if kind is None or "needs root" not in str(error) and "not installed" not in str(error):
                raise
            say(f"  durable {kind}: skipped, {error}")


class Qcow2Chain:
    """Layers of qcow2, each with a little data of its own over the one below."""

    CLUSTERS_PER_LAYER = 16

    def __init__(self, suite, work):
        self.suite, self.work, self.layers = suite, work, []
        self.base = suite.raw(work / "base.raw", direct=False)

    def grow(self, depth):
        """Has at least `depth` layers. The backing file is named when the chain is opened, so a
        layer is made without opening those below."""
        clusters = self.suite.span // 65536
        while len(self.layers) < depth:
            index = len(self.layers)
            path = self.work / f"layer{index}.qcow2"
            run(["qemu-img", "create", "-q", "-f", "qcow2", path, self.suite.span])
            writes = []
            for k in range(self.CLUSTERS_PER_LAYER):
                at = (index * 7919 + k * 104729) % clusters
                writes += ["-c", f"write -q -P {1 + index % 255} {at * 65536} 65536"]
            run(["qemu-io", *writes, path])
            self.layers.append(path)

    def serve(self, depth, seconds):
        nodes = backends.qcow2_nodes(self.layers[:depth], self.base, False, writable=False)
        return backends.Qsd(self.work, f"chain{depth}", nodes, writable=False).serve(seconds)


def depth(suite):
    """Random reads at growing fork depth, everything in RAM, so that what is seen is the lookup."""
    depths = (1, 10) if suite.quick else (1, 10, 100)
    ours = (*depths, 100) if suite.quick else (*depths, 1000)
    with media.directory(suite.tmpfs, "depth") as work:
        name_paths(work)
        chain = Qcow2Chain(suite, work)
        chain.grow(depths[-1])
        raw = suite.raw(work / "raw", direct=False)
        pool = suite.pool(work, room=3)
        suite.engine("chain", pool.pool, **{"from": "full"}, depth=ours[-1], clusters=chain.CLUSTERS_PER_LAYER)
        makers = {"qsd raw": qsd_raw(work, "qsd", raw, False).serve()}
        makers |= {f"qcow2 depth {d}": chain.serve(d, 120) for d in depths}
        with pool.serve() as disk, opened(makers) as ends:
            served = {"tidepool depth 0": disk("full")}
            served |= {f"tidepool depth {d}": disk(f"d{d}") for d in ours}
            yield measure("depth", "read, QD 32",
                          {n: suite.steady(e, rw="read", depth=32, wait="spin") for n, e in (served | ends).items()},
                          suite.rounds, [bar(f"tidepool depth {d}", "tidepool depth 0", "iops", 0.95) for d in ours],
                          subject="tidepool depth 0")
        if not suite.quick:
            chain.grow(1000)
            yield {"row": "depth", "label": "qcow2 depth 1000", "runs": {}, "bars": [],
                   "note": opens_in(lambda: chain.serve(1000, 100))}


def opens_in(maker):
    """How long a backend takes to appear, in words."""
    begun = time.monotonic()
    try:
        with maker():
            return f"opened in {time.monotonic() - begun:.1f} s"
    except BenchError as error:
        if "did not appear" in str(error):
            return "not open after 100 s"
        return f"does not open: {str(error).splitlines()[-1][:200]}"


ROWS = {"noise": noise, "ram": ram, "direct": direct, "fork-write": fork_write, "durable": durable, "depth": depth,
        **engine.ROWS}
NEEDS_TIDEPOOL = {"ram", "direct", "fork-write", "durable", "depth"}
