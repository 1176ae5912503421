"""Fused steps on shards, fragments and sub-groups are those of one process.

Oracles: the run of one process; the unfused run, from which a fused one differs in some last bit.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from processes import harness

from hf_radam.optim import fused

pytestmark = pytest.mark.skipif(isinstance(fused.load_library(), str), reason=str(fused.load_library()))
SIZES = {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 99, "attention_dropout": 0.0}
TOLERANCE = 2e-6  # as in test_backends: float32 sums in another order


def train(folder, backend, wanted):
    """The weights after 12 steps with each optimizer, full."""
    options = {"max_steps": 12, "per_device_train_batch_size": 2, "dataloader_pin_memory": False}
    options |= {"gradient_accumulation_steps": 2 if backend == "one" else 1, "adam_beta2": 0.95}
    found = {}
    for method in ("wsd", "schedule_free_ewa"):
        arguments = options | tiny.METHODS[method] | {"fused_optimizer": wanted} | harness.arguments(backend)
        trainer = tiny.trainer(folder / method, tiny.llama(**SIZES), **arguments)
        trainer.train()
        assert harness.is_really(trainer, backend)
        assert trainer._bare_optimizer.fused == (wanted == "auto")
        sharding = trainer._evaluation.sharding
        found[method] = {name: sharding.gather_model(name).clone() for name in sharding.parameters}
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return harness.run(train, tmp_path_factory.mktemp("one"), "one", "auto", backend="one")[0]


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero1", "zero3"])
def test_fused_shards_are_those_of_one_process(tmp_path, one, backend):
    if harness.missing(backend):
        pytest.skip(harness.missing(backend))
    ranks = harness.run(train, tmp_path / "fused", backend, "auto", backend=backend)
    unfused = harness.run(train, tmp_path / "unfused", backend, "false", backend=backend)[0]
    for method, expected in one.items():
        for rank in ranks:
            for name, value in expected.items():
                torch.testing.assert_close(rank[method][name], value, rtol=0, atol=TOLERANCE, msg=f"{method} {name}")
        assert tiny.same(ranks[0][method], ranks[1][method])
        assert not tiny.same(ranks[0][method], unfused[method])
