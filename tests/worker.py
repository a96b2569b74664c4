"""One process of a pool that tests run functions on: joins the group, then takes jobs from a pipe until it closes."""

import faulthandler
import importlib.util
import os
import pickle
import sys
import traceback
from pathlib import Path

from parallel.runtime import start


def load(path: str):
    """A test module, from its file; once per process."""
    name = "job_" + "_".join(Path(path).with_suffix("").parts[-2:])  # files in two folders may have one name
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def main() -> None:
    """Serve jobs: (file, function, arguments) in, (whether it worked, result or traceback) out."""
    faulthandler.enable()
    jobs, answers = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    with start() as runtime:
        while True:
            try:
                path, function, arguments = pickle.load(jobs)
            except EOFError:
                break
            try:
                answer = (True, getattr(load(path), function)(runtime, *arguments))
            except BaseException:  # noqa: BLE001  (told to the test, whatever it is)
                answer = (False, traceback.format_exc())
            pickle.dump(answer, answers)
            answers.flush()
    os._exit(0)
