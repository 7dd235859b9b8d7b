"""The command line: one function per verb, its flags from the signature, heavy imports inside.

Exit code 0 done, 1 failed, 2 bad usage or input, 130 interrupted, 143 ended by SIGTERM while training (the same command
resumes where it says so).
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable

import tyro

from .bench import bench
from .chat import chat
from .evaluation import evaluate
from .flags import find_recipe
from .plan import doctor, plan
from .text import generate, infill
from .training import adapt, convert, export, prepare, train

__all__ = ["VERBS", "entry", "find_recipe", "main"]


VERBS: dict[str, Callable[..., None]] = {
    "adapt": adapt,
    "convert": convert,
    "prepare": prepare,
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "infill": infill,
    "chat": chat,
    "export": export,
    "bench": bench,
    "plan": plan,
    "doctor": doctor,
}
#: Verbs that go on where they were interrupted; eval does where it was given a folder.
RESUMING = ("adapt", "train", "prepare")


def usage() -> str:
    lines = [f"  {name:<9} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return (
        "usage: diffulm VERB ...   (diffulm VERB --help for its flags)\n\n" + "\n".join(lines)
        + "\n\nexample: diffulm adapt smollm2-135m-instruct-q4 --recipe smollm2-block --minutes 5 --out runs/demo"
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version", "version"):
        from .. import __version__

        print(f"diffulm {__version__}")
        return 0
    if arguments[0] not in VERBS:
        import difflib

        near = difflib.get_close_matches(arguments[0], VERBS, n=1)
        print(
            f"diffulm: unknown verb {arguments[0]!r}" + (f"; did you mean {near[0]}?" if near else ""), file=sys.stderr
        )
        print(usage(), file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("diffulm").setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    verb = arguments[0]
    try:
        check_repeated(arguments[1:])
        # What verbs share stands in dataclasses (flags.py): a box of the help each, their flags without a prefix.
        tyro.cli(VERBS[verb], prog=f"diffulm {verb}", args=arguments[1:], config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as error:
        return int(error.code or 0) if isinstance(error.code, int) or error.code is None else 2
    except ValueError as error:
        print(f"diffulm {verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        # An interrupt that passed through `exec` of a string (namedtuple, dataclass: any import) leaves CPython's
        # "unhandled" flag set though we caught it, and `python -m` would die of SIGINT in place of exiting 130. The
        # next `exec` clears the flag.
        exec("")
        print(
            f"\ndiffulm {verb}: interrupted"
            + ("; the same command resumes" if verb in RESUMING or {"eval", "--out"} <= {*arguments} else ""),
            file=sys.stderr,
        )
        return getattr(interrupt, "code", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if disk_is_full(error):
            print(
                f"diffulm {verb}: the disk is full; free some space and give the same command again: finished stages "
                "and the last checkpoint are kept",
                file=sys.stderr,
            )
            return 2
        if os.environ.get("DIFFULM_DEBUG"):
            raise
        print(f"diffulm {verb}: failed: {type(error).__name__}: {error} (DIFFULM_DEBUG=1 shows where)", file=sys.stderr)
        return 1
    return 0


def check_repeated(arguments: list[str]) -> None:
    """ValueError for a flag that is given twice: only its last values would count, in silence."""
    flags: list[str] = []
    for argument in arguments:
        if argument == "--":
            break
        if argument.startswith("--"):
            flags.append(argument.partition("=")[0])
    for flag in flags:
        if flags.count(flag) > 1:
            raise ValueError(f"{flag} is given {flags.count(flag)} times; give it once, with all its values behind it")


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is the operating system's "no space left"."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error) or "code: 28" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def entry() -> None:
    """Console script."""
    code = main()
    # All is written and said. Python takes its time to go (torch), and a Ctrl-C in that time would abort it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)
