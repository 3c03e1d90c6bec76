"""The README's snippets give what it says they give."""

import doctest
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_snippets():
    text = README.read_text(encoding="utf-8").replace("```", "\n")  # a fence is not part of an expected output
    test = doctest.DocTestParser().get_doctest(text, {}, "README.md", str(README), 0)
    assert len(test.examples) > 10
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
    assert results.failed == 0
