"""Averages of shards that move while the device goes on, and evaluation that exchanges them with the weights.

Oracle: in the same processes, the training whose averages move at once.
"""

from __future__ import annotations

import pytest
import tiny
from processes import harness
from test_host_average import LateCopies

from hf_radam import averaging

SIZES = {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 99, "attention_dropout": 0.0}


def train(folder, backend):
    """Losses, weights and averages of a training with a late copier, and of one without."""
    options = {"max_steps": 12, "per_device_train_batch_size": 2, "dataloader_pin_memory": False}
    options |= tiny.METHODS["ewa"] | {"ewa_every": 1, "eval_strategy": "steps", "eval_steps": 4}
    ends, copiers = [], []

    def late(weights, averages):
        copiers.append(LateCopies(weights))
        return copiers[-1]

    for name, make in (("late", late), ("at once", averaging.host_copies)):
        averaging.host_copies = make
        trainer = tiny.trainer(folder / name, tiny.llama(**SIZES), **options | harness.arguments(backend))
        trainer.train()
        assert harness.is_really(trainer, backend)
        sharding = trainer._evaluation.sharding
        ends.append(
            (
                [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
                {name: sharding.gather_model(name).clone() for name in sharding.parameters},
                trainer.average.averaged_state_dict(),
            )
        )
    return ends, [copier.started for copier in copiers]


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero1"])
def test_late_averages_are_those_that_move_at_once(tmp_path, backend):
    if harness.missing(backend):
        pytest.skip(harness.missing(backend))
    for (late, at_once), moved in harness.run(train, tmp_path, backend, backend=backend):
        assert moved == [11]
        assert late[0] == at_once[0] and len(late[0]) == 3
        assert tiny.same(late[1], at_once[1]) and tiny.same(late[2], at_once[2])
