"""Texts become blocks: every source is read whole, split once and for all, and cut without losing the order.

Oracles: the files as the tests wrote them; tokens of the tokenizer called on each document by itself.
"""

import json
import random
from itertools import chain

import pytest
from launched import random_text

from clm_arguments import DataArguments, ModelArguments
from clm_data import (
    STREAM_WINDOW,
    load_texts,
    load_tokenizer,
    make_blocks,
    split_standard_library,
    standard_library,
    train_tokenizer,
    validation_blocks,
)
from clm_model import InputError

BLOCK = 16


@pytest.fixture
def documents():
    draw = random.Random(0)
    return [random_text(draw, draw.randint(20, 60)) + f"\n# {i}\n" for i in range(40)]


@pytest.fixture
def model_args(tmp_path):
    return ModelArguments(cache_dir=str(tmp_path / "cache"))


def read(texts, split):
    return [row[texts[split].column] for row in texts[split].rows]


def write_jsonl(path, documents, column="text"):
    path.write_text("".join(json.dumps({column: text, "number": 1}) + "\n" for text in documents))
    return str(path)


def test_standard_library_is_split_once_and_never_on_both_sides(tmp_path):
    sides = split_standard_library(str(tmp_path), 5)
    corpus = standard_library()
    rows = [row for side in sides.values() for row in side]
    assert {row["path"]: row["text"] for row in rows} == corpus
    assert len({row["text"] for row in rows}) == len(rows) == len(corpus)
    assert not any("test" in row["path"].split("/") for row in rows)
    size = {split: sum(len(text.encode()) for text in side["text"]) for split, side in sides.items()}
    assert sum(size.values()) > 5e6
    assert size["validation"] / sum(size.values()) == pytest.approx(0.05, abs=0.001)
    again = split_standard_library(str(tmp_path), 5)
    assert [side.cache_files for side in again.values()] == [side.cache_files for side in sides.values()]
    assert set(split_standard_library(str(tmp_path), 6)["validation"]["path"]) != set(sides["validation"]["path"])


