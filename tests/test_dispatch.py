"""The choice of an instruction set at import, and that neither importing nor calling changes the process."""

import ctypes
import importlib
import os
import platform
from importlib.util import find_spec

import numpy as np
import pytest
from processes import output, run

import bn_c
from bn_c import _dispatch

UNSUPPORTED = [isa for isa in _dispatch.ISAS if isa not in bn_c.supported_isas()]


# ---- instruction sets -------------------------------------------------------------------------------


def cpu_features():
    """What NumPy found when it asked the CPU."""
    core = "numpy._core" if find_spec("numpy._core") else "numpy.core"
    return importlib.import_module(f"{core}._multiarray_umath").__cpu_features__


def of_this_machine():
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return ["aarch64"]
    if machine not in ("x86_64", "amd64"):
        return ["generic"]
    features = cpu_features()
    v3 = all(features[name] for name in ("AVX2", "FMA3", "F16C"))
    v4 = v3 and features["AVX512_SKX"]
    return ["x86_64"] + ["x86_64_v3"] * v3 + ["x86_64_v4"] * v4


def test_all_sets_of_this_machine_are_supported():
    built = [isa for isa in of_this_machine() if find_spec(f"bn_c._kernels_{isa}")]
    assert list(bn_c.supported_isas()) == built


def test_the_highest_supported_set_is_the_default():
    assert output("import bn_c; print(bn_c.isa)") == bn_c.supported_isas()[-1]
    assert output("import bn_c; print(bn_c.isa)", BN_C_MAX_ISA="") == bn_c.supported_isas()[-1]


@pytest.mark.parametrize("isa", bn_c.supported_isas())
def test_a_set_by_name(isa):
    code = "import bn_c, sys; print(bn_c.isa, *sorted(name for name in sys.modules if '_kernels_' in name))"
    assert output(code, BN_C_MAX_ISA=isa).split() == [isa, f"bn_c._kernels_{isa}"]


def test_only_the_chosen_kernels_are_loaded():
    """Those of another set could end the process by the mere loading."""
    code = "import bn_c, sys; print(*(name for name in sys.modules if '_kernels_' in name))"
    assert output(code) == f"bn_c._kernels_{bn_c.supported_isas()[-1]}"


@pytest.mark.parametrize("name", ["avx2", "X86_64", "x86_64_v5", "x86_64_v", "None", " ", *UNSUPPORTED])
def test_unknown_and_unsupported_names(name):
    result = run("import bn_c", BN_C_MAX_ISA=name)
    message = result.stderr.splitlines()[-1]
    assert result.returncode == 1
    assert message.startswith("ImportError: BN_C_MAX_ISA: expected one of ")
    assert ", ".join(bn_c.supported_isas()) in message
    assert repr(name) in message


def test_the_chosen_set_computes():
    code = """
        import numpy as np, bn_c
        y = bn_c.batch_norm_inference(np.arange(100, dtype="f4").reshape(1, 1, -1), [1], [4], eps=0)
        print(bool(np.array_equal(y.ravel(), (np.arange(100) - 1) / 2)))
    """
    for isa in bn_c.supported_isas():
        assert output("if True:" + code, BN_C_MAX_ISA=isa) == "True"


# ---- threads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "expected"), [("1", 1), ("3", 3), ("", 1)])
def test_number_of_threads_from_the_environment(text, expected):
    assert output("import bn_c; print(bn_c.get_num_threads())", BN_C_NUM_THREADS=text) == str(expected)


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "1e3"])
def test_bad_number_of_threads_in_the_environment(text):
    result = run("import bn_c", BN_C_NUM_THREADS=text)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        f"ImportError: BN_C_NUM_THREADS: expected a positive integer, got {text!r}"
    )


def test_setting_the_number_of_threads():
    before = bn_c.get_num_threads()
    try:
        bn_c.set_num_threads(2)
        assert bn_c.get_num_threads() == 2
        with pytest.raises(ValueError, match="num_threads: expected at least 1, got 0"):
            bn_c.set_num_threads(0)
        assert bn_c.get_num_threads() == 2
    finally:
        bn_c.set_num_threads(before)


