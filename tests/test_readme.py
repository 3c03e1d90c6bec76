"""The snippets of the README and of the docstrings give what they say they give."""

import doctest
from pathlib import Path

import numpy as np
import pytest

import bn_c
from bn_c import folding, functional, image, layer, models, stats

README = Path(__file__).parent.parent / "README.md"


def test_snippets():
    text = README.read_text(encoding="utf-8").replace("```", "\n")  # a fence is not part of an expected output
    test = doctest.DocTestParser().get_doctest(text, {}, "README.md", str(README), 0)
    assert len(test.examples) > 10
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
    assert results.failed == 0


@pytest.mark.parametrize("module", [folding, functional, image, layer, models, stats])
def test_docstrings(module):
    names = {"np": np, "bn_c": bn_c}
    for test in doctest.DocTestFinder().find(module, extraglobs=names):
        assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed == 0
