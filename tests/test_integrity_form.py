"""What damage to a checkpoint of stock `Trainer` does not keep its form from being checked.

The oracle is the damage itself: each file below is broken on purpose in a real checkpoint, and must be the one named.
"""

import json
import zipfile

import pytest
from tiny import TRAIN, llama
from transformers import Trainer, TrainingArguments

from hf_radam.checkpoints.integrity import damage


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    arguments = TrainingArguments(
        str(folder), max_steps=2, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    Trainer(llama(), arguments, train_dataset=TRAIN).train()
    return folder / "checkpoint-2"


@pytest.fixture
def restored(stock):
    files = {path: path.read_bytes() for path in stock.iterdir()}
    yield stock
    for path, content in files.items():
        path.write_bytes(content)


def header(content, *, offset, value):
    """Set two bytes in the first entry of a zip archive's directory."""
    with_entry = content.rindex(b"PK\x01\x02", 0, content.index(b"PK\x01\x02") + 4)
    begin = with_entry + offset
    return content[:begin] + value.to_bytes(2, "little") + content[begin + 2 :]


@pytest.mark.parametrize(
    ("offset", "value"), [(6, 0x40), (8, 1 << 5), (8, 1), (10, 9), (10, 8)], ids="version patched encrypted 9 8".split()
)
def test_every_way_in_which_a_zip_archive_fails_is_told(restored, offset, value):
    file = restored / "optimizer.pt"
    file.write_bytes(header(file.read_bytes(), offset=offset, value=value))
    assert zipfile.is_zipfile(file)
    assert list(damage(restored)) == ["optimizer.pt"]


@pytest.mark.parametrize(
    "text", ["[]", "[" * 100_000, '"a"', "{}", '{"global_step": "2"}', "NaN"], ids=lambda text: text[:20]
)
def test_a_trainer_state_that_is_none_is_told(restored, text):
    (restored / "trainer_state.json").write_text(text, encoding="utf-8")
    assert list(damage(restored)) == ["trainer_state.json"]


def test_an_index_of_shards_with_strange_names_is_told(restored):
    (restored / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": 1}}), encoding="utf-8")
    try:
        assert list(damage(restored)) == ["1"]
    finally:
        (restored / "model.safetensors.index.json").unlink()


def test_a_whole_one_is_whole(stock):
    assert damage(stock) == {}
