"""Fuzzing guided by coverage: files that libFuzzer makes up for whatever reads files, and arguments for the calls.

    pip install atheris
    python tests/fuzz.py files SECONDS
    python tests/fuzz.py arguments SECONDS

It begins with what is in `tests/corpus`, where it leaves what broke something; `test_models.py` and
`test_properties.py` go through all of that.
"""

import io
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from importlib import import_module
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["bn_c", "zipfile"]):
        for name in ("bn_c", "bn_c.commands.run", "bn_c.models"):
            import_module(name)

from command_line import call

import bn_c
from bn_c.models import READERS

CORPUS = Path(__file__).with_name("corpus")


def corpus(kind):
    return sorted((CORPUS / kind).iterdir())


def check_file(data, folder):
    """Every reader takes the file, or says in one line that names it why not."""
    for suffix in READERS:
        path = folder / f"model{suffix}"
        path.write_bytes(data)
        said = str(path)
        try:
            use(bn_c.load_layers(path))
        except ImportError:
            pass  # the package for such files is not installed
        except (OSError, ValueError) as error:
            said = str(error)
        assert str(path) in said
        assert "\n" not in said
    for suffix, axis in ((".npy", 0), (".npz", -1)):
        (folder / f"x{suffix}").write_bytes(data)
        with redirect_stderr(io.StringIO()) as said:
            status = call("run", folder / f"x{suffix}", "-o", folder / "y.npy", "--axis", axis)
        assert (status, said.getvalue().count("\n")) in ((0, 0), (2, 1)), said.getvalue()
    assert not list(folder.glob(".bn_c-*"))


def use(layers):
    """A layer that a file gave is whole."""
    for layer in layers.values():
        assert repr(layer)
        shape = np.ones(max(2, layer.axis + 1, -layer.axis), int)
        shape[layer.axis] = layer.num_features
        layer.eval()(np.zeros(shape, np.float32))


def check_arguments():
    """What `test_properties.py` tests, with the arguments that Hypothesis makes of bytes."""
    import test_properties as tests
    from hypothesis import given
    from hypothesis import strategies as st

    @given(st.data(), st.sampled_from([None, *tests.CALLS]), st.sampled_from(bn_c.supported_isas()))
    def test(data, name, isa):
        if name is None:
            check = tests.test_a_bad_argument_is_named_and_nothing_is_written
            check.hypothesis.inner_test(data.draw(tests.spoiled()), "inference")
        else:
            check = tests.test_the_result_of_the_oracle_or_an_error
            check.hypothesis.inner_test(name, data.draw(tests.cases()), isa, data.draw(st.sampled_from(tests.CACHES)))

    return test.hypothesis.fuzz_one_input


def main(kind, seconds):
    # Damage that the checksum finds goes no further.
    zipfile.ZipExtFile._update_crc = lambda *_: None
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        new = Path(folder, "new")
        new.mkdir()
        target = check_arguments() if kind == "arguments" else lambda data: check_file(data, Path(folder))
        options = [f"-max_total_time={seconds}", f"-artifact_prefix={CORPUS / kind}/", "-max_len=8192"]
        limits = ["-timeout=20", "-report_slow_units=20", "-rss_limit_mb=1500"]
        atheris.Setup([sys.argv[0], *options, *limits, str(new), str(CORPUS / kind)], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
