"""Programs that misbehave end soon, with everything they started; what cannot be kept from them is said."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from diffulm.eval import execute
from diffulm.eval.execute import Limits, Outcome, passed, run
from diffulm.eval.store import Store

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX resource limits")
QUICK = Limits(seconds=60.0, cpu_seconds=5, memory=1 << 28)


def test_a_good_program_passes() -> None:
    outcome = run("import math\nassert math.gcd(12, 18) == 6\nprint('fine')", QUICK)
    assert outcome.passed and outcome.how == "passed"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("assert 1 == 2, 'wrong'", "AssertionError: wrong"),
        ("def f(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit(0)", ""),  # leaving early is no pass
        ("import os; os._exit(0)", ""),
        ("raise SystemExit", ""),
        ("import nonesuch", "ModuleNotFoundError"),
    ],
)
def test_what_fails(program: str, said: str) -> None:
    outcome = run(program, QUICK)
    assert outcome.how == "failed" and said in outcome.said


def test_loops_end() -> None:
    began = time.monotonic()
    assert run("while True: pass", Limits(seconds=1.0)).how == "timeout"
    assert run("import time; time.sleep(60)", Limits(seconds=1.0)).how == "timeout"
    assert run("import os\nos.close(1); os.close(2)\nwhile True: pass", Limits(seconds=1.0)).how == "timeout"
    assert time.monotonic() - began < 50, "none was waited for"
    assert run("while True: pass", Limits(seconds=60.0, cpu_seconds=1)).how == "failed", "CPU time"


def test_memory_and_files_are_limited() -> None:
    assert "MemoryError" in run("x = bytearray(1 << 33)", QUICK).said
    assert "File too large" in run("open('a', 'w').write('x' * (1 << 24))", QUICK).said


@pytest.mark.parametrize(
    "program",
    [
        # Up to 30 MB, and 600 empty files and folders; cleared at the end, so that a watcher sees them or nobody does.
        "for i in range(300):\n    open(f'x/{i}', 'wb').write(bytes(100_000)); time.sleep(0.01)\nshutil.rmtree('x')",
        "for i in range(300):\n    os.mkdir(f'x/{i}'); open(f'x/{i}/a', 'w'); time.sleep(0.01)\nshutil.rmtree('x')",
    ],
)
def test_a_full_folder_ends_a_program(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute.tempfile, "tempdir", str(tmp_path))
    few = replace(QUICK, disk=1 << 21, files=50)
    assert run("import os, shutil, time\nos.mkdir('x')\n" + program, few).how == "disk"
    assert not list(tmp_path.iterdir()), "the folder is deleted"


def test_a_full_folder_that_nobody_saw_in_time_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "LOOK", 1000.0)
    program = "for i in range(30): open(f'{i}', 'wb').write(bytes(100_000))"
    assert run(program, replace(QUICK, disk=1 << 21)).how == "disk" and run(program, QUICK).passed


def test_what_a_program_may_write(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1 << 22))
    program = (
        f"import os\nos.symlink({str(tmp_path)!r}, 'folder'); os.symlink({str(tmp_path / 'large')!r}, 'file')\n"
        "for i in range(40): open(f'{i}', 'wb').write(bytes(100_000)); os.remove(f'{i}')\n"
        "for i in range(10): open(f'{i}', 'wb').write(bytes(100_000))"
    )
    outcome = run(program, replace(QUICK, disk=1 << 21, files=50))
    assert outcome.passed, "links are not followed, and what is deleted is not counted"


def test_a_timeout_is_run_again_with_more_time_before_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine a good program may take too long; what is kept would outlive that."""
    given: list[float] = []

    def fake(program: str, limits: Limits | None = None) -> Outcome:
        given.append((limits or Limits()).seconds)
        return Outcome(program.split()[len(given) - 1])

    monkeypatch.setattr(execute, "run", fake)
    store = Store(tmp_path / "scores.jsonl")
    for ends, right, times in (
        ("timeout passed", True, [12.0, 48.0]),
        ("timeout timeout passed", False, [12.0, 48.0]),
        ("timeout failed", False, [12.0, 48.0]),
        ("failed passed", False, [12.0]),  # CPU time among others: final
        ("disk passed", False, [12.0]),
        ("passed failed", True, [12.0]),
    ):
        given.clear()
        assert passed(ends, store) is right and given == times, ends
        assert passed(ends, Store(tmp_path / "scores.jsonl")) is right and given == times, "kept"


def test_floods_end_and_are_not_kept() -> None:
    for stream in ("stdout", "stderr"):
        outcome = run(f"import sys\nwhile True: sys.{stream}.write('x' * 100_000)", QUICK)
        assert outcome.how == "output" and len(outcome.said) <= 2000


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are watched through /proc")
def test_forks_end_with_all_they_started() -> None:
    mark = f"mark{os.getpid()}x{time.monotonic_ns()}"
    bomb = f"import os\nname = '{mark}'\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert run(bomb, Limits(seconds=20.0, cpu_seconds=20)).how in ("processes", "failed")
    # A child that stays behind in the group goes too, and its parent's end is not waited for through the pipe.
    began = time.monotonic()
    child = f"import subprocess\nsubprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(77)  # {mark}'])"
    assert run(child, QUICK).passed and time.monotonic() - began < 60
    while (left := [p for p in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in _bytes(p)]) and (
        time.monotonic() - began < 70
    ):
        time.sleep(0.05)  # killed; the system takes its time
    assert not left


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_its_folder_is_its_own_and_goes(tmp_path: Path) -> None:
    program = (
        "import os, sys, tempfile\nassert os.getcwd() == os.environ['HOME'] == tempfile.gettempdir()\n"
        "assert sorted(os.environ) == ['HOME', 'LANG', 'TMPDIR'] or 'LC_CTYPE' in os.environ\n"
        "open('left.txt', 'w').write('x')\nassert not sys.stdin.read()\nraise ValueError(os.getcwd())"
    )
    folder = run(program, QUICK).said.rpartition("ValueError: ")[2]
    assert "diffulm-" in folder and not Path(folder).exists()


def test_the_rest_of_the_disk_is_not_out_of_reach_and_we_say_so(tmp_path: Path) -> None:
    """Best effort: nothing portable keeps a process of the same user from that user's files."""
    outside = tmp_path / "outside"
    assert run(f"open({str(outside)!r}, 'w').write('x')", QUICK).passed and outside.exists()
    said = execute.__doc__ or ""
    assert "NO SECURITY BOUNDARY" in said and "files outside its folder" in said


def test_windows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute.os, "name", "nt")
    with pytest.raises(ValueError, match="POSIX resource limits, which this system lacks"):
        run("1")
