"""TRL's `SFTTrainer` with the mixin does what `RAdamTrainer` does, and with none of our flags what it does alone.

The oracles: losses, accuracies and entropies of the weights that ship, without a trainer (`sft.measured`); stock
`SFTTrainer`; uninterrupted twins and runs that were planned longer, bit for bit.
"""

import dataclasses
import inspect
import re

import peft
import pytest
import sft
import tiny
import trl
from datasets import Dataset
from huggingface_hub import ModelCard
from test_model_card import model_of
from transformers import LlamaForCausalLM

from hf_radam import RAdamTrainerMixin, RAdamTrainingArguments, load_evaluation_model
from hf_radam.checkpoints.manifest import read_manifest

CLOSE = 2e-6  # as in test_evaluation_weights.py
SAVING = {"save_strategy": "steps", "save_steps": 5}
PACKED = {"packing": True, "packing_strategy": "wrapped", "max_length": 16, "eval_packing": False}


def lora(folder):
    """An adapter as `SFTTrainer` makes it, on a base model that lies in `folder`."""
    if not (folder / "base").is_dir():
        sft.llama().save_pretrained(folder / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    return {"model": LlamaForCausalLM.from_pretrained(folder / "base"), "peft_config": config}


KINDS = {"completions": lambda folder: {"completion": True}, "packed": lambda folder: PACKED, "adapter": lora}


def finished(trainer, resume=None):
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


# ---- What is evaluated is what ships ----


@pytest.mark.parametrize(
    ("method", "kind"), [("ewa", "completions"), ("schedule_free", "packed"), ("schedule_free_ewa", "adapter")]
)
def test_what_was_evaluated_ships_and_the_run_resumes_bitwise(tmp_path, method, kind):
    def make(name):
        return sft.trainer(tmp_path / name, **KINDS[kind](tmp_path), **tiny.METHODS[method], **SAVING)

    def plain(folder):
        if kind == "adapter":
            return peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), folder)
        return LlamaForCausalLM.from_pretrained(folder)

    run, completion = tmp_path / "run", kind == "completions"
    trainer = finished(make("run"))
    before = tiny.parameters(trainer.model)
    metrics = trainer.evaluate()
    model = load_evaluation_model(run)  # the newest checkpoint
    assert isinstance(model, peft.PeftModelForCausalLM) == (kind == "adapter")
    shipped = sft.measured(model, completion=completion)
    assert {name: metrics[f"eval_{name}"] for name in shipped} == pytest.approx(shipped, abs=CLOSE)
    assert tiny.same(before, tiny.parameters(trainer.model))
    trainer.save_model()
    assert sft.measured(plain(run), completion=completion) == pytest.approx(shipped, abs=CLOSE)
    trained = sft.measured(trainer.model, completion=completion)
    assert sft.measured(plain(run / "checkpoint-20"), completion=completion) == pytest.approx(trained, abs=CLOSE)
    assert abs(trained["loss"] - shipped["loss"]) > 10 * CLOSE
    folder = read_manifest(run / "checkpoint-20")["evaluation"]["folder"]
    assert folder == ("ewa/adapter" if kind == "adapter" else method)
    for one in (run, run / "checkpoint-20" / folder):
        assert (one / "tokenizer.json").is_file()
    assert tiny.same(tiny.state(trainer), tiny.state(finished(make("again"), resume=run / "checkpoint-5")))


