"""A SIGTERM that reaches one of several processes stops all after the same step, with one complete checkpoint."""

from __future__ import annotations

import pytest
import tiny
from processes import harness
from processes.test_sharded_details import options

from hf_radam.checkpoints.manifest import read_manifest


class AskedOnOneRank(tiny.TrainerCallback):
    """The SIGTERM reaches the last process first."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        managers = [c.jit_manager for c in self.trainer.callback_handler.callbacks if hasattr(c, "jit_manager")]
        managers[0].is_checkpoint_requested |= state.global_step == 3 and args.process_index == args.world_size - 1


def stop_all(folder, backend):
    trainer = tiny.trainer(folder, **options(backend, ewa=True, optim="radam", enable_jit_checkpoint=True))
    trainer.add_callback(AskedOnOneRank(trainer))
    trainer.train()
    return trainer.state.global_step, [path.name for path in folder.glob("checkpoint-*")]


@pytest.mark.parametrize("backend", ["ddp", "fsdp2_sharded"])
def test_a_sigterm_that_one_process_has_seen_stops_all_of_them(tmp_path, backend):
    assert harness.run(stop_all, tmp_path, backend, backend=backend) == [(4, ["checkpoint-4"])] * 2
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(read_manifest(tmp_path / "checkpoint-4")["files"])
