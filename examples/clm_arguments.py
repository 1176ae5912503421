"""What `run_clm.py` can be told about the model and the data; the training arguments are hf_radam's."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from clm_model import check_overrides
from clm_parser import YamlArgumentParser
from hf_radam import RAdamTrainingArguments

DATA_SUFFIXES = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
MODEL_TYPES = tuple(config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING)


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


def _check_positive(owner, *names: str) -> None:
    """Refuse numbers that are not above zero (NaN is not); None means not given."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} must be above zero: give a positive number, or leave it out")


@dataclass
class ModelArguments:
    """Which model to train: one that exists, or a new one from a configuration."""

    model_name_or_path: str | None = _option(None, "Model to go on from: a folder or a name on the hub.")
    model_type: str | None = _option(
        None, "Architecture of a new model, e.g. llama, gpt2. With no model named at all, a small llama is built."
    )
    config_overrides: str | None = _option(
        None, "Changes to the configuration of a new model: n_embd=10,resid_pdrop=0.2,scale_attn_weights=false"
    )
    config_name: str | None = _option(None, "Configuration of a new model: a folder, a file or a name on the hub.")
    tokenizer_name: str | None = _option(
        None, "Tokenizer, if not the model's: a folder or a name on the hub. With neither, one is trained on the data."
    )
    cache_dir: str | None = _option(None, "Folder for what is downloaded or prepared; default: below HF_HOME.")
    model_revision: str = _option("main", "Branch, tag or commit of the model on the hub.")
    token: str | None = _option(None, "Token for the hub, if not the one that `hf auth login` stored.")
    trust_remote_code: bool = _option(False, "Run model code that comes with a model of the hub.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _option(
        "float32",
        "Type of the parameters. Keep float32 for training and use --bf16 for speed; "
        "auto takes the one that the model or configuration names.",
    )
    attn_implementation: str | None = _option(None, "Attention: eager, sdpa, flash_attention_2, ...")
    low_cpu_mem_usage: bool = _option(
        False, "Known from older scripts; transformers 5 always loads that way, so it changes nothing."
    )

    def __post_init__(self):
        """Refuse combinations that contradict each other."""
        if self.model_name_or_path and (self.model_type or self.config_overrides):
            extra = "model_type" if self.model_type else "config_overrides"
            raise ValueError(
                f"{extra}={getattr(self, extra)} describes a new model, but "
                f"model_name_or_path={self.model_name_or_path} names one that exists: leave one of them out"
            )
        if self.config_name and self.model_type:
            raise ValueError(
                f"config_name={self.config_name} already says the architecture: leave out model_type={self.model_type}"
            )
        if self.model_type and self.model_type not in MODEL_TYPES:
            raise ValueError(
                f"model_type={self.model_type} is no causal language model of transformers: "
                f"choose for example {', '.join(m for m in ('gpt2', 'llama', 'mixtral', 'qwen3') if m in MODEL_TYPES)}"
            )
        if self.config_overrides and not self.config_name:
            check_overrides(self.model_type, self.config_overrides)
        if self.low_cpu_mem_usage and not self.model_name_or_path:
            raise ValueError("low_cpu_mem_usage is about loading weights: it needs model_name_or_path, or leave it out")


