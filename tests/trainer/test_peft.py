"""PEFT models with averaging: the adapter folders in a checkpoint, loaded by PEFT itself, are what was evaluated.

The oracles: the average (see test_average.py); x from y and the optimizer's z; PEFT's own loading; a forward pass over
the evaluation data without a trainer (`tiny.loss_of`).
"""

import math

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from hf_radam import load_evaluation_model
from hf_radam.checkpoints.manifest import CheckpointError, read_manifest, write_manifest

CLOSE = 2e-6  # as in test_evaluation_weights.py
SAVING = {"save_strategy": "steps", "save_steps": 5}


def lora(folder, *, build=tiny.llama, autocast=True, **options) -> peft.PeftModel:
    """An adapter on a base model that lies in `folder`, as a user makes it."""
    if not (folder / "base").is_dir():
        build().save_pretrained(folder / "base")
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    torch.manual_seed(1)
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, "task_type": "CAUSAL_LM"} | options
    return peft.get_peft_model(base, peft.LoraConfig(**config), autocast_adapter_dtype=autocast)


def base_of(folder) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder / "base")


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def only(weights, names) -> dict[str, torch.Tensor]:
    return {name: weights[name] for name in names}


@pytest.mark.parametrize(
    ("method", "modules"),
    [("ewa", None), ("schedule_free", ["lm_head"]), ("schedule_free_ewa", ["embed_tokens"]), ("wsd", ["lm_head"])],
)
def test_the_adapter_ships_what_was_evaluated_and_resumes_bitwise(tmp_path, method, modules):
    run, options = tmp_path / "run", tiny.METHODS[method] | SAVING
    model = lora(tmp_path, modules_to_save=modules)
    trainer = tiny.trained(run, model, **options)
    weights, loss, checkpoint = trained(model), trainer.evaluate()["eval_loss"], run / "checkpoint-20"
    averages = trainer.average.averaged_state_dict() if trainer.average else {}
    source = {"wsd": None, "schedule_free": "schedule_free"}.get(method, "ewa")
    folder = checkpoint / source / "adapter" if source else checkpoint
    assert read_manifest(checkpoint)["evaluation"]["folder"] == (f"{source}/adapter" if source else None)
    plain = tiny.parameters(peft.PeftModel.from_pretrained(base_of(tmp_path), folder))
    if source:
        if source == "schedule_free":
            z = [values["z"] for values in trainer.optimizer.state_dict()["state"].values()]
            averages = {name: (y - 0.1 * z) / 0.9 for (name, y), z in zip(weights.items(), z, strict=True)}
        for name in weights:  # roundings of values of size 1
            torch.testing.assert_close(plain[name], averages[name], rtol=0, atol=1e-6)
        assert {p.name for p in (checkpoint / source).iterdir()} == {"adapter"}
    with trainer.evaluation_weights():
        assert tiny.same(plain, tiny.parameters(model))  # frozen parameters too
    assert tiny.same(weights, only(plain, weights)) == (source is None)
    # The root holds the adapter that trains, and no file holds more than an adapter
    root = tiny.parameters(peft.PeftModel.from_pretrained(base_of(tmp_path), checkpoint))
    assert tiny.same(weights, only(root, weights))
    assert {len(load_file(one / "adapter_model.safetensors")) for one in (checkpoint, folder)} == {len(weights)}
    # Every way to load it gives the loss that was reported
    shipped = load_evaluation_model(run)  # the newest checkpoint
    assert isinstance(shipped, peft.PeftModelForCausalLM) and not shipped.training
    trainer.save_model()
    saved = peft.PeftModel.from_pretrained(base_of(tmp_path), run)
    for one in (shipped, saved, load_evaluation_model(run)):
        assert tiny.loss_of(one) == pytest.approx(loss, abs=CLOSE)
    assert tiny.same(weights, trained(model))
    assert (abs(tiny.loss_of(model) - loss) > 10 * CLOSE) == (source is not None)
    again = lora(tmp_path, modules_to_save=modules)
    resumed = tiny.trained(tmp_path / "again", again, resume=run / "checkpoint-15", **options)
    assert tiny.same(tiny.state(trainer), tiny.state(resumed))


def bf16_based(folder, kind):
    """PEFT makes fp32 adapters and leaves modules_to_save in the dtype of the base."""
    model = lora(folder, build=tiny.bf16, autocast=kind != "all bf16", modules_to_save=["lm_head"])
    for parameter in model.parameters():
        if parameter.requires_grad and kind == "all that trains in fp32":
            parameter.data = parameter.data.float()
    return model


@pytest.mark.parametrize("kind", ["as PEFT makes it", "all bf16"])
def test_bf16_parameters_that_train_are_refused_with_schedule_free(tmp_path, kind):
    with pytest.raises(ValueError, match="Keep float32 parameters"):
        tiny.trainer(tmp_path, bf16_based(tmp_path, kind), **tiny.METHODS["schedule_free"])


