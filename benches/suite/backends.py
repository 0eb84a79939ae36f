"""Backends under test: tidepool and qemu-storage-daemon, and fio as the floor without any."""

import collections
import contextlib
import json

from .procs import BenchError, Daemon, pinned, run, COMMANDS

Endpoint = collections.namedtuple("Endpoint", "socket pid")


class Qsd:
    """One qemu-storage-daemon with one export.

    The export runs in an iothread: on the machines tried that is the daemon's fastest way of
    working, and the comparison is with its best.
    """

    def __init__(self, work, name, nodes, writable=True):
        self.work, self.name, self.nodes, self.writable = work, name, nodes, writable

    @contextlib.contextmanager
    def serve(self, seconds=60):
        socket = self.work / f"{self.name}.sock"
        argv = ["qemu-storage-daemon", "--object", "iothread,id=io0"]
        for node in self.nodes:
            argv += ["--blockdev", json.dumps(node)]
        argv += ["--export", f"type=vhost-user-blk,id=e0,node-name=top,addr.type=unix,addr.path={socket},"
                 f"writable={'on' if self.writable else 'off'},num-queues=1,iothread=io0"]
        short = len(self.nodes) <= 4
        with Daemon(argv, self.work / f"{self.name}.log", note=short) as daemon:
            daemon.wait_for(socket, seconds)
            yield Endpoint(socket, daemon.pid)


def file_node(path, direct, node="top", **more):
    return {"driver": "file", "node-name": node, "filename": str(path), "aio": "io_uring",
            "cache": {"direct": direct}, "discard": "unmap", **more}


def qsd_raw(work, name, path, direct):
    return Qsd(work, name, [file_node(path, direct)])


def qcow2_nodes(layers, base, direct, writable=True):
    """Nodes for a chain: `layers` from the lowest to the top, over the raw `base` if any. Only a
    chain that is not writable can share layers with another."""
    nodes, backing = [], None
    if base is not None:
        nodes.append(file_node(base, direct, "base", **{"read-only": True}))
        backing = "base"
    for index, layer in enumerate(layers):
        is_top = index == len(layers) - 1
        read_only = {} if is_top and writable else {"read-only": True}
        nodes.append(file_node(layer, direct, f"file{index}", **read_only))
        name = "top" if is_top else f"layer{index}"
        nodes.append({"driver": "qcow2", "node-name": name, "file": f"file{index}", "backing": backing,
                      "cache": {"direct": direct}, "discard": "unmap", **read_only})
        backing = name
    return nodes


def qcow2_create(path, size, base=None, base_format="raw", options=None):
    argv = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if options:
        argv += ["-o", options]
    if base is not None:
        argv += ["-b", base, "-F", base_format]
    run([*argv, path, size], note=True)


class Tidepool:
    """One pool, driven by the command line."""

    def __init__(self, binary, work, name, size):
        self.binary, self.work = binary, work
        self.pool = work / f"{name}.pool"
        self.sockets = work / f"{name}.socks"
        self.sockets.mkdir()
        self.command("pool", "create", self.pool, "--size", size)

    def command(self, *argv, note=True):
        return run([self.binary, *argv], note=note)

    def disk(self, name):
        return f"{self.pool}:{name}"

    def create(self, name, size, base=None):
        argv = ["disk", "create", self.disk(name), "--size", size]
        if base is not None:
            argv += ["--base", base, "--base-format", "raw"]
        self.command(*argv)

    def fork(self, source, target, note=True):
        self.command("disk", "fork", self.disk(source), self.disk(target), note=note)

    @contextlib.contextmanager
    def serve(self):
        """Serves every disk of the pool; yields a function from disk name to endpoint."""
        argv = [self.binary, "serve", self.pool, "--sockets", self.sockets]
        with Daemon(argv, self.work / "tidepool.log") as daemon:
            def endpoint(disk):
                return Endpoint(daemon.wait_for(self.sockets / f"{disk}.sock"), daemon.pid)
            yield endpoint


def fio(path, rw, depth, seconds, span, note=True):
    """fio on the raw file itself, io_uring and O_DIRECT, on the backend's CPU; the shape of a load
    generator's report."""
    argv = pinned(["fio", "--name=raw", f"--filename={path}", "--ioengine=io_uring", "--direct=1", "--bs=4k",
                   f"--rw={'randread' if rw == 'read' else 'randwrite'}", f"--iodepth={depth}", f"--size={span}",
                   "--time_based", f"--runtime={seconds}", "--ramp_time=0.5", "--norandommap", "--randrepeat=0",
                   "--overwrite=1", "--fallocate=none", "--output-format=json"])
    if note:
        COMMANDS.note(argv)
    text = run(argv)
    job = json.loads(text[text.index("{"):])["jobs"][0]
    side = job["read" if rw == "read" else "write"]
    if not side["total_ios"]:
        raise BenchError("fio did nothing")
    clat = side["clat_ns"]["percentile"]
    cpu_seconds = (job["usr_cpu"] + job["sys_cpu"]) / 100 * side["runtime"] / 1000
    return {
        "iops": side["iops"],
        "latency_us": {"p50": clat["50.000000"] / 1e3, "p99": clat["99.000000"] / 1e3},
        "cpu_us": {"backend": cpu_seconds * 1e6 / side["total_ios"]},
    }
