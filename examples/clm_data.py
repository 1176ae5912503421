"""From text to blocks of tokens: load it, hold a part out, tokenize, join, cut.

Where the data has no validation text, `validation_split_percentage` is held out, the same for each run:

- the standard library and a folder of text files: whole files with that part of the bytes, chosen by their names;
- a .txt file: its last lines, so that the training text stays in one piece;
- other data sets: that part of the documents, drawn with a fixed seed;
- a stream, whose length nobody knows: that part of its first 20 000 documents or lines; training skips them. Of a
  stream's own validation text as many documents are read.
"""

import hashlib
import logging
import os
import shutil
import sysconfig
import tempfile
import tokenize
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import tokenizers
from datasets import Dataset, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetsError
from datasets.utils import tqdm  # silent where disable_progress_bars() was called
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from clm_arguments import DATA_SUFFIXES, DataArguments, ModelArguments
from clm_model import InputError, hub_kwargs
from hf_radam.config_files import one_sentence

logger = logging.getLogger(__name__)

SPLIT_SEED = 0  # of its own: the held-out text must not change with --seed
STREAM_WINDOW = 20_000  # documents, of which validation_split_percentage % are a stream's validation text
TOKENIZER_BYTES = 100_000_000  # a tokenizer learns nothing new from more text
BATCH = {"documents": 1000, "lines": 20_000}  # rows tokenized and joined at a time
END_OF_TEXT = "<|endoftext|>"
DEFAULT_VOCAB_SIZE = 4096
# Tests repeat themselves and hold files that are broken on purpose; site-packages is not the standard library.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}


@dataclass(frozen=True)
class Text:
    """Rows of text; `lines` are those of one running text, not documents."""

    rows: Dataset | IterableDataset
    column: str
    lines: bool = False


@dataclass(frozen=True)
class TextSize:
    """Size of a text in tokens, ends of documents included, and in UTF-8 bytes."""

    tokens: int
    bytes: int


# ---- The Python standard library, and a tokenizer trained on text ----


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))  # so that ("ab", "c") and ("a", "bc") differ
        digest.update(data)
    return digest.hexdigest()


def choose_validation(sizes: dict[str, int], percentage: float) -> set[str]:
    """Choose documents (name -> bytes) with about `percentage` % of the bytes, by a hash of their names."""
    left = sum(sizes.values()) * percentage / 100
    chosen: set[str] = set()
    for name in sorted(sizes, key=_digest):
        if sizes[name] <= left:  # a larger document is passed over
            chosen.add(name)
            left -= sizes[name]
    return chosen or {min(sizes, key=lambda name: (sizes[name], name))}


