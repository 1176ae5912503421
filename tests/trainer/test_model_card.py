"""The model card: its metadata, its numbers, and its code, which is run where the card lies.

Oracles: huggingface_hub's reader of cards, a forward pass without a trainer (`tiny.loss_of`), the weights in the
trainer, upstream's card.
"""

import re
import shutil

import peft
import pytest
import tiny
import torch
from hf_radam.model_card import completed
from hf_radam.training.card_facts import facts_of, last_evaluation, loaders
from huggingface_hub import ModelCard
from test_peft import lora
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM, Trainer

from hf_radam import RAdamTrainer

SAVED = {"save_strategy": "steps", "save_steps": 10}
CLOSE = 2e-6  # as in test_evaluation_weights.py
TAGS = {
    "wsd": ["hf_radam", "radam", "wsd"],
    "wsd_s": ["hf_radam", "radam", "wsd-s"],
    "ewa": ["hf_radam", "radam", "ewa"],
    "schedule_free": ["hf_radam", "schedule-free"],
    "schedule_free_ewa": ["hf_radam", "schedule-free", "ewa"],
}
WORDS = {
    "wsd": "- Schedule: wsd, 20 steps: peak, 1-sqrt decay over steps 12-20 to 0 of the peak\n- Averaging: none\n",
    "wsd_s": "- Schedule: wsd_s, 20 steps: peak, 1-sqrt decay over steps 6-10, 12-20 to 0 of the peak\n",
    "ewa": "every update, with a half-life of 0.0625 of the updates since it began; 1.25 updates after update 20\n",
    "schedule_free": "- Schedule: constant, 20 steps\n- Averaging: none\n",
    "schedule_free_ewa": "every 3 updates, with a decay of 0.9 per update, which is a half-life of 6.579 updates; ",
}


class Own(LlamaForCausalLM):
    """A class that transformers does not have."""


def finished(folder, model=None, **options):
    trainer = tiny.trainer(folder, model, **options)
    trainer.train()
    trainer.save_model()
    return trainer


def card_of(trainer, folder, **options) -> str:
    trainer.create_model_card(**options)
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["library_name"] in ("transformers", "peft")
    return card.text


def ran(card, folder, monkeypatch) -> list[dict]:
    """What each block of Python in a card defines, run in the folder."""
    monkeypatch.chdir(folder)
    found = []
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        names = {}
        exec(block, names)
        found.append({name: tiny.parameters(v) for name, v in names.items() if isinstance(v, torch.nn.Module)})
    return found


def table(card) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.*\|$", card, re.MULTILINE)]


@pytest.mark.parametrize("method", tiny.METHODS)
def test_the_card_tells_the_method_and_its_code_loads_each_kind_of_weights(tmp_path, monkeypatch, method):
    trainer = finished(tmp_path, **tiny.METHODS[method], **SAVED)
    card = card_of(trainer, tmp_path, tasks="text-generation")
    assert ModelCard.load(tmp_path / "README.md").data.tags == ["generated_from_trainer", *TAGS[method]]
    assert WORDS[method] in card
    root, checkpoint, evaluation = ran(card, tmp_path, monkeypatch)
    with trainer.evaluation_weights():
        shipped = tiny.parameters(trainer.model)
    kinds = {"training": tiny.parameters(trainer.model)}
    if trainer.average is not None:
        kinds["averaged"] = trainer.average.averaged_state_dict()
    if "schedule_free" in method:
        with trainer._schedule_free.evaluating():
            kinds["x"] = tiny.parameters(trainer.model)
    assert checkpoint.keys() == kinds.keys()
    assert all(tiny.same(checkpoint[kind], kinds[kind]) for kind in kinds)
    assert tiny.same(root["model"], shipped) and tiny.same(evaluation["model"], shipped)
    if "wsd" not in method:
        assert not tiny.same(shipped, kinds["training"])


