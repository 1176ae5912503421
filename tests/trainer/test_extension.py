"""`--extend_from`: an extended run is, bit for bit, the run that was planned for the new length from the start."""

import json
import os
import re
import shutil

import pytest
import tiny
from transformers import Trainer

from hf_radam.checkpoints.manifest import CheckpointError, read_manifest
from hf_radam.checkpoints.verify import verify_checkpoint
from hf_radam.training_args import HorizonError

WSD = {"optim": "radam", "lr_scheduler_type": "wsd", "ewa": True, "ewa_every": 3}
WSD_S = {"optim": "radam", "lr_scheduler_type": "wsd_s", "ewa": True, "ewa_decay": 0.9}


def run(folder, *, until=None, source=None, resume=None, **options):
    """Train for as long as the arguments say, or be interrupted after step `until`."""
    if source is not None:
        options["extend_from"] = str(source)
    trainer = tiny.trainer(folder, **options)
    if until is not None:
        trainer.add_callback(tiny.StopAfter(until))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def state(trainer):
    """Everything that training would continue with."""
    average = trainer.average
    optimizer = trainer.optimizer.state_dict()
    moments = {f"{i}.{k}": v for i, entry in optimizer["state"].items() for k, v in entry.items()}
    return (
        tiny.parameters(trainer.model),
        {} if average is None else average.averaged_state_dict() | {k: v for k, v in moments.items()},
        None if average is None else average.counters(),
        [{k: v for k, v in group.items() if k != "params"} for group in optimizer["param_groups"]],
    )


def assert_same(one, other):
    for a, b in zip(state(one), state(other), strict=True):
        assert tiny.same(a, b) if isinstance(a, dict) and a and hasattr(next(iter(a.values())), "shape") else a == b


def pinned_weights(folder):
    """The hash of the training weights of every pinned checkpoint, by its place in the run."""
    places = sorted(path.relative_to(folder).as_posix() for path in folder.glob("_*/checkpoint-*"))
    return {place: read_manifest(folder / place)["files"]["model.safetensors"]["sha256"] for place in places}


def test_wsd_of_40_steps_extended_to_80_is_the_run_of_80_up_to_its_decay_and_after(tmp_path):
    run(tmp_path / "short", **WSD, max_steps=40)
    extended = run(tmp_path / "extended", source=tmp_path / "short", **WSD, max_steps=80)
    assert_same(extended, run(tmp_path / "planned", **WSD, max_steps=80))
    pins = pinned_weights(tmp_path / "planned")
    assert [*pins] == ["_pre_decay/checkpoint-72"] and pinned_weights(tmp_path / "extended") == pins


def test_wsd_s_with_two_budgets_is_the_first_extended_to_the_second(tmp_path):
    whole = run(tmp_path / "whole", **WSD_S, budgets=[40], max_steps=80)
    run(tmp_path / "short", **WSD_S, max_steps=40)
    assert_same(whole, run(tmp_path / "extended", source=tmp_path / "short", **WSD_S, max_steps=80))
    pins = pinned_weights(tmp_path / "whole")
    assert [*pins] == ["_budgets/checkpoint-40", "_budgets/checkpoint-80"]
    assert pinned_weights(tmp_path / "extended") == pins
    last = [read_manifest(tmp_path / name / "_budgets/checkpoint-80")["schedule"] for name in ("whole", "extended")]
    assert last[0] == last[1]


@pytest.mark.parametrize(("method", "warmup"), [("ewa", 0), ("schedule_free", 0), ("schedule_free_ewa", 4)])
def test_constant_rates_are_extended_from_the_last_checkpoint(tmp_path, method, warmup):
    options = tiny.METHODS[method] | {"warmup_steps": warmup, "save_strategy": "steps", "save_steps": 10}
    run(tmp_path / "short", **options, max_steps=20)
    extended = run(tmp_path / "extended", source=tmp_path / "short", **options, max_steps=36)
    assert_same(extended, run(tmp_path / "planned", **options, max_steps=36))


def test_the_warm_up_stays_where_it_was_though_it_was_a_ratio(tmp_path, capsys):
    options = WSD | {"warmup_steps": 0.5, "decay_steps": 0.2}
    run(tmp_path / "short", **options, max_steps=20)
    extended = run(tmp_path / "extended", source=tmp_path / "short", **options, max_steps=40)
    assert "warm-up 10 steps, peak, 1-sqrt decay over steps 32-40" in capsys.readouterr().out
    planned = run(tmp_path / "planned", **options | {"warmup_steps": 10}, max_steps=40)
    assert_same(extended, planned)
    with pytest.raises(ValueError, match="warmup_steps=12, but the run that is extended had 10. Leave it out"):
        run(tmp_path / "x", source=tmp_path / "short", **options | {"warmup_steps": 12}, max_steps=40)


