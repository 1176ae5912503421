"""What `run_clm.py` can be told about the model and the data; the training arguments are hf_radam's."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from clm_model import new_config
from hf_radam import RAdamTrainingArguments
from hf_radam.config_files import ConfigArgumentParser, one_sentence

DATA_SUFFIXES = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
OTHER_RANKS_WAIT = 10  # seconds before ranks above 0 report an error; launchers end them when rank 0 has left


def fail(error: BaseException | str) -> NoReturn:
    """Print one sentence as a command line tool does, on one process of a machine, and exit with code 2."""
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        time.sleep(OTHER_RANKS_WAIT)
    message = error if isinstance(error, str) else one_sentence(error)
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which model to train: an existing one, or a new one from a configuration."""

    model_name_or_path: str | None = _flag(None, "Model to continue from: a folder or a name on the hub.")
    model_type: str | None = _flag(None, "Architecture of a new model, e.g. gpt2; default: a small llama.")
    config_overrides: str | None = _flag(None, "Changes to the configuration of a new model: n_embd=10,resid_pdrop=0.2")
    config_name: str | None = _flag(None, "Configuration of a new model: a folder, a file or a name on the hub.")
    tokenizer_name: str | None = _flag(None, "Tokenizer; default: the model's, or one trained on the training text.")
    cache_dir: str | None = _flag(None, "Folder for downloads and prepared data; default: below HF_HOME.")
    model_revision: str = _flag("main", "Branch, tag or commit of the model on the hub.")
    token: str | None = _flag(None, "Token for the hub; default: the one that `hf auth login` stored.")
    trust_remote_code: bool = _flag(False, "Run model code that comes with a model of the hub.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _flag(
        "float32", "Type of the parameters; keep float32 for training, with --bf16 for speed. auto: the model's own."
    )
    attn_implementation: str | None = _flag(None, "Attention: eager, sdpa, flash_attention_2, ...")
    low_cpu_mem_usage: bool = _flag(False, "Accepted for older scripts; transformers 5 always loads that way.")

    def __post_init__(self):
        """Refuse combinations that contradict each other."""
        if self.model_name_or_path and (self.model_type or self.config_overrides):
            extra = "model_type" if self.model_type else "config_overrides"
            raise ValueError(
                f"{extra}={getattr(self, extra)} describes a new model, but model_name_or_path="
                f"{self.model_name_or_path} names an existing one. Leave one out."
            )
        if self.config_name and self.model_type:
            raise ValueError(f"config_name={self.config_name} has an architecture. Leave model_type out.")
        if self.model_type and self.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ValueError(f"model_type={self.model_type} is not a causal language model. Try llama, gpt2 or qwen3.")
        if self.config_overrides and not self.config_name:
            new_config(self.model_type, self.config_overrides, {})  # raises InputError
        if self.low_cpu_mem_usage and not self.model_name_or_path:
            raise ValueError("low_cpu_mem_usage is for loading weights. Give model_name_or_path, or leave it out.")