def test_the_table_has_the_losses_of_both_weights(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 10, "metric_for_best_model": "loss"}
    trainer = finished(tmp_path, **tiny.METHODS["ewa"], **SAVED, **options, ewa_eval_raw=True)
    with trainer.evaluation_weights():
        averaged = tiny.loss_of(trainer.model)
    raw = tiny.loss_of(trainer.model)
    card = card_of(trainer, tmp_path).split("## Evaluation\n")[1].split("## Weights")[0]
    assert table(card)[0] == ["metric", "evaluation weights", "training weights"]
    ((name, *losses),) = table(card)[2:]
    assert name == "loss" and [float(loss) for loss in losses] == pytest.approx([averaged, raw], abs=1e-4)
    assert "After update 20:" in card and f"Best `eval_loss`: {averaged:.4f}, after update 20." in card


def test_of_the_best_model_the_card_tells_the_losses_when_it_was_best(tmp_path, monkeypatch):
    """The first evaluation is made the best; those after it are of other weights."""
    options = {"eval_strategy": "steps", "eval_steps": 10, "greater_is_better": True, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "loss", "logging_strategy": "steps", "logging_steps": 5}
    trainer = finished(tmp_path, **tiny.METHODS["ewa"], **SAVED, **options, ewa_eval_raw=True)
    history = [entry for entry in trainer.state.log_history if entry["step"] == 10 and "eval_loss" in entry]
    known = list(trainer.state.log_history)
    upstreams = card_of(trainer, tmp_path, tasks="text-generation", dataset_tags="me/data", dataset="data")
    for name in ("loss", "raw_loss"):
        assert f"- {name.title().replace('_', ' ')}: {history[0][f'eval_{name}']:.4f}\n" in upstreams
    assert trainer.state.log_history == known
    trainer.evaluate()
    card = card_of(trainer, tmp_path)
    ours = card.split("## Evaluation\n")[1].split("## Weights")[0]
    losses = [f"{history[0][key]:.4f}" for key in ("eval_loss", "eval_raw_loss")]
    assert "After update 10:" in ours and table(ours)[2:] == [["loss", *losses]]
    assert "the average of the weights (EWA) after update 10, the best by `eval_loss`" in card
    assert "; 0.625 updates after update 10\n" in card
    root, checkpoint, evaluation = ran(card, tmp_path, monkeypatch)
    for found in (root["model"], checkpoint["averaged"], evaluation["model"]):
        assert tiny.same(found, tiny.parameters(trainer.model))
    assert "The best checkpoint of the run has" in card and "checkpoint-20" not in card


def test_the_last_of_several_evaluations_is_told_with_the_twin_of_each_metric():
    history = [
        {"step": 5, "eval_a_loss": 9.0, "eval_a_raw_loss": 8.0},
        {"step": 9, "eval_a_loss": 1.0, "eval_a_raw_loss": 2.0, "eval_a_raw_x": 3, "eval_a_raw_raw_x": 4, "epoch": 1},
        {"step": 9, "eval_raw_loss": 5.0, "eval_raw_raw_loss": 6.0, "eval_raw_runtime": 1.0},  # of a data set "raw"
        {"step": 9, "loss": 7.0},
    ]
    both = ["eval_a", "eval_raw"]
    last = last_evaluation(history, update=None, raw_prefixes=both)
    assert last.metrics == {"eval_a_loss": 1.0, "eval_a_raw_x": 3, "eval_raw_loss": 5.0}
    assert last.raw == {"eval_a_loss": 2.0, "eval_a_raw_x": 4, "eval_raw_loss": 6.0} and last.update == 9
    alone = last_evaluation(history[1:2], update=None, raw_prefixes=[])
    assert alone.raw == {} and len(alone.metrics) == 4
    first = last_evaluation([{"step": 9, "eval_a_loss": 0.5}, *history], update=9, raw_prefixes=both)
    assert first.metrics["eval_a_loss"] == 0.5
    assert last_evaluation(history[-1:], update=None, raw_prefixes=both) is None
    assert last_evaluation(history, update=7, raw_prefixes=both) is None