def test_several_extensions_in_a_row_in_place_and_elsewhere(tmp_path, capsys):
    run(tmp_path / "a", **WSD, max_steps=20, save_strategy="steps", save_steps=10)
    run(tmp_path / "a", source=tmp_path / "a", **WSD, max_steps=40, save_strategy="steps", save_steps=10)
    last = run(tmp_path / "b", source=tmp_path / "a", **WSD, max_steps=60)
    assert f"from {tmp_path / 'a' / '_pre_decay' / 'checkpoint-36'}" in capsys.readouterr().out
    assert_same(last, run(tmp_path / "planned", **WSD, max_steps=60))
    assert sorted(os.listdir(tmp_path / "a" / "_pre_decay")) == ["checkpoint-18", "checkpoint-36"]


def test_wsd_s_several_extensions_in_a_row(tmp_path):
    run(tmp_path / "a", **WSD_S, max_steps=20)
    run(tmp_path / "b", source=tmp_path / "a", **WSD_S, max_steps=40)
    last = run(tmp_path / "c", source=tmp_path / "b", **WSD_S, budgets=[50], max_steps=60)
    whole = run(tmp_path / "whole", **WSD_S, budgets=[20, 40, 50], max_steps=60)
    assert_same(last, whole)
    with pytest.raises(ValueError, match="budgets=\\[30\\]: the run is past step 30 of 60, at its budget 40"):
        run(tmp_path / "x", source=tmp_path / "b", **WSD_S, budgets=[30], max_steps=60)


def test_several_decays_branch_from_one_pre_decay_checkpoint(tmp_path):
    options = WSD | {"decay_steps": 5}
    run(tmp_path / "trunk", **options, max_steps=20)
    options |= {"decay_type": "linear"}
    branch = run(tmp_path / "branch", source=tmp_path / "trunk", **options, max_steps=20)
    assert_same(branch, run(tmp_path / "planned", **options, max_steps=20))
    # The branch has a pre-decay checkpoint of its own, so it can be extended without the trunk.
    shutil.rmtree(tmp_path / "trunk")
    longer = run(tmp_path / "longer", source=tmp_path / "branch", **options, max_steps=30)
    assert_same(longer, run(tmp_path / "planned30", **options, max_steps=30))


def test_a_decay_branches_from_a_constant_run(tmp_path):
    constant = tiny.METHODS["ewa"] | {"save_strategy": "steps", "save_steps": 10}
    run(tmp_path / "trunk", **constant, max_steps=20)
    decayed = constant | {"lr_scheduler_type": "wsd", "decay_steps": 6}
    branch = run(tmp_path / "branch", source=tmp_path / "trunk", **decayed, max_steps=26)
    assert_same(branch, run(tmp_path / "planned", **decayed, max_steps=26))


@pytest.mark.parametrize("options", [WSD, WSD_S], ids=["wsd", "wsd_s"])
def test_the_command_can_be_given_again_after_an_interruption(tmp_path, options, capsys):
    options = options | {"save_strategy": "steps", "save_steps": 7}
    run(tmp_path / "short", **options, max_steps=20)
    budgets = {"budgets": [20]} if options["lr_scheduler_type"] == "wsd_s" else {}
    planned = run(tmp_path / "planned", **options | budgets, max_steps=40)
    for folder in ("elsewhere", "short"):
        run(tmp_path / folder, until=31, source=tmp_path / "short", **options, max_steps=40)
        capsys.readouterr()
        again = run(tmp_path / folder, source=tmp_path / "short", **options, max_steps=40)
        assert f"from {tmp_path / folder / 'checkpoint-28'}\n" in capsys.readouterr().out
        assert_same(again, planned)


def test_an_interrupted_run_is_extended_from_where_it_stood(tmp_path, capsys):
    for name, options in (("wsd", WSD), ("wsd_s", WSD_S | {"budgets": [10]})):
        options = options | {"save_strategy": "steps", "save_steps": 4}
        run(tmp_path / name, until=13, **options, max_steps=40)
        longer = run(tmp_path / f"{name}-longer", source=tmp_path / name, **options, max_steps=60)
        assert f"from {tmp_path / name / 'checkpoint-12'}\n" in capsys.readouterr().out
        assert_same(longer, run(tmp_path / f"{name}-planned", **options, max_steps=60))


