"""An `output_dir` that is itself named `checkpoint-7` is a run to whatever reads it."""

import json

import tiny

from hf_radam import cli, load_evaluation_model
from hf_radam.checkpoints.runs import is_checkpoint


def test_it_is_loaded_resumed_extended_inspected_and_averaged(tmp_path, capsys, caplog):
    folder, options = tmp_path / "checkpoint-7", tiny.METHODS["ewa"] | {"max_steps": 6}
    trainer = tiny.trained(folder, **options, save_strategy="steps", save_steps=3)
    trainer.save_model()
    assert not is_checkpoint(folder) and is_checkpoint(folder / "checkpoint-6")
    evaluated = tiny.parameters(load_evaluation_model(folder))
    assert tiny.same(evaluated, trainer.average.averaged_state_dict()) and "Passing over" not in caplog.text
    assert tiny.trained(folder, **options, resume=True).state.global_step == 6
    longer = tiny.trained(tmp_path / "checkpoint-9", **options | {"max_steps": 9}, extend_from=str(folder))
    assert longer.state.global_step == 9
    capsys.readouterr()
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], len(facts["checkpoints"])) == ("run", 2)
    checkpoints = [str(folder / f"checkpoint-{step}") for step in (3, 6)]
    assert cli.main(["average", *checkpoints, "--weights", "uniform", "-o", str(tmp_path / "mean")]) == 0
