"""
One run on one process or, under `accelerate launch`, on several: who scores which batch, sums over all, one voice.

Every process loads the model and scores every n-th batch; sums over processes give each of them the whole result, from
which all compute the same statistics; only the first process prints and writes.
"""

import atexit
import os
import signal
import sys
import time
from contextlib import contextmanager
from functools import cache

PATIENCE = 10  # seconds that the other processes leave to the first to report a mistake that all of them met


class LostProcess(Exception):
    """Another process of this run is gone, and with it what it scored."""


def state():
    """accelerate's own record of the processes, a PartialState; the first call connects them."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def is_first() -> bool:
    return state().is_main_process


def count() -> int:
    return state().num_processes


def own(items: range) -> range:
    """The items that this process works on: every n-th one, so that all processes have as much to do."""
    return items[state().process_index :: count()]


def device() -> str | None:
    """The device that accelerate gives this process; None where it is the only one."""
    found = state().device
    return None if count() == 1 else "cpu" if found.type == "cpu" else str(found)


@contextmanager
def together():
    """Around what all processes do at once: a peer's end comes out as LostProcess."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcess("another process of this run ended before its part was done") from error


def total(part):
    """Elementwise sum of all processes' tensors; exact where one process has the entry and the others 0."""
    if count() == 1:
        return part
    from accelerate.utils import reduce

    with together():
        return reduce(part.to(state().device), "sum").to(part.device)


def from_first(value):
    """The first process's value, on all of them. value: anything that pickles."""
    from accelerate.utils import broadcast_object_list

    with together():
        return broadcast_object_list([value])[0]


def from_all(values: list) -> list:
    """All processes' lists in one, the first process's first."""
    from accelerate.utils import gather_object

    with together():
        return gather_object(values)


def stopped_by_launcher(*_):
    raise KeyboardInterrupt


def leave() -> None:
    """At a good end; one that fails leaves at once, since the others may never come."""
    state().destroy_process_group()


@cache
def speak_as_one():
    """Have only the first process heard. Returns say(message), for the last word of one that fails: of the others it
    comes when the first has had time for its own.

    accelerate launch ends the other processes with SIGTERM when one has failed: the first then leaves as after Ctrl-C,
    since it may have something to say or to clear away. The others just end: what a handler of theirs raises is lost if
    Python is deleting an object at that moment, and they would go on.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console's code page may lack what tokens are written with
            stream.reconfigure(errors="backslashreplace")
    index = state().process_index
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ and "LOCAL_RANK" not in os.environ:
        print("note: without GPUs accelerate launch starts one process only; for two on the CPU: "
              "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2 ...", file=sys.stderr)  # fmt: skip
    if count() > 1:
        atexit.register(leave)
        if not index:
            signal.signal(signal.SIGTERM, stopped_by_launcher)
    if index:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)

    def say(message: str) -> None:
        if index:
            time.sleep(PATIENCE)
        print(f"process {index}: {message}" if index else message, file=sys.__stderr__ if index else sys.stderr)

    return say
