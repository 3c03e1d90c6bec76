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
from pathlib import Path

import numpy as np

CORPUS = Path(__file__).with_name("corpus")


def corpus(kind):
    return sorted((CORPUS / kind).iterdir())


def check_file(data, folder):
    """Every reader takes the file, or says in one line that names it why not."""
    from command_line import call

    import bn_c
    from bn_c.models import READERS

    for suffix in READERS:
        path = folder / f"model{suffix}"
        path.write_bytes(data)
        try:
            layers = bn_c.load_layers(path)
        except ImportError:
            continue  # the package for such files is not installed
        except (OSError, ValueError) as error:
            assert str(path) in str(error), repr(error)
            assert "\n" not in str(error), repr(error)
            continue
        for layer in layers.values():
            assert repr(layer)
            shape = np.ones(max(2, layer.axis + 1, -layer.axis), int)
            shape[layer.axis] = layer.num_features
            if not layer.training:
                layer(np.zeros(shape, np.float32))
    for suffix, axis in ((".npy", 0), (".npz", -1)):
        (folder / f"x{suffix}").write_bytes(data)
        with redirect_stderr(io.StringIO()) as said:
            status = call("run", folder / f"x{suffix}", "-o", folder / "y.npy", "--axis", axis)
        assert (status, said.getvalue().count("\n")) in ((0, 0), (2, 1)), said.getvalue()
    assert not list(folder.glob(".bn_c-*"))


def check_arguments():
    """What `test_properties.py` tests, with the arguments that Hypothesis makes of bytes."""
    import test_properties
    from hypothesis import given
    from hypothesis import strategies as st

    import bn_c

    right, wrong = test_properties.test_the_result_of_the_oracle_or_an_error, test_properties.test_a_bad_argument_is_named_and_nothing_is_written
    names = st.sampled_from([None, *test_properties.CALLS])

    @given(st.data(), names)
    def test(data, name):
        if name is None:
            wrong.hypothesis.inner_test(data.draw(test_properties.spoiled()), "inference")
        else:
            isa = data.draw(st.sampled_from(bn_c.supported_isas()))
            right.hypothesis.inner_test(name, data.draw(test_properties.cases()), isa)

    return test.hypothesis.fuzz_one_input


def main(kind, seconds):
    import atheris

    with atheris.instrument_imports(include=["bn_c", "zipfile"]):
        import bn_c
        import bn_c.cli
        import bn_c.commands.run
        import bn_c.models
    # Damage that the checksum finds goes no further.
    zipfile.ZipExtFile._update_crc = lambda *_: None
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        new = Path(folder, "new")
        new.mkdir()
        target = check_arguments() if kind == "arguments" else lambda data: check_file(data, Path(folder))
        options = [f"-max_total_time={seconds}", f"-artifact_prefix={CORPUS / kind}/", "-max_len=8192"]
        limits = ["-timeout=20", "-rss_limit_mb=1500"]
        atheris.Setup([sys.argv[0], *options, *limits, str(new), str(CORPUS / kind)], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
