"""Python processes that a test tells what to run: for what must be set before the first import, or not be there."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

# Answers each line, some code as JSON, with what the code printed and the error that it raised.
_LOOP = """
import contextlib, io, json, sys, traceback
answers, names = sys.stdout, {}
for line in sys.stdin:
    printed, error = io.StringIO(), None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            exec(json.loads(line), names)
        except BaseException:
            error = traceback.format_exc()
    print(json.dumps([printed.getvalue(), error]), file=answers, flush=True)
"""
WITHOUT_PACKAGE = "import sys\nsys.modules['pixclip_hf'] = None\n"


class Failed(Exception):
    """The traceback of code that failed in its process."""


class Process:
    """A running interpreter; names that its code defines stay."""

    def __init__(self, process):
        self._process = process

    def run(self, code):
        """Runs `code`; returns what it printed, warnings and progress too.

        Raises:
            Failed: with its traceback.
        """
        self._process.stdin.write(json.dumps(code) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise Failed(f"The process ended with {self._process.wait()}.")
        printed, error = json.loads(answer)
        if error:
            raise Failed(error)
        return printed


@contextmanager
def running_process(folder, package=True, **environment):
    """A [`Process`] in `folder`, with `environment` added to this one's; without `package`, `pixclip_hf` does not
    import there. Its caches are below `folder`."""
    variables = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    variables |= {"HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", _LOOP if package else WITHOUT_PACKAGE + _LOOP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=variables,
        cwd=folder,
    )
    try:
        yield Process(process)
    finally:
        process.kill()
        process.communicate()
