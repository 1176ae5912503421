"""The measures of the structure count what they say, and the limits hold. Oracle: a small package."""

import measures
import pytest

FILES = {
    "__init__.py": "from .a import value\n",
    "a.py": "import torch\nfrom pkg import b\nvalue = b._ours\nx = torch._foreign(value)\ny = getattr(x, '_private')\n",
    "b.py": '"""The updates of what is whole; an update rule."""\nfrom lib._in import name\n_ours = 1\npiece = _ours\n',
    "c.cpp": "int x;\n",
}


@pytest.fixture
def package(tmp_path):
    (tmp_path / "pkg").mkdir()
    for name, text in FILES.items():
        (tmp_path / "pkg" / name).write_text(text)
    return tmp_path / "pkg"


def test_lines_imports_and_private_names(package):
    trees = measures.parsed(package)
    assert measures.lines(measures.sources(package)) == 11 and len(measures.sources(package)) == 4
    private = measures.private_accesses(trees)
    assert {file.name: found for file, found in private.items()} == {"a.py": [4, 5], "b.py": [2]}
    graph = measures.imports(trees, package)
    assert graph == {"pkg": {"pkg.a"}, "pkg.a": {"pkg.b"}, "pkg.b": set()}
    assert measures.imported_once(graph) == ["pkg.a", "pkg.b"]


def test_long_functions_and_old_words(package):
    body = "    pass\n" * 50
    (package / "a.py").write_text(f"def long():\n{body}\n\ndef short():\n{body[9:]}")
    assert measures.long_functions(measures.parsed(package)) == ["a.py:1 long"]
    assert measures.old_words([package / "b.py"]) == {
        "update for step": 1,
        "what is/what of": 1,
        "whole": 1,
        "piece": 1,
    }


@pytest.fixture(scope="module")
def measured():
    return measures.measure()[0]


@pytest.mark.parametrize("name", measures.LIMITS)
def test_the_limit_holds(measured, name):
    assert measured[name] <= measures.LIMITS[name], "python tests/measures.py -v tells where"
