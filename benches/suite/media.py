"""Where the data lies: the work file system, tmpfs, or a journaled file system on a loop device."""

import contextlib
import os
import pathlib
import shutil

from .procs import BenchError, run


@contextlib.contextmanager
def directory(parent, name):
    """A fresh directory, removed at the end."""
    path = pathlib.Path(parent) / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def file_system_of(path):
    """Type, source and options of the file system `path` is on."""
    best = None
    with open("/proc/self/mounts") as mounts:
        for line in mounts:
            source, at, kind, options = line.split()[:4]
            if (str(path) + "/").startswith(at.rstrip("/") + "/"):
                if best is None or len(at) >= len(best[0]):
                    best = (at, f"{kind} ({options}) on {source}")
    return best[1] if best else "unknown"


@contextlib.contextmanager
def journaled(parent, kind, gigabytes):
    """A fresh journaled `kind` ("ext4" or "xfs") on a loop device with direct I/O.

    The image is written out first: a loop device over a sparse or unwritten file would measure
    the allocation of the file system below.
    """
    if os.geteuid() != 0:
        raise BenchError("a loop device needs root")
    maker = f"mkfs.{kind}"
    if shutil.which(maker) is None:
        raise BenchError(f"{maker} is not installed")
    with directory(parent, f"loop-{kind}") as work:
        image, mount = work / "image", work / "mnt"
        mount.mkdir()
        run(["dd", "if=/dev/zero", f"of={image}", "bs=1M", f"count={gigabytes * 1024}", "oflag=direct"], note=False)
        device = run(["losetup", "--direct-io=on", "--find", "--show", image], note=False).strip()
        try:
            quiet = ["-q", "-f"] if kind == "xfs" else ["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]
            run([maker, *quiet, device], note=True)
            run(["mount", device, mount], note=True)
            try:
                yield mount
            finally:
                run(["umount", mount], note=False)
        finally:
            run(["losetup", "-d", device], note=False, check=False)