@dataclass
class DataArguments:
    """Which text to train on; default: the source of the Python standard library."""

    dataset_name: str | None = _flag(None, "Data set: a name on the hub, or a folder in the hub's layout.")
    dataset_config_name: str | None = _flag(None, "Configuration of that data set.")
    train_file: str | None = _flag(None, "Training text: .txt, .json, .jsonl, .csv, .parquet, or a folder of texts.")
    validation_file: str | None = _flag(None, "Validation text; default: a part of the training text.")
    max_train_samples: int | None = _flag(None, "Train on the first N blocks only.")
    max_eval_samples: int | None = _flag(None, "Evaluate on the first N blocks only.")
    streaming: bool = _flag(False, "Read the training data while training; needs --max_steps.")
    block_size: int | None = _flag(None, "Tokens in a block; default: what the model takes, 1024 at most.")
    overwrite_cache: bool = _flag(False, "Prepare the data again, whatever is in the cache.")
    validation_split_percentage: int = _flag(5, "Part of the training text held out where there is no validation text.")
    preprocessing_num_workers: int | None = _flag(None, "Processes that prepare the data.")
    keep_linebreaks: bool = _flag(True, "Keep the line breaks of .txt files.")
    vocab_size: int | None = _flag(None, "Entries of the tokenizer that is trained when none is named; default: 4096.")
    text_column: str | None = _flag(None, "Column with the text; default: `text`, else the only column of strings.")

    def __post_init__(self):
        """Refuse values and combinations that no data set can satisfy."""
        least = {"max_train_samples": 1, "max_eval_samples": 1, "preprocessing_num_workers": 1, "block_size": 2}
        least["vocab_size"] = 257  # the 256 bytes and the end of text
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise ValueError(f"{name}={value} is too small. Give at least {bound}.")
        if not 1 <= self.validation_split_percentage <= 99:
            raise ValueError(
                f"validation_split_percentage={self.validation_split_percentage} must be 1 to 99. Give 5, for example."
            )
        if self.dataset_name and (self.train_file or self.validation_file):
            raise ValueError(
                f"dataset_name={self.dataset_name} and files (train_file={self.train_file}, validation_file="
                f"{self.validation_file}) are two sources of data. Leave one out."
            )
        if self.dataset_config_name and not self.dataset_name:
            raise ValueError(f"dataset_config_name={self.dataset_config_name} needs dataset_name. Give it.")
        if self.validation_file and not self.train_file:
            raise ValueError(f"validation_file={self.validation_file} needs a text to train on. Give train_file.")
        for name in ("train_file", "validation_file"):
            _check_file(name, getattr(self, name))
        if self.streaming and not (self.dataset_name or self.train_file):
            raise ValueError("streaming needs dataset_name or train_file. Leave it out for the standard library.")
        if self.streaming and self.preprocessing_num_workers:
            raise ValueError("preprocessing_num_workers prepares data in advance, streaming does not. Leave one out.")


def _check_file(name: str, path: str | None) -> None:
    if not path or os.path.isdir(path):
        return
    suffix = os.path.splitext(path)[1]
    if not os.path.exists(path):
        raise ValueError(f"{name}={path} does not exist. Give a file, or a folder of text files.")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{name}={path} is empty. Give a file with text.")
    if suffix not in DATA_SUFFIXES:
        raise ValueError(f"{name}={path} ends in {suffix!r}. Give one of {', '.join(DATA_SUFFIXES)}, or a folder.")


def _check_together(model_args: ModelArguments, data_args: DataArguments, training_args) -> None:
    """Refuse what only two groups of arguments together make wrong."""
    tokenizer = model_args.tokenizer_name or model_args.model_name_or_path
    if data_args.streaming and training_args.do_train and training_args.max_steps <= 0:
        raise ValueError(f"A stream has no length: max_steps={training_args.max_steps}. Give max_steps above 0.")
    if data_args.vocab_size is not None and tokenizer:
        raise ValueError(f"vocab_size={data_args.vocab_size} is for a new tokenizer, not {tokenizer}. Leave it out.")
    if training_args.do_predict:
        raise ValueError("do_predict has no test text. Use do_eval, which evaluates the validation text.")
    if not training_args.do_train and not model_args.model_name_or_path:
        raise ValueError(
            "do_train=false would evaluate an untrained model. Give model_name_or_path, or use evaluate_clm.py."
        )
    if not (training_args.do_train or training_args.do_eval):
        raise ValueError("do_train and do_eval are both false, so nothing is left to do. Give one of them.")


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[ModelArguments, DataArguments, RAdamTrainingArguments]:
    """Parse `[FILE.yaml] [--flag value ...]`; flags win over the file, an error is one sentence and exit code 2.

    With neither `do_train` nor `do_eval` given, both are done.
    """
    parser = ConfigArgumentParser([ModelArguments, DataArguments, RAdamTrainingArguments], refuse=fail)
    parser.set_defaults(do_train=None, do_eval=None)  # None tells "not given" from "given as false"
    model_args, data_args, training_args = parser.parse(argv)
    both = training_args.do_train is None and training_args.do_eval is None
    training_args.do_train = both or bool(training_args.do_train)
    training_args.do_eval = both or bool(training_args.do_eval) or training_args.eval_strategy != "no"  # as upstream
    try:
        _check_together(model_args, data_args, training_args)
    except ValueError as error:
        parser.error(str(error))
    return model_args, data_args, training_args
