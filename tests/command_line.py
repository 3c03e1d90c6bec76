"""Ways to run `bn-c`."""

import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import bn_c
from bn_c import cli

# Not where a source tree may shadow what is installed.
ELSEWHERE = Path(bn_c.__file__).parents[1]


def default_signals():
    """As a shell starts a command, also where the tests were started in the background or with nohup."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def start(*arguments, **options):
    """`bn-c` as a process of its own, which ends with a test that fails."""
    with subprocess.Popen(
        [sys.executable, "-m", "bn_c", *map(str, arguments)],
        text=True,
        cwd=ELSEWHERE,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": default_signals, **options},
    ) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def bn_c_command(*arguments, **options):
    """What became of such a process."""
    with start(*arguments, **options) as process:
        stdout, stderr = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def call(*arguments):
    """The status of a command that runs in this process."""
    try:
        return cli.main(list(map(str, arguments)))
    except SystemExit as left:
        return left.code
