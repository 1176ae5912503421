"""From text to blocks of tokens: load it, hold a part out, tokenise, join, cut.

What is held out where the data has no validation text (always `validation_split_percentage`, the same for each run):

- the standard library and a folder of text files: whole files with that part of the bytes, chosen by their names;
- a .txt file: its last lines, so that the training text stays in one piece;
- other data sets: that part of the documents, drawn with a fixed seed;
- a stream, whose length nobody knows: the first p % of 20 000 documents (or lines); training skips them. Of a stream's
  own validation text as many documents are read.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetsError
from datasets.utils import tqdm  # silent where disable_progress_bars() was called
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from clm_arguments import DATA_SUFFIXES, DataArguments, ModelArguments
from clm_corpus import choose_validation, train_tokenizer, write_standard_library
from clm_model import hub_kwargs
from clm_parser import InputError, one_sentence

logger = logging.getLogger(__name__)

SPLIT_SEED = 0  # of its own: the held-out text must not change with --seed
STREAM_WINDOW = 20_000  # documents; a stream's validation text is validation_split_percentage % of so many
TOKENIZER_BYTES = 100_000_000  # a tokenizer learns nothing new from more text than this
BATCH = {"documents": 1000, "lines": 20_000}  # rows tokenised and joined at a time


@dataclass(frozen=True)
class Text:
    """Rows of text; `lines` says that they are the lines of one running text, not documents of their own."""

    rows: Dataset | IterableDataset
    column: str
    lines: bool = False


@dataclass(frozen=True)
class TextSize:
    """Size of a text in tokens, ends of documents included, and in UTF-8 bytes of text."""

    tokens: int
    bytes: int


def load_texts(model_args: ModelArguments, data_args: DataArguments, overwrite: bool = False) -> dict[str, Text]:
    """Load the texts that the arguments name: `train` and `validation`, which is always in memory or on disk.

    Raises:
        InputError: data that cannot be read, or that leaves nothing to hold out.
    """
    load = _loader(model_args, data_args, overwrite)
    if data_args.dataset_name:
        parts = load(data_args.dataset_name, data_args.dataset_config_name, token=model_args.token)
        if "train" not in parts:
            raise InputError(f"dataset_name={data_args.dataset_name} has no split `train`, only {', '.join(parts)}")
        texts = {name: _text(parts[name], data_args) for name in ("train", "validation") if name in parts}
    elif data_args.train_file:
        texts = _load_files(load, data_args)
    else:
        files = write_standard_library(model_args.cache_dir, data_args.validation_split_percentage, overwrite)
        texts = {split: _text(rows, data_args) for split, rows in load("json", data_files=files).items()}
    if "validation" not in texts:
        texts = _hold_out(texts["train"], data_args.validation_split_percentage)
    validation = texts["validation"]
    if isinstance(validation.rows, IterableDataset):
        texts["validation"] = replace(validation, rows=_read(validation.rows, _stream_count(data_args)))
    return texts


def _loader(model_args: ModelArguments, data_args: DataArguments, overwrite: bool) -> Callable[..., Any]:
    """Bind what every `load_dataset` of a run shares, and put its errors into one sentence."""

    def load(*names: str | None, **kwargs: Any) -> Any:
        mode = "force_redownload" if overwrite and not data_args.dataset_name else None
        try:
            return load_dataset(
                *names, streaming=data_args.streaming, cache_dir=model_args.cache_dir, download_mode=mode, **kwargs
            )
        except (DatasetsError, OSError, ValueError) as error:
            source = data_args.dataset_name or data_args.train_file
            raise InputError(f"cannot read {source}: {one_sentence(error.__cause__ or error)}") from error

    return load


def _load_files(load: Callable[..., Any], data_args: DataArguments) -> dict[str, Text]:
    paths = {"train": data_args.train_file, "validation": data_args.validation_file}
    files = {split: [path] for split, path in paths.items() if path}
    if len(files) == 1 and Path(data_args.train_file).is_dir():
        files = _split_folder(data_args.train_file, data_args.validation_split_percentage)
    texts = {}
    for split, names in files.items():
        origin = paths[split] or data_args.train_file
        if Path(origin).is_dir():
            names = [str(path) for path in _folder_files(origin)] if names == [origin] else names
            rows = load("text", data_files={split: names}, sample_by="document", split=split)
            texts[split] = _text(rows, data_args)
        elif origin.endswith(".txt"):
            rows = load("text", data_files={split: names}, keep_linebreaks=data_args.keep_linebreaks, split=split)
            texts[split] = _text(rows, data_args, lines=True)
        else:
            rows = load(DATA_SUFFIXES[Path(origin).suffix], data_files={split: names}, split=split)
            texts[split] = _text(rows, data_args)
    return texts


def _folder_files(folder: str) -> list[Path]:
    """List the text files of a folder, subfolders included, hidden ones left out."""
    files = [
        path
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    tables = [path for path in files if DATA_SUFFIXES.get(path.suffix, "text") != "text"]
    if tables:
        raise InputError(f"{tables[0]} is no text file: name it as train_file itself, or take it out of {folder}")
    if not files:
        raise InputError(f"the folder {folder} holds no files: give a folder of text files")
    return files


def _split_folder(folder: str, percentage: int) -> dict[str, list[str]]:
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _folder_files(folder)}
    if len(sizes) < 2:
        raise InputError(f"the folder {folder} holds one file, so none can be held out: name it as train_file itself")
    chosen = choose_validation(sizes, percentage)
    sides = {"train": sizes.keys() - chosen, "validation": chosen}
    return {split: [str(Path(folder) / name) for name in sorted(names)] for split, names in sides.items()}


def _text(rows: Dataset | IterableDataset, data_args: DataArguments, lines: bool = False) -> Text:
    """Find the column that holds the text."""
    if rows.features is not None:
        columns = list(rows.features)
        strings = [c for c, f in rows.features.items() if isinstance(f, Value) and f.dtype.endswith("string")]
    else:  # a stream knows its columns only from its rows
        first = next(iter(rows), {})
        columns, strings = list(first), [c for c, value in first.items() if isinstance(value, str)]
    wanted = data_args.text_column or ("text" if "text" in columns else strings[0] if len(strings) == 1 else None)
    if wanted not in columns:
        problem = f"there is no column {wanted!r}" if wanted else "it is not clear which column holds the text"
        raise InputError(f"{problem}: name one of {', '.join(columns) or '(no rows)'} as --text_column")
    return Text(rows, wanted, lines)


def _hold_out(text: Text, percentage: int) -> dict[str, Text]:
    """Split rows that have no validation text, see the head of this file."""
    if isinstance(text.rows, IterableDataset):
        count = STREAM_WINDOW * percentage // 100
        parts = text.rows.skip(count), text.rows.take(count)
    else:
        total = len(text.rows)
        if total < 2:
            raise InputError(f"the training text has {total} row(s), so none can be held out: give a validation_file")
        count = min(max(1, round(total * percentage / 100)), total - 1)
        if text.lines:
            parts = text.rows.select(range(total - count)), text.rows.select(range(total - count, total))
        else:
            both = text.rows.train_test_split(test_size=count, seed=SPLIT_SEED)
            parts = both["train"], both["test"]
    return {"train": replace(text, rows=parts[0]), "validation": replace(text, rows=parts[1])}


def _stream_count(data_args: DataArguments) -> int:
    return STREAM_WINDOW * data_args.validation_split_percentage // 100


def _read(stream: IterableDataset, count: int) -> Dataset:
    logger.info("reading the validation text: at most the first %d documents of the stream", count)
    rows = list(tqdm(stream.take(count), desc="Reading the validation text", unit=" documents"))
    if not rows:
        raise InputError("the stream holds no validation text: give a validation_file, or leave out --streaming")
    return Dataset.from_list(rows)


def load_tokenizer(
    model_args: ModelArguments, data_args: DataArguments, train: Text, overwrite: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the arguments name, else train one on the training text (its first 100 MB)."""
    name = model_args.tokenizer_name or model_args.model_name_or_path
    if name is None:
        texts = list(_first_bytes(train, TOKENIZER_BYTES))
        return train_tokenizer(texts, data_args.vocab_size, model_args.cache_dir, overwrite)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub_kwargs(model_args))
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer can be loaded from {name!r}: {one_sentence(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer {name!r} has no eos_token to part documents with: choose another one")
    return tokenizer


def _first_bytes(text: Text, limit: int) -> Iterator[str]:
    left = limit
    for row in tqdm(text.rows, desc="Reading text for the tokenizer", unit=" documents"):
        yield row[text.column]
        left -= len(row[text.column].encode())
        if left <= 0:
            logger.info("the tokenizer learns from the first %d bytes of text", limit)
            return


def encode(batch: dict[str, list], *, tokenizer: PreTrainedTokenizerBase, column: str, lines: bool) -> dict[str, list]:
    """Tokenise rows; each document, but not each line of a running text, ends with the end-of-text token."""
    if any(row is None for row in batch[column]):
        raise InputError(f"a row has no text in column {column!r}: take such rows out of the data")
    # verbose=False: documents longer than the model are no problem here, they are cut into blocks.
    ids = tokenizer(batch[column], add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return {"input_ids": ids if lines else [row + [tokenizer.eos_token_id] for row in ids]}


def join_and_cut(batch: dict[str, list], *, block_size: int) -> dict[str, list]:
    """Join the rows of a batch and cut them into blocks; what does not fill the last block is dropped.

    So each batch (1000 documents or 20 000 lines) loses fewer than `block_size` tokens.
    """
    tokens = list(chain.from_iterable(batch["input_ids"]))
    blocks = [tokens[i : i + block_size] for i in range(0, len(tokens) - block_size + 1, block_size)]
    return {"input_ids": blocks, "labels": [list(block) for block in blocks]}


def to_blocks(
    text: Text, tokenizer: PreTrainedTokenizerBase, block_size: int, data_args: DataArguments, overwrite: bool = False
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset]:
    """Tokenise and cut a text; return the blocks and the tokenised rows they were cut from."""
    batched: dict[str, Any] = {"batched": True, "batch_size": BATCH["lines" if text.lines else "documents"]}
    steps: dict[str, dict[str, Any]] = {"encode": {}, "cut": {}}
    if isinstance(text.rows, Dataset):  # a stream is mapped while it is read: no processes, no cache, no bar
        batched |= {"num_proc": data_args.preprocessing_num_workers, "load_from_cache_file": not overwrite}
        steps = {"encode": {"desc": "Tokenising"}, "cut": {"desc": f"Cutting blocks of {block_size}"}}
    encoded = text.rows.map(
        encode,
        fn_kwargs={"tokenizer": tokenizer, "column": text.column, "lines": text.lines},
        remove_columns=text.rows.column_names or list(next(iter(text.rows))),
        **batched,
        **steps["encode"],
    )
    blocks = encoded.map(join_and_cut, fn_kwargs={"block_size": block_size}, **batched, **steps["cut"])
    return blocks, encoded


def training_blocks(
    text: Text, tokenizer: PreTrainedTokenizerBase, block_size: int, data_args: DataArguments, overwrite: bool = False
) -> Dataset | IterableDataset:
    """Make the training data: `input_ids` and `labels`, the same list twice; the model shifts them.

    Raises:
        InputError: the text does not fill one block.
    """
    blocks, encoded = to_blocks(text, tokenizer, block_size, data_args, overwrite)
    if isinstance(blocks, Dataset):
        return _first(blocks, encoded, data_args.max_train_samples, "training", block_size)
    if next(iter(blocks), None) is None:
        raise InputError(
            f"the stream does not fill one training block of {block_size} tokens after the validation text: "
            "leave out --streaming, lower --validation_split_percentage or --block_size"
        )
    return blocks if data_args.max_train_samples is None else blocks.take(data_args.max_train_samples)


def validation_blocks(
    text: Text, tokenizer: PreTrainedTokenizerBase, block_size: int, data_args: DataArguments, overwrite: bool = False
) -> tuple[Dataset, TextSize]:
    """Make the validation data, and the size of its text: bits per byte need tokens per byte.

    Raises:
        InputError: the text does not fill one block.
    """
    blocks, encoded = to_blocks(text, tokenizer, block_size, data_args, overwrite)
    size = TextSize(
        tokens=sum(len(ids) for ids in encoded["input_ids"]),
        bytes=sum(len(row.encode()) for row in text.rows[text.column]),
    )
    return _first(blocks, encoded, data_args.max_eval_samples, "validation", block_size), size


def _first(blocks: Dataset, encoded: Dataset, limit: int | None, name: str, block_size: int) -> Dataset:
    if len(blocks) == 0:
        tokens = sum(len(ids) for ids in encoded["input_ids"])
        raise InputError(
            f"the {name} text has {tokens} tokens in {len(encoded)} rows and does not fill one block of {block_size}: "
            "give more text, or a smaller --block_size"
        )
    if limit is not None and limit > len(blocks):
        logger.warning("the %s text fills %d blocks, fewer than the %d asked for", name, len(blocks), limit)
    return blocks if limit is None else blocks.select(range(min(limit, len(blocks))))