def test_before_the_first_averaging_and_before_anything_is_saved(tmp_path):
    trainer = tiny.trainer(tmp_path, **tiny.METHODS["ewa"], ewa_start_step=15)
    trainer.add_callback(tiny.StopAfter(10))
    trainer.train()
    card = card_of(trainer, tmp_path)
    assert "moved every update after the first 15, with a half-life of 0.0625 of the updates since it began\n" in card
    assert (
        "No model was beside this card yet. The evaluation weights are the weights as the optimizer left them." in card
    )
    assert "```" not in card and "10 updates.\n" in card


def test_what_was_pushed_names_the_repository(tmp_path, monkeypatch):
    sent = []
    tiny.spy_on_hub(monkeypatch, lambda folder, path: sent.append((folder / "README.md").read_text("utf-8")))
    run = tmp_path / "there" / "run"
    trainer = tiny.trainer(run, **tiny.METHODS["ewa"], **SAVED, push_to_hub=True, hub_strategy="end")
    trainer.train()
    trainer.push_to_hub(tags=["mine", "wsd"])
    card = sent[-1]
    assert "This repository holds the **evaluation weights**: the average of the weights (EWA)." in card
    assert ModelCard(card).data.tags == ["mine", "generated_from_trainer", *TAGS["ewa"]]  # the method is not wsd
    trainer.push_to_hub()
    assert sent[-1].count("## Weights") == 1
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "run").symlink_to(run)  # where the name is a folder, from_pretrained takes that
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], names)
    assert tiny.same(tiny.parameters(names["model"]), trainer.average.averaged_state_dict())


def test_the_card_of_an_adapter_loads_it_on_its_base(tmp_path, monkeypatch):
    run = tmp_path / "run"
    trainer = finished(run, lora(tmp_path), **tiny.METHODS["schedule_free_ewa"], **SAVED)
    card = card_of(trainer, run, tasks="text-generation")
    data = ModelCard.load(run / "README.md").data
    assert data.library_name == "peft" and {"lora", *TAGS["schedule_free_ewa"]} <= set(data.tags)
    assert f"- PEFT {peft.__version__}" in card
    root, checkpoint, evaluation = ran(card, run, monkeypatch)
    averaged = {n: v for n, v in trainer.average.averaged_state_dict().items() if "lora" in n}
    assert {"training", "averaged", "x"} == checkpoint.keys()
    for found in (root["model"], checkpoint["averaged"], evaluation["model"]):
        assert len(averaged) == 8 and tiny.same({name: found[name] for name in averaged}, averaged)
    assert tiny.same(checkpoint["training"], tiny.parameters(trainer.model))


def test_an_adapter_whose_base_has_no_name_says_so(tmp_path):
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    card = card_of(finished(tmp_path, model, **tiny.METHODS["ewa"], **SAVED), tmp_path)
    assert "(EWA). The adapter does not name its base model, which has to be loaded first.\n" in card
    assert "```" not in card


def test_a_class_that_transformers_does_not_have_is_imported_from_where_it_is(tmp_path, monkeypatch):
    torch.manual_seed(0)
    trainer = finished(tmp_path, Own(tiny.llama().config), **tiny.METHODS["schedule_free"], **SAVED)
    card = card_of(trainer, tmp_path)
    root, checkpoint, evaluation = ran(card, tmp_path, monkeypatch)
    assert "from test_model_card import Own\n" in card
    assert tiny.same(root["model"], checkpoint["x"]) and tiny.same(root["model"], evaluation["model"])