def test_resuming_a_finished_run_into_a_longer_schedule_is_refused_with_the_right_command(tmp_path):
    for name, options in (("wsd", WSD), ("wsd_s", WSD_S)):
        options = options | {"save_strategy": "steps", "save_steps": 10}
        run(tmp_path / name, **options, max_steps=20)
        command = f"extend the run: --extend_from {tmp_path / name} --max_steps 40"
        for resume in (True, str(tmp_path / name / "checkpoint-20")):
            with pytest.raises(CheckpointError, match=re.escape(command)):
                run(tmp_path / name, resume=resume, **options, max_steps=40)


def test_what_is_no_extension_is_refused(tmp_path):
    run(tmp_path / "wsd", **WSD, max_steps=20, save_strategy="steps", save_steps=19)
    ewa = tiny.METHODS["ewa"] | {"save_strategy": "steps", "save_steps": 10}
    run(tmp_path / "ewa", **ewa)
    os.mkdir(tmp_path / "empty")
    for name, options, total, message in (
        ("wsd", WSD, 19, "max_steps=19 is less than the 20 steps"),
        ("wsd", WSD | {"decay_steps": 15}, 25, "The decay to step 25 would begin at 10, before"),
        ("ewa", ewa, 20, "max_steps=20 leaves nothing to train"),
        ("ewa", ewa | {"lr_scheduler_type": "wsd", "decay_steps": 8}, 22, "would begin at 14, before"),
        ("empty", ewa, 30, "There is no checkpoint in it"),
        ("ewa", ewa | {"learning_rate": 0.02}, 30, "trained with learning_rate=0.01"),
        ("ewa", ewa | {"optim": "adamw_torch"}, 30, "trained with optim=radam, the arguments say adamw_torch"),
    ):
        with pytest.raises((CheckpointError, HorizonError), match=re.escape(message)):
            run(tmp_path / "x", source=tmp_path / name, **options, max_steps=total)
    with pytest.raises(ValueError, match="both name a checkpoint. Drop one"):
        run(tmp_path / "x", source=tmp_path / "ewa", resume=str(tmp_path), **ewa, max_steps=30)


def test_a_damaged_pre_decay_checkpoint_is_skipped(tmp_path, caplog):
    options = WSD | {"save_strategy": "steps", "save_steps": 6}
    run(tmp_path / "short", **options, max_steps=20)
    (tmp_path / "short/_pre_decay/checkpoint-18/optimizer.pt").unlink()
    (tmp_path / "short/checkpoint-18/hf_radam.json").unlink()  # not written into: the pinned one is the same file
    extended = run(tmp_path / "extended", source=tmp_path / "short", **options, max_steps=40)
    for reason in ("_pre_decay/checkpoint-18/optimizer.pt is missing", "no hf_radam.json: it is damaged"):
        assert reason in caplog.text
    assert_same(extended, run(tmp_path / "planned", **options, max_steps=40))


@pytest.mark.parametrize("name", ["checkpoint-6", "last-checkpoint"])
def test_one_checkpoint_of_any_name_may_be_the_source(tmp_path, name):
    """The hub keeps one as last-checkpoint."""
    options = WSD | {"save_strategy": "steps", "save_steps": 6}
    run(tmp_path / "short", **options, max_steps=20)
    source = (tmp_path / "short" / "checkpoint-6").rename(tmp_path / name)
    extended = run(tmp_path / "extended", source=source, **options, max_steps=30)
    identity = read_manifest(source)["manifest_sha256"]
    assert read_manifest(tmp_path / "extended" / "checkpoint-12")["extended_from"] == identity
    assert_same(extended, run(tmp_path / "planned", **options, max_steps=30))


