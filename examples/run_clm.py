"""Train a causal language model with one of hf_radam's four methods, from one command.

    accelerate launch examples/run_clm.py configs/quickstart.yaml --learning_rate 2e-3
    accelerate launch examples/run_clm.py --optim radam --lr_scheduler_type wsd --max_steps 300 --block_size 128 \
        --output_dir runs/flags

The flags are those of `RAdamTrainingArguments` and of `clm_arguments.py`. With no data named, the text is the source of
the Python standard library; with no model named, a small llama is built. Evaluation uses the evaluation weights.
"""

import dataclasses
import gc
import logging
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import transformers
import yaml
from accelerate import PartialState
from transformers import default_data_collator, set_seed

from clm_arguments import DataArguments, ModelArguments, fail, parse_arguments
from clm_data import TextSize, load_texts, load_tokenizer, make_blocks, validation_blocks
from clm_model import InputError, build_model, load_named_config, resolve_block_size
from hf_radam import RAdamTrainer, RAdamTrainingArguments
from hf_radam.checkpoints.runs import list_checkpoints, run_of
from hf_radam.checkpoints.storage import RunInUseError

logger = logging.getLogger(__name__)

RECIPE = "run_clm.yaml"
SECRETS = ("token",)


def set_up_logging(training_args: RAdamTrainingArguments) -> None:
    """Log what this script does, on the main process as loudly as the training arguments say."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    for name in ("run_clm", "__main__", "clm_data", "clm_model"):
        logging.getLogger(name).setLevel(logging.INFO if training_args.should_log else logging.WARNING)
    datasets.utils.logging.set_verbosity(training_args.get_process_log_level())
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    if training_args.disable_tqdm or not training_args.should_log:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    method = [getattr(value, "value", value) for value in (training_args.optim, training_args.lr_scheduler_type)]
    logger.info("%s, %d process(es), %s, %s", training_args.device, training_args.world_size, *method)


def check_processes(data_args: DataArguments, training_args: RAdamTrainingArguments) -> None:
    """Refuse processes that would each train alone, and a stream that they would not share evenly.

    As it is, accelerate reads a stream on the first process and gives each process its part of every batch, so that a
    resumed run finds its place. With `dispatch_batches` false each process would read files of its own.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and training_args.world_size == 1:
        raise InputError(
            f"{launched} processes were launched, but each would train alone. On CPUs give --use_cpu true."
        )
    if data_args.streaming and training_args.world_size > 1:
        if training_args.accelerator_config.dispatch_batches is False:
            raise InputError("dispatch_batches=false does not split a stream evenly. Leave it out.")


def prepare(model_args: ModelArguments, data_args: DataArguments, training_args: RAdamTrainingArguments) -> tuple:
    """Load or make data, tokenizer and model, in the order in which each needs the one before.

    Returns:
        Model, tokenizer, training blocks (None if there is no training), validation blocks and the size of their text.
    """
    named = load_named_config(model_args)
    if training_args.local_process_index > 0:
        data_args = dataclasses.replace(data_args, overwrite_cache=False)
    # The first process of each machine fills the caches, the others read them.
    with training_args.main_process_first(desc="preparing the data"):
        texts = load_texts(model_args, data_args)
        tokenizer = load_tokenizer(model_args, data_args, texts["train"])
        size = resolve_block_size(data_args.block_size, model_args, named, tokenizer)
        train = None
        if training_args.do_train:
            train, _ = make_blocks(texts["train"], tokenizer, size, data_args, data_args.max_train_samples)
        validation, text_size = validation_blocks(texts["validation"], tokenizer, size, data_args)
    count = len(train) if isinstance(train, datasets.Dataset) else "streamed" if train is not None else "no"
    blocks = f"{count} training and {len(validation)} validation blocks of {size} tokens"
    logger.info("%s; validation text: %d tokens, %d bytes", blocks, text_size.tokens, text_size.bytes)
    return build_model(model_args, named, tokenizer, size), tokenizer, train, validation, text_size


