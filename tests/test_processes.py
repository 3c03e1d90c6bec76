"""Calls in threads and processes of every kind: the result of a single thread, and no hang, crash or leak."""

import array
import concurrent.futures
import itertools
import multiprocessing
import os
import random
import signal
import sys
import threading
import time

import numpy as np
import pytest
from oracle import bits
from processes import SECONDS, isolated, output, run

import bn_c
from bn_c import _core, _threads

GIL = getattr(sys, "_is_gil_enabled", lambda: True)()
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


# ---- one layer for many threads ---------------------------------------------------------------------


def one_of_many(layers, inputs, expected, wrong, until, number):
    """Random calls of shared layers on shared inputs, until the time is up."""
    choose = random.Random(number)
    while time.monotonic() < until and not wrong:
        at = choose.randrange(len(inputs)), choose.randrange(len(layers))
        y = layers[at[1]](inputs[at[0]])
        stats = bn_c.batch_stats(inputs[at[0]], num_threads=choose.randrange(1, 4))
        if (bits(y), stats.to_dict()) != expected[at]:
            wrong.append(at)


def many_threads(seconds):
    rng = np.random.default_rng(9)
    shapes = [(2, 5), (64, 5), (3, 5, 40, 41), (2, 5, 190, 191), (70_000, 5)]
    inputs = [rng.standard_normal(shape).astype(dtype) for shape in shapes for dtype in ("f4", "f2")]
    layers = [bn_c.BatchNorm(5, num_threads=n, activation=name) for n in (1, 2, 3) for name in (None, "hard_swish")]
    expected = {
        (i, k): (bits(layer(x)), bn_c.batch_stats(x).to_dict())
        for i, x in enumerate(inputs)
        for k, layer in enumerate(layers)
    }
    wrong, until = [], time.monotonic() + seconds
    threads = [
        threading.Thread(target=one_of_many, args=(layers, inputs, expected, wrong, until, n), daemon=True)
        for n in range(8)
    ]
    sys.setswitchinterval(1e-5)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert not wrong


def test_eight_threads_share_layers_and_inputs(thorough):
    """Not in a child: ThreadSanitizer does not look at those."""
    before = sys.getswitchinterval()
    try:
        many_threads(60 if thorough else 2)
    finally:
        sys.setswitchinterval(before)


# ---- threads that help ------------------------------------------------------------------------------


def helped_after_pauses():
    """Helpers are awake, about to sleep, asleep, or waking when they are asked."""
    expected = bits(bn_c.batch_norm(X))
    choose = random.Random(0)
    for n in range(600):
        assert bits(bn_c.batch_norm(X, num_threads=2 + n % 3)) == expected
        if n % 2:
            time.sleep(choose.choice([0, 0.00005, 0.0001, 0.0002]))


def test_calls_after_pauses_of_any_length():
    isolated(helped_after_pauses)


def idle():
    bn_c.batch_norm(X, num_threads=4)
    assert sum(thread.name == "bn_c" for thread in threading.enumerate()) == 3
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(1)
    assert time.process_time() - before < 0.5  # three that wait actively would take one second for each core


def test_helpers_sleep_when_nobody_calls():
    isolated(idle)


def awake_when_calls_follow_each_other():
    """On arrays that are not worth waking threads for."""
    layer = bn_c.BatchNorm(5, num_threads=2)
    expected = bits(layer(X))
    _core.wake_threads_from(X.size + 1)
    time.sleep(0.1)
    assert not _core.are_awake(_threads.helpers)
    for _ in range(1000):
        y = layer(X)
        woken = _core.are_awake(_threads.helpers)
        assert bits(y) == expected
        if woken:
            break
    assert woken
    _core.wake_threads_from(2 * X.size + 2)
    time.sleep(0.1)
    for _ in range(64):
        layer(X)
        assert not _core.are_awake(_threads.helpers)


def test_threads_are_awake_when_calls_follow_each_other():
    isolated(awake_when_calls_follow_each_other)


def awake_when_batches_follow_each_other():
    """Whose statistics are one part: only y is for several threads."""
    x = np.ones((512, 100), np.float32)
    expected = bits(bn_c.batch_norm(x, num_threads=2))
    _core.wake_threads_from(2 * x.size + 1)
    time.sleep(0.1)
    assert not _core.are_awake(_threads.helpers)
    for _ in range(1000):
        y = bn_c.batch_norm(x, num_threads=2)
        woken = _core.are_awake(_threads.helpers)
        assert bits(y) == expected
        if woken:
            break
    assert woken