def test_a_run_of_stock_trainer_is_extended(tmp_path):
    common = {"optim": "adamw_torch", "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 10}
    args = tiny.stock_arguments(tmp_path / "stock", **common)
    Trainer(tiny.llama(), args, train_dataset=tiny.TRAIN).train()
    options = common | {"lr_scheduler_type": "wsd", "decay_steps": 4, "max_steps": 30}
    extended = run(tmp_path / "extended", source=tmp_path / "stock", **options)
    planned = run(tmp_path / "planned", **options)
    assert tiny.same(tiny.parameters(extended.model), tiny.parameters(planned.model))


def test_the_pre_decay_checkpoint_is_stored_once_and_outlives_rotation(tmp_path):
    options = WSD | {"max_steps": 20, "save_total_limit": 1, "save_strategy": "steps"}
    run(tmp_path, **options, save_steps=18)  # a normal checkpoint falls on the same step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_pre_decay", "checkpoint-20"]
    run(tmp_path / "both", **options | {"save_total_limit": 2}, save_steps=18)
    kept, normal = tmp_path / "both/_pre_decay/checkpoint-18", tmp_path / "both/checkpoint-18"
    files = [path for path in kept.rglob("*") if path.is_file()]
    assert files and all(os.path.samefile(path, normal / path.relative_to(kept)) for path in files)
    assert json.loads((kept / "trainer_state.json").read_text())["global_step"] == 18


def test_pins_do_not_depend_on_the_save_strategy_and_change_nothing(tmp_path):
    best = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 9, "metric_for_best_model": "loss"}
    runs = []
    for name, saving in (("no", {}), ("epoch", {"save_strategy": "epoch"}), ("best", best)):
        runs.append(run(tmp_path / name, **WSD | saving, max_steps=20))
        assert [*pinned_weights(tmp_path / name)] == ["_pre_decay/checkpoint-18"]
        assert_same(runs[0], runs[-1])
    resumed = run(tmp_path / "again", resume=str(tmp_path / "no/_pre_decay/checkpoint-18"), **WSD, max_steps=20)
    assert_same(runs[0], resumed)
    plain = run(tmp_path / "plain", optim="radam", ewa=True, ewa_every=3, max_steps=18)  # constant: no pins
    assert not (tmp_path / "plain" / "_pre_decay").exists()
    at_18 = run(tmp_path / "at", until=18, **WSD, max_steps=20)
    assert tiny.same(tiny.parameters(at_18.model), tiny.parameters(plain.model))


def test_the_command_can_be_given_again_at_the_end(tmp_path):
    for name, options in (("wsd", WSD), ("ewa", tiny.METHODS["ewa"])):
        options = options | {"save_strategy": "steps", "save_steps": 10}
        run(tmp_path / name, **options, max_steps=20)
        first, again = (run(tmp_path / name, source=tmp_path / name, **options, max_steps=40) for _ in range(2))
        assert again.state.global_step == 40
        assert_same(first, again)


@pytest.mark.parametrize("options", [WSD, tiny.METHODS["ewa"]], ids=["wsd", "ewa"])
def test_another_run_in_the_output_folder_is_not_continued(tmp_path, options):
    options = options | {"save_strategy": "steps", "save_steps": 10}
    for seed, name in ((1, "a"), (2, "b")):
        run(tmp_path / name, **options, max_steps=20, seed=seed)
    run(tmp_path / "c", source=tmp_path / "a", **options, max_steps=30, seed=1)
    with pytest.raises(
        HorizonError, match="checkpoint-30 in output_dir is not of this extension of .*b. Use another output_dir"
    ):
        run(tmp_path / "c", source=tmp_path / "b", **options, max_steps=30, seed=2)
    again = run(tmp_path / "c", source=tmp_path / "a", **options, max_steps=30, seed=1)
    assert again.state.global_step == 30


def test_a_plain_resume_of_an_extended_run_remembers_the_budgets_that_were_passed(tmp_path):
    options = WSD_S | {"save_strategy": "steps", "save_steps": 6}
    run(tmp_path / "a", **options, max_steps=20)
    run(tmp_path / "b", source=tmp_path / "a", until=31, **options, max_steps=40)
    run(tmp_path / "b", resume=True, **options, max_steps=40)
    assert read_manifest(tmp_path / "b" / "checkpoint-36")["schedule"]["budgets"] == [20, 40]


def test_a_damaged_pin_is_written_again_from_a_complete_checkpoint(tmp_path):
    options = WSD | {"save_strategy": "steps", "save_steps": 6}
    run(tmp_path / "run", until=18, **options, max_steps=20)
    (tmp_path / "run/_pre_decay/checkpoint-18/optimizer.pt").unlink()
    run(tmp_path / "run", resume=str(tmp_path / "run/checkpoint-18"), **options, max_steps=20)
    assert verify_checkpoint(tmp_path / "run/_pre_decay/checkpoint-18") == {}


@pytest.mark.parametrize("change", [{"max_steps": 18}, {"warmup_steps": 5}], ids=str)
def test_no_command_is_named_that_would_be_refused(tmp_path, change):
    options = WSD | {"decay_steps": 5, "max_steps": 20}
    run(tmp_path, **options, save_strategy="steps", save_steps=2)
    step = 2 if "warmup_steps" in change else 16
    with pytest.raises(CheckpointError, match="Resume with the flags the run was started with\\.$"):
        run(tmp_path / "x", resume=str(tmp_path / f"checkpoint-{step}"), **options | change)