def checkpoint_to_resume(training_args: RAdamTrainingArguments) -> str | bool | None:
    """Translate `--resume_from_checkpoint` (true, false or a folder), and check it before any work."""
    wanted, output_dir = training_args.resume_from_checkpoint, training_args.output_dir
    if training_args.extend_from is not None:
        return None  # the trainer resumes from that run, or from its own checkpoints of the longer schedule
    last = next((str(place.path) for place in list_checkpoints(output_dir)), None)
    held = f"output_dir={output_dir} already holds {os.path.basename(last or '')}"
    if wanted is None or wanted.lower() == "false":
        if training_args.do_train and last is not None:
            raise InputError(f"{held}. Give --resume_from_checkpoint true, or another --output_dir.")
        return None
    if wanted.lower() == "true":
        if last is None:
            raise InputError(f"resume_from_checkpoint=true, but {output_dir} holds no checkpoint. Leave it out.")
        return True
    if not os.path.isdir(wanted):
        raise InputError(f"resume_from_checkpoint={wanted} is not a folder. Give a checkpoint's folder, or true.")
    if last is not None and not os.path.samefile(run_of(Path(wanted).absolute()), output_dir):
        raise InputError(f"{held} of another run than {wanted}. Give another --output_dir.")
    return wanted


def write_recipe(
    model_args: ModelArguments, data_args: DataArguments, output_dir: str, block_size: int, size: TextSize
) -> None:
    """Write what `evaluate_clm.py` needs to make the same validation blocks again, without secrets."""
    model = {name: value for name, value in dataclasses.asdict(model_args).items() if name not in SECRETS}
    data = dataclasses.asdict(data_args) | {"block_size": block_size}
    for name in ("train_file", "validation_file"):
        data[name] = os.path.abspath(data[name]) if data[name] else None
    recipe = {"model": model, "data": data, "validation": dataclasses.asdict(size)}
    path = Path(output_dir, RECIPE)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        if (before["data"], before["validation"]) != (recipe["data"], recipe["validation"]):
            logger.warning("the run continues with other data than before: do not compare its losses with the old ones")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


class OnceAccepted(transformers.TrainerCallback):
    """Calls `action` on the main process once the trainer has accepted arguments and checkpoint."""

    def __init__(self, action: Callable[[], None]):
        self.action = action
        self.first_step: int | None = None  # completed steps before, once training has begun

    def on_train_begin(self, args, state, control, **kwargs):
        """Note where training begins and act."""
        self.first_step = state.global_step
        if state.is_world_process_zero:
            self.action()


def train(trainer: RAdamTrainer, resume_from_checkpoint: str | bool | None, accepted: OnceAccepted) -> None:
    """Train, save the model (its evaluation weights) and the metrics."""
    trainer.add_callback(accepted)
    try:
        result = trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    except (ValueError, RunInUseError) as error:
        if accepted.first_step is not None:
            raise
        fail(error)  # arguments or checkpoint were refused
    trainer.save_model()  # with the tokenizer
    if trainer.state.global_step == accepted.first_step:
        return  # a finished run was resumed: nothing was trained, and its metrics stay
    metrics = dict(result.metrics)
    if isinstance(trainer.train_dataset, datasets.Dataset):
        metrics["train_samples"] = len(trainer.train_dataset)
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def evaluate(trainer: RAdamTrainer, size: TextSize) -> None:
    """Evaluate the evaluation weights; add perplexity and bits per byte, which compare across tokenizers."""
    metrics = trainer.evaluate()
    loss = metrics["eval_loss"]
    metrics |= {"eval_samples": len(trainer.eval_dataset), "perplexity": perplexity(loss)}
    metrics["bits_per_byte"] = bits_per_byte(loss, size)
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity where that is beyond a float."""
    return math.inf if loss > 709 else math.exp(loss)


def bits_per_byte(loss: float, size: TextSize) -> float:
    """Convert nats per token into bits per byte of the text."""
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
        check_processes(data_args, training_args)
        resume_from_checkpoint = checkpoint_to_resume(training_args)
        model, tokenizer, blocks, validation, size = prepare(model_args, data_args, training_args)
    except InputError as error:
        fail(error)
    set_seed(training_args.seed)  # whatever the preparation drew, a run depends on its seed only
    data = {"train_dataset": blocks, "eval_dataset": validation, "data_collator": default_data_collator}
    try:
        trainer = RAdamTrainer(model, training_args, processing_class=tokenizer, **data)
    except ValueError as error:  # the arguments do not fit model, data or launch
        fail(error)
    if training_args.do_train:
        block_size = len(validation[0]["input_ids"])
        recipe = partial(write_recipe, model_args, data_args, training_args.output_dir, block_size, size)
        train(trainer, resume_from_checkpoint, OnceAccepted(recipe))
    if training_args.do_eval:
        evaluate(trainer, size)
    publish(trainer, model_args, data_args)


def main() -> None:
    """Run, and leave the other processes after the last object that communicates with them is gone.

    Otherwise a process over gloo may abort while it exits, and the launcher reports a finished run as failed (torch
    2.13: 3 of 20 launches).
    """
    run()
    gc.collect()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
