"""What nobody planned for: evaluating first, freezing half-way, other classes; processes late, stopped, or apart.

Oracles: the run without the surprise, bit for bit; clones taken before.
"""

from __future__ import annotations

import os
import signal
import time

import pytest
import tiny
import torch
from processes import harness
from processes.test_moving import ODD
from processes.test_sharded_details import error_of, options, zero

from hf_radam import RAdamScheduleFree, WeightAverage, load_evaluation_model
from hf_radam.checkpoints.load import consolidate
from hf_radam.checkpoints.manifest import read_manifest
from hf_radam.optim import schedule_free_x
from hf_radam.trainer import ranks

# ---- Evaluating before training ----


def evaluate_then_train(folder):
    """Weights and averages of a training after an evaluation, and of one without it."""
    found = []
    for first in (True, False):
        trainer = tiny.trainer(folder / str(first), tiny.llama(**ODD), **options("ddp", optim="radam", ewa=True))
        if first:
            trainer.evaluate()
        trainer.train()
        assert harness.is_really(trainer, "ddp")
        found.append(tiny.parameters(trainer.model) | {f"ewa.{k}": v for k, v in averages_of(trainer).items()})
    return found


def averages_of(trainer):
    return trainer.average.averaged_state_dict()


def test_evaluating_first_does_not_undo_ddp(tmp_path):
    (first, plain), (other, _) = harness.run(evaluate_then_train, tmp_path)
    assert tiny.same(first, plain) and tiny.same(first, other)


def evaluate_first_where_sharded(folder, backend):
    """What is said of evaluating first, of training then, and of training once more; and how far each training came."""
    trainer = tiny.trainer(folder, tiny.llama(**ODD), **options(backend, optim="radam", ewa=True))
    return [error_of(do) or trainer.state.global_step for do in (trainer.evaluate, trainer.train, trainer.train)]


@zero
@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("fsdp2", ["not possible under FSDP2", 6, 6]),
        ("zero1", ["not possible under ZeRO-1 and 2", 6, "has prepared this model for an earlier"]),
        ("zero3", [0, "has prepared this model for an earlier", "has prepared this model for an earlier"]),
    ],
)
def test_evaluating_first_or_training_twice_works_or_is_refused(tmp_path, backend, expected):
    for said in harness.run(evaluate_first_where_sharded, tmp_path, backend, backend=backend):
        for words, wanted in zip(said, expected, strict=True):
            assert words == wanted or isinstance(wanted, str) and wanted in str(words), (words, wanted)


# ---- Freezing half-way ----


