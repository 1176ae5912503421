"""Train a causal language model with one of hf_radam's four methods, from one command.

    accelerate launch examples/run_clm.py configs/quickstart.yaml --learning_rate 2e-3
    accelerate launch examples/run_clm.py --optim radam --lr_scheduler_type wsd --max_steps 300 --block_size 128 \
        --output_dir runs/flags

The flags are those of `RAdamTrainingArguments` and of `clm_arguments.py`. With no data named, the text is the source of
the Python standard library; with no model named, a small llama is built. Evaluation uses the evaluation weights.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import transformers
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase, default_data_collator, set_seed

from clm_arguments import DataArguments, ModelArguments, parse_arguments
from clm_data import TextSize, load_texts, load_tokenizer, training_blocks, validation_blocks
from clm_model import build_model, load_named_config, resolve_block_size
from clm_parser import InputError, fail
from clm_processes import check_processes, check_stream, leave_the_others, set_up_logging
from hf_radam import RAdamTrainer, RAdamTrainingArguments
from hf_radam.checkpoints.manifest import CheckpointError
from hf_radam.checkpoints.runs import list_checkpoints, run_of
from hf_radam.training.agreement import DisagreementError
from hf_radam.training_args import HorizonError

logger = logging.getLogger(__name__)

RECIPE = "run_clm.yaml"
SECRETS = ("token",)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything that a trainer needs, ready before it is built."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: datasets.Dataset | datasets.IterableDataset | None
    validation: datasets.Dataset
    size: TextSize
    block_size: int


def prepare(model_args: ModelArguments, data_args: DataArguments, training_args: RAdamTrainingArguments) -> Prepared:
    """Load or make data, tokenizer and model, in the order in which each needs the one before.

    Raises:
        InputError: anything in the arguments that turns out to be wrong only here.
    """
    named = load_named_config(model_args)
    # The first process of each machine fills the caches, the others read them.
    overwrite = data_args.overwrite_cache and training_args.local_process_index == 0
    with training_args.main_process_first(desc="preparing the data"):
        texts = load_texts(model_args, data_args, overwrite)
        tokenizer = load_tokenizer(model_args, data_args, texts["train"], overwrite)
        block_size = resolve_block_size(data_args.block_size, model_args, named, tokenizer)
        train = None
        if training_args.do_train:
            train = training_blocks(texts["train"], tokenizer, block_size, data_args, overwrite)
        validation, size = validation_blocks(texts["validation"], tokenizer, block_size, data_args, overwrite)
    logger.info(
        "%s training and %d validation blocks of %d tokens; validation text: %d tokens, %d bytes",
        len(train) if isinstance(train, datasets.Dataset) else "streamed" if train is not None else "no",
        len(validation),
        block_size,
        size.tokens,
        size.bytes,
    )
    model = build_model(model_args, named, tokenizer, block_size)
    return Prepared(model, tokenizer, train, validation, size, block_size)


def build_trainer(ready: Prepared, training_args: RAdamTrainingArguments) -> RAdamTrainer:
    """Build the trainer.

    Raises:
        InputError: the arguments do not fit model or data, in the words of `hf_radam`.
    """
    try:
        return RAdamTrainer(
            model=ready.model,
            args=training_args,
            train_dataset=ready.train,
            eval_dataset=ready.validation,
            processing_class=ready.tokenizer,
            data_collator=default_data_collator,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def checkpoint_to_resume(training_args: RAdamTrainingArguments) -> str | bool | None:
    """Translate `--resume_from_checkpoint` (true, false or a folder) and check it before any work.

    Raises:
        InputError: nothing to resume from, or a folder that holds another run which would be mixed with this one.
    """
    wanted = training_args.resume_from_checkpoint
    output_dir = training_args.output_dir
    if training_args.extend_from is not None:
        return None  # the trainer goes on from that run, or from its own checkpoints of the longer schedule
    last = next((str(place.path) for place in list_checkpoints(output_dir)), None)
    if wanted is None or wanted.lower() == "false":
        if training_args.do_train and last is not None:
            raise InputError(
                f"output_dir={output_dir} already holds {os.path.basename(last)}: pass --resume_from_checkpoint true "
                "to go on from it, another --output_dir, or remove the folder"
            )
        return None
    if wanted.lower() == "true":
        if last is None:
            raise InputError(f"resume_from_checkpoint=true, but {output_dir} holds no checkpoint: leave it out")
        return True
    if not os.path.isdir(wanted):
        raise InputError(f"resume_from_checkpoint={wanted} is no folder: give a checkpoint's folder, or true")
    if last is not None and not os.path.samefile(run_of(Path(wanted).absolute()), output_dir):
        raise InputError(
            f"output_dir={output_dir} already holds {os.path.basename(last)} of another run than {wanted}: pass "
            "another --output_dir, or remove the folder"
        )
    return wanted


def write_recipe(model_args: ModelArguments, data_args: DataArguments, output_dir: str, ready: Prepared) -> None:
    """Write what `evaluate_clm.py` needs to make the same validation blocks again; secrets are left out."""
    model = {name: value for name, value in dataclasses.asdict(model_args).items() if name not in SECRETS}
    data = dataclasses.asdict(data_args) | {"block_size": ready.block_size}
    for name in ("train_file", "validation_file"):
        data[name] = os.path.abspath(data[name]) if data[name] else None
    recipe = {"model": model, "data": data, "validation": dataclasses.asdict(ready.size)}
    os.makedirs(output_dir, exist_ok=True)
    path = os.path.join(output_dir, RECIPE)
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            before = yaml.safe_load(file)
        if (before["data"], before["validation"]) != (recipe["data"], recipe["validation"]):
            logger.warning("the run goes on with other data than before: do not compare its losses with the old ones")
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump(recipe, file, sort_keys=False)


class OnceAccepted(transformers.TrainerCallback):
    """Does what must wait until the trainer has accepted arguments and checkpoint, just before the first update."""

    def __init__(self, action: Callable[[], None]):
        """Take the action, for the main process; `first_update` becomes the updates done before."""
        self.action = action
        self.first_update = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Note where training begins and act."""
        self.first_update = state.global_step
        if state.is_world_process_zero:
            self.action()