def test_threads_are_awake_when_batches_follow_each_other():
    isolated(awake_when_batches_follow_each_other)


def works_alone():
    """Helpers that are all busy, or cannot be had."""
    expected = bits(bn_c.batch_norm(X))
    _threads.helpers = tuple(_core.Helper() for _ in range(3))  # without a thread: offers are never taken
    for _ in range(3):
        assert bits(bn_c.batch_norm(X, num_threads=4)) == expected


def test_offers_that_nobody_takes_are_withdrawn():
    isolated(works_alone)


# ---- processes --------------------------------------------------------------------------------------

X = np.linspace(-3, 3, 3 * 5 * 150 * 151, dtype="f4").reshape(3, 5, 150, 151)
LAYER = bn_c.BatchNorm(5, num_threads=2)
_threads._cpus = lambda: 4  # in the workers too, whatever the machine has
_core.wake_threads_from(1)


def statistics_of(part):
    """What a worker returns has to be pickled."""
    return bn_c.batch_stats(part, num_threads=2), LAYER(part), bn_c.batch_norm(part, num_threads=2)


def with_workers(method):
    context = multiprocessing.get_context(method)
    parts = [X[:1], X[1:], X]
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        results = list(pool.map(statistics_of, parts))
    for part, (stats, *ys) in zip(parts, results, strict=True):
        expected = statistics_of(part)
        assert stats == expected[0]
        assert [bits(y) for y in ys] == [bits(y) for y in expected[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_multiprocessing(method):
    isolated(with_workers, method)


def fork_inside_calls():
    """The child has none of the threads that were inside calls, and can call all the same."""
    expected = bits(LAYER(X)), bn_c.batch_stats(X, num_threads=2)
    stop = threading.Event()

    def work():
        while not stop.is_set():
            LAYER(X)
            bn_c.batch_stats(X, num_threads=2)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            right = (bits(LAYER(X)), bn_c.batch_stats(X, num_threads=2)) == expected
            os._exit(0 if right else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    stop.set()
    for thread in threads:
        thread.join(SECONDS)
    assert_same(expected)
    isolated(assert_same, expected)  # the parent's threads are idle now


def assert_same(expected):
    assert (bits(LAYER(X)), bn_c.batch_stats(X, num_threads=2)) == expected


@needs_fork
@pytest.mark.slow
def test_fork_while_other_threads_are_inside_calls():
    isolated(fork_inside_calls)


# ---- the end of the interpreter ---------------------------------------------------------------------

CALLING = """
import sys, threading, time, numpy as np, bn_c
bn_c._threads._cpus = lambda: 4
x = np.linspace(-3, 3, 600_000, dtype="f4").reshape(2, 30, 100, 100)
layer = bn_c.BatchNorm(30, num_threads=2)
stats = bn_c.batch_stats(x)
def call(bn_c=bn_c, x=x, layer=layer, stats=stats):
    assert bn_c.batch_stats(x, num_threads=2) == stats
    layer(x)
    bn_c.batch_norm(x, num_threads=2)
call()
print("called", flush=True)
"""

ENDINGS = {
    "daemons inside calls": """
for _ in range(4):
    threading.Thread(target=lambda: [call() for _ in range(10**9)], daemon=True).start()
time.sleep(0.2)
""",
    "a thread that goes on calling after the main one": """
threading.Thread(target=lambda: [call() for _ in range(30)]).start()
""",
    "atexit": """
import atexit
atexit.register(call)
""",
    "exit from inside a thread": """
def leave():
    call()
    sys.exit(5)
thread = threading.Thread(target=leave)
thread.start()
thread.join()
""",
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_the_end_of_the_interpreter(ending):
    result = run(CALLING + ending)
    assert (result.returncode, result.stdout, result.stderr) == (0, "called\n", "")


def test_a_finalizer_at_the_end_of_the_interpreter():
    """Python may have emptied modules that the call needs: it is right or says so, and the process ends."""
    result = run(
        CALLING
        + """
import os
class Last:
    def __init__(self):
        self.write = os.write
    def __del__(self, call=call, emptied=(AttributeError, TypeError)):
        try:
            call()
            self.write(1, b"again")
        except emptied:
            self.write(1, b"emptied")
last = Last()
"""
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout in ("called\nagain", "called\nemptied")


# ---- signals ----------------------------------------------------------------------------------------


def assert_interrupts(timer, layer, x, y):
    caught = False
    try:
        timer.start()
        layer(x, out=y)
        while True:
            time.sleep(0.01)  # a signal just before a sleep is seen when that ends
    except KeyboardInterrupt:
        caught = True
    assert caught
    timer.join()


def interrupted(num_threads):
    """Ctrl-C arrives when no thread writes to out any more."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    layer = bn_c.BatchNorm(5, num_threads=num_threads)
    x = np.broadcast_to(np.float32(1), (10, 5, 1000, 100))
    y = np.empty(x.shape, "f4")
    expected = layer(x[:1]).flat[0]
    main = threading.main_thread().ident
    for delay in (0.0, 0.002, 0.01):
        y[:] = 7
        timer = threading.Timer(delay, signal.pthread_kill, (main, signal.SIGINT))
        assert_interrupts(timer, layer, x, y)
        before = y.copy()
        time.sleep(0.05)
        assert np.array_equal(y, before), "still being written"
        assert ((y == 7) | (y == expected)).all()
        assert bits(layer(X)) == bits(LAYER(X))


@pytest.mark.parametrize("num_threads", [1, 2, 4])  # with more than there are cores, the caller often waits
def test_interrupt_during_a_long_call(num_threads):
    isolated(interrupted, num_threads)


def other_signals():
    """A handler runs, and the call is not disturbed."""
    expected, of_batch, seen = bits(LAYER(X)), bits(bn_c.batch_norm(X)), []

    def handle(*_):
        seen.append(bits(LAYER(X)))
        signal.setitimer(signal.ITIMER_REAL, 0.002)

    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.002)
    results = [bits(bn_c.batch_norm(X, num_threads=2)) for _ in range(20)]
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    assert set(results) == {of_batch}
    assert set(seen) == {expected}


def test_signal_handlers_may_call_too():
    isolated(other_signals)


# ---- arrays that change meanwhile -------------------------------------------------------------------


def resized():
    """What is lent to a call cannot be resized meanwhile: each call sees one length."""
    x, refused, stop = array.array("f", np.linspace(-3, 3, 400_000)), [], threading.Event()
    layer = bn_c.BatchNorm(len(x), axis=0)
    expected = bits(layer(np.array(x)))

    def resize():
        while not stop.is_set():
            try:
                x.append(0)
                x.pop()
            except BufferError as error:
                refused.append(str(error))
            if len(x) > 400_000:
                x.pop()

    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=resize, daemon=True)
    thread.start()
    wrong, errors = 0, {"x: expected 400000 channels on axis 0, got shape (400001,)"}
    for calls in itertools.count():
        if calls > 50 and (refused or calls > 5000):
            break
        try:
            wrong += bits(layer(x)) != expected
        except ValueError as error:
            errors.add(str(error))
    stop.set()
    thread.join(SECONDS)
    assert not wrong
    assert len(errors) == 1, errors
    assert refused


@pytest.mark.skipif(not GIL, reason="array.array is not safe without the GIL")
def test_an_array_that_another_thread_resizes():
    isolated(resized)


# ---- interpreters -----------------------------------------------------------------------------------

SUBINTERPRETER = """
import sys
import numpy as np, bn_c
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
x = np.arange(12, dtype="f4").reshape(4, 3)
expected = bn_c.batch_norm(x).tobytes()
other = interpreters.create()
interpreters.run_string(other, f'''
import sys
sys.path[:] = {sys.path}
try:
    import numpy as np, bn_c
    x = np.arange(12, dtype="f4").reshape(4, 3)
    print(bn_c.batch_norm(x).tobytes() == {expected})
except ImportError as error:
    print("refused")
sys.stdout.flush()
''')
interpreters.destroy(other)
print(bn_c.batch_norm(x).tobytes() == expected)
"""


def test_another_interpreter_works_or_refuses():
    """NumPy refuses to be loaded by a second interpreter of a process, so bn_c cannot be either."""
    assert output(SUBINTERPRETER).splitlines() in (["refused", "True"], ["True", "True"])
