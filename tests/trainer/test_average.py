"""The average that the trainer writes equals one recomputed in float64 from the weights after every step."""

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_radam import RAdamTrainer


class Recorder(TrainerCallback):
    """Keeps the training weights after every step, in float64."""

    def __init__(self):
        self.path = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.path.append({name: p.detach().double().clone() for name, p in model.named_parameters()})


@pytest.mark.parametrize(
    ("build", "options"),
    [
        # Wide windows: an average shifted by one step, or with theta_0 in it, is far outside the tolerance.
        (tiny.llama, {"ewa_decay": 0.98}),
        (tiny.tied, {"ewa_decay": 0.98, "ewa_every": 3, "ewa_start_step": 4}),
        (tiny.bf16, {"ewa_half_life_ratio": 0.5}),
        (tiny.mixtral, {"ewa_half_life_ratio": 0.5}),
        (tiny.llama, {"ewa_half_life_ratio": 0.5, "ewa_every": 3, "ewa_device": "cpu"}),
        (tiny.bf16, {"ewa_decay": 0.98, "ewa_device": "cpu"}),
    ],
)
def test_against_the_weighted_sum_of_recorded_weights(tmp_path, options, build):
    recorder = Recorder()
    options = options | {"save_strategy": "steps", "save_steps": 20, "gradient_accumulation_steps": 2}
    args = tiny.arguments(tmp_path, optim="adamw_torch", ewa=True, **options)
    trainer = RAdamTrainer(build(), args, train_dataset=tiny.TRAIN, callbacks=[recorder])
    trainer.train()
    every, start = options.get("ewa_every", 1), options.get("ewa_start_step", 0)
    times = [t for t in range(start + 1, 21) if (t - start) % every == 0]
    weights: list[float] = []
    for t in times:
        if "ewa_decay" in options:
            weights = [w * 0.98**every for w in weights] + [1.0]
        else:
            keep = 0.5 ** (every / (0.5 * (t - start))) if weights else 0.0
            weights = [w * keep for w in weights] + [1.0 - keep]
    total = sum(weights)
    written = load_file(tmp_path / "checkpoint-20" / "ewa" / "model.safetensors") if build is not tiny.mixtral else None
    for name, average in trainer.average.averaged_state_dict().items():
        expected = sum(w * recorder.path[t - 1][name] for w, t in zip(weights, times, strict=True)) / total
        # 20 roundings in fp32 of weights below 1; one step moves a weight by up to 1e-2.
        torch.testing.assert_close(average.double(), expected, rtol=0, atol=1e-6)
        if written is not None:
            assert torch.equal(written[name], average)