@pytest.mark.parametrize("method", ["ewa", "schedule_free"])
def test_what_is_frozen_half_way_comes_back_from_an_evaluation(tmp_path, method):
    trainer = tiny.trainer(tmp_path, max_steps=6, save_strategy="steps", save_steps=6, **tiny.METHODS[method])

    class Freeze(tiny.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                trainer.model.model.layers[0].requires_grad_(False)

    trainer.add_callback(Freeze())
    trainer.train()
    before = tiny.parameters(trainer.model)
    with trainer.evaluation_weights():
        evaluated = tiny.parameters(trainer.model)
    assert tiny.same(tiny.parameters(trainer.model), before)
    saved = type(trainer.model).from_pretrained(tmp_path / "checkpoint-6" / method)
    assert tiny.same(evaluated, tiny.parameters(saved))


# ---- A class whose files have other keys ----


def train_mixtral(folder, backend, resume):
    more = {"ewa": True, "optim": "radam", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2} if resume is None else {}
    trainer = tiny.trainer(folder, tiny.mixtral(), **options(backend, **more | best))
    trainer.train(resume_from_checkpoint=resume)
    return None if trainer.average is None else averages_of(trainer)


def train_and_resume_mixtral(folder, backend):
    train_mixtral(folder / "run", backend, None)
    return train_mixtral(folder / "resumed", backend, str(folder / "run" / "checkpoint-2"))


@zero
@pytest.mark.parametrize("backend", ["zero3_ungathered", "fsdp2_sharded"])
def test_mixtral_resumes_also_from_shards_put_together(tmp_path, backend):
    first = harness.run(train_and_resume_mixtral, tmp_path, backend, backend=backend)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    loaded = tiny.parameters(load_evaluation_model(checkpoint))
    consolidate(checkpoint)
    assert tiny.same(loaded, tiny.parameters(type(tiny.mixtral()).from_pretrained(checkpoint / "ewa")))
    again = harness.run(train_mixtral, tmp_path / "again", backend, str(checkpoint), backend=backend)
    assert tiny.same(first[0], again[0]) and tiny.same(first[0], first[1])


# ---- Too early ----


def save_before_training(folder):
    args = tiny.arguments(folder, **options("zero3", optim="radam", ewa=True))  # from here on models are partitioned
    tiny.llama(**ODD).save_pretrained(folder / "source") if args.process_index == 0 else None
    torch.distributed.barrier()
    model = tiny.LlamaForCausalLM.from_pretrained(folder / "source")
    trainer = tiny.RAdamTrainer(model, args, train_dataset=tiny.TRAIN)
    trainer.save_model(str(folder / "model"))


@zero
def test_saving_a_partitioned_model_before_training_is_refused(tmp_path):
    for outcome in harness.run(save_before_training, tmp_path, backend="zero3", check=False):
        assert "only after training has begun" in outcome.error, outcome.output
    assert not list((tmp_path / "model").glob("*.safetensors"))


# ---- A plain loop with FSDP2 ----


def plain_fsdp2():
    from torch.distributed.fsdp import fully_shard

    harness.join_group()
    model = tiny.llama(**ODD)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with pytest.raises(ValueError, match="find_sharding"):
        WeightAverage(model.named_parameters())
    optimizer = RAdamScheduleFree(model.parameters(), lr=1e-2)
    optimizer.train()
    batch = {key: value[None] for key, value in tiny.TRAIN[torch.distributed.get_rank()].items()}
    for _ in range(6):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    x = schedule_free_x(model, optimizer)
    with torch.no_grad():
        model(**batch)  # FSDP2 keeps the root's parameters gathered after it
    return tiny.same(schedule_free_x(model, optimizer), x), x["lm_head.weight"].shape


def test_a_plain_loop_with_fsdp2():
    assert harness.run(plain_fsdp2, backend="fsdp2") == [(True, torch.Size([67, 32]))] * 2


# ---- A process that is late ----


def wait_for_a_late_one(folder, backend):
    trainer = tiny.trainer(folder, tiny.llama(**ODD), **options(backend, optim="radam", ewa=True, ddp_timeout=3))
    began = time.monotonic()

    class Late(tiny.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2 and args.process_index == 1:
                time.sleep(3600)

    trainer.add_callback(Late())
    try:
        trainer.train()
    except (RuntimeError, OSError):
        return time.monotonic() - began
    return None


@pytest.mark.parametrize("backend", ["ddp", pytest.param("zero2", marks=zero)])  # which has a group of its own
def test_nobody_waits_longer_than_the_time_limit(tmp_path, backend):
    first, _ = harness.run(wait_for_a_late_one, tmp_path, backend, backend=backend, check=False, grace=2)
    assert first.value is not None and 3 < first.value < 300, (first.error, first.output)


# ---- A process that is stopped ----


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


# ---- Several machines: one folder that all see, or an error on all of them ----


def train_on_two_machines(folder, apart):
    """Train as one process on a machine of its own; `apart` gives each machine a folder of the same name."""
    rank = os.environ["RANK"]
    os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"] = "1", "0"
    ranks.PATIENCE = 2.0
    home = folder / rank if apart else folder
    home.mkdir(exist_ok=True)
    os.chdir(home)
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2} | harness.arguments("ddp")
    with pytest.raises(ValueError, match="save_on_each_node is not supported"):
        tiny.trainer("run", save_on_each_node=True, **options | tiny.METHODS["ewa"]).train()
    tiny.trainer("run", **options | tiny.METHODS["ewa"]).train()
    return sorted(file.name for file in (home / "run" / "checkpoint-2").glob("rng_state*"))


def test_one_folder_holds_the_files_of_both(tmp_path):
    assert harness.run(train_on_two_machines, tmp_path, False) == [["rng_state_0.pth", "rng_state_1.pth"]] * 2


def test_folders_apart_are_refused_on_both(tmp_path):
    for outcome in harness.run(train_on_two_machines, tmp_path, True, check=False):
        assert "is not shared by all machines: ranks [1] do not see" in outcome.error
    assert not list(tmp_path.rglob("seen-by-all*"))
