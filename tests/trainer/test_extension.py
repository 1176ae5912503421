"""`--extend_from`: an extended run is, bit for bit, the run that was planned for the new length from the start."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import tiny
from transformers import LlamaForCausalLM, Trainer

from hf_radam.checkpoints.manifest import CheckpointError, read_manifest
from hf_radam.checkpoints.verify import verify_checkpoint
from hf_radam.training_args import HorizonError

WSD = {"optim": "radam", "lr_scheduler_type": "wsd", "ewa": True, "ewa_every": 3}
WSD_S = {"optim": "radam", "lr_scheduler_type": "wsd_s", "ewa": True, "ewa_decay": 0.9}
BUDGETS = WSD_S | {"budgets": [20]}
EWA = tiny.METHODS["ewa"]


def run(folder, *, source=None, **options):
    """Train; the arguments are left as they were given, so that another run may use them."""
    extension = {} if source is None else {"extend_from": str(source)}
    trainer = tiny.trained(folder, **options, **extension)
    given = {name: value for name, value in options.items() if name not in ("resume", "until")}
    assert trainer.args.to_dict() == tiny.arguments(folder, **given, **extension).to_dict()
    return trainer


def assert_same(one, other):
    assert tiny.same(tiny.state(one), tiny.state(other))


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Give the finished run with some options, which is trained once; saving changes nothing, so it is not compared."""
    runs: dict[str, object] = {}

    def finished(**options):
        options = {k: v for k, v in options.items() if k not in ("save_strategy", "save_steps")}
        name = repr(sorted(options.items()))
        if name not in runs:
            runs[name] = run(tmp_path_factory.mktemp("planned"), **options)
        return runs[name]

    return finished


