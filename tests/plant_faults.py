"""Plants the faults of `planted_faults.py` one after the other in a copy of the package,
and runs the tests that must notice each: `python tests/plant_faults.py [WORD ...]`.

With words only the faults whose file or selection of tests has one of them. Each run is
a fork of this process, which has imported what is slow to import; what escapes, or was
never tested, is named at the end, with exit code 1. With SHOW=1 in the environment the
end of what each run prints is shown.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

from planted_faults import FAULTS, SOURCE, TESTS, Fault

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
SLOW_TO_IMPORT = (
    *("torch", "transformers", "scipy.stats", "scipy.optimize", "pydantic", "rich"),
    *("transformers.models.llama.modeling_llama", "lm_eval.evaluator", "hypothesis"),
)
SECONDS = 300  # a fault may make a test run on and on
TAIL = 1500  # characters of what a run that went wrong printed


def main(words: list[str]) -> int:
    """Plant each fault and print what became of it; 1 where one escaped."""
    for name in SLOW_TO_IMPORT:
        importlib.import_module(name)
    chosen = [one for one in FAULTS if not words or any(w in str(one) for w in words)]
    passing: dict[tuple[str, str], bool] = {}
    missed = []
    for number, fault in enumerate(chosen, 1):
        start = time.monotonic()
        selection = fault.tests, fault.seen_by
        if selection not in passing:
            passing[selection] = outcome(None, *selection) == pytest.ExitCode.OK
        found = outcome(fault, *selection)
        if not passing[selection]:
            word = "UNTESTED: these tests fail, or are none, without the fault"
        elif found == pytest.ExitCode.TESTS_FAILED:
            word = "seen"
        else:
            word = f"ESCAPED ({found})"
        if word != "seen":
            missed.append(fault)
        seconds = time.monotonic() - start
        print(
            f"{number:3} of {len(chosen)} {word:8} {seconds:3.0f} s  {fault}",
            flush=True,
        )
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults seen")
    for fault in missed:
        print(f"not seen: {fault}: {fault.wrong!r} for {fault.right!r}")
    return int(bool(missed))


def outcome(fault: Fault | None, tests: str, select: str) -> int:
    """The exit code of pytest on a copy of the package, with the fault if there is
    one; -1 where it took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "src"
        shutil.copytree(
            SOURCE, copy / "notall", ignore=shutil.ignore_patterns("__pycache__")
        )
        if fault:
            file = copy / "notall" / fault.file
            file.write_text(fault.planted(file.read_text("utf-8")), "utf-8")
        process = os.fork()
        if not process:
            _test(copy, Path(folder) / "out", tests, select)
        started = time.monotonic()
        while not (ended := os.waitpid(process, os.WNOHANG))[0]:
            if time.monotonic() - started > SECONDS:
                os.kill(process, 9)
                os.waitpid(process, 0)
                return -1
            time.sleep(0.05)
        code = os.waitstatus_to_exitcode(ended[1])
        if os.environ.get("SHOW"):
            print((Path(folder) / "out").read_text("utf-8", "replace")[-TAIL:])
        return code


def _test(copy: Path, out: Path, tests: str, select: str) -> None:
    """In the fork: run the tests on the package in `copy`, and leave."""
    number = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.dup2(number, 1)
    os.dup2(number, 2)
    os.environ["PYTHONPATH"] = str(copy)  # of programs that tests start
    sys.path.insert(0, str(copy))
    code = 3
    try:
        quick = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", ""]
        files = [str(TESTS / name) for name in tests.split()]
        code = int(pytest.main([*quick, *files, *(["-k", select] if select else [])]))
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
