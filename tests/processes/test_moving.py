"""A run is resumed in another layout: another back-end, number of processes, or kind of state dicts.

Oracles: the uninterrupted run in the layout that resumes; and weights, averages and optimizer of the run that saved,
gathered by torch's own functions at the step of the save, bit for bit.
"""

from __future__ import annotations

import tiny
from processes import harness
from transformers import TrainerCallback

from hf_radam import RAdamTrainer

SAVED, STEPS = 6, 9
ODD = {"vocab_size": 67, "intermediate_size": 45, "attention_dropout": 0.0}  # no first dimension is a multiple of 2
METHODS = {
    "wsd, ewa": {"optim": "radam", "lr_scheduler_type": "wsd", "decay_steps": STEPS - SAVED, "ewa": True},
    "schedule_free": {"optim": "radam_schedulefree"},
}
LAYOUTS = ("one", "ddp", "fsdp2", "fsdp2_sharded")
MOVES = [("one", "ddp"), ("ddp", "one"), ("ddp", "fsdp2"), ("fsdp2", "ddp"), ("fsdp2", "fsdp2_sharded")]
MOVES += [("fsdp2_sharded", "one"), ("one", "fsdp2_sharded")]
# A gradient is summed over 4 sequences at once or over 2 and 2: float32 sums in another order, 9 steps long.
TOLERANCE = 1e-6


def model(method):
    """Tied embeddings, or a frozen parameter."""
    made = tiny.llama(**ODD, tie_word_embeddings=method == "schedule_free")
    if method != "schedule_free":
        made.model.embed_tokens.requires_grad_(False)
    return made


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


class Notes(TrainerCallback):
    """Records complete weights and optimizer state when training begins and at the step of the save."""

    def __init__(self):
        self.trainer, self.kept = None, {}

    def note(self):
        bare, optimizer = self.trainer._bare_model, self.trainer._bare_optimizer
        names = {parameter: name for name, parameter in bare.named_parameters()}
        # The formats do not keep the difference between a tuple and a list.
        groups = [
            {k: list(v) if isinstance(v, tuple) else v for k, v in group.items() if k != "params"}
            for group in optimizer.param_groups
        ]
        state = {
            names[parameter]: {key: whole(value) for key, value in kept.items()}
            for parameter, kept in optimizer.state.items()
        }
        weights = {name: whole(parameter) for parameter, name in names.items()}
        average = self.trainer.average
        averaged = {}
        if average is not None and average.started:
            averaged = {"tensors": average.averaged_state_dict(), "counters": average.counters()}
        return {"weights": weights, "state": state, "groups": groups, "average": averaged}

    def on_train_begin(self, args, state, control, **kwargs):
        self.kept["begin"] = self.note()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == SAVED:
            self.kept["saved"] = self.note()


def train(folder, layout, method, resume=None, until=STEPS):
    """Train, and return what was recorded on the way and the weights at the end."""
    options = {"max_steps": STEPS, "save_steps": SAVED, "save_strategy": "no" if resume else "steps"}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 if layout == "one" else 1}
    arguments = tiny.arguments(folder, **options | METHODS[method] | harness.arguments(layout))
    notes = Notes()
    callbacks = [notes, tiny.StopAfter(until)]
    notes.trainer = RAdamTrainer(model(method), arguments, train_dataset=tiny.TRAIN, callbacks=callbacks)
    notes.trainer.train(resume_from_checkpoint=resume and str(resume))
    assert harness.is_really(notes.trainer, layout)
    return notes.kept | {"end": notes.note()["weights"]}


def uninterrupted(root, layout):
    return {method: train(root / layout / method, layout, method) for method in METHODS}


def resumed(root, moves, until=STEPS):
    """Resume, by source, layout and method."""
    found = {}
    for source, layout in moves:
        for method in METHODS:
            saved = root / source / method / f"checkpoint-{SAVED}"
            folder = root / f"{source} to {layout} until {until}" / method
            found[source, layout, method] = train(folder, layout, method, saved, until)
    return found


def check_what_was_loaded(kept, saved, method):
    """Every process began with exactly what was saved."""
    assert tiny.same(kept["begin"]["weights"], saved["weights"])
    averages = kept["begin"]["average"], saved["average"]
    assert bool(averages[0]) == ("ewa" in method)
    assert averages[0].get("counters") == averages[1].get("counters")
    assert tiny.same(*(average.get("tensors", {}) for average in averages))
    states = kept["begin"]["state"], saved["state"]
    assert states[0].keys() == states[1].keys() and states[0]
    assert all(tiny.same(*(state[name] for state in states)) for name in states[0])
    assert kept["begin"]["groups"] == saved["groups"]
    if method == "schedule_free":
        assert [group["k"] for group in saved["groups"]] == [SAVED] * 2


def check_the_end(kept, uninterrupted_run):
    """The resumed run trained like the uninterrupted one."""
    end, expected = kept["end"], uninterrupted_run["end"]
    assert end.keys() == expected.keys()
    difference = max(float((end[name] - expected[name]).abs().max()) for name in end)
    trained = max(float((end[name] - kept["begin"]["weights"][name]).abs().max()) for name in end)
    assert difference <= TOLERANCE and trained > 1000 * TOLERANCE, (difference, trained)


def test_a_run_is_resumed_in_every_layout_as_if_it_had_always_been_there(tmp_path):
    """That it is resumed in its own layout, bit for bit, is part of `test_backends.py`."""
    whole = {layout: harness.run(uninterrupted, tmp_path, layout, backend=layout) for layout in LAYOUTS}
    for target in LAYOUTS:
        moves = [move for move in MOVES if move[1] == target]
        for rank, found in enumerate(harness.run(resumed, tmp_path, moves, backend=target)):
            for (source, layout, method), kept in found.items():
                check_what_was_loaded(kept, whole[source][0][method]["saved"], method)
                check_the_end(kept, whole[layout][rank][method])
    for layout in ("ddp", "fsdp2", "fsdp2_sharded"):  # on three processes a step has other samples
        for found in harness.run(resumed, tmp_path, [(layout, layout)], SAVED + 1, backend=layout, world=3):
            for (source, _, method), kept in found.items():
                check_what_was_loaded(kept, whole[source][0][method]["saved"], method)
