"""The table "method x back-end": trained, evaluated, saved, shipped, resumed and extended in two real processes.

Oracles: the run of one process with as many sequences in each step; plain `from_pretrained` on what was written, with
a loss that no trainer computed; the run that was never interrupted, and the one that was planned longer, bit for bit;
the schedule's own function. The resumed run's averages move as late as a busy device allows, the others' at once.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from processes import harness
from processes.test_moving import MOVES, ODD
from processes.test_sharded_details import error_of
from safetensors.torch import load_file
from test_host_average import LateCopies
from transformers import AutoModelForCausalLM

from hf_radam import averaging, load_evaluation_model
from hf_radam.checkpoints.load import consolidate
from hf_radam.checkpoints.manifest import read_manifest
from hf_radam.optim import fused, schedule_free
from hf_radam.schedules import wsd, wsd_s

STEPS, LONGER, SAVED = 8, 11, 4
METHODS = {
    "wsd": {"optim": "radam", "lr_scheduler_type": "wsd", "decay_steps": 3},
    "wsd_s": {"optim": "radam", "lr_scheduler_type": "wsd_s", "budgets": [5], "decay_steps": 2},
    # the first averaging comes with step 3, the next with step 5, after the checkpoint that is resumed
    "ewa": {"optim": "radam", "ewa": True, "ewa_device": "cpu", "ewa_every": 2, "ewa_start_step": 1}
    | {"ewa_eval_raw": True, "eval_on_start": True, "gradient_accumulation_steps": 2, "max_grad_norm": 0.05},
    "schedule_free": {"optim": "radam_schedulefree"},
}
BACKENDS = harness.BACKENDS
# A gradient is summed over 4 sequences at once or over 2 and 2: float32 sums in another order, 8 steps long.
TOLERANCE = 2e-6
BESIDE = {"ewa": "ewa", "schedule_free": "schedule_free"}
REFUSED = {"weight_decay": 0.2, "learning_rate": 2e-2, "optim": "adamw_torch"}


class Rates(tiny.TrainerCallback):
    """Keeps the learning rate of every step."""

    def __init__(self):
        self.used = {}

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.used[state.global_step] = float(optimizer.param_groups[0]["lr"])


def model(method):
    """Odd sizes everywhere; tied embeddings or a frozen parameter besides."""
    made = tiny.llama(**ODD, tie_word_embeddings=method == "schedule_free")
    if method == "ewa":
        made.model.layers[0].mlp.up_proj.requires_grad_(False)
    return made


def options(backend, method):
    accumulation = METHODS[method].get("gradient_accumulation_steps", 1) * (2 if backend == "one" else 1)
    when = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": SAVED}
    size = {"max_steps": STEPS, "per_device_train_batch_size": 2, "dataloader_pin_memory": False}
    size |= {"gradient_accumulation_steps": accumulation}
    return when | METHODS[method] | size | harness.arguments(backend)


def train_one(folder, backend, method):
    """Train, evaluate, ship, resume and extend; return what one process saw of it."""
    made = partial(tiny.trainer, **options(backend, method))
    trainer, kernels = made(folder / "run", model(method)), []
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "_fused_adamw_"), (schedule_free, "schedule_free_step")):
            kernel = getattr(owner, name)
            patch.setattr(owner, name, lambda *args, run=kernel, **kwargs: kernels.append(run(*args, **kwargs)) or None)
        trainer.train()
    assert [name for name in BACKENDS if harness.is_really(trainer, name)] == [*harness.SAME.get(backend, [backend])]
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    weights = harness.gathered(trainer)
    average = trainer.average
    shards = average.state_dict()["averages"].values() if average else ()
    facts = {
        "losses": {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry},
        "loss": loss,
        "weights": weights,
        "average": average.averaged_state_dict() if average else None,
        "fused": trainer._bare_optimizer._fuses and bool(kernels),
        "bytes": sum(shard.numel() * shard.element_size() for shard in shards),
    }
    saved = str(folder / "run" / f"checkpoint-{SAVED}")
    resumed, copiers = made(folder / "resumed", model(method)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(averaging, "host_copies", lambda weights, _: copiers.append(LateCopies(weights)) or copiers[-1])
        resumed.train(resume_from_checkpoint=saved)
    facts["resumed is the same"] = tiny.same(weights, harness.gathered(resumed))
    facts["resumed loss"] = resumed.evaluate()["eval_loss"]
    if average:
        facts["moved late"] = [copier.started for copier in copiers]
        facts["resumed average is the same"] = tiny.same(facts["average"], resumed.average.averaged_state_dict())
    if method == "wsd":
        facts["refused"] = [
            error_of(made(folder / "refused", model(method), **{key: value}).train, resume_from_checkpoint=saved)
            for key, value in REFUSED.items()
        ]
    if method in ("wsd", "wsd_s"):
        rates = Rates()
        longer = made(folder / "longer", model(method), max_steps=LONGER, extend_from=str(folder / "run"))
        longer.add_callback(rates)
        longer.train()
        planned = {"budgets": [5, STEPS]} if method == "wsd_s" else {}
        twin = made(folder / "planned", model(method), max_steps=LONGER, save_strategy="no", **planned)
        twin.train()
        facts["longer is the planned"] = tiny.same(harness.gathered(longer), harness.gathered(twin))
        facts["rates"] = rates.used
    return facts


def train_all(folder, backend):
    return {method: train_one(folder / method, backend, method) for method in METHODS}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The oracle, one process: its folder, and what it saw."""
    folder = tmp_path_factory.mktemp("one")
    return folder, harness.run(train_all, folder, "one", backend="one")[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_method(tmp_path, one, backend):
    if harness.missing(backend):
        pytest.skip(harness.missing(backend))
    folder, alone = one
    ranks = [alone]
    if backend != "one":
        folder, ranks = tmp_path, harness.run(train_all, tmp_path, backend, backend=backend)
    for method in METHODS:
        check(folder / method, method, backend, [facts[method] for facts in ranks], alone[method])


def check(folder, method, backend, ranks, one):
    for facts in ranks:
        assert facts["losses"] == pytest.approx(one["losses"], abs=TOLERANCE), method
        for name, value in one["weights"].items():
            torch.testing.assert_close(facts["weights"][name], value, rtol=0, atol=TOLERANCE, msg=f"{method} {name}")
        assert tiny.same(facts["weights"], ranks[0]["weights"])
        assert facts["resumed is the same"] and facts["resumed loss"] == facts["loss"], method
        assert facts["fused"] == (METHODS[method]["optim"] == "radam" or not isinstance(fused.load_library(), str))
        if one["average"]:
            assert facts["resumed average is the same"] and facts["moved late"] == [2]  # with steps 5 and 7
            for name, value in one["average"].items():
                torch.testing.assert_close(facts["average"][name], value, rtol=0, atol=TOLERANCE)
        check_schedule(facts, method)
    if method == "ewa":
        check_shares(backend, ranks, one)
    loss, checkpoint = ranks[0]["loss"], folder / "run" / f"checkpoint-{STEPS}"
    files = read_manifest(checkpoint)["files"]
    states = {"rng_state.pth"} if backend == "one" else {"rng_state_0.pth", "rng_state_1.pth"}
    assert {*states, "scheduler.pt", "trainer_state.json"} <= set(files)
    shards = [name for name in files if name.endswith(".distcp") or "zero_pp_rank" in name]
    assert not shards or {re.search(r"(__|rank_)(\d)", name)[2] for name in shards} == {"0", "1"}, "every rank's files"
    # The mean over 16 sequences one by one, or over batches of 8: float32 sums in another order.
    assert tiny.loss_of(load_evaluation_model(checkpoint)) == pytest.approx(loss, abs=1e-6)
    consolidate(checkpoint)  # where the weights lie in shards
    assert tiny.loss_of(AutoModelForCausalLM.from_pretrained(folder / "run")) == pytest.approx(loss, abs=1e-6)
    if method in BESIDE:
        beside = checkpoint / BESIDE[method]
        assert tiny.loss_of(AutoModelForCausalLM.from_pretrained(beside)) == pytest.approx(loss, abs=1e-6)
    if method == "ewa":
        average = load_file(checkpoint / "ewa" / "model.safetensors")
        assert tiny.same(average, {name: ranks[0]["average"][name] for name in average})


def check_schedule(facts, method):
    """Other numbers are refused, and an extension has the weights and the rates of the longer schedule."""
    for (name, value), said in zip(REFUSED.items() if method == "wsd" else (), facts.get("refused", ()), strict=True):
        assert f"{name}=" in said and str(value) in said, said
    if method in ("wsd", "wsd_s"):
        assert facts["longer is the planned"], method
        first = min(facts["rates"])
        assert first == (STEPS - 3 if method == "wsd" else STEPS)  # before the decay, or at the budget
        if method == "wsd":
            rates = [wsd(step, total_steps=LONGER, decay_steps=3) for step in range(first, LONGER)]
        else:
            ends = [5, STEPS, LONGER]
            rates = [wsd_s(step, budgets=ends, decay_steps=[2, 2, 2]) for step in range(first, LONGER)]
        assert [*facts["rates"].values()] == pytest.approx([1e-2 * rate for rate in rates], rel=1e-12)


def check_shares(backend, ranks, one):
    """4 bytes for each parameter that trains, once over all ranks, and evenly."""
    trained = sum(v.numel() for n, v in one["average"].items() if n != "model.layers.0.mlp.up_proj.weight")
    bytes_of = [facts["bytes"] for facts in ranks]
    assert one["bytes"] == 4 * trained == sum(bytes_of)
    # Of an odd number of rows the first rank has one more.
    assert max(bytes_of) - min(bytes_of) < 4 * 45 * 12


def test_the_table_of_back_ends_claims_what_is_tested():
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    table = page.partition("<!-- methods and back-ends")[2].partition("\n\n")[0].splitlines()[1:]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    flags = {"schedule_free": "--optim radam_schedulefree", "ewa": "--ewa"}
    flags |= {name: f"--optim radam --lr_scheduler_type {name}" for name in ("wsd", "wsd_s")}
    claimed = {row[0] for row in rows[: len(flags)] if set(row[1:]) == {"yes"}}
    assert claimed == {f"`{flag}`" for flag in flags.values()} and flags.keys() <= METHODS.keys()
    tested = {"one process": ["one"], "DDP": ["ddp"], "FSDP2, full or sharded state dicts": ["fsdp2", "fsdp2_sharded"]}
    tested |= {"ZeRO-1": ["zero1"], "ZeRO-2": ["zero2"], "ZeRO-3, gathered or not": ["zero3", "zero3_ungathered"]}
    assert head[1:] == list(tested) and sum(tested.values(), []) == list(BACKENDS)
    # What moves, in the columns' order; the refusals are tested in test_refusals.py.
    columns, words = ("one", "ddp", "fsdp2"), {"one": "one process", "ddp": "DDP", "fsdp2": "FSDP2"}
    moved = {(source.removesuffix("_sharded"), target.removesuffix("_sharded")) for source, target in MOVES}
    sources = [", ".join(words[source] for source in columns if (source, c) in moved and source != c) for c in columns]
    assert [row[1:] for row in rows[len(flags) :]] == [
        [*["yes"] * 3, *["refused"] * 3],
        [*sources, *["refused"] * 3],
        [*["yes"] * 2, *["refused"] * 4],
    ]
