"""Passes in processes of this machine: each asks for a shard when it is ready for one, and is replaced if it dies."""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .passes import Done, Pass, work
from .plan import Shard

# A shard that is at work each time a worker dies is likely what kills them.
MOST_DEATHS = 3
_NO_SHARD = -1


class _Worker:
    """A process and the shards that it holds."""

    def __init__(self, passes: Sequence[Pass], output: Path, index: int):
        context = worker_context()
        self.index = index
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, passes, output, index), daemon=False)
        self.process.start()
        theirs.close()  # so that the death of the process is the end of the pipe
        self.held: dict[int, Shard] = {}
        self.sent_home = False

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def worker_context() -> Any:
    """How workers start: forked from a server that has done the imports, or as fresh processes elsewhere. A fork of
    this process would inherit threads of torch that do not run there."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def run_processes(passes: Sequence[Pass], output: Path, shards: Iterator[Shard], workers: int) -> Iterator[Done]:
    """Runs passes over shards in so many processes, and yields each shard with its manifest when it is done.

    Raises:
        RuntimeError: a shard whose worker has died several times, or workers that cannot start.
        What a pass raises, with its traceback in the notes.
    """
    again: deque[Shard] = deque()
    deaths: Counter[int] = Counter()
    running: dict[Any, _Worker] = {}  # by the pipe to each
    try:
        for index in range(workers):
            worker = _Worker(passes, output, index)
            running[worker.pipe] = worker
        while running:
            ready: list[Any] = wait(list(running))
            for pipe in ready:
                worker = running[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, ConnectionResetError):
                    del running[pipe]
                    worker.stop()
                    again.extend(worker.held.values())
                    deaths.update(worker.held.keys() or ([] if worker.sent_home else [_NO_SHARD]))
                    _check_deaths(worker, deaths)
                    # One for one: a worker that was sent home is through, even where shards of another came back.
                    if worker.held or not worker.sent_home:
                        fresh = _Worker(passes, output, worker.index)
                        running[fresh.pipe] = fresh
                    continue
                if isinstance(message, BaseException):
                    raise message
                if message is None:
                    shard = again.popleft() if again else next(shards, None)
                    if shard is None:
                        worker.sent_home = True
                    else:
                        worker.held[shard.number] = shard
                    try:
                        pipe.send(shard)
                    except BrokenPipeError:
                        continue  # it has died: the end of its pipe comes next
                else:
                    del worker.held[message[0].number]
                    yield message
    finally:
        for worker in running.values():
            worker.stop()


def _check_deaths(worker: _Worker, deaths: Counter[int]) -> None:
    if deaths[_NO_SHARD] >= MOST_DEATHS:
        raise RuntimeError(
            f"Workers died {deaths[_NO_SHARD]} times with no shard in hand, the last one with exit code "
            f"{worker.process.exitcode}. What they print says why they cannot start."
        )
    for number, shard in worker.held.items():
        if deaths[number] >= MOST_DEATHS:
            raise RuntimeError(
                f"A worker died {deaths[number]} times with shard {number} (items {shard.start} to {shard.stop - 1}) "
                f"in hand, the last time with exit code {worker.process.exitcode}. -9 is often a lack of memory: "
                "smaller shards and batches need less."
            )


def _serve(pipe: Connection, passes: Sequence[Pass], output: Path, index: int) -> None:
    """A worker: asks for shards with None, and answers with what is done or with an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinator, who gets it too, ends its workers
    threading.Thread(target=_leave_with_coordinator, daemon=True).start()
    if any(each.num_gpus for each in passes):
        _choose_gpu(index)

    def given() -> Iterator[Shard]:
        while True:
            pipe.send(None)
            if (shard := pipe.recv()) is None:
                return
            yield shard

    try:
        for done in work(passes, output, given()):
            pipe.send(done)
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)))
        pipe.send(_as_sent(error))


def _as_sent(error: Exception) -> Exception:
    """The error itself, or one that says the same where it does not pickle."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever the class of the error does there
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _leave_with_coordinator() -> None:
    """Ends this process when the one that started it has ended, however that did."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _choose_gpu(index: int) -> None:
    """Shows this process one of the GPUs, before it uses any."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    if names:
        os.environ["CUDA_VISIBLE_DEVICES"] = names[index % len(names)]
