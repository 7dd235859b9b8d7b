"""Running code that a model wrote, in a process of its own with limits. THIS IS NO SECURITY BOUNDARY.

The limits keep a bad program from taking the machine along by accident: it cannot use more CPU time, memory, disk in
its folder or wall time than it was given, and its processes are killed with it as one group. They do not keep a hostile
one from anything the user may do: it can read and write files outside its folder, open connections, and leave its
process group. Run it where that does not matter: a container or a virtual machine with no secrets and no network.

Windows has neither resource limits nor process groups of this kind; `run` refuses there.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from .store import Store, content_key


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    seconds: wall time; cpu_seconds: CPU time of each process; memory: bytes of address space of each process; file:
    bytes of each file it writes; disk, files: bytes, and files and folders, in its folder; processes: processes and
    threads it may have at a time; output: bytes of standard output and standard error each.

    The system enforces cpu_seconds, memory and file, and processes for all users but root. Wall time, disk, files,
    output and processes are watched from outside: the program is killed soon after, not at once. What it deletes
    between two looks at its folder is not seen, nor what it writes elsewhere.
    """

    seconds: float = 12.0
    cpu_seconds: int = 8
    memory: int = 1 << 30
    file: int = 1 << 20
    disk: int = 1 << 24
    files: int = 1000
    processes: int = 16
    output: int = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and the end of what it wrote to standard error.

    "passed": it came to its last line. "failed": it raised, exited before that, or was killed by a limit of the system.
    "timeout" (wall time), "disk" (its folder had too much or too many files), "output" (it printed too much),
    "processes" (it started too many): it was killed, or what it left was over the limit.
    """

    how: str
    said: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ran to its end."""
        return self.how == "passed"


#: Seconds between two looks at a program's folder.
LOOK = 0.1

#: Wall time of the second run of a program that timed out, over that of the first. In it a program
#: that computes reaches its CPU time even with a fifth of a core; what times out again was waiting.
PATIENCE = 4

#: Runs in the new interpreter before the program: the limits bind everything it starts. The last line of a program
#: that ran to its end prints a word made for this run: exit(0) in the middle is no pass.
PRELUDE = """
import resource, sys
def limit(kind, most):
    try:
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    except (ValueError, OSError):
        pass
cpu, memory, file, processes = map(int, sys.argv[1:5])
limit(resource.RLIMIT_CPU, cpu)
limit(resource.RLIMIT_AS, memory)
limit(resource.RLIMIT_FSIZE, file)
limit(resource.RLIMIT_CORE, 0)
limit(resource.RLIMIT_NPROC, processes)
word = sys.stdin.readline()
source = open("program.py", encoding="utf-8").read()
exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
sys.stdout.flush()
sys.__stderr__.write("\\n" + word)
"""


def check_allowed(name: str, allowed: bool) -> None:
    """ValueError unless the user has allowed the code of a task to be run."""
    if not allowed:
        raise ValueError(
            f"{name} runs code that a model wrote; give --allow-code-execution where that can do no harm (a container "
            "without secrets), or leave it out"
        )


def passed(program: str, store: Store) -> bool:
    """Whether a program ran to its end; its end is kept. One that takes too much wall time is run once more with more
    of it: that may have been the machine's doing, and what is kept outlives this run."""
    key = content_key("run", program)
    if store.get(key) is None:
        outcome, limits = run(program), Limits()
        if outcome.how == "timeout":
            outcome = run(program, replace(limits, seconds=PATIENCE * limits.seconds))
        store.put({key: {"how": outcome.how, "said": outcome.said[-300:]}})
    return bool(store.get(key)["how"] == "passed")


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program by itself: the standard library alone, no arguments, no input, an environment of its own, a
    temporary folder as cwd and HOME.

    The folder is deleted afterwards; what the program wrote elsewhere stays. ValueError where the system cannot limit.
    """
    if os.name != "posix":
        raise ValueError("code is run with POSIX resource limits, which this system lacks; use Linux or macOS")
    limits = limits or Limits()
    word = os.urandom(16).hex()
    with tempfile.TemporaryDirectory(prefix="diffulm-", ignore_cleanup_errors=True) as name:
        (Path(name) / "program.py").write_text(program, encoding="utf-8", errors="replace")
        settings = (limits.cpu_seconds, limits.memory, limits.file, limits.processes + _running())
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", PRELUDE, *map(str, settings)],
            cwd=name, env={"HOME": name, "TMPDIR": name, "LANG": "C.UTF-8"}, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        with child:
            try:
                how, said = _watch(child, word, name, limits)
            finally:
                _kill(child)
    if how == "ended" and child.returncode == 0 and word in said:
        return Outcome("passed")
    return Outcome("failed" if how == "ended" else how, said.replace(word, "").strip()[-2000:])


def _running(session: int | None = None) -> int:
    """Processes and threads of this user, or of a session; 0 where the system does not list them."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if session is None:
                mine = folder.stat().st_uid == os.getuid()
            else:  # fields behind the name, which may hold anything: state, parent, group, session, ..., threads
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                mine = int(fields[3]) == session
            count += len(list((folder / "task").iterdir())) if mine else 0
    return count


def _overfull(folder: str, limits: Limits) -> bool:
    """Whether a folder holds more than a program may write. No further files are looked at than that takes."""
    entries, size, left = 0, 0, [folder]
    while left:
        with contextlib.suppress(OSError), os.scandir(left.pop()) as found:
            for entry in found:
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    size += entry.stat(follow_symlinks=False).st_size
                entries += 1
                if entries > limits.files or size > limits.disk:
                    return True
                if entry.is_dir(follow_symlinks=False):
                    left.append(entry.path)
    return False


def _watch(child: subprocess.Popen[bytes], word: str, folder: str, limits: Limits) -> tuple[str, str]:
    """("ended", "timeout", "disk", "output" or "processes"; standard error), read while the program writes."""
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(f"{word}\n".encode())
        child.stdin.close()
    how, deadline, look = "timeout", time.monotonic() + limits.seconds, 0.0
    kept = {child.stdout.fileno(): bytearray(), child.stderr.fileno(): bytearray()}
    with selectors.DefaultSelector() as pipes:
        for pipe in kept:
            pipes.register(pipe, selectors.EVENT_READ)
        # What an ended program wrote is read to its end, however late this process comes to it.
        while not (late := time.monotonic() >= deadline) or how == "ended":
            ready = pipes.select(0 if late else 0.02)
            for key, _ in ready:
                piece = os.read(key.fd, 1 << 16)
                kept[key.fd] += piece
                if not piece:
                    pipes.unregister(key.fd)
            if max(map(len, kept.values())) > limits.output:
                how = "output"
                break
            if late and not ready:
                break
            if how != "ended" and _running(child.pid) > limits.processes:
                how = "processes"
                break
            if how != "ended" and time.monotonic() >= look:
                if _overfull(folder, limits):
                    how = "disk"
                    break
                look = time.monotonic() + LOOK
            if how != "ended" and child.poll() is not None:
                # What it started goes with it. What left the group may hold the pipes: their end is not waited for.
                how, deadline = "ended", min(deadline, time.monotonic() + 0.5)
                _kill(child)
            if how == "ended" and not pipes.get_map():
                break
    if how == "ended" and _overfull(folder, limits):  # as much, written before anyone looked
        how = "disk"
    return how, bytes(kept[child.stderr.fileno()]).decode("utf-8", "replace")


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End the program and all of its process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
