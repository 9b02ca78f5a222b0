"""A long-lived process for tests: a shard or a worker in many jobs, one after the other.

It takes one JSON command per line on stdin and answers with JSON lines on stdout; whatever the code
under test prints goes to stderr. It ends when stdin closes, even in the middle of a job, so that no
process outlives the tests, however those end.
"""

import faulthandler
import importlib
import json
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, TextIO

import torch
from safetensors.torch import save_file

from ps_core.config import load
from ps_server.server import serve
from shardline.session import Session

Case = Callable[..., Mapping[str, Any]]
"""What one worker does: called with a session and keyword arguments, it returns tensors, and values
that JSON can hold.
"""
Message = dict[str, Any]
STACKS_SIGNAL: Final = signal.SIGUSR1
"""Makes a host write to stderr where all of its threads are."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a case returned on one worker, as it was after the session had closed."""

    values: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def run_case(case: Case, environ: Mapping[str, str], arguments: Mapping[str, Any]) -> Result:
    """Run a case in a session of its own, configured by `environ` alone."""
    torch.seed()  # what the case before has left is no choice of this one's
    with Session(load(environ=environ)) as session:
        returned = case(session, **arguments)
    tensors = {k: _copy(v) for k, v in returned.items() if isinstance(v, torch.Tensor)}
    values = {k: v for k, v in returned.items() if k not in tensors}
    return Result(json.loads(json.dumps(values)), tensors)  # the same types in any process


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _obey(command: Message, announce: Callable[[str], None]) -> Message:
    """Serve one job as a shard, or run a case as a worker; the last answer to the command."""
    try:
        if command["role"] == "shard":
            serve(load(environ=command["environ"]), announce)
            return {"event": "done"}
        module, _, name = command["case"].partition(":")
        case = attrgetter(name)(importlib.import_module(module))
        result = run_case(case, command["environ"], command["arguments"])
        save_file(result.tensors, Path(command["tensors"]))
        return {"event": "done", "values": result.values}
    except BaseException as error:  # noqa: BLE001 - told to the test, which decides
        # A session ends its process because of an error: that one is of interest.
        cause = error.__cause__ if isinstance(error, SystemExit) and error.__cause__ else error
        text = "".join(traceback.format_exception(error))
        return {"event": "failed", "error": f"{type(cause).__name__}: {cause}", "traceback": text}


def _read_commands(source: TextIO, commands: queue.SimpleQueue[str]) -> None:
    for line in source:
        commands.put(line)
    os._exit(0)


def _private_pipes() -> tuple[TextIO, TextIO]:
    """The pipes from and to the test, which the code under test neither reads nor writes.

    Python's own `sys.stdin` will not do: a process that torch's DataLoader forks closes it, and
    would wait forever for the thread that reads here.
    """
    commands = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return commands, answers


def main() -> None:
    """Take commands until stdin closes."""
    faulthandler.register(STACKS_SIGNAL)
    source, answers = _private_pipes()

    def send(message: Message) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])  # imports half of torch: not in the middle of a job
    commands: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_commands, args=(source, commands), daemon=True).start()
    send({"event": "up"})
    while True:
        command = json.loads(commands.get())
        send(_obey(command, lambda text: send({"event": "announced", "text": text})))


if __name__ == "__main__":
    main()