@dataclass
class DataArguments:
    """Which text to train on; with nothing named, the source of the Python standard library."""

    dataset_name: str | None = _option(None, "Data set: a name on the hub, or a folder in the hub's layout.")
    dataset_config_name: str | None = _option(None, "Configuration of that data set.")
    train_file: str | None = _option(
        None, "Training text: a .txt, .json, .jsonl, .csv or .parquet file, or a folder of text files."
    )
    validation_file: str | None = _option(
        None, "Validation text of the same kinds; default: a part of the training text."
    )
    max_train_samples: int | None = _option(None, "Train on the first N blocks only.")
    max_eval_samples: int | None = _option(None, "Evaluate on the first N blocks only.")
    streaming: bool = _option(False, "Read the training data while training; needs --max_steps.")
    block_size: int | None = _option(None, "Tokens in a block; default: what the model takes, 1024 at most.")
    overwrite_cache: bool = _option(False, "Prepare the data again, whatever is in the cache.")
    validation_split_percentage: int = _option(
        5, "Part of the training text held out, in percent, where there is no validation text."
    )
    preprocessing_num_workers: int | None = _option(None, "Processes that prepare the data.")
    keep_linebreaks: bool = _option(True, "Keep the line breaks of .txt files.")
    vocab_size: int | None = _option(
        None, "Entries of the tokenizer trained when none is named; default: 4096. It sets the model's vocabulary."
    )
    text_column: str | None = _option(None, "Column with the text; default: `text`, else the only column of strings.")

    def __post_init__(self):
        """Refuse values and combinations that no data set can satisfy."""
        _check_positive(self, "max_train_samples", "max_eval_samples", "block_size", "preprocessing_num_workers")
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(f"block_size={self.block_size} leaves nothing to predict: take at least 2")
        if not 1 <= self.validation_split_percentage <= 99:
            raise ValueError(
                f"validation_split_percentage={self.validation_split_percentage} is no part of the text: take 1 to 99"
            )
        if self.vocab_size is not None and not self.vocab_size >= 257:
            raise ValueError(
                f"vocab_size={self.vocab_size} has no room for the 256 bytes and the end of text: take at least 257"
            )
        self._check_source()

    def _check_source(self) -> None:
        if self.dataset_name and (self.train_file or self.validation_file):
            raise ValueError(
                f"dataset_name={self.dataset_name} and files (train_file={self.train_file}, "
                f"validation_file={self.validation_file}) are two sources of data: leave one out"
            )
        if self.dataset_config_name and not self.dataset_name:
            raise ValueError(f"dataset_config_name={self.dataset_config_name} needs dataset_name")
        if self.validation_file and not self.train_file:
            raise ValueError(f"validation_file={self.validation_file} needs train_file, the text to train on")
        for name in ("train_file", "validation_file"):
            path = getattr(self, name)
            if path and not os.path.exists(path):
                raise ValueError(f"{name}={path} does not exist: give a file, or a folder of text files")
            if path and not os.path.isdir(path) and os.path.getsize(path) == 0:
                raise ValueError(f"{name}={path} is empty: give a file with text")
            suffix = os.path.splitext(path or "")[1]
            if path and not os.path.isdir(path) and suffix not in DATA_SUFFIXES:
                raise ValueError(f"{name}={path} ends in {suffix!r}: known are {', '.join(DATA_SUFFIXES)}, or a folder")
        if self.streaming and not (self.dataset_name or self.train_file):
            raise ValueError("streaming needs dataset_name or train_file: the standard library is small, leave it out")
        if self.streaming and self.preprocessing_num_workers:
            raise ValueError(
                f"preprocessing_num_workers={self.preprocessing_num_workers} prepares data beforehand, streaming does "
                "not: leave one out (--dataloader_num_workers reads a stream in parallel)"
            )


def _check_together(model_args: ModelArguments, data_args: DataArguments, training_args) -> None:
    """Refuse what only two groups of arguments together make wrong."""
    if data_args.streaming and training_args.do_train and training_args.max_steps <= 0:
        raise ValueError(f"a stream has no length: streaming needs max_steps above zero, not {training_args.max_steps}")
    tokenizer = model_args.tokenizer_name or model_args.model_name_or_path
    if data_args.vocab_size is not None and tokenizer:
        raise ValueError(
            f"vocab_size={data_args.vocab_size} is for a new tokenizer, but {tokenizer} has one: leave it out"
        )
    if training_args.do_predict:
        raise ValueError("do_predict has no test text here: leave it out, do_eval evaluates the validation text")
    if not training_args.do_train and not model_args.model_name_or_path:
        raise ValueError(
            "do_train=false without model_name_or_path would evaluate an untrained model: name one, or evaluate a run "
            "with examples/evaluate_clm.py"
        )
    if not (training_args.do_train or training_args.do_eval):
        raise ValueError("do_train and do_eval are both false: nothing is left to do")


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[ModelArguments, DataArguments, RAdamTrainingArguments]:
    """Parse `[FILE.yaml] [--flag value ...]`; flags win over the file, errors are one sentence and exit code 2.

    With neither `do_train` nor `do_eval` given, both are done.
    """
    parser = YamlArgumentParser([ModelArguments, DataArguments, RAdamTrainingArguments])
    parser.set_defaults(do_train=None, do_eval=None)  # None tells "not given" from "given as false"
    model_args, data_args, training_args = parser.parse(argv)
    if training_args.do_train is None and training_args.do_eval is None:
        training_args.do_train = training_args.do_eval = True
    training_args.do_train = bool(training_args.do_train)
    training_args.do_eval = bool(training_args.do_eval) or training_args.eval_strategy != "no"  # as upstream
    try:
        _check_together(model_args, data_args, training_args)
    except ValueError as error:
        parser.error(str(error))
    return model_args, data_args, training_args
