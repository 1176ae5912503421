"""Checkpoints that hf_radam 0.1.0 wrote (format 2) resume, extend, load and verify.

`tests/data/format_2.tar.xz` has two of its runs, of 20 steps with checkpoints at 10 and 20. The oracle is what it
trained and evaluated itself; another processor rounds otherwise, hence the tolerance.
"""

import tarfile
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from hf_radam import RAdamTrainer, load_evaluation_model
from hf_radam.checkpoints.runs import list_checkpoints
from hf_radam.checkpoints.verify import verify_checkpoint

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
RUNS = {
    "wsd": (tiny.METHODS["wsd"] | {"ewa": True}, 4.022302, "_pre_decay/checkpoint-12"),
    "schedule_free_ewa": (tiny.METHODS["schedule_free_ewa"], 4.068567, "checkpoint-20"),
}
"""Options, the evaluation loss at the end, and the checkpoint from which an extension starts."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("format_2")
    with tarfile.open(Path(__file__).parents[1] / "data" / "format_2.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def trainer(folder, options, **more):
    model = tiny.llama(**SIZES, num_key_value_heads=1)
    args = tiny.arguments(folder, **options, fused_optimizer="false", save_strategy="steps", save_steps=10, **more)
    return RAdamTrainer(model, args, train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL)


@pytest.mark.parametrize("name", RUNS)
def test_they_resume_load_and_verify(runs, tmp_path, name):
    options, loss, _ = RUNS[name]
    assert [verify_checkpoint(ref.path) for ref in list_checkpoints(runs / name)].count({}) >= 2
    resumed = trainer(tmp_path, options)
    resumed.train(resume_from_checkpoint=str(runs / name / "checkpoint-10"))
    old, new = (load_file(run / "checkpoint-20" / "model.safetensors") for run in (runs / name, tmp_path))
    assert old.keys() == new.keys()
    for key in old:
        torch.testing.assert_close(new[key], old[key], rtol=1e-4, atol=1e-5)
    assert resumed.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-5)
    assert tiny.loss_of(load_evaluation_model(runs / name / "checkpoint-20")) == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_they_extend(runs, tmp_path, capsys, name):
    options, _, source = RUNS[name]
    extended = trainer(tmp_path, options, max_steps=40, extend_from=str(runs / name))
    extended.train()
    assert extended.state.global_step == 40 and f"from {runs / name / source}\n" in capsys.readouterr().out