THREADED_CALL = """
import sys, numpy as np, bn_c
bn_c._threads._cpus = lambda: 2
bn_c._core.wake_threads_from(1)
x = np.arange(600_000, dtype="f4").reshape(2, 30, 100, 100)
expected = bn_c.batch_norm(x, num_threads=1).tobytes()
def right():
    return bn_c.batch_norm(x, num_threads=2).tobytes() == expected
assert right()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_threads_in_a_forked_child():
    code = """
import os, warnings
warnings.simplefilter("ignore")
child = os.fork()
if child == 0:
    os._exit(0 if right() else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), right())
"""
    assert output(THREADED_CALL + code) == "0 True"


def test_threads_when_the_interpreter_ends():
    code = """
import atexit
atexit.register(lambda: print(right()))
"""
    assert output(THREADED_CALL + code) == "True"


def test_threads_in_a_daemon():
    code = """
import threading
answers = []
thread = threading.Thread(target=lambda: answers.append(right()), daemon=True)
thread.start()
thread.join()
threading.Thread(target=lambda: [right() for _ in range(10_000)], daemon=True).start()
print(answers[0])
"""
    assert output(THREADED_CALL + code) == "True"


# ---- the process ------------------------------------------------------------------------------------


def test_import_brings_no_other_packages():
    code = """
import sys, numpy
before = set(sys.modules)
import bn_c
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""
    added = [name for name in output(code).split() if not name.startswith(("_cython_", "cython_runtime"))]
    assert set(added) <= {"bn_c", "numpy"}


def test_import_and_calls_change_no_settings_of_the_process():
    code = """
import os, signal, threading, warnings, locale, random, numpy as np
def settings():
    return {
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "errors": np.geterr(),
        "printing": np.get_printoptions(),
        "warnings": list(warnings.filters),
        "locale": locale.setlocale(locale.LC_ALL),
        "random": random.getstate(),
        "threads": threading.active_count(),
        "directory": os.getcwd(),
    }
before = settings()
import bn_c
x = np.ones((2, 3, 4), "f4")
bn_c.batch_norm(x, eps=0)
bn_c.BatchNorm(3, training=True)(x)
after = settings()
print(*(name for name in before if before[name] != after[name]))
"""
    assert output(code) == ""


def test_subnormals_survive_the_import():
    code = """
import numpy as np
import bn_c
bn_c.batch_norm(np.ones((2, 3, 4), "f4"))
smallest = np.array([2.0**-149, 2.0**-130], "f4")
print(*(smallest * np.float32(1) > 0), float(np.float64(5e-324) * 1.0) > 0)
"""
    assert output(code) == "True True True"


# ---- the floating-point state of the caller ---------------------------------------------------------

LIBC = ctypes.CDLL(None)
# Where fenv_t keeps the control word, the bits of it that are settings, and those that flush subnormals.
CONTROL = {"x86_64": (28, 0xFFC0, 0x8040), "aarch64": (0, 0x07C00000, 0x01000000)}
UPWARD = {"x86_64": 0x800, "aarch64": 0x400000}
DOWNWARD = {"x86_64": 0x400, "aarch64": 0x800000}
MACHINE = platform.machine()

needs_fenv = pytest.mark.skipif(
    not hasattr(LIBC, "fegetenv") or MACHINE not in CONTROL or platform.system() != "Linux",
    reason="knows the floating-point environment of Linux on x86-64 and aarch64 only",
)


def environment():
    state = ctypes.create_string_buffer(64)
    assert LIBC.fegetenv(state) == 0
    return state


def control_word():
    at, settings, _ = CONTROL[MACHINE]
    return ctypes.c_uint32.from_buffer(environment(), at).value & settings


def flush_subnormals():
    at, _, flush = CONTROL[MACHINE]
    state = environment()
    ctypes.c_uint32.from_buffer(state, at).value |= flush
    assert LIBC.fesetenv(state) == 0


