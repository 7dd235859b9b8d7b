"""The process group that torchrun describes: joined and left in order, and what its first process does alone."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ..runtime import log, under_torchrun

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Terminated(KeyboardInterrupt):
    """SIGTERM, answered in order. `code`: 128 + 15, which shells and schedulers say of a death by SIGTERM."""

    code = 143


def rank_and_world() -> tuple[int, int]:
    """(rank, world size) of the process group, (0, 1) when there is none."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank_and_world()[0] == 0


@contextlib.contextmanager
def process_group(device: torch.device | None = None) -> Iterator[tuple[int, int]]:
    """Joins the group torchrun describes for the length of the block; (0, 1) without torchrun.

    gloo carries what lies on the CPU, NCCL what lies on the GPU (when `device` is one). Within the block only rank 0
    logs. Of several errors the first one is raised as it is; in the other processes, whose errors only follow from it,
    it becomes a silent SystemExit, and so does an interrupt in all but rank 0.
    """
    rank, world = under_torchrun()
    if world == 1:
        yield 0, 1
        return
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    store, rank, world = next(iter(dist.rendezvous("env://")))
    store = dist.PrefixStore(_attempt(), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    level = log.level
    if rank:
        log.setLevel(logging.ERROR)
    try:
        yield rank, world
    except Exception as error:
        _speak_first()
        # The group is left standing: to destroy it would make the others fail, and speak, before this one has spoken.
        if not _failed_first(store):
            raise SystemExit(2 if isinstance(error, ValueError) else 1) from error
        if _lost_a_peer(error):
            raise RuntimeError(
                "the connection to another process broke; if none of them said why, it was killed (out of memory?)"
            ) from error
        raise
    except KeyboardInterrupt as interrupt:
        _leave()
        if rank:
            raise SystemExit(getattr(interrupt, "code", 130)) from interrupt
        raise
    else:
        _leave()
    finally:
        log.setLevel(level)


def _attempt() -> str:
    """A prefix for the keys of this start of the processes.

    torchrun keeps one store over its restarts, in which processes would find the addresses of dead ones. The count of
    restarts is each node's own, hence no prefix on many nodes (there a variable gives every start a store of its own:
    docs/guides/scale.md).
    """
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if one_node else 0}"


def _leave() -> None:
    """The orderly end: all processes together, no sharded module alive (one would abort its process, at random)."""
    import torch.distributed as dist

    gc.collect()
    dist.barrier()
    _waiting.clear()
    dist.destroy_process_group()


def _speak_first() -> None:
    """Ignore SIGTERM from here on: torchrun sends it when it sees another process dead, most likely while this one is
    about to say so. Nothing outlives its error for long (torchrun kills after half a minute)."""
    with contextlib.suppress(ValueError):  # not the main thread: signals go elsewhere
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _failed_first(store: Any) -> bool:
    """Whether no other process has failed before; the store is torchrun's and outlives the processes."""
    try:
        return bool(store.add("failures", 1) == 1)
    except Exception:  # torchrun is gone too: better twice than never
        return True


def _lost_a_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process went away."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "connection closed", "nccl"))


#: The group in which processes wait for rank 0; made at first use, since every process must take part in making it.
_waiting: list[Any] = []


def on_first_rank(work: Callable[[], T]) -> T:
    """What `work` returns, which rank 0 alone does while the others wait, however long; pickled on its way to them.

    An error or an interrupt of rank 0 is raised there, and ends the others silently (SystemExit).
    """
    rank, world = rank_and_world()
    if world == 1:
        return work()
    import torch.distributed as dist

    if not _waiting:
        _waiting.append(dist.new_group(backend="gloo", timeout=timedelta(days=30)))
    message: list[Any] = [None]
    if rank == 0:
        try:
            message = [(0, work())]
        except BaseException as error:
            code = 2 if isinstance(error, ValueError) else 1
            code = getattr(error, "code", 130) if isinstance(error, KeyboardInterrupt) else code
            dist.broadcast_object_list([(code, None)], group=_waiting[0])
            raise
    dist.broadcast_object_list(message, group=_waiting[0])
    code, value = message[0]
    if code:
        raise SystemExit(code)
    result: T = value
    return result
