"""The table "method x back-end": trained, evaluated, saved, shipped, resumed and extended in two real processes.

Oracles: the run of one process with as many sequences in each update; plain `from_pretrained` on what was written, with
a loss that no trainer computed; the run that was never interrupted, and the one that was planned longer, bit for bit.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from processes import harness
from processes.test_moving import MOVES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_radam import load_evaluation_model
from hf_radam.checkpoints.manifest import read_manifest

UPDATES, LONGER = 12, 16
METHODS = {name: tiny.METHODS[name] for name in ("wsd", "ewa", "schedule_free")}
METHODS["ewa"] = METHODS["ewa"] | {"ewa_device": "cpu"}
METHODS["flags"] = tiny.METHODS["schedule_free_ewa"] | {
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.05,
    "ewa_every": 3,
    "ewa_start_step": 4,  # the first averaging comes with update 7
    "ewa_eval_raw": True,
    "eval_on_start": True,
}
METHODS["wsd_s"] = {"optim": "radam", "lr_scheduler_type": "wsd_s", "budgets": [6], "decay_steps": 2}
BACKENDS = harness.BACKENDS
ODD = {"vocab_size": 67, "intermediate_size": 45, "attention_dropout": 0.0}  # no first dimension is a multiple of 2
# A gradient is summed over 4 sequences at once or over 2 and 2: float32 sums in another order, 12 updates long.
TOLERANCE = 2e-6
BESIDE = {"ewa": "ewa", "schedule_free": "schedule_free", "flags": "ewa"}
RESUMED_AT = {"flags": 4}  # before there is an average


def model(method):
    """Odd sizes everywhere; tied embeddings or a frozen parameter besides."""
    made = tiny.llama(**ODD, tie_word_embeddings=method == "schedule_free")
    if method == "ewa":
        made.model.layers[0].mlp.up_proj.requires_grad_(False)
    return made


def options(backend, method):
    accumulation = METHODS[method].get("gradient_accumulation_steps", 1) * (2 if backend == "one" else 1)
    when = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 4}
    size = {"max_steps": UPDATES, "per_device_train_batch_size": 2, "dataloader_pin_memory": False}
    size |= {"gradient_accumulation_steps": accumulation}
    return when | METHODS[method] | size | harness.arguments(backend)


def whole_weights(trainer):
    """Every parameter as the forward pass has it, whole, on every rank."""
    sharding = trainer._evaluation.sharding
    return {name: sharding.gather_model(name).clone() for name in sharding.parameters}


def train_one(folder, backend, method):
    """Train, evaluate, ship, resume and extend; what one process saw of it."""
    made = partial(tiny.trainer, **options(backend, method))
    trainer = made(folder / "run", model(method))
    trainer.train()
    assert harness.is_really(trainer, backend)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    weights = whole_weights(trainer)
    average = trainer.average
    pieces = average.state_dict()["averages"].values() if average else ()
    facts = {
        "losses": {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry},
        "loss": loss,
        "weights": weights,
        "average": average.averaged_state_dict() if average else None,
        "bytes": sum(piece.numel() * piece.element_size() for piece in pieces),
    }
    resumed = made(folder / "resumed", model(method))
    resumed.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{RESUMED_AT.get(method, 8)}"))
    facts["resumed is the same"] = tiny.same(weights, whole_weights(resumed))
    facts["resumed loss"] = resumed.evaluate()["eval_loss"]
    if average:
        facts["resumed average is the same"] = tiny.same(facts["average"], resumed.average.averaged_state_dict())
    longer = made(folder / "longer", model(method), max_steps=LONGER, extend_from=str(folder / "run"))
    longer.train()
    planned = {"budgets": [6, 12]} if method == "wsd_s" else {}
    twin = made(folder / "planned", model(method), max_steps=LONGER, **planned)
    twin.train()
    facts["longer is the planned"] = tiny.same(whole_weights(longer), whole_weights(twin))
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
        assert facts["longer is the planned"], method
        if one["average"]:
            assert facts["resumed average is the same"]
            for name, value in one["average"].items():
                torch.testing.assert_close(facts["average"][name], value, rtol=0, atol=TOLERANCE)
    if method == "ewa":
        check_shares(backend, ranks, one)
    loss, checkpoint = ranks[0]["loss"], folder / "run" / "checkpoint-12"
    files = read_manifest(checkpoint)["files"]
    states = {"rng_state.pth"} if backend == "one" else {"rng_state_0.pth", "rng_state_1.pth"}
    assert {*states, "scheduler.pt", "trainer_state.json"} <= set(files)
    shards = [name for name in files if name.endswith(".distcp") or "zero_pp_rank" in name]
    assert not shards or {re.search(r"(__|rank_)(\d)", name)[2] for name in shards} == {"0", "1"}, "every rank's files"
    # The mean over 16 sequences one by one, or over batches of 8: float32 sums in another order.
    assert tiny.loss_of(load_evaluation_model(checkpoint)) == pytest.approx(loss, abs=1e-6)
    assert tiny.loss_of(AutoModelForCausalLM.from_pretrained(folder / "run")) == pytest.approx(loss, abs=1e-6)
    if method in BESIDE:
        beside = checkpoint / BESIDE[method]
        assert tiny.loss_of(AutoModelForCausalLM.from_pretrained(beside)) == pytest.approx(loss, abs=1e-6)
    if method == "ewa":
        average = load_file(checkpoint / "ewa" / "model.safetensors")
        assert tiny.same(average, {name: ranks[0]["average"][name] for name in average})


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
    # What moves, in the columns' order; the refusals are tested in test_going_on.py and test_refusals.py.
    columns, words = ("one", "ddp", "fsdp2"), {"one": "one process", "ddp": "DDP", "fsdp2": "FSDP2"}
    moved = {(source.removesuffix("_sharded"), target.removesuffix("_sharded")) for source, target in MOVES}
    sources = [", ".join(words[source] for source in columns if (source, c) in moved and source != c) for c in columns]
    assert [row[1:] for row in rows[len(flags) :]] == [
        [*["yes"] * 3, *["refused"] * 3],
        [*sources, *["refused"] * 3],
        [*["yes"] * 2, *["refused"] * 4],
    ]