EVERY_6 = {"save_strategy": "steps", "save_steps": 6}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The folder of finished runs of 20 steps, with checkpoints every 6; to be read only."""
    folder = tmp_path_factory.mktemp("short")
    for name, options in (("wsd", WSD), ("wsd_s", WSD_S), ("ewa", EWA)):
        run(folder / name, **options | EVERY_6, max_steps=20)
    return folder


def pinned_weights(folder):
    """The hash of the training weights of every pinned checkpoint, by its place in the run."""
    places = sorted(path.relative_to(folder).as_posix() for path in folder.glob("_*/checkpoint-*"))
    return {place: read_manifest(folder / place)["files"]["model.safetensors"]["sha256"] for place in places}


def test_wsd_of_20_steps_extended_to_40_and_60_is_the_run_of_40_or_60(tmp_path, capsys, short, planned):
    extended = run(tmp_path / "a", source=short / "wsd", **WSD | EVERY_6, max_steps=40)
    whole = planned(**WSD, max_steps=40)
    assert_same(extended, whole)
    pins = pinned_weights(Path(whole.args.output_dir))
    assert [*pins] == ["_pre_decay/checkpoint-36"] and pinned_weights(tmp_path / "a") == pins
    capsys.readouterr()
    longer = run(tmp_path / "b", source=tmp_path / "a", **WSD, max_steps=60)
    assert f"from {tmp_path / 'a' / 'checkpoint-36'}\n" in capsys.readouterr().out
    assert_same(longer, planned(**WSD, max_steps=60))


def test_wsd_s_with_several_budgets_is_the_first_extended_to_the_next(tmp_path, short, planned):
    extended = run(tmp_path / "a", source=short / "wsd_s", **WSD_S, max_steps=40)
    whole = planned(**BUDGETS, max_steps=40)
    assert_same(extended, whole)
    pins = pinned_weights(Path(whole.args.output_dir))
    assert [*pins] == ["_budgets/checkpoint-20", "_budgets/checkpoint-40"] and pinned_weights(tmp_path / "a") == pins
    last = [read_manifest(Path(one.args.output_dir, "_budgets/checkpoint-40"))["schedule"] for one in (extended, whole)]
    assert last[0] == last[1]
    longer = run(tmp_path / "b", source=tmp_path / "a", **WSD_S, budgets=[50], max_steps=60)
    assert_same(longer, planned(**WSD_S, budgets=[20, 40, 50], max_steps=60))
    with pytest.raises(ValueError, match="budgets=\\[30\\] must lie after step 40, the last budget that the run"):
        run(tmp_path / "x", source=tmp_path / "a", **WSD_S, budgets=[30], max_steps=60)


def test_a_constant_rate_after_a_warm_up_is_extended_from_the_last_checkpoint(tmp_path, planned):
    options = tiny.METHODS["schedule_free_ewa"] | {"warmup_steps": 4} | EVERY_6
    run(tmp_path / "short", **options, max_steps=20)
    extended = run(tmp_path / "extended", source=tmp_path / "short", **options, max_steps=36)
    assert_same(extended, planned(**options, max_steps=36))


def test_the_warm_up_stays_where_it_was_though_it_was_a_ratio(tmp_path, capsys, planned):
    options = WSD | {"warmup_steps": 0.5, "decay_steps": 0.2}
    run(tmp_path / "short", **options, max_steps=20)
    extended = run(tmp_path / "extended", source=tmp_path / "short", **options, max_steps=40)
    assert "warm-up 10 steps, peak, 1-sqrt decay over steps 32-40" in capsys.readouterr().out
    assert_same(extended, planned(**options | {"warmup_steps": 10}, max_steps=40))
    with pytest.raises(ValueError, match="warmup_steps=12, but the run that is extended had 10. Leave it out"):
        run(tmp_path / "x", source=tmp_path / "short", **options | {"warmup_steps": 12}, max_steps=40)


def test_several_decays_branch_from_one_pre_decay_checkpoint(tmp_path, short, planned):
    trunk = shutil.copytree(short / "wsd", tmp_path / "trunk")
    options = WSD | {"decay_type": "linear"}
    branch = run(tmp_path / "branch", source=trunk, **options, max_steps=20)
    assert_same(branch, planned(**options, max_steps=20))
    # The branch has a pre-decay checkpoint of its own, so it can be extended without the trunk.
    shutil.rmtree(trunk)
    longer = run(tmp_path / "longer", source=tmp_path / "branch", **options, max_steps=30)
    assert_same(longer, planned(**options, max_steps=30))


def test_a_decay_branches_from_a_constant_run(tmp_path, short, planned):
    decayed = EWA | {"lr_scheduler_type": "wsd", "decay_steps": 6}
    branch = run(tmp_path, source=short / "ewa", **decayed, max_steps=26)
    assert_same(branch, planned(**decayed, max_steps=26))


@pytest.mark.parametrize(
    ("name", "options", "whole", "in_place", "pins"),
    [
        ("wsd", WSD, WSD, True, ["_pre_decay/checkpoint-18", "_pre_decay/checkpoint-36"]),
        ("wsd_s", WSD_S, BUDGETS, False, ["_budgets/checkpoint-20", "_budgets/checkpoint-40"]),
        ("ewa", EWA, EWA, True, []),
    ],
)
def test_the_command_can_be_given_again(tmp_path, name, options, whole, in_place, pins, capsys, short, planned):
    """After an interruption, and at the end."""
    folder = shutil.copytree(short / name, tmp_path / "run") if in_place else tmp_path / "elsewhere"
    command = options | EVERY_6 | {"max_steps": 40, "source": folder if in_place else short / name}
    run(folder, until=31, **command)
    capsys.readouterr()
    again = run(folder, **command)
    assert f"from {folder / 'checkpoint-30'}\n" in capsys.readouterr().out
    assert_same(again, planned(**whole, max_steps=40))
    assert_same(run(folder, **command), again)
    assert [*pinned_weights(folder)] == pins


@pytest.mark.parametrize("options", [WSD, WSD_S | {"budgets": [10]}], ids=["wsd", "wsd_s"])
def test_an_interrupted_run_is_extended_from_where_it_stood(tmp_path, options, capsys, planned):
    run(tmp_path / "short", until=13, **options | EVERY_6, max_steps=40)
    longer = run(tmp_path / "longer", source=tmp_path / "short", **options, max_steps=60)
    assert f"from {tmp_path / 'short' / 'checkpoint-12'}\n" in capsys.readouterr().out
    assert_same(longer, planned(**options, max_steps=60))


@pytest.mark.parametrize(("name", "options"), [("wsd", WSD), ("wsd_s", WSD_S)])
def test_resuming_into_a_longer_schedule_is_refused_with_the_right_command(tmp_path, short, name, options):
    finished = shutil.copytree(short / name, tmp_path / name)
    command = f"extend the run: --extend_from {finished} --max_steps 40"
    for resume in (True, str(finished / "checkpoint-20")):
        with pytest.raises(CheckpointError, match=re.escape(command)):
            run(finished, resume=resume, **options, max_steps=40)


@pytest.mark.parametrize(("step", "change"), [(18, {"max_steps": 19}), (6, {"warmup_steps": 9})], ids=str)
def test_no_command_is_named_that_would_be_refused(tmp_path, short, step, change):
    checkpoint, options = short / "wsd" / f"checkpoint-{step}", WSD | {"max_steps": 20} | change
    with pytest.raises(CheckpointError, match="Resume with the flags the run was started with\\.$"):
        run(tmp_path, resume=str(checkpoint), **options)


def test_what_is_no_extension_is_refused(tmp_path, short):
    for name, options, total, message in (
        ("wsd", WSD, 19, "max_steps=19 is less than the 20 steps"),
        ("wsd", WSD | {"decay_steps": 15}, 25, "The decay to step 25 would begin at 10, before"),
        ("ewa", EWA, 20, "max_steps=20 leaves nothing to train"),
        ("ewa", EWA | {"lr_scheduler_type": "wsd", "decay_steps": 8}, 22, "would begin at 14, before"),
        ("", EWA, 30, "There is no checkpoint in it"),
        ("ewa", EWA | {"learning_rate": 0.02}, 30, "trained with learning_rate=0.01"),
        ("ewa", EWA | {"optim": "adamw_torch"}, 30, "trained with optim=radam, the arguments say adamw_torch"),
    ):
        with pytest.raises((CheckpointError, HorizonError), match=re.escape(message)):
            run(tmp_path, source=short / name, **options, max_steps=total)
    with pytest.raises(ValueError, match="both name a checkpoint. Drop one"):
        run(tmp_path, source=short / "ewa", resume=str(tmp_path), **EWA, max_steps=30)


def test_a_damaged_pre_decay_checkpoint_is_skipped(tmp_path, caplog, short, planned):
    corrupted = shutil.copytree(short / "wsd", tmp_path / "corrupted")
    (corrupted / "_pre_decay/checkpoint-18/optimizer.pt").unlink()
    (corrupted / "checkpoint-18/hf_radam.json").unlink()
    extended = run(tmp_path / "extended", source=corrupted, **WSD, max_steps=40)
    for reason in ("_pre_decay/checkpoint-18/optimizer.pt is missing", "no hf_radam.json: it is corrupted"):
        assert reason in caplog.text
    assert_same(extended, planned(**WSD, max_steps=40))


@pytest.mark.parametrize("name", ["checkpoint-6", "last-checkpoint"])
def test_one_checkpoint_of_any_name_may_be_the_source(tmp_path, short, planned, name):
    """The hub keeps one as last-checkpoint."""
    source = shutil.copytree(short / "wsd" / "checkpoint-6", tmp_path / name)
    extended = run(tmp_path / "extended", source=source, **WSD | EVERY_6, max_steps=40)
    identity = read_manifest(source)["manifest_sha256"]
    assert read_manifest(tmp_path / "extended" / "checkpoint-12")["extended_from"] == identity
    assert_same(extended, planned(**WSD, max_steps=40))


def test_a_run_of_stock_trainer_is_extended(tmp_path, planned):
    common = {"optim": "adamw_torch", "lr_scheduler_type": "constant"} | EVERY_6
    args = tiny.stock_arguments(tmp_path / "stock", **common)
    Trainer(tiny.llama(), args, train_dataset=tiny.TRAIN).train()
    options = common | {"lr_scheduler_type": "wsd", "decay_steps": 4, "max_steps": 30}
    extended = run(tmp_path / "extended", source=tmp_path / "stock", **options)
    assert tiny.same(tiny.parameters(extended.model), tiny.parameters(planned(**options).model))


def test_the_pre_decay_checkpoint_is_stored_once_and_outlives_rotation(tmp_path, short):
    run(tmp_path, **WSD | EVERY_6, save_total_limit=1, max_steps=20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_pre_decay", "checkpoint-20"]
    pinned, normal = short / "wsd/_pre_decay/checkpoint-18", short / "wsd/checkpoint-18"
    files = [path for path in pinned.rglob("*") if path.is_file()]
    assert files and all(os.path.samefile(path, normal / path.relative_to(pinned)) for path in files)
    assert json.loads((pinned / "trainer_state.json").read_text())["global_step"] == 18


def test_pins_do_not_depend_on_the_save_strategy_and_change_nothing(tmp_path, planned):
    best = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 9, "metric_for_best_model": "loss"}
    pinned = planned(**WSD, max_steps=20)
    for name, saving in (("no", {}), ("best", best)):
        assert_same(run(tmp_path / name, **WSD | saving, max_steps=20), pinned)
        assert [*pinned_weights(tmp_path / name)] == ["_pre_decay/checkpoint-18"]
    checkpoint = tmp_path / "no/_pre_decay/checkpoint-18"
    assert_same(run(tmp_path / "again", resume=str(checkpoint), **WSD, max_steps=20), pinned)
    plain = run(tmp_path / "plain", optim="radam", ewa=True, ewa_every=3, max_steps=18)  # constant: no pins
    assert not (tmp_path / "plain" / "_pre_decay").exists()
    at_18 = LlamaForCausalLM.from_pretrained(checkpoint)
    assert tiny.same(tiny.parameters(at_18), tiny.parameters(plain.model))


def test_another_run_in_the_output_folder_is_not_continued(tmp_path, short):
    options = EWA | EVERY_6
    run(tmp_path / "other", **options, max_steps=20, seed=2)
    run(tmp_path / "c", source=short / "ewa", **options, max_steps=30)
    with pytest.raises(HorizonError, match="-30 in output_dir is not of this extension of .*other. Use another output"):
        run(tmp_path / "c", source=tmp_path / "other", **options, max_steps=30, seed=2)


def test_a_damaged_pin_is_written_again_from_a_complete_checkpoint(tmp_path, short):
    copy = shutil.copytree(short / "wsd", tmp_path / "run")
    (copy / "_pre_decay/checkpoint-18/optimizer.pt").unlink()
    run(copy, resume=str(copy / "checkpoint-18"), **WSD, max_steps=20)
    assert verify_checkpoint(copy / "_pre_decay/checkpoint-18") == {}