def standard_library() -> dict[str, str]:
    """Read the Python standard library: path -> source, without tests, empty files and second copies."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]  # in place: os.walk does not enter them
        modules += [Path(folder, name) for name in files if name.endswith(".py")]
    documents: dict[str, str] = {}
    seen: set[str] = set()
    for path in tqdm(sorted(modules), desc="Reading the standard library", unit=" files"):
        with tokenize.open(path) as file:  # obeys the encoding that a module declares
            text = file.read()
        if text.strip() and text not in seen:
            seen.add(text)
            documents[path.relative_to(root).as_posix()] = text
    return documents


def split_standard_library(cache_dir: str | None, percentage: int) -> dict[str, Dataset]:
    """Load the standard library (`path`, `text`), whole modules held out, through the cache of the data sets."""
    documents = standard_library()
    held_out = choose_validation({name: len(text.encode()) for name, text in documents.items()}, percentage)
    sides = {"train": documents.keys() - held_out, "validation": held_out}
    parts = {split: {name: documents[name] for name in sorted(names)} for split, names in sides.items()}
    return {
        split: Dataset.from_generator(_rows, gen_kwargs={"documents": part}, cache_dir=cache_dir)
        for split, part in parts.items()
    }


def _rows(documents: dict[str, str]) -> Iterator[dict[str, str]]:
    yield from ({"path": name, "text": text} for name, text in documents.items())


def train_tokenizer(
    texts: Sequence[str], vocab_size: int | None, cache_dir: str | None, overwrite: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, or load the one that was trained on the same texts; little text gives fewer entries."""
    size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    key = _digest("1", tokenizers.__version__, str(size), *texts)[:16]  # "1": change it when the rules below change
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "hf_radam" / f"tokenizer-{key}"
    if overwrite or not folder.exists():
        logger.info("training a tokenizer of %d entries on %d documents", size, len(texts))
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that no text is unknown
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
        backend.train_from_iterator(texts, trainer, length=len(texts))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as staging:
            tokenizer.save_pretrained(Path(staging, "new"))
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # another run was faster; it trained on the same texts
                os.replace(Path(staging, "new"), folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def load_tokenizer(model_args: ModelArguments, data_args: DataArguments, train: Text) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the arguments name, or train one on the training text (its first 100 MB)."""
    name = model_args.tokenizer_name or model_args.model_name_or_path
    if name is None:
        return train_tokenizer(
            list(_first_texts(train)), data_args.vocab_size, model_args.cache_dir, data_args.overwrite_cache
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub_kwargs(model_args))
    except (OSError, ValueError) as error:
        raise InputError(f"No tokenizer can be loaded from {name!r}: {one_sentence(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"The tokenizer {name!r} has no eos_token to separate documents. Choose another one.")
    return tokenizer


def _first_texts(text: Text) -> Iterator[str]:
    left = TOKENIZER_BYTES
    for row in tqdm(text.rows, desc="Reading text for the tokenizer", unit=" documents"):
        yield row[text.column]
        left -= len(row[text.column].encode())
        if left <= 0:
            return


# ---- Texts ----


def load_texts(model_args: ModelArguments, data_args: DataArguments) -> dict[str, Text]:
    """Load the texts that the arguments name: `train` and `validation`, which is never a stream."""
    load = _loader(model_args, data_args)
    percentage = data_args.validation_split_percentage
    if data_args.dataset_name:
        parts = load(data_args.dataset_name, data_args.dataset_config_name, token=model_args.token)
        if "train" not in parts:
            raise InputError(f"dataset_name={data_args.dataset_name} has no split `train`, only {', '.join(parts)}.")
        texts = {name: _text(parts[name], data_args) for name in ("train", "validation") if name in parts}
    elif data_args.train_file:
        texts = _load_files(load, data_args)
    else:
        parts = split_standard_library(model_args.cache_dir, percentage)
        texts = {split: _text(rows, data_args) for split, rows in parts.items()}
    if "validation" not in texts:
        texts = _hold_out(texts["train"], percentage)
    validation = texts["validation"]
    if isinstance(validation.rows, IterableDataset):
        count = STREAM_WINDOW * percentage // 100
        logger.info("reading the validation text: at most the first %d documents of the stream", count)
        rows = list(tqdm(validation.rows.take(count), desc="Reading the validation text", unit=" documents"))
        if not rows:
            raise InputError("The stream holds no validation text. Give a validation_file, or leave out --streaming.")
        texts["validation"] = replace(validation, rows=Dataset.from_list(rows))
    return texts


def _loader(model_args: ModelArguments, data_args: DataArguments) -> Callable[..., Any]:
    mode = "force_redownload" if data_args.overwrite_cache and not data_args.dataset_name else None
    options = {"streaming": data_args.streaming, "cache_dir": model_args.cache_dir, "download_mode": mode}

    def load(*names: str | None, **kwargs: Any) -> Any:
        try:
            return load_dataset(*names, **options, **kwargs)
        except (DatasetsError, OSError, ValueError) as error:
            source = data_args.dataset_name or data_args.train_file
            raise InputError(f"Cannot read {source}: {one_sentence(error.__cause__ or error)}") from error

    return load


def _load_files(load: Callable[..., Any], data_args: DataArguments) -> dict[str, Text]:
    paths = {"train": data_args.train_file, "validation": data_args.validation_file}
    files = {split: _folder_files(path) if os.path.isdir(path) else [path] for split, path in paths.items() if path}
    if "validation" not in files and os.path.isdir(data_args.train_file):
        files = _split_folder(data_args.train_file, files["train"], data_args.validation_split_percentage)
    texts = {}
    for split, names in files.items():
        path = Path(paths[split] or data_args.train_file)
        kind = "text" if path.is_dir() else DATA_SUFFIXES[path.suffix]
        options: dict[str, Any] = {"sample_by": "document"} if path.is_dir() else {}
        if lines := kind == "text" and not path.is_dir():
            options["keep_linebreaks"] = data_args.keep_linebreaks
        texts[split] = _text(load(kind, data_files={split: names}, split=split, **options), data_args, lines)
    return texts


def _folder_files(folder: str) -> list[str]:
    """List the text files of a folder, subfolders included, hidden ones left out."""
    paths = [path.relative_to(folder) for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    tables = [path for path in paths if DATA_SUFFIXES.get(path.suffix, "text") != "text"]
    if tables:
        raise InputError(f"{tables[0]} in {folder} is not a text file. Give it as train_file, or take it out.")
    if not paths:
        raise InputError(f"The folder {folder} holds no files. Give a folder of text files.")
    return [str(Path(folder, path)) for path in paths]


def _split_folder(folder: str, files: list[str], percentage: int) -> dict[str, list[str]]:
    if len(files) < 2:
        raise InputError(f"The folder {folder} holds one file, so none can be held out. Give it as train_file.")
    names = {Path(path).relative_to(folder).as_posix(): path for path in files}
    chosen = choose_validation({name: os.path.getsize(path) for name, path in names.items()}, percentage)
    train = [names[name] for name in sorted(names.keys() - chosen)]
    return {"train": train, "validation": [names[name] for name in sorted(chosen)]}


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
        problem = f"There is no column {wanted!r}" if wanted else "It is not clear which column holds the text"
        raise InputError(f"{problem}. Name one of {', '.join(columns) or '(no rows)'} as --text_column.")
    return Text(rows, wanted, lines)


def _hold_out(text: Text, percentage: int) -> dict[str, Text]:
    """Split rows that have no validation text, see the head of this file."""
    if isinstance(text.rows, IterableDataset):
        count = STREAM_WINDOW * percentage // 100
        train, validation = text.rows.skip(count), text.rows.take(count)
    else:
        total = len(text.rows)
        if total < 2:
            raise InputError(f"The training text has {total} rows, so none can be held out. Give a validation_file.")
        count = min(max(1, round(total * percentage / 100)), total - 1)
        if text.lines:
            train, validation = text.rows.select(range(total - count)), text.rows.select(range(total - count, total))
        else:
            train, validation = text.rows.train_test_split(test_size=count, seed=SPLIT_SEED).values()
    return {"train": replace(text, rows=train), "validation": replace(text, rows=validation)}


# ---- Blocks ----


def encode(batch: dict[str, list], *, tokenizer: PreTrainedTokenizerBase, column: str, lines: bool) -> dict[str, list]:
    """Tokenize rows; each document, but not each line of a running text, ends with the end-of-text token."""
    if any(row is None for row in batch[column]):
        raise InputError(f"A row has no text in column {column!r}. Take such rows out of the data.")
    # verbose=False: documents longer than the model are no problem here, they are cut into blocks.
    ids = tokenizer(batch[column], add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return {"input_ids": ids if lines else [row + [tokenizer.eos_token_id] for row in ids]}


def join_and_cut(batch: dict[str, list], *, block_size: int) -> dict[str, list]:
    """Join the rows of a batch and cut them into blocks; the end that does not fill a block is dropped.

    So each batch (1000 documents or 20 000 lines) loses fewer than `block_size` tokens.
    """
    tokens = list(chain.from_iterable(batch["input_ids"]))
    blocks = [tokens[i : i + block_size] for i in range(0, len(tokens) - block_size + 1, block_size)]
    return {"input_ids": blocks, "labels": [list(block) for block in blocks]}


def make_blocks(
    text: Text, tokenizer: PreTrainedTokenizerBase, block_size: int, data_args: DataArguments, limit: int | None
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset]:
    """Tokenize and cut a text into at most `limit` blocks; return them and the tokenized rows.

    A block has `input_ids` and `labels`, the same list twice; the model shifts them.
    """
    options: dict[str, Any] = {"batched": True, "batch_size": BATCH["lines" if text.lines else "documents"]}
    stream = isinstance(text.rows, IterableDataset)
    if not stream:  # a stream is mapped while it is read: no processes, no cache
        options["num_proc"] = data_args.preprocessing_num_workers
        options["load_from_cache_file"] = not data_args.overwrite_cache
    kwargs = {"tokenizer": tokenizer, "column": text.column, "lines": text.lines}
    columns = text.rows.column_names or list(next(iter(text.rows)))
    encoded = text.rows.map(encode, fn_kwargs=kwargs, remove_columns=columns, **options)
    blocks = encoded.map(join_and_cut, fn_kwargs={"block_size": block_size}, **options)
    if next(iter(blocks), None) is None:
        size = (
            "The stream"
            if stream
            else f"The text of {len(encoded)} rows, {sum(map(len, encoded['input_ids']))} tokens,"
        )
        raise InputError(f"{size} does not fill one block of {block_size}. Give more text, or a smaller --block_size.")
    if limit is None:
        return blocks, encoded
    if stream:
        return blocks.take(limit), encoded
    if limit > len(blocks):
        logger.warning("the text fills %d blocks, fewer than the %d asked for", len(blocks), limit)
    return blocks.select(range(min(limit, len(blocks)))), encoded


def validation_blocks(
    text: Text, tokenizer: PreTrainedTokenizerBase, block_size: int, data_args: DataArguments
) -> tuple[Dataset, TextSize]:
    """Make the validation data, and the size of its text: bits per byte need tokens per byte."""
    blocks, encoded = make_blocks(text, tokenizer, block_size, data_args, data_args.max_eval_samples)
    tokens, size = sum(map(len, encoded["input_ids"])), sum(len(row.encode()) for row in text.rows[text.column])
    return blocks, TextSize(tokens, size)