@pytest.mark.parametrize(
    ("method", "kind"),
    [("ewa", "as PEFT makes it"), ("ewa", "all bf16"), ("schedule_free", "all that trains in fp32")],
)
def test_a_bf16_base(tmp_path, method, kind):
    def make():
        return bf16_based(tmp_path, kind)

    options = tiny.METHODS[method] | SAVING | {"bf16": kind != "all bf16"}
    options |= {"optim": "adamw_torch"} if method == "ewa" else {}
    trainer = tiny.trained(tmp_path / "run", make(), **options)
    again = tiny.trained(tmp_path / "again", make(), **options, resume=tmp_path / "run" / "checkpoint-5")
    assert tiny.same(tiny.state(trainer), tiny.state(again))
    file = load_file(tmp_path / "run" / "checkpoint-20" / method / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in file.values()} == {torch.float32}
    with trainer.evaluation_weights():
        evaluated = tiny.parameters(trainer.model)
    shipped = tiny.parameters(load_evaluation_model(tmp_path / "run"))
    assert {n: p.dtype for n, p in shipped.items()} == {n: p.dtype for n, p in evaluated.items()}
    assert tiny.same(shipped, evaluated)
    as_told = load_evaluation_model(tmp_path / "run", dtype=torch.float32)
    assert {p.dtype for p in as_told.parameters()} == {torch.float32}
    if method == "ewa":  # in float32 nothing of the average is lost
        averages = trainer.average.averaged_state_dict()
        names = trained(trainer.model)
        assert tiny.same(only(tiny.parameters(as_told), names), only(averages, names))


def test_a_base_of_two_dtypes_comes_back_as_it_was(tmp_path):
    base = tiny.llama()
    with torch.no_grad():
        base.model.norm.weight += 1e-4  # no bf16 number
    model = lora(tmp_path, build=lambda: base)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and "norm" not in name:
            parameter.data = parameter.data.bfloat16()
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.register_forward_hook(lambda module, args, output: output.bfloat16())
    trainer = tiny.trained(tmp_path / "run", model, **tiny.METHODS["ewa"], **SAVING)
    shipped = tiny.parameters(load_evaluation_model(tmp_path / "run"))
    assert {p.dtype for n, p in shipped.items() if "q_proj.base" in n} == {torch.bfloat16}
    with trainer.evaluation_weights():
        assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in shipped.items()}
        assert tiny.same(tiny.parameters(model), shipped)


@pytest.mark.parametrize("method", ["ewa", "schedule_free"])
def test_tied_embeddings_that_train(tmp_path, method):
    def make():
        return lora(tmp_path, build=tiny.tied, modules_to_save=["embed_tokens"], ensure_weight_tying=True)

    options = tiny.METHODS[method] | SAVING
    trainer = tiny.trained(tmp_path / "run", make(), **options)
    again = tiny.trained(tmp_path / "again", make(), **options, resume=tmp_path / "run" / "checkpoint-5")
    assert tiny.same(tiny.state(trainer), tiny.state(again))
    plain = peft.PeftModel.from_pretrained(base_of(tmp_path), tmp_path / "run" / "checkpoint-20" / method / "adapter")
    for shipped in (plain, load_evaluation_model(tmp_path / "run")):
        assert tiny.loss_of(shipped) == pytest.approx(trainer.evaluate()["eval_loss"], abs=CLOSE)


@pytest.mark.parametrize("method", ["ewa", "schedule_free"])
def test_the_best_model_is_the_best_evaluation_weights(tmp_path, method):
    # Far too high on purpose, so that the best comes before the end.
    options = tiny.METHODS[method] | {"learning_rate": 3.0, "max_steps": 40, "max_grad_norm": 0.0}
    saving = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    model = lora(tmp_path, modules_to_save=["lm_head"])
    trainer = tiny.trained(tmp_path / "run", model, **options, **saving, load_best_model_at_end=True)
    best = trainer.state.best_metric
    reported = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert best == min(reported) < reported[-1] - 1e-3 and math.isfinite(best)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=CLOSE)
    assert tiny.loss_of(model) == pytest.approx(best, abs=CLOSE)
    trainer.save_model()
    assert tiny.loss_of(load_evaluation_model(tmp_path / "run")) == pytest.approx(best, abs=CLOSE)
    with pytest.raises(RuntimeError, match="holds the best evaluation weights"):
        trainer.train()


def test_a_base_model_that_is_not_named(tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    trainer = tiny.trainer(tmp_path, peft.get_peft_model(tiny.llama(), config), **tiny.METHODS["ewa"], **SAVING)
    trainer.train()
    with pytest.raises(ValueError, match=r"does not name the base model .* peft.PeftModel.from_pretrained\(base"):
        load_evaluation_model(tmp_path)
    shipped = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "checkpoint-20" / "ewa" / "adapter")
    assert tiny.loss_of(shipped) == pytest.approx(trainer.evaluate()["eval_loss"], abs=CLOSE)


class MyLlama(LlamaForCausalLM):
    """A class of the user's."""


