"""Passes for tests, in a module of their own so that worker processes can import them."""

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from pixclip_hf.data.whole_files import whole_file
from pixclip_hf.jobs import between_path


@dataclass
class Squares:
    """Writes the squares of the positions, and notes in `calls` which process wrote which shard."""

    output: Path
    calls: Path
    seconds: float = 0.0
    num_gpus: float = 0

    def __call__(self, shards):
        for shard in shards:
            with open(self.calls, "a") as file:
                file.write(f"{shard.number} {os.getpid()}\n")
            time.sleep(self.seconds)
            self.before_writing(shard)
            with whole_file(self.output / "data" / f"{shard.number:05d}.json") as unfinished:
                unfinished.write_text(json.dumps([position**2 for position in shard.positions]))
            self.after_writing(shard)
            yield shard, {"items": len(shard)}

    def before_writing(self, shard):
        pass

    def after_writing(self, shard):
        pass


@dataclass
class Killed(Squares):
    """Dies by SIGKILL at some shards, once before it writes and once after, or always."""

    at: tuple[int, ...] = ()
    always: bool = False

    def before_writing(self, shard):
        self._die(shard, "before")

    def after_writing(self, shard):
        self._die(shard, "after")

    def _die(self, shard, when):
        mark = self.calls.with_name(f"{shard.number} {when}")
        if shard.number in self.at and (self.always or not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class LastDies(Squares):
    """Dies with the last shard when the other worker has been told that there is no more, which ends only when a third
    one is there; that one asks for a shard when the other has ended."""

    last: int = 0

    def __call__(self, shards):
        home, third = self.calls.with_name("home"), self.calls.with_name("third")
        if third.exists():
            wait_for(lambda: not psutil.pid_exists(int(home.read_text())))
        yield from super().__call__(shards)
        if not home.exists():
            with whole_file(home) as unfinished:
                unfinished.write_text(str(os.getpid()))
        wait_for(third.exists)

    def before_writing(self, shard):
        if shard.number == self.last and not self.calls.with_name("third").exists():
            wait_for(self.calls.with_name("home").exists)
            os.kill(os.getpid(), signal.SIGKILL)


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


@dataclass
class Fails(Squares):
    """Raises an error that a constructor with two arguments made, which does not pickle as it is."""

    number: int = 0
    error: str = "odd"

    def before_writing(self, shard):
        if shard.number == self.number:
            raise {"odd": OddError("shard", shard.number), "key": KeyError("no such key"), "full": OSError(28, "No")}[
                self.error
            ]


class OddError(Exception):
    def __init__(self, what, number):
        super().__init__(f"{what} {number} is odd")


@dataclass
class First:
    """Leaves the positions for the next pass."""

    output: Path
    calls: Path
    num_gpus: float = 0

    def __call__(self, shards):
        for shard in shards:
            path = between_path(self.output, 0, shard.number)
            if not path.exists():
                with open(self.calls, "a") as file:
                    file.write(f"first {shard.number}\n")
                with whole_file(path) as unfinished:
                    unfinished.write_text(json.dumps(list(shard.positions)))
            yield shard, {}


@dataclass
class Second:
    """Doubles what the first pass left; stops before a shard where it is told to."""

    output: Path
    stop_at: int | None = None
    num_gpus: float = 0

    def __call__(self, shards):
        for shard in shards:
            if shard.number == self.stop_at:
                raise KeyboardInterrupt
            numbers = json.loads(between_path(self.output, 0, shard.number).read_text())
            with whole_file(self.output / "data" / f"{shard.number:05d}.json") as unfinished:
                unfinished.write_text(json.dumps([2 * number for number in numbers]))
            yield shard, {"items": len(shard)}


@dataclass
class NeverStarts(Squares):
    """Its process ends before it asks for a shard."""

    def __call__(self, shards):
        os._exit(7)
