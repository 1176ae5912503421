"""A corrupted checkpoint is told by the file, passed over by the searches, and none of its weights are loaded.

Each file of a checkpoint is removed, cut, zeroed, or has single bits changed. Oracles: the name of the file in the
message; the weights of an untouched trainer; the outcome of the run that was never corrupted, which resuming from the
checkpoint before must have, bit for bit.
"""

import logging
import re
import shutil

import pytest
import tiny
from transformers import Trainer

from hf_radam import load_evaluation_model
from hf_radam.checkpoints.manifest import MANIFEST_NAME, CheckpointError
from hf_radam.checkpoints.runs import check_resumable
from hf_radam.checkpoints.verify import verify_checkpoint

METHODS = {**tiny.METHODS, "wsd": tiny.METHODS["wsd"] | {"decay_steps": 3}}
BESIDE = {"wsd": "", "ewa": "ewa/", "schedule_free": "schedule_free/"}
"""By method: the folder of the evaluation weights in a checkpoint."""
MODEL = ("config.json", "generation_config.json", "model.safetensors")
STATE = ("optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin", MANIFEST_NAME)
CASES = [("ewa", file) for file in (*STATE, *MODEL, *(f"ewa/{name}" for name in MODEL))]  # every file
CASES += [(method, folder + "model.safetensors") for method, folder in BESIDE.items() if method != "ewa"]
CASES += [("wsd", MANIFEST_NAME), ("schedule_free", "model.safetensors")]
SIX = {"max_steps": 6, "save_strategy": "no"}
SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}


def flipped(data: bytes, position: int, bit: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def damages(data: bytes) -> dict[str, bytes | None]:
    """Contents that a file may be left with instead of `data`; None where it is gone."""
    last = len(data) - 1
    flips = {f"bit of byte {p}": flipped(data, p, bit) for p, bit in ((0, 0), (last // 2, 7), (last, 1))}
    cuts = {"half": data[: len(data) // 2], "empty": b"", "one byte long": data + b"\0"}
    return {"gone": None, "zeroed": bytes(len(data))} | cuts | flips


def leave(file, content: bytes | None) -> None:
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_bytes(content)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of each method with checkpoint-3 and checkpoint-6, and the weights they ended with."""
    made = {}
    for method in BESIDE:
        run = tmp_path_factory.mktemp(method)
        trainer = tiny.trainer(run, **METHODS[method] | SAVING)
        trainer.train()
        made[method] = run, tiny.parameters(trainer.model)
    checkpoint = made["ewa"][0] / "checkpoint-6"
    files = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert {file for method, file in CASES if method == "ewa"} == files
    return made


@pytest.mark.parametrize(("method", "file"), CASES, ids=[f"{m}, {f}" for m, f in CASES])
def test_any_damage_is_named_and_passed_over(runs, tmp_path, caplog, method, file):
    run, end = runs[method]
    shutil.copytree(run, tmp_path / "run")
    bad = tmp_path / "run/checkpoint-6" / file
    evaluated = {step: tiny.parameters(load_evaluation_model(run / f"checkpoint-{step}")) for step in (3, 6)}
    concerns_evaluation = file == MANIFEST_NAME or file in {BESIDE[method] + name for name in MODEL}
    trainer = tiny.trainer(tmp_path / "run", **METHODS[method] | SIX)
    before = tiny.parameters(trainer.model)
    whole = bad.read_bytes()
    for how, content in damages(whole).items():
        leave(bad, content)
        with pytest.raises(CheckpointError, match=re.escape(file)):
            trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-6"))
        assert tiny.same(before, tiny.parameters(trainer.model)) and trainer.optimizer is None, how
        if not concerns_evaluation and how != "gone":
            continue
        caplog.clear()
        loaded = tiny.parameters(load_evaluation_model(tmp_path / "run"))
        assert tiny.same(loaded, evaluated[3 if concerns_evaluation else 6]), how
        assert passed_over(caplog, file) == concerns_evaluation, how
    caplog.clear()
    trainer.train(resume_from_checkpoint=True)  # with the last damage
    assert passed_over(caplog, file)
    assert tiny.same(tiny.parameters(trainer.model), end)


def passed_over(caplog, file: str) -> bool:
    """Whether a warning says that checkpoint-6 was passed over, and because of which file."""
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    return any("Passing over" in text and "checkpoint-6" in text and file in text for text in told)


def test_every_byte_of_the_manifest_counts(runs, tmp_path):
    """Its own checksum included: each byte in turn has one bit changed, another bit in each place."""
    shutil.copytree(runs["wsd"][0] / "checkpoint-6", tmp_path / "checkpoint-6")
    manifest = tmp_path / "checkpoint-6" / MANIFEST_NAME
    whole = manifest.read_bytes()
    for position in range(len(whole)):
        manifest.write_bytes(flipped(whole, position, position % 8))
        assert list(verify_checkpoint(tmp_path / "checkpoint-6", only="")) == [MANIFEST_NAME], position
    manifest.write_bytes(whole)
    assert not verify_checkpoint(tmp_path / "checkpoint-6")


def test_a_stock_checkpoint_needs_a_state_weights_and_a_completed_save(tmp_path):
    trainer = Trainer(
        tiny.llama(), tiny.stock_arguments(tmp_path, optim="adamw_torch", **SAVING), train_dataset=tiny.TRAIN
    )
    trainer.train()
    checkpoint = tmp_path / "checkpoint-6"
    assert verify_checkpoint(checkpoint) == verify_checkpoint(checkpoint, only="") == {}
    for name, contents in {"trainer_state.json": (b"", b"[]", b"{}", b"[" * 100_000), "model.safetensors": ()}.items():
        complete = (checkpoint / name).read_bytes()
        for content in (None, *contents):
            leave(checkpoint / name, content)
            assert list(verify_checkpoint(checkpoint)) == [name]
            with pytest.raises(CheckpointError, match=name):
                check_resumable(checkpoint)
        leave(checkpoint / name, complete)
    (checkpoint / "checkpoint-is-incomplete.txt").touch()
    assert list(verify_checkpoint(checkpoint)) == ["checkpoint-is-incomplete.txt"]
