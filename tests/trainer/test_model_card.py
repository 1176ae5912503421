"""The model card: its metadata, its numbers, and its code, which is run in the folder of the card.

Oracles: huggingface_hub's reader of cards, a forward pass without a trainer (`tiny.loss_of`), the weights in the
trainer. (That it is upstream's card without our methods: `test_inert_and_resume.py`.)
"""

import re

import pytest
import tiny
from huggingface_hub import ModelCard
from test_peft import lora
from transformers import LlamaForCausalLM

SAVED = {"save_strategy": "steps", "save_steps": 10}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 10, "metric_for_best_model": "loss", "ewa_eval_raw": True}
TAGS = {
    "wsd": ["hf_radam", "radam", "wsd"],
    "wsd_s": ["hf_radam", "radam", "wsd-s"],
    "ewa": ["hf_radam", "radam", "ewa"],
    "schedule_free": ["hf_radam", "schedule-free"],
    "schedule_free_ewa": ["hf_radam", "schedule-free", "ewa"],
}
OURS = {tag for tags in TAGS.values() for tag in tags}
SENTENCES = {
    "wsd": "- Schedule: wsd, 20 steps: peak, 1-sqrt decay over steps 12-20 to 0 of the peak\n- Averaging: none\n",
    "wsd_s": "- Schedule: wsd_s, 20 steps: peak, 1-sqrt decay over steps 6-10, 12-20 to 0 of the peak\n",
    "ewa": "every 1 step(s) after step 0, half-life 0.0625 of the steps so far, 1.25 steps at the last\n",
    "schedule_free": "- Schedule: constant, 20 steps\n- Averaging: none\n",
    "schedule_free_ewa": "every 3 step(s) after step 0, decay 0.9 per step, ",
}


class Own(LlamaForCausalLM):
    """A class that transformers does not have."""


def card_of(trainer, **options) -> str:
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(**options)
    return ModelCard.load(f"{trainer.args.output_dir}/README.md").text


def model_of(card, folder, monkeypatch) -> dict:
    """The weights of the model that the Python in a card loads."""
    monkeypatch.chdir(folder)
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    exec(block, names)
    return tiny.parameters(names["model"])


MODELS = [*((method, None) for method in tiny.METHODS), ("schedule_free_ewa", lora), ("schedule_free_ewa", Own)]


@pytest.mark.parametrize(("method", "build"), MODELS)
def test_the_method_is_described_and_the_code_loads_the_evaluation_weights(tmp_path, monkeypatch, method, build):
    """Of a model, of an adapter on its base, and of a class of the user from its module."""
    model = lora(tmp_path) if build is lora else build and build(tiny.llama().config)
    trainer = tiny.trainer(tmp_path / "run", model, **tiny.METHODS[method], **SAVED)
    card = card_of(trainer, tasks="text-generation")
    data = ModelCard.load(tmp_path / "run" / "README.md").data
    assert [tag for tag in data.tags if tag in OURS] == TAGS[method]
    assert ("generated_from_trainer" in data.tags) == (build is not lora)  # as upstream's cards
    assert SENTENCES[method] in card and "This model was trained from scratch" in card
    assert (data.library_name == "peft" and "lora" in data.tags) == (build is lora)
    assert ("card import Own\n" in card) == (build is Own)
    with trainer.evaluation_weights():
        evaluated = tiny.parameters(trainer.model)
    assert tiny.same(model_of(card, tmp_path / "run", monkeypatch), evaluated)
    assert tiny.same(evaluated, tiny.parameters(trainer.model)) == (method in ("wsd", "wsd_s"))


def test_the_table_has_the_metrics_of_both_weights(tmp_path):
    trainer = tiny.trainer(tmp_path, **tiny.METHODS["ewa"], **SAVED, **EVALUATED)
    trainer.compute_metrics = lambda prediction: {"a|b": 0.25}
    card = card_of(trainer, finetuned_from="me/base")
    with trainer.evaluation_weights():
        averaged = tiny.loss_of(trainer.model)
    raw = tiny.loss_of(trainer.model)
    assert "| metric | evaluation weights | training weights |\n| --- | --- | --- |\n| loss | " in card
    losses = re.search(r"\| loss \| (.*) \| (.*) \|", card).groups()
    assert [float(loss) for loss in losses] == pytest.approx([averaged, raw], abs=1e-4)
    assert "After step 20:" in card and f"Best `eval_loss`: {averaged:.4f}, after step 20." in card
    assert "| a\\|b | 0.2500 | 0.2500 |\n" in card and "fine-tuned version of [me/base]" in card


def test_of_the_best_model_it_has_the_metrics_of_its_step(tmp_path, monkeypatch):
    """The first evaluation is made the best, of two data sets; those after it are of other weights."""
    best = {"greater_is_better": True, "load_best_model_at_end": True, "metric_for_best_model": "a_loss"}
    trainer = tiny.trainer(tmp_path, **tiny.METHODS["ewa"] | SAVED | EVALUATED | best)
    trainer.eval_dataset = {"a": tiny.EVAL, "b": tiny.EVAL[:4]}
    card = card_of(trainer)
    logged = {}
    for entry in trainer.state.log_history:
        logged |= entry if entry["step"] == 10 else {}
    for name in ("a", "b"):
        averaged, raw = logged[f"eval_{name}_loss"], logged[f"eval_{name}_raw_loss"]
        assert f"| {name}_loss | {averaged:.4f} | {raw:.4f} |\n" in card
    assert "After step 10:" in card and "(EWA) after step 10, the best by `a_loss`." in card
    assert tiny.same(model_of(card, tmp_path, monkeypatch), tiny.parameters(trainer.model))


def test_what_is_pushed_names_the_repository_and_has_one_section(tmp_path, monkeypatch):
    sent = []
    tiny.spy_on_hub(monkeypatch, lambda folder, path: sent.append((folder / "README.md").read_text("utf-8")))
    trainer = tiny.trained(tmp_path, **tiny.METHODS["ewa"], push_to_hub=True, hub_strategy="end")
    trainer.push_to_hub(tags=["mine", "wsd"])
    trainer.push_to_hub()
    assert 'AutoModelForCausalLM.from_pretrained("me/run")' in sent[0] and "model of this repository has" in sent[0]
    assert ModelCard(sent[0]).data.tags == ["mine", "generated_from_trainer", *TAGS["ewa"]]  # the method is not wsd
    assert sent[-1].count("## Training method") == sent[-1].count("## Weights") == 1


def test_a_card_that_was_damaged_is_only_logged(tmp_path, caplog):
    trainer = tiny.trained(tmp_path, **tiny.METHODS["ewa"], max_steps=1)
    for metadata in ("key: [", "5", "1: 2", "tags: 5"):
        corrupted = f"---\n{metadata}\n---\n<!-- hf_radam -->\n<!-- hf_radam: end -->\n"
        (tmp_path / "README.md").write_text(corrupted)
        caplog.clear()
        trainer.save_model()
        assert f"The model card {tmp_path / 'README.md'} could not be renewed: " in caplog.text
        assert (tmp_path / "README.md").read_text() == corrupted
