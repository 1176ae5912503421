"""An `output_dir` that is itself named `checkpoint-7` is a run to whatever reads it."""

import json

import pytest
import tiny

from hf_radam import cli, load_evaluation_model
from hf_radam.checkpoints.runs import is_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "checkpoint-7"
    trainer = tiny.trainer(folder, **tiny.METHODS["ewa"], max_steps=6, save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return folder, trainer.average.averaged_state_dict()


def test_its_model_is_loaded(run, caplog):
    folder, evaluated = run
    assert not is_checkpoint(folder) and is_checkpoint(folder / "checkpoint-6")
    assert tiny.same(tiny.parameters(load_evaluation_model(folder)), evaluated)
    assert "Passing over" not in caplog.text


def test_it_is_resumed_and_extended(run, tmp_path):
    folder, _ = run
    longer = tiny.trainer(tmp_path / "checkpoint-9", **tiny.METHODS["ewa"], max_steps=9, extend_from=str(folder))
    longer.train()
    assert longer.state.global_step == 9
    again = tiny.trainer(folder, **tiny.METHODS["ewa"], max_steps=6)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


def test_it_is_inspected_and_averaged(run, tmp_path, capsys):
    folder, _ = run
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], len(facts["checkpoints"])) == ("run", 2)
    checkpoints = [str(folder / f"checkpoint-{step}") for step in (3, 6)]
    assert cli.main(["average", *checkpoints, "--weights", "uniform", "-o", str(tmp_path / "mean")]) == 0