def test_a_model_from_scratch_is_not_said_to_be_fine_tuned(tmp_path):
    trainer = tiny.trainer(tmp_path, **tiny.METHODS["wsd"])
    assert "This model was trained from scratch on an unknown dataset." in card_of(trainer, tmp_path)
    assert "fine-tuned version of [me/base]" in card_of(trainer, tmp_path, finetuned_from="me/base")


def test_without_our_methods_the_card_is_upstreams_byte_for_byte(tmp_path):
    cards = []
    for cls in (Trainer, RAdamTrainer):
        make = tiny.stock_arguments if cls is Trainer else tiny.arguments
        args = make(tmp_path / "run", eval_strategy="steps", eval_steps=10, **SAVED)
        trainer = cls(tiny.llama(), args, train_dataset=tiny.TRAIN, eval_dataset=tiny.EVAL)
        trainer.train()
        trainer.create_model_card(tags=["mine"], tasks="text-generation", dataset_tags="me/data", dataset="data")
        cards.append((tmp_path / "run" / "README.md").read_bytes())
        shutil.rmtree(tmp_path / "run")
    assert cards[0] == cards[1] and b"hf_radam" not in cards[0]


def test_names_that_a_card_could_break_at(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 10}
    trainer = tiny.trainer(tmp_path / "run", **tiny.METHODS["ewa"], **options)
    trainer.compute_metrics = lambda prediction: {"a|b": 0.25}
    trainer.train()
    trainer.create_model_card(model_name="mine---", tags=["tag---"])
    file = tmp_path / "run" / "README.md"
    before = file.read_text()
    assert ModelCard.load(file).data.tags == ["tag---", "generated_from_trainer", *TAGS["ewa"]]
    assert ModelCard.load(file).data.to_dict()["model-index"][0]["name"] == "mine---"
    assert "| a\\|b | 0.2500 |\n" in before
    trainer.save_model()  # writes our part again
    assert file.read_text().count("## Training method") == 1 and "# mine---\n" in file.read_text()


class FSDPMine(LlamaForCausalLM):
    """A name that begins as those of FSDP2 do."""


def test_a_card_that_was_edited_until_it_is_none_ends_no_training(tmp_path, caplog):
    trainer = finished(tmp_path, **tiny.METHODS["ewa"])
    trainer.create_model_card()
    file = tmp_path / "README.md"
    edited = file.read_text().replace("---\n", "")
    file.write_text(edited)
    caplog.clear()
    with caplog.at_level("WARNING", logger="hf_radam"):
        trainer.save_model()
    assert "could not be brought up to date: The card does not begin with metadata in YAML" in caplog.text
    assert file.read_text() == edited
    for metadata in ("key: [", "key: " + 5000 * "[", "5"):
        with pytest.raises(ValueError, match="does not begin with metadata"):
            completed(f"---\n{metadata}\n---\ntext", facts_of(trainer))
    for tags in ("5", "true", "word"):
        with pytest.raises(ValueError, match="has the tags .*, which are no list"):
            completed(f"---\ntags: {tags}\n---\ntext", facts_of(trainer))


def test_the_class_that_loads_a_model():
    config = tiny.llama().config
    assert loaders(FSDPMine(config))[0].preamble == "from test_model_card import FSDPMine"
    wrapped = type("FSDPLlamaForCausalLM", (LlamaForCausalLM,), {"__module__": "torch"})
    assert loaders(wrapped(config))[0].call == "AutoModelForCausalLM.from_pretrained({})"
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = BertLMHeadModel(BertConfig(**sizes, intermediate_size=16, is_decoder=True))
    other.config.model_type = "mine"  # for which the auto class has no model, or another
    assert loaders(other)[0].call == "BertLMHeadModel.from_pretrained({})"
    script = type("Script", (LlamaForCausalLM,), {"__module__": "__main__"})
    plain, evaluation = loaders(script(config))
    comment = "# Script is a class of the training script: define it here first."
    assert plain.preamble == comment and evaluation.preamble.endswith(comment)
    assert plain.call == "Script.from_pretrained({})"
