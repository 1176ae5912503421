"""`hf-radam inspect` on damaged, strange and hostile files.

Oracles: the damage that was done, and what loading the same file in earnest gives.
"""

import os
import pickle
import shutil
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from inspecting import a_list, flip, inspect, nested, truncate

from hf_radam import load_evaluation_model
from hf_radam.checkpoints.manifest import read_manifest, write_manifest
from hf_radam.checkpoints.verify import verify_checkpoint
from hf_radam.inspection.checkpoint import inspect_checkpoint
from hf_radam.inspection.pickled import Opaque, pickled_attributes
from hf_radam.inspection.uses import uses

OURS = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "hf_radam.json"]
OURS += ["training_args.bin", "config.json", "schedule_free/model.safetensors", "schedule_free/config.json"]


@pytest.mark.parametrize("harm", [truncate, flip, a_list, nested, Path.unlink])
@pytest.mark.parametrize("name", OURS)
def test_each_damaged_file_is_named_and_the_rest_is_told(run, name, harm, capsys):
    checkpoint = run("schedule_free") / "checkpoint-12"
    harm(checkpoint / name)
    facts = inspect_checkpoint(checkpoint)
    assert facts.state == "damaged" and name in facts.problems
    assert {file.name for file in facts.files if file.problem} == set(facts.problems)
    assert name == "hf_radam.json" or list(facts.problems) == [name]
    assert (facts.update, facts.max_steps, facts.optim, facts.root) == (12, 20, "radam_schedulefree", "y")
    code, text = inspect(checkpoint, capsys)
    assert code == 1 and f"resume no: damaged ({name}" in text and f"{name} BAD: " in text
    can = uses(facts)["evaluate"]
    harmless = not name.startswith("schedule_free/") and name != "hf_radam.json"
    assert can.possible == harmless, can
    if harmless:
        load_evaluation_model(checkpoint)


def test_strange_manifests_with_a_right_checksum_are_told(run, capsys):
    checkpoint = run("wsd") / "checkpoint-12"
    good = {k: v for k, v in read_manifest(checkpoint).items() if k not in ("files", "manifest_sha256")}
    strange = [{"schedule": {"total_steps": 20}}, {"schedule": []}, {"max_steps": float("inf")}, {"method": "wsd"}]
    strange += [{"averaging": 3}, {"evaluation": {"folder": 3}}, {"global_step": None}, {"schedule_step": -1}]
    for change in strange:
        write_manifest(checkpoint, good | change)
        code, text = inspect(checkpoint, capsys)
        assert code == 1 and "has not the form of a manifest" in text and "update 12 of 20" in text, change
    write_manifest(checkpoint, good)
    assert inspect(checkpoint, capsys)[0] == 0


def test_a_manifest_of_another_format_is_not_called_damaged(run, capsys):
    checkpoint = run("wsd") / "checkpoint-12"
    file = checkpoint / "hf_radam.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"format_version": 2', '"format_version": 99'), "utf-8")
    code, text = inspect(checkpoint, capsys)
    assert code == 1 and "has format 99" in text and "another format" in text and "damaged" not in text


def test_random_damage_never_ends_in_a_traceback(run, made_by_stock, tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    ours = run("schedule_free_ewa") / "checkpoint-12"
    theirs = Path(shutil.copytree(made_by_stock / "checkpoint-5", tmp_path / "checkpoint-5"))
    for round_ in range(60):
        checkpoint = (ours, theirs)[round_ % 2]
        files = sorted(path for path in checkpoint.iterdir() if path.is_file())
        file = files[round_ // 2 % len(files)]
        content = file.read_bytes()
        place, length = (int(torch.randint(len(content), (), generator=generator)) for _ in range(2))
        file.write_bytes(content[:place] + bytes(min(length, 512)) + content[place + length % 600 :])
        code, text = inspect(checkpoint, capsys)
        assert code == int(bool(verify_checkpoint(checkpoint))) and text, (round_, file)
        file.write_bytes(content)


def test_the_arguments_are_read_without_unpickling(made, made_by_stock):
    for file in (made / "ewa/checkpoint-6/training_args.bin", made_by_stock / "checkpoint-5/training_args.bin"):
        found, loaded = pickled_attributes(file), vars(torch.load(file, weights_only=False))
        assert found.keys() == loaded.keys()
        plain = {name: value for name, value in found.items() if not isinstance(value, Opaque)}
        plain.pop("_setup_devices")  # torch.device("cpu"), a class applied to one string
        assert len(plain) > 80
        assert plain == {name: getattr(loaded[name], "value", loaded[name]) for name in plain}


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"])
def test_nothing_in_the_files_is_run(run, name, tmp_path, capsys):
    checkpoint = run("ewa") / "checkpoint-12"
    torch.save(Trap(tmp_path / "trapped"), checkpoint / name)
    (checkpoint / "hf_radam.json").unlink()  # so that all of them are looked into
    assert inspect(checkpoint, capsys)[0] == 1
    assert not (tmp_path / "trapped").exists()
    with pytest.raises(FileExistsError):  # the trap works
        (tmp_path / "trapped").mkdir()
        pickle.loads(pickle.dumps(Trap(tmp_path / "trapped")))


def test_a_zip_bomb_for_arguments_is_passed_over(run, capsys):
    checkpoint = run("ewa") / "checkpoint-12"
    for padding, found in (("", {"optim": "radam", "padding": ""}), ("a" * 2**22, {})):
        with zipfile.ZipFile(checkpoint / "training_args.bin", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/data.pkl", pickle.dumps(Namespace(optim="radam", padding=padding), protocol=2))
        assert pickled_attributes(checkpoint / "training_args.bin") == found
    assert inspect(checkpoint, capsys)[0] == 1
