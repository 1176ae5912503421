"""Tables between marks: written where they belong, the rest of a document untouched."""

import pytest

import measured

PARTS = {"small": lambda data: measured.markdown(["n"], [[str(data)]]), "words": lambda data: f"{data} words\n"}
DOCUMENT = """Before.

<!-- kind: small, written by `a command` -->
old
<!-- end of kind -->
Between. <!-- other: small -->
<!-- kind: words -->
<!-- end of kind -->
After.
"""


def test_only_what_stands_between_marks_is_written(tmp_path):
    path = tmp_path / "text.md"
    path.write_text(DOCUMENT)
    measured.write_document(path, "kind", PARTS, 3)
    expected = DOCUMENT.replace("old\n", "| n |\n|---|\n| 3 |\n").replace("words -->\n", "words -->\n3 words\n")
    assert path.read_text() == expected
    assert measured.written(expected, "kind", PARTS, 3) == expected
    assert measured.names(DOCUMENT, "kind") == ["small", "words"]


def test_a_document_without_a_place_for_tables_says_so(tmp_path):
    path = tmp_path / "text.md"
    path.write_text("Nothing.\n")
    with pytest.raises(ValueError, match=r"text.md: There is no <!-- kind: NAME --> \.\.\. "):
        measured.write_document(path, "kind", PARTS, 3)
    path.write_text("<!-- kind: large -->\n<!-- end of kind -->\n")
    with pytest.raises(ValueError, match=r"text.md: <!-- kind: large --> is none of small, words"):
        measured.write_document(path, "kind", PARTS, 3)