def train(
    trainer: RAdamTrainer, resume_from_checkpoint: str | bool | None, blocks: Any, accepted: OnceAccepted
) -> None:
    """Train, save the model (its evaluation weights) and the metrics."""
    trainer.add_callback(accepted)
    try:
        result = trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    except (CheckpointError, HorizonError, DisagreementError) as error:  # refused before the first update
        fail(error)
    trainer.save_model()  # with the tokenizer
    if trainer.state.global_step == accepted.first_update:
        return  # a finished run was resumed: nothing was trained, and its metrics stay
    metrics = dict(result.metrics)
    if isinstance(blocks, datasets.Dataset):
        metrics["train_samples"] = len(blocks)
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def evaluate(trainer: RAdamTrainer, ready: Prepared) -> None:
    """Evaluate the evaluation weights; add perplexity and bits per byte, which other tokenizers can be compared by."""
    metrics = trainer.evaluate()
    loss = metrics["eval_loss"]
    metrics["eval_samples"] = len(ready.validation)
    metrics["perplexity"] = perplexity(loss)
    metrics["bits_per_byte"] = bits_per_byte(loss, ready.size)
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def perplexity(loss: float) -> float:
    """Give exp(loss); infinity where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(loss: float, size: TextSize) -> float:
    """Turn nats per token into bits per byte of the text: loss / ln 2 x tokens / bytes."""
    return loss / math.log(2) * size.tokens / size.bytes


def publish(trainer: RAdamTrainer, model_args: ModelArguments, data_args: DataArguments) -> None:
    """Write the model card, and push the model where the arguments ask for it."""
    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "text-generation"}
    if data_args.dataset_name:
        name = " ".join(filter(None, (data_args.dataset_name, data_args.dataset_config_name)))
        card |= {"dataset_tags": data_args.dataset_name, "dataset_args": data_args.dataset_config_name, "dataset": name}
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def run() -> None:
    """Parse, prepare, train, evaluate, publish; a wrong request ends in one sentence and exit code 2."""
    model_args, data_args, training_args = parse_arguments()
    set_up_logging(training_args)
    if training_args.device.type == "cpu":
        training_args.dataloader_pin_memory = False  # does nothing without an accelerator, and torch warns
    set_seed(training_args.seed)
    try:
        check_processes(training_args)
        check_stream(data_args, training_args)
        resume_from_checkpoint = checkpoint_to_resume(training_args)
        ready = prepare(model_args, data_args, training_args)
        set_seed(training_args.seed)  # whatever the preparation drew, a run depends on its seed only
        trainer = build_trainer(ready, training_args)
    except InputError as error:
        fail(error)
    if training_args.do_train:
        accepted = OnceAccepted(lambda: write_recipe(model_args, data_args, training_args.output_dir, ready))
        train(trainer, resume_from_checkpoint, ready.train, accepted)
    if training_args.do_eval:
        evaluate(trainer, ready)
    publish(trainer, model_args, data_args)


def main() -> None:
    """Run, and leave with the right exit code."""
    run()
    leave_the_others()


if __name__ == "__main__":
    main()