def test_the_class_of_the_base_model_may_be_given_or_found_without_a_task(tmp_path):
    trainer = tiny.trained(tmp_path / "run", lora(tmp_path, task_type=None), **tiny.METHODS["ewa"], **SAVING)
    loss = trainer.evaluate()["eval_loss"]
    for options, expected in (({}, LlamaForCausalLM), ({"model_class": MyLlama}, MyLlama)):
        shipped = load_evaluation_model(tmp_path / "run" / "checkpoint-20", **options)
        assert type(shipped.get_base_model()) is expected
        assert tiny.loss_of(shipped) == pytest.approx(loss, abs=CLOSE)


def test_an_adapter_for_another_task(tmp_path):
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(**tiny.SIZES)).save_pretrained(tmp_path / "base")
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "run")
    shipped = load_evaluation_model(tmp_path / "run")
    assert isinstance(shipped, peft.PeftModelForSequenceClassification)
    assert tiny.same(tiny.parameters(model), tiny.parameters(shipped))


def test_embeddings_that_were_resized_and_train_are_kept(tmp_path):
    """PEFT writes them without being told, as the vocabulary is no longer the base model's."""

    def make():
        model = lora(tmp_path)
        torch.manual_seed(2)
        model.get_base_model().resize_token_embeddings(tiny.VOCABULARY + 2, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.requires_grad_(True)
        return model

    options = tiny.METHODS["ewa"] | SAVING
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        trainer = tiny.trained(tmp_path / "run", make(), **options)
        again = tiny.trained(tmp_path / "again", make(), **options, resume=tmp_path / "run" / "checkpoint-5")
    assert "base_model.model.lm_head.weight" in trained(trainer.model)
    assert tiny.same(tiny.state(trainer), tiny.state(again))


def unsupported_models():
    """Models of which one adapter folder does not hold everything that trains, and what the error says."""
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    two = peft.get_peft_model(tiny.llama(), config)
    two.add_adapter("other", config)
    thawed = peft.get_peft_model(tiny.llama(), config)
    thawed.base_model.model.model.norm.weight.requires_grad_(True)
    prompt = peft.get_peft_model(tiny.llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    normed = peft.get_peft_model(tiny.llama(), config)
    normed.base_model.model.model.extra = torch.nn.BatchNorm1d(4).requires_grad_(False)
    yield two, r"has the adapters \['default', 'other'\]\. Train one"
    yield peft.get_peft_model(tiny.llama(), config, adapter_name="mine"), r"has the adapters \['mine'\]"
    yield thawed, r"PEFT does not write base_model\.model\.model\.norm\.weight, which trains"
    yield prompt, r"PROMPT_TUNING trains a prompt, not the model"
    yield normed, "BatchNorm layers, whose statistics no adapter holds"


def test_what_an_adapter_cannot_hold_is_refused(tmp_path):
    best = SAVING | {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True}
    for model, message in unsupported_models():
        for options in (tiny.METHODS["ewa"], tiny.METHODS["schedule_free"], tiny.METHODS["wsd"] | best):
            with pytest.raises(ValueError, match=message):
                tiny.trainer(tmp_path, model, **options)
        tiny.trainer(tmp_path, model, **tiny.METHODS["wsd"])  # which upstream saves
    added = tiny.llama()
    added._hf_peft_config_loaded = True  # by add_adapter(), for which transformers 5.24 needs PEFT 0.22
    with pytest.raises(ValueError, match="Use peft.get_peft_model"):
        tiny.trainer(tmp_path, added, **tiny.METHODS["wsd"])


@pytest.mark.parametrize("method", ["ewa", "wsd"])
def test_another_or_a_damaged_adapter_is_refused(tmp_path, method):
    options = tiny.METHODS[method] | SAVING
    tiny.trained(tmp_path / "run", lora(tmp_path), **options)
    checkpoint = tmp_path / "run" / "checkpoint-5"
    for other, message in (
        ({"target_modules": ["q_proj", "k_proj"]}, "missing .*k_proj.* unexpected .*v_proj"),
        ({"r": 3}, "of another shape .*q_proj"),
    ):
        model = lora(tmp_path, **other)
        before = tiny.parameters(model)
        with pytest.raises(CheckpointError, match=message):
            tiny.trained(tmp_path / "again", model, resume=checkpoint, **options)
        assert tiny.same(before, tiny.parameters(model))
    with pytest.raises(CheckpointError):  # nor is it the checkpoint of a full model
        tiny.trained(tmp_path / "again", tiny.llama(), resume=checkpoint, **options)
    (checkpoint / "adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match="is 9 bytes long, not"):
        tiny.trained(tmp_path / "again", lora(tmp_path), resume=checkpoint, **options)
    write_manifest(checkpoint, read_manifest(checkpoint))  # as if it had been written so
    with pytest.raises(CheckpointError, match="cannot be read as an adapter"):
        tiny.trained(tmp_path / "again", lora(tmp_path), resume=checkpoint, **options)