@pytest.mark.parametrize("streaming", [False, True])
def test_jsonl_to_blocks(tmp_path, documents, model_args, streaming):
    # A stream gives its first documents to the validation: more than the file has, if they are not fewer than 200.
    held_out = STREAM_WINDOW // 100
    documents = documents * (1 + held_out // len(documents)) if streaming else documents
    data_args = DataArguments(
        train_file=write_jsonl(tmp_path / "a.jsonl", documents), streaming=streaming, validation_split_percentage=1
    )
    texts = load_texts(model_args, data_args)
    train, validation = read(texts, "train"), read(texts, "validation")
    if streaming:
        assert (validation, train) == (documents[:held_out], documents[held_out:])
    else:
        assert (sorted(train + validation), len(validation)) == (sorted(documents), 1)
        assert read(load_texts(model_args, data_args), "validation") == validation

    tokenizer = load_tokenizer(model_args, data_args, texts["train"])
    blocks = list(make_blocks(texts["train"], tokenizer, BLOCK, data_args, None)[0])
    expected = list(chain.from_iterable([*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in train))
    joined = list(chain.from_iterable(block["input_ids"] for block in blocks))
    assert joined == expected[: len(joined)]
    assert 0 <= len(expected) - len(joined) < BLOCK
    assert all(block["labels"] == block["input_ids"] and len(block["labels"]) == BLOCK for block in blocks)

    blocks, size = validation_blocks(texts["validation"], tokenizer, BLOCK, data_args)
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in validation)
    assert (size.tokens, size.bytes) == (tokens, sum(len(text.encode()) for text in validation))
    assert len(blocks) == tokens // BLOCK


def test_lines_of_a_text_file_are_one_running_text(tmp_path, documents, model_args):
    path = tmp_path / "a.txt"
    path.write_text("".join(documents))
    data_args = DataArguments(train_file=str(path), validation_split_percentage=10)
    texts = load_texts(model_args, data_args)
    assert "".join(read(texts, "train") + read(texts, "validation")) == path.read_text()
    assert len(read(texts, "validation")) == round(2 * len(documents) / 10)
    tokenizer = load_tokenizer(model_args, data_args, texts["train"])
    for block in make_blocks(texts["train"], tokenizer, BLOCK, data_args, None)[0]:
        assert tokenizer.eos_token_id not in block["input_ids"]


def test_files_of_a_folder_are_documents_and_held_out_whole(tmp_path, documents, model_args):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").write_text("not text")
    for i, text in enumerate(documents):
        (folder / ("sub" if i % 2 else "") / f"{i}.md").write_text(text)
    data_args = DataArguments(train_file=str(folder), validation_split_percentage=20)
    texts = load_texts(model_args, data_args)
    train, validation = read(texts, "train"), read(texts, "validation")
    assert sorted(train + validation) == sorted(documents)
    assert len("".join(validation)) / len("".join(documents)) == pytest.approx(0.2, abs=0.05)
    assert read(load_texts(model_args, data_args), "validation") == validation


def test_a_validation_file_of_another_kind_and_a_named_column(tmp_path, documents, model_args):
    table, other = tmp_path / "a.csv", tmp_path / "b.txt"
    table.write_text("title,body\n" + "".join(f'"{i}","{text}"\n' for i, text in enumerate(documents)))
    other.write_text("one\ntwo\n")
    with pytest.raises(InputError, match="Name one of title, body as --text_column"):
        load_texts(model_args, DataArguments(train_file=str(table), text_column="text"))
    only = write_jsonl(tmp_path / "c.jsonl", documents, column="body")
    texts = load_texts(model_args, DataArguments(train_file=only, validation_file=str(other)))
    assert (texts["train"].column, read(texts, "train")) == ("body", documents)
    assert (texts["validation"].lines, read(texts, "validation")) == (True, ["one\n", "two\n"])


def test_a_data_set_by_name_uses_its_own_validation_split(tmp_path, documents, model_args):
    folder = tmp_path / "named"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", documents[:30])
    write_jsonl(folder / "validation.jsonl", documents[30:])
    for streaming in (False, True):
        texts = load_texts(model_args, DataArguments(dataset_name=str(folder), streaming=streaming))
        assert (read(texts, "train"), read(texts, "validation")) == (documents[:30], documents[30:])


def test_text_that_cannot_be_read_or_is_too_little(tmp_path, model_args):
    for name, content in (("a.jsonl", b"{broken"), ("a.txt", b"\xff\xfe\xff")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="Cannot read"):
            load_texts(model_args, DataArguments(train_file=str(tmp_path / name)))
    little = DataArguments(train_file=write_jsonl(tmp_path / "b.jsonl", ["abc", "abd"]))
    texts = load_texts(model_args, little)
    tokenizer = load_tokenizer(model_args, little, texts["train"])
    with pytest.raises(InputError, match=r"The text of 1 rows, \d tokens, does not fill one block of 500"):
        make_blocks(texts["train"], tokenizer, 500, little, None)
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        DataArguments(train_file=str(tmp_path / "a.txt"))
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, words in (("a.md", "holds no files"), ("b.csv", "holds one file"), ("c.md", "not a text file")):
        with pytest.raises(InputError, match=words):
            load_texts(model_args, DataArguments(train_file=str(folder)))
        (folder / name).write_text("text")


def test_tokenizer_is_trained_once_knows_every_byte_and_gives_text_back(tmp_path, documents):
    first = train_tokenizer(documents, 300, str(tmp_path))
    (folder,) = (tmp_path / "hf_radam").iterdir()
    stamp = (folder / "tokenizer.json").stat().st_mtime_ns
    again = train_tokenizer(documents, 300, str(tmp_path))
    assert (folder / "tokenizer.json").stat().st_mtime_ns == stamp
    fresh = train_tokenizer(documents, 300, str(tmp_path / "other"))
    assert first.get_vocab() == again.get_vocab() == fresh.get_vocab() and len(first) == 300
    text = "Grüße, \t\x00 漢字\r\n  end "
    assert first.decode(first(text)["input_ids"]) == text
    assert first.eos_token_id == first.bos_token_id == first.convert_tokens_to_ids("<|endoftext|>")
