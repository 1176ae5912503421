"""A SIGTERM that reaches one of several processes stops all after the same step, with one complete checkpoint."""

from __future__ import annotations

import os
import signal

import pytest
import tiny
from processes import harness
from processes.test_sharded_details import options

from hf_radam.checkpoints.manifest import read_manifest


class Stopped(tiny.TrainerCallback):
    """A SIGTERM reaches the last process alone, in the middle of a step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stop_all(folder, backend):
    trainer = tiny.trainer(folder, **options(backend, ewa=True, optim="radam", enable_jit_checkpoint=True))
    trainer.add_callback(Stopped())
    trainer.train()
    return trainer.state.global_step, [path.name for path in folder.glob("checkpoint-*")]


@pytest.mark.parametrize("backend", ["ddp", "fsdp2_sharded"])
def test_a_sigterm_that_one_process_has_seen_stops_all_of_them(tmp_path, backend):
    assert harness.run(stop_all, tmp_path, backend, backend=backend) == [(4, ["checkpoint-4"])] * 2
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(read_manifest(tmp_path / "checkpoint-4")["files"])
