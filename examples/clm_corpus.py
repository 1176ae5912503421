"""The corpus that every machine has: the source of the Python standard library; and a tokenizer trained on text."""

import hashlib
import json
import logging
import os
import shutil
import sysconfig
import tempfile
import tokenize
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
import tokenizers
from datasets.utils import tqdm  # silent where disable_progress_bars() was called
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
DEFAULT_VOCAB_SIZE = 4096
# Tests repeat themselves and hold files that are broken on purpose; site-packages is not the standard library.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
# Names the layout of what is cached: change it when the same input gives other files.
CACHE_VERSION = "1"


def cache_root(cache_dir: str | None) -> Path:
    """Give the folder for prepared data: below `cache_dir`, else below the data sets' cache of HF_HOME."""
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "hf_radam"


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))  # so that ("ab", "c") and ("a", "bc") differ
        digest.update(data)
    return digest.hexdigest()


def choose_validation(sizes: dict[str, int], percentage: float) -> set[str]:
    """Choose whole documents with about `percentage` % of the bytes, by a hash of their names.

    The order of the hashes decides who is taken until the share is full; a document that is larger than what is left
    is passed over. At least one is chosen. The choice depends on names and sizes only, not on their order.

    Args:
        sizes: name of each document -> its bytes. At least two documents.
        percentage: share to choose, above 0 and below 100.
    """
    left = sum(sizes.values()) * percentage / 100
    order = sorted(sizes, key=_digest)
    chosen: set[str] = set()
    for name in order:
        if sizes[name] <= left:
            chosen.add(name)
            left -= sizes[name]
    return chosen or {min(sizes, key=lambda name: (sizes[name], name))}


def standard_library() -> dict[str, str]:
    """Read the Python standard library that runs this: path in the library -> source, one document per module.

    Tests, empty files and second copies of the same text are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents: dict[str, str] = {}
    seen: set[str] = set()
    for path in tqdm(_modules(root), desc="Reading the standard library", unit=" files"):
        with tokenize.open(path) as file:  # obeys the encoding that a module declares
            text = file.read()
        if text.strip() and text not in seen:
            seen.add(text)
            documents[path.relative_to(root).as_posix()] = text
    return documents


def _modules(root: Path) -> list[Path]:
    modules = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]  # in place: os.walk does not enter them
        modules += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(modules)


def write_standard_library(cache_dir: str | None, percentage: int, overwrite: bool = False) -> dict[str, str]:
    """Write the standard library as JSONL (`path`, `text`), once per content and split; return the files by split.

    Validation documents are whole modules, see `choose_validation`; no module and no text is on both sides.
    """
    documents = standard_library()
    key = _digest(CACHE_VERSION, str(percentage), *(part for item in documents.items() for part in item))[:16]
    folder = cache_root(cache_dir) / f"standard-library-{key}"
    held_out = choose_validation({name: len(text.encode()) for name, text in documents.items()}, percentage)
    for split in ("train", "validation"):
        path = folder / f"{split}.jsonl"
        if overwrite or not path.exists():
            names = [name for name in sorted(documents) if (name in held_out) == (split == "validation")]
            lines = (json.dumps({"path": name, "text": documents[name]}) + "\n" for name in names)
            _write_whole(path, lines)
            logger.info("%s: %d modules in %s", split, len(names), path)
    return {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}


def _write_whole(path: Path, lines: Iterable[str]) -> None:
    """Write a file so that under its name it is whole or absent, also when two runs write at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=path.parent))
    try:
        (staging / path.name).write_text("".join(lines), encoding="utf-8")
        os.replace(staging / path.name, path)
    finally:
        shutil.rmtree(staging)


def train_tokenizer(
    texts: Sequence[str], vocab_size: int | None, cache_dir: str | None, overwrite: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the texts, or take the one that was trained on the same texts before.

    Args:
        texts: training documents.
        vocab_size: entries, the 256 bytes and the end of text included; None is 4096. Little text gives fewer.
        cache_dir: see `cache_root`.
        overwrite: train again even if it is there.
    """
    size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    key = _digest(CACHE_VERSION, tokenizers.__version__, str(size), *texts)[:16]
    folder = cache_root(cache_dir) / f"tokenizer-{key}"
    if overwrite or not folder.exists():
        logger.info("training a tokenizer of %d entries on %d documents", size, len(texts))
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder.parent))
        _byte_level_bpe(texts, size).save_pretrained(staging)
        staging.chmod(0o755)  # mkdtemp makes a private folder, a shared cache needs a readable one
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(staging, folder)
        except OSError:  # another run was faster; it trained on the same texts
            if not folder.exists():
                raise
            shutil.rmtree(staging)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _byte_level_bpe(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256, so that no text is unknown
        show_progress=True,
    )
    backend.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
