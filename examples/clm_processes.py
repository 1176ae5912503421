"""What `run_clm.py` must know of being one of several processes: who speaks, who trains with whom, how they end."""

import gc
import logging
import os
import sys

import datasets
import transformers
from accelerate import PartialState

from clm_arguments import DataArguments
from clm_parser import InputError
from hf_radam import RAdamTrainingArguments
from hf_radam.training.launched import check_launched

logger = logging.getLogger(__name__)


def set_up_logging(training_args: RAdamTrainingArguments) -> None:
    """Log what this script does, on the main process as loudly as the training arguments say."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    level = logging.INFO if training_args.should_log else logging.WARNING
    for name in ("run_clm", "__main__", __name__, "clm_corpus", "clm_data", "clm_model"):
        logging.getLogger(name).setLevel(level)
    datasets.utils.logging.set_verbosity(training_args.get_process_log_level())
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    if training_args.disable_tqdm or not training_args.should_log:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    logger.info(
        "device %s, %d process(es), optimizer %s, schedule %s",
        training_args.device,
        training_args.world_size,
        getattr(training_args.optim, "value", training_args.optim),
        getattr(training_args.lr_scheduler_type, "value", training_args.lr_scheduler_type),
    )


def check_processes(training_args: RAdamTrainingArguments) -> None:
    """Refuse processes that would not train as the launch file says.

    Upstream joins processes on CPUs only where `use_cpu` is set; without it each would train alone and write the same
    files.

    Raises:
        InputError: FSDP or DeepSpeed without GPUs, or more processes launched than training will use.
    """
    try:
        check_launched(training_args)
    except ValueError as error:
        raise InputError(str(error)) from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and training_args.world_size == 1:
        raise InputError(f"{launched} processes were launched, but each would train alone: on CPUs pass --use_cpu true")


def check_stream(data_args: DataArguments, training_args: RAdamTrainingArguments) -> None:
    """Refuse the one setting under which the processes do not share a stream evenly and in its order.

    As it is, accelerate reads the stream on the first process and gives each process its part of every batch: the
    samples, their order and so the place after a resume are those of one process. Otherwise each process would read
    files of its own, one of them more than another, or the whole stream besides.

    Raises:
        InputError: a stream, several processes and `dispatch_batches` set to false.
    """
    if data_args.streaming and training_args.world_size > 1:
        if training_args.accelerator_config.dispatch_batches is False:
            raise InputError(
                "dispatch_batches=false would not split a stream evenly: leave it out of accelerator_config"
            )


def leave_the_others() -> None:
    """Take leave of the other processes while Python is whole, and after the last object that speaks with them is gone.

    Otherwise a process over gloo may abort while it exits, and the launcher reports a finished run as failed (torch
    2.13: 3 of 20 launches, 1 of 20 where the trainer was still there).
    """
    gc.collect()
    PartialState().destroy_process_group()
