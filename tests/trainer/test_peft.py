"""PEFT models with averaging: the adapter folders in a checkpoint, loaded by PEFT itself, are what was evaluated.

The oracles: the average (see test_combinations.py); x from y and the optimizer's z; PEFT's own loading; a forward pass
over the evaluation data without a trainer (`tiny.loss_of`).
"""

import copy
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
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    config |= copy.deepcopy(options)  # PEFT appends to its lists
    return peft.get_peft_model(base, peft.LoraConfig(**config), autocast_adapter_dtype=autocast)


def base_of(folder) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder / "base")


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def only(weights, names) -> dict[str, torch.Tensor]:
    return {name: weights[name] for name in names}


HEAD, EMBEDDINGS = {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}
TIED = EMBEDDINGS | {"build": tiny.tied, "ensure_weight_tying": True}


@pytest.mark.parametrize(
    ("method", "kind"),
    [("ewa", {}), ("ewa", TIED), ("schedule_free", HEAD), ("schedule_free_ewa", EMBEDDINGS), ("wsd", HEAD)],
    ids=["ewa", "ewa tied", "schedule_free", "schedule_free_ewa", "wsd"],
)
def test_the_adapter_ships_what_was_evaluated_and_resumes_bitwise(tmp_path, method, kind):
    run, options = tmp_path / "run", tiny.METHODS[method] | SAVING
    model = lora(tmp_path, **kind)
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
    count = len(weights) + (kind is TIED)  # PEFT writes the tied weights twice
    assert {len(load_file(one / "adapter_model.safetensors")) for one in (checkpoint, folder)} == {count}
    # Every way to load it gives the loss that was reported
    shipped = load_evaluation_model(run)  # the newest checkpoint
    assert isinstance(shipped, peft.PeftModelForCausalLM) and not shipped.training
    trainer.save_model()
    saved = peft.PeftModel.from_pretrained(base_of(tmp_path), run)
    for one in (shipped, saved, load_evaluation_model(run)):
        assert tiny.loss_of(one) == pytest.approx(loss, abs=CLOSE)
    assert tiny.same(weights, trained(model))
    assert (abs(tiny.loss_of(model) - loss) > 10 * CLOSE) == (source is not None)
    again = lora(tmp_path, **kind)
    resumed = tiny.trained(tmp_path / "again", again, resume=run / "checkpoint-15", **options)
    assert tiny.same(tiny.state(trainer), tiny.state(resumed))


def shifted():
    model = tiny.llama()
    model.model.norm.weight.data += 1e-4  # no bf16 number
    return model


def bf16_based(folder, kind):
    """PEFT makes fp32 adapters and leaves modules_to_save in the dtype of the base."""
    build = shifted if kind == "norms in fp32" else tiny.bf16
    model = lora(folder, build=build, autocast=kind != "all bf16", modules_to_save=["lm_head"])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and kind == "all that trains in fp32":
            parameter.data = parameter.data.float()
        elif not parameter.requires_grad and "norm" not in name:
            parameter.data = parameter.data.bfloat16()
    return model


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("ewa", "as PEFT makes it"),
        ("ewa", "all bf16"),
        ("ewa", "norms in fp32"),
        ("schedule_free", "all that trains in fp32"),
    ],
)
def test_a_bf16_base_comes_back_as_it_was(tmp_path, method, kind):
    def make():
        return bf16_based(tmp_path, kind)

    options = tiny.METHODS[method] | SAVING | {"bf16": kind != "all bf16"}
    options |= {"optim": "adamw_torch"} if method == "ewa" else {}
    trainer = tiny.trained(tmp_path / "run", make(), **options)
    again = tiny.trained(tmp_path / "again", make(), **options, resume=tmp_path / "run" / "checkpoint-5")
    assert tiny.same(tiny.state(trainer), tiny.state(again))
    if kind in ("as PEFT makes it", "all bf16"):  # parameters that train are bf16
        with pytest.raises(ValueError, match="Keep float32 parameters"):
            tiny.trainer(tmp_path / "x", make(), **tiny.METHODS["schedule_free"])
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
        averages = only(trainer.average.averaged_state_dict(), trained(trainer.model))
        assert tiny.same(only(tiny.parameters(as_told), averages), averages)


def test_the_best_model_is_the_best_evaluation_weights(tmp_path):
    # Far too high on purpose, so that the best comes before the end.
    options = tiny.METHODS["schedule_free"] | {"learning_rate": 3.0, "max_steps": 40, "max_grad_norm": 0.0}
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


class MyLlama(LlamaForCausalLM):
    """A class of the user's."""


def test_an_adapter_without_a_task_is_loaded_and_no_other_or_damaged_one_is_resumed(tmp_path):
    run, options = tmp_path / "run", tiny.METHODS["ewa"] | SAVING
    loss = tiny.trained(run, lora(tmp_path, task_type=None), **options).evaluate()["eval_loss"]
    for given, expected in (({}, LlamaForCausalLM), ({"model_class": MyLlama}, MyLlama)):
        shipped = load_evaluation_model(run / "checkpoint-20", **given)
        assert type(shipped.get_base_model()) is expected
        assert tiny.loss_of(shipped) == pytest.approx(loss, abs=CLOSE)

    def refused(model, message):
        before = tiny.parameters(model)
        with pytest.raises(CheckpointError, match=message):
            tiny.trained(tmp_path / "again", model, resume=run / "checkpoint-5", **options)
        assert tiny.same(before, tiny.parameters(model))

    refused(lora(tmp_path, target_modules=["q_proj", "k_proj"]), "missing .*k_proj.* unexpected .*v_proj")
    refused(lora(tmp_path, r=3), "of another shape .*q_proj")
    refused(tiny.llama(), "does not hold the weights of this model")  # nor is it the checkpoint of a full model
    (run / "checkpoint-5" / "adapter_model.safetensors").write_bytes(b"cut short")
    refused(lora(tmp_path), "is 9 bytes long, not")
    write_manifest(run / "checkpoint-5", read_manifest(run / "checkpoint-5"))  # as if it had been written so
    refused(lora(tmp_path), "cannot be read as an adapter")


def test_an_adapter_is_loaded_by_its_task_on_the_base_that_it_names(tmp_path):
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(**tiny.SIZES)).save_pretrained(tmp_path / "base")
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "run")
    shipped = load_evaluation_model(tmp_path / "run")
    assert isinstance(shipped, peft.PeftModelForSequenceClassification)
    assert tiny.same(tiny.parameters(model), tiny.parameters(shipped))
    peft.get_peft_model(tiny.llama(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "unnamed")
    with pytest.raises(ValueError, match=r"does not name the base model .* peft.PeftModel.from_pretrained\(base"):
        load_evaluation_model(tmp_path / "unnamed")


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