STATES = {
    "flush subnormals": flush_subnormals,
    "round up": lambda: LIBC.fesetround(UPWARD[MACHINE]),
    "round down": lambda: LIBC.fesetround(DOWNWARD[MACHINE]),
}


@pytest.fixture
def restored_environment():
    before = environment()
    yield
    LIBC.fesetenv(before)


def subnormals_are_flushed():
    return float(np.float32(2.0**-140) * np.float32(0.5)) == 0


@needs_fenv
def test_flushing_subnormals_takes_effect(restored_environment):
    """Or the next test would show nothing."""
    assert not subnormals_are_flushed()
    flush_subnormals()
    assert subnormals_are_flushed()


@needs_fenv
@pytest.mark.parametrize("set_state", STATES.values(), ids=STATES)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_bits_do_not_depend_on_the_state_of_the_caller(isa, set_state, num_threads, restored_environment):
    rng = np.random.default_rng(7)
    sizes = np.float32(2) ** -np.arange(112, 144, 4, "f4").reshape(8, 1, 1)
    x = rng.standard_normal((4, 8, 41, 41)).astype("f4") * sizes
    halves = rng.standard_normal((4, 8, 31)).astype("f2")
    mean, var, gamma = np.full(8, 2.0**-140), rng.uniform(1, 2, 8), rng.uniform(1, 2, 8)
    y, y_halves = (np.empty(a.shape, dtype) for a, dtype in ((x, "f4"), (halves, "f2")))

    def results():
        options = {"num_threads": num_threads}
        bn_c.batch_norm_inference(x, mean, var, gamma, out=y, **options)
        bn_c.batch_norm_inference(halves, mean, var, gamma, out=y_halves, **options)
        given = y.tobytes() + y_halves.tobytes()
        bn_c.batch_norm(x, gamma, eps=1e-30, out=y, **options)
        bn_c.batch_norm(halves, gamma, out=y_halves, **options)
        stats = bn_c.batch_stats(x, **options).to_dict()
        return given, y.tobytes(), y_halves.tobytes(), stats

    expected = results()
    set_state()
    before = control_word()
    got = results()
    assert control_word() == before
    assert got == expected


@needs_fenv
@pytest.mark.parametrize("set_state", STATES.values(), ids=STATES)
def test_statistics_in_parts_do_not_depend_on_the_state_of_the_caller(isa, set_state, restored_environment):
    """Parts of a large input are merged, and of several, in the modes of the loops."""
    x = np.random.default_rng(8).standard_normal((200_000, 5)).astype("f4") + 3
    y = np.empty_like(x)

    def results():
        _, stats = bn_c.batch_norm(x, out=y, return_stats=True)
        merged = bn_c.batch_stats(x[:1000]) + bn_c.batch_stats(x[1000:])
        return y.tobytes(), stats.to_dict(), merged.to_dict(), bn_c.batch_stats(x).to_dict()

    expected = results()
    set_state()
    assert results() == expected


@needs_fenv
def test_calls_leave_the_usual_state(isa, batch):
    before = control_word()
    x = np.ones((3, 4, 500), "f4")
    if batch:
        bn_c.batch_norm(x)
    else:
        bn_c.batch_norm_inference(x, np.zeros(4), np.ones(4))
    assert control_word() == before


def test_numpys_error_settings_do_not_matter(isa, batch):
    """Inside, infinity and NaN are results like any other."""
    x = np.array([[1e38, np.nan, np.inf, 1, 1e-45], [-3e38, 1, 1, 1, 0]], "f4")
    with np.errstate(all="raise"):
        if batch:
            y = bn_c.batch_norm(x, np.full(5, 1e38), eps=0, dtype="f2")
        else:
            y = bn_c.batch_norm_inference(x, np.zeros(5), np.zeros(5), np.full(5, 1e38), eps=0, dtype="f2")
    assert np.isnan(y[0, 1])
