"""Tests in processes of their own: forked ones, and new interpreters."""

import faulthandler
import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest

import bn_c

SECONDS = 300  # until a case counts as hanging; an emulated CPU is 50 times slower


def run(code, **environment):
    """A new interpreter with the same bn_c and only these settings of it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BN_C_")}
    path = str(Path(bn_c.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": os.pathsep.join([path, *filter(None, sys.path)]), **environment},
        cwd=path,  # not where a source tree may shadow what is installed
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def output(code, **environment):
    """What it printed; its failure is one here."""
    result = run(code, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def isolated(run, *arguments):
    """Runs it in a child; an exception, a signal or a hang there is a failure here."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork, where other tests have left threads
        child = os.fork()
    if child == 0:
        report(write, run, arguments)
    os.close(write)
    text, hangs = listen(read, child)
    os.close(read)
    status = os.waitpid(child, 0)[1]
    if hangs:
        pytest.fail(f"still running after {SECONDS} s\n{text}", pytrace=False)
    if os.WIFSIGNALED(status):
        pytest.fail(f"died of {signal.Signals(os.WTERMSIG(status)).name}\n{text}", pytrace=False)
    if status:
        pytest.fail(text, pytrace=False)


def report(write, run, arguments):
    """What the child does: never returns."""
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.enable(write)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        run(*arguments)
        status = 0
    except BaseException:
        os.write(write, traceback.format_exc().encode(errors="replace")[-60_000:])
    finally:
        os._exit(status)


def listen(read, child):
    """All that the child says until its end, and whether that had to be forced."""
    text, deadline = b"", time.monotonic() + SECONDS
    while True:
        ready, _, _ = select.select([read], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            return text.decode(errors="replace"), True
        some = os.read(read, 1 << 16)
        if not some:
            return text.decode(errors="replace"), False
        text += some


def killed_at_any_moment(replace, target, kills):
    """At least so many writers of a file are killed, some before and some after its end: it is always whole."""

    def started():
        child = os.fork()  # a process whose start takes no time
        if child == 0:
            status = 1
            try:
                replace()
                status = 0
            finally:
                os._exit(status)
        return child

    durations = []
    for _ in range(3):
        began = time.perf_counter()
        assert os.waitpid(started(), 0)[1] == 0
        durations.append(time.perf_counter() - began)
    old, new = b"old", target.read_bytes()
    seen = set()
    choose = random.Random(0)
    for n in range(20 * kills):
        target.write_bytes(old)
        child = started()
        time.sleep(choose.uniform(0, 2) * min(durations))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen.add(target.read_bytes())
        assert seen <= {old, new}
        for file in target.parent.glob(".bn_c-*.tmp"):
            file.unlink()
        if n >= kills - 1 and len(seen) == 2:
            return
    raise AssertionError("always killed too early or too late")
