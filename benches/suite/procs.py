"""Child processes: pinned, logged, always ended."""

import json
import os
import shlex
import signal
import socket
import subprocess
import time

CLIENT_CPU = 0
BACKEND_CPU = 1


class BenchError(Exception):
    """Something a benchmark needs is missing or failed."""


class Commands:
    """Remembers the commands of a row, each once, with paths shortened to names."""

    def __init__(self):
        self.seen = []
        self.names = []

    def name(self, path, name):
        """Shows `path` as `name` from now on."""
        self.names.append((str(path), name))
        self.names.sort(key=lambda pair: -len(pair[0]))

    def note(self, argv):
        line = shlex.join(str(a) for a in argv)
        for path, name in self.names:
            line = line.replace(path, name)
        if line not in self.seen:
            self.seen.append(line)

    def take(self):
        """The commands since the last call."""
        seen, self.seen = self.seen, []
        return seen


COMMANDS = Commands()


def run(argv, timeout=600, note=False, check=True):
    """Runs to the end; returns standard output."""
    argv = [str(a) for a in argv]
    if note:
        COMMANDS.note(argv)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout)
    if check and done.returncode != 0:
        raise BenchError(f"{shlex.join(argv)}\n  exit {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def pinned(argv, cpu=BACKEND_CPU):
    """`cpu` may be a list as taskset takes it."""
    return ["taskset", "-c", str(cpu), *[str(a) for a in argv]]


def can_connect(path):
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.connect(str(path))
        return True
    except OSError:
        return False
    finally:
        probe.close()


class Daemon:
    """A backend process on the backend's CPU. A context manager: leaving it ends the process."""

    def __init__(self, argv, log, note=True):
        self.argv = pinned(argv)
        self.log = log
        self.process = None
        if note:
            COMMANDS.note(self.argv)

    def __enter__(self):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        return self

    @property
    def pid(self):
        return self.process.pid

    def wait_for(self, path, seconds=60):
        """Waits until `path` exists. Connecting would take the place of the one client some
        backends allow, so it only looks."""
        deadline = time.monotonic() + seconds
        while not os.path.exists(path):
            if self.process.poll() is not None:
                with open(self.log, errors="replace") as log:
                    tail = log.read()[-2000:]
                raise BenchError(f"{shlex.join(self.argv)[:400]}\n  ended with {self.process.returncode}: {tail}")
            if time.monotonic() > deadline:
                raise BenchError(f"{path} did not appear in {seconds} s")
            time.sleep(0.005)
        return path

    def __exit__(self, *_error):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class LoadGen:
    """The load generator: `benches/loadgen`."""

    def __init__(self, binary):
        self.binary = binary

    def __call__(self, endpoint, note=True, **options):
        argv = [self.binary, "--socket", endpoint.socket, "--cpu", CLIENT_CPU]
        if endpoint.pid:
            argv += ["--backend-pid", endpoint.pid]
        for name, value in options.items():
            flag = "--" + name.replace("_", "-")
            if value is True:
                argv.append(flag)
            elif value is not None and value is not False:
                argv += [flag, value]
        if note:
            hidden = {"--socket": "SOCKET", "--backend-pid": "PID", "--seed": "ROUND"}
            COMMANDS.note([hidden.get(before, a) for before, a in zip(["", *argv], argv)])
        return json.loads(run(argv, timeout=900))

    def fill(self, endpoint, span=None):
        """Writes the disk from end to end, incompressible, then flushes."""
        self(endpoint, note=False, rw="write", order="fill", block=65536, depth=8, span=span, seconds=900)
        self(endpoint, note=False, rw="write", order="fill", block=4096, depth=1, ops=2, flush_every=1,
             seconds=60)