def test_metrics_of_both_evaluations_are_apart_and_in_the_card(tmp_path):
    """TRL's trainer collects accuracies and entropies while it computes losses, and logs what it has collected."""
    logging = {"logging_strategy": "steps", "logging_steps": 5, "eval_strategy": "steps", "eval_steps": 7}
    trainer = finished(sft.trainer(tmp_path, **tiny.METHODS["ewa"], **logging, ewa_eval_raw=True))
    metrics = trainer.evaluate()
    with trainer.evaluation_weights():
        averaged = sft.measured(trainer.model)
    raw = sft.measured(trainer.model)
    trainer.create_model_card()
    rows = re.findall(r"^\| (\S+) \| (.*) \|$", (tmp_path / "README.md").read_text("utf-8"), re.MULTILINE)
    table = {name: [float(value) for value in values.split(" | ")] for name, values in rows if name in averaged}
    assert not any("raw" in name for name, _ in rows)
    for name in averaged:
        assert table[name] == pytest.approx([averaged[name], raw[name]], abs=1e-4)
        assert metrics[f"eval_{name}"] == pytest.approx(averaged[name], abs=CLOSE)
        assert metrics[f"eval_raw_{name}"] == pytest.approx(raw[name], abs=CLOSE)
        assert abs(raw[name] - averaged[name]) > 10 * CLOSE
    assert metrics["eval_num_tokens"] > 0 and "eval_raw_num_tokens" not in metrics
    assert trainer.state.log_history[-1].items() >= metrics.items()
    # Evaluating changed nothing that is logged of training
    logging["eval_strategy"] = "no"
    alone = finished(sft.trainer(tmp_path / "alone", **tiny.METHODS["ewa"], **logging))
    logged = [
        [{k: v for k, v in line.items() if k in ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm")}
         for line in one.state.log_history if "loss" in line]
        for one in (trainer, alone)
    ]  # fmt: skip
    assert logged[0] == logged[1] and len(logged[0]) == 4 and len(logged[0][0]) == 5


def test_an_extended_run_is_the_one_planned_longer(tmp_path):
    options = tiny.METHODS["wsd"]
    finished(sft.trainer(tmp_path / "short", **options | {"max_steps": 14}))
    extended = finished(sft.trainer(tmp_path / "extended", **options, extend_from=str(tmp_path / "short")))
    assert tiny.same(tiny.state(extended), tiny.state(finished(sft.trainer(tmp_path / "planned", **options))))


# ---- With none of our flags, and the arguments ----


def test_with_none_of_our_flags_the_run_and_its_card_are_of_the_stock_trainer(tmp_path):
    logged = {"logging_strategy": "steps", "logging_steps": 5, "eval_strategy": "steps", "eval_steps": 10}
    runs, cards = [], []
    for name, kinds in (("own", (sft.SFT, sft.SFTArguments)), ("stock", (trl.SFTTrainer, trl.SFTConfig))):
        runs.append(finished(sft.trainer(tmp_path / name / "run", kinds=kinds, **logged, **SAVING)))
        cards.append((tmp_path / name / "run" / "README.md").read_bytes())
    assert tiny.same(*(tiny.parameters(one.model) for one in runs))
    timeless = [
        [{k: v for k, v in line.items() if "second" not in k and "runtime" not in k} for line in one.state.log_history]
        for one in runs
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) > 4
    assert cards[0] == cards[1] and b"hf_radam" not in cards[0]


def test_arguments_that_are_not_of_both_are_refused(tmp_path):
    wrong = "SFT has arguments of class SFTConfig.* derived from it and SFTConfig"
    unknown = "Make them with a dataclass derived from RAdamTrainingArguments and that class"
    for args, message in ((sft.arguments(tmp_path, trl.SFTConfig), wrong), (tiny.arguments(tmp_path), unknown)):
        with pytest.raises(TypeError, match=message):
            sft.SFT(sft.llama(), args, train_dataset=sft.dataset(sft.TRAIN), processing_class=sft.tokenizer())


def test_our_names_are_not_those_of_trls_trainers():
    """TRL's trainers set attributes of themselves, which must not be names of the mixin."""
    ours = set()
    for base in RAdamTrainerMixin.__mro__:
        if base.__module__.startswith("hf_radam"):
            ours |= {*vars(base), *re.findall(r"self\.(\w+)\b[^=\n]* = ", inspect.getsource(base))}
    ours = {name for name in ours if not name.startswith("__")}
    assert {"average", "_evaluation", "_tokenizer_to_save"} <= ours
    for theirs in (trl.SFTTrainer, trl.DPOTrainer, trl.RewardTrainer, trl.KTOTrainer):
        set_there = set(re.findall(r"self\.(\w+)\b[^=\n]* = ", inspect.getsource(theirs)))
        assert "_metrics" in set_there
        assert not ours & set_there, theirs


def test_vllm_would_keep_generating_with_the_weights_that_were_evaluated(tmp_path):
    kind = dataclasses.make_dataclass("Generating", [("use_vllm", bool, True)], bases=(sft.SFTArguments,))  # as GRPO's
    for method in ("ewa", "schedule_free"):
        with pytest.raises(ValueError, match="vLLM would keep generating with those"):
            sft.trainer(tmp_path, kinds=(sft.SFT, kind), **tiny.METHODS[method])
    sft.trainer(tmp_path, kinds=(sft.SFT, kind), **tiny.METHODS["wsd"])


def test_raw_weights_are_not_evaluated_where_what_is_measured_of_them_cannot_be_kept_apart(tmp_path, monkeypatch):
    """As in `ORPOTrainer`, which keeps its measurements elsewhere."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # it would warn that it may change
    orpo = pytest.importorskip("trl.experimental.orpo")

    class ORPO(RAdamTrainerMixin, orpo.ORPOTrainer):
        pass

    kind = dataclasses.make_dataclass("Both", [], bases=(RAdamTrainingArguments, orpo.ORPOConfig))
    data = preferences(sft.TRAIN)

    def make(**options):
        args = sft.arguments(tmp_path, kind, **tiny.METHODS["ewa"], **options)
        return ORPO(sft.llama(), args, train_dataset=data, eval_dataset=data, processing_class=sft.tokenizer())

    with pytest.raises(ValueError, match="ewa_eval_raw with ORPO: TRL would log the mean of both evaluations"):
        make(ewa_eval_raw=True)
    make()


# ---- Preferences ----


@dataclasses.dataclass
class DPOArguments(RAdamTrainingArguments, trl.DPOConfig):
    """What a user writes."""


class DPO(RAdamTrainerMixin, trl.DPOTrainer):
    """What a user writes."""


def preferences(rows):
    prompts, chosen = zip(*rows, strict=True)
    rejected = [" " + " ".join(reversed(rest.split())) for rest in chosen]
    return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})


def dpo(folder, model=None, kinds=(DPO, DPOArguments), **options):
    args = sft.arguments(folder, kinds[1], **options)
    data, reference = (preferences(sft.TRAIN), preferences(sft.EVAL)), sft.llama().eval()
    # The reference comes before the arguments; TRL leaves its dropout as it is.
    return kinds[0](model or sft.llama(), reference, args, None, *data, processing_class=sft.tokenizer())


def test_preferences(tmp_path):
    """Against `DPOTrainer` alone, which evaluates what ships and what trained."""
    options = tiny.METHODS["ewa"] | SAVING | {"ewa_eval_raw": True}
    trainer = finished(dpo(tmp_path / "run", **options))
    metrics = trainer.evaluate()
    for prefix, model in (("eval", load_evaluation_model(tmp_path / "run")), ("eval_raw", trainer.model)):
        alone = dpo(tmp_path / "alone", model, kinds=(trl.DPOTrainer, trl.DPOConfig)).evaluate()
        for name in ("loss", "rewards/margins"):
            assert metrics[f"{prefix}_{name}"] == pytest.approx(alone[f"eval_{name}"], abs=CLOSE)
    assert abs(metrics["eval_raw_loss"] - metrics["eval_loss"]) > 10 * CLOSE
    again = finished(dpo(tmp_path / "again", **options), resume=tmp_path / "run" / "checkpoint-5")
    assert tiny.same(tiny.state(trainer), tiny.state(again))


# ---- The model card ----


def section(card):
    return card[card.index("## Training method") : card.index("## Training procedure")]


def test_the_card_is_of_the_last_checkpoint_and_the_model_beside_it(tmp_path, monkeypatch):
    """TRL writes the card before each checkpoint, of which one alone is kept here."""
    run, sent = tmp_path / "run", []
    tiny.spy_on_hub(monkeypatch, lambda folder, path: sent.append((folder / "README.md").read_text("utf-8")))
    saving = SAVING | {"save_total_limit": 1, "push_to_hub": True, "hub_strategy": "every_save"}
    trainer = finished(sft.trainer(run, **tiny.METHODS["ewa"], **saving))
    card = ModelCard.load(run / "README.md")
    assert {"trl", "sft", "hf_radam", "radam", "ewa"} <= set(card.data.tags)
    assert "This model was trained from scratch" in card.text and card.text.count("## Training method") == 1
    assert "for 20 steps.\n" in card.text
    assert sent and all('AutoModelForCausalLM.from_pretrained("me/run")' in section(one) for one in sent)
    found = model_of(section(card.text).replace("me/run", "."), run, monkeypatch)
    assert tiny.same(found, trainer.average.averaged_state_dict())
