"""Compare the evaluation weights and the training weights of a run of `run_clm.py`, or of one of its checkpoints.

    python examples/evaluate_clm.py runs/quickstart
    python examples/evaluate_clm.py runs/quickstart/checkpoint-300 --prompt "class " --json result.json
    python examples/evaluate_clm.py runs/merged      # checkpoints merged by `hf-radam average`

The validation text is that of the run (`run_clm.yaml`), unless flags name another. The loss is the mean over blocks, as
`eval_loss` is.
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from clm_arguments import DataArguments, ModelArguments, fail
from clm_data import TextSize, load_texts, validation_blocks
from clm_model import InputError
from hf_radam import load_evaluation_model
from hf_radam.checkpoints.load import holds_model, is_checkpoint, load_model_folder, newest_loadable_checkpoint
from hf_radam.cli.merging import RECORD_NAME
from run_clm import RECIPE, bits_per_byte, perplexity

DATA_FLAGS = ("train_file", "validation_file", "dataset_name", "dataset_config_name", "block_size", "text_column")
Column = dict[str, Any]
"""One column of the table: name, source (a folder), loss, perplexity, bits_per_byte, sample."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("path", type=Path, help="Folder of a run, or one of its checkpoints.")
    parser.add_argument("--batch_size", type=int, default=16, help="Blocks evaluated at a time.")
    parser.add_argument("--max_blocks", type=int, help="Evaluate the first N blocks only; default: as the run did.")
    parser.add_argument("--prompt", default="    def __init__(self,", help="Beginning of the text that is sampled.")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="Length of that text; 0 samples none.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the sample, the same for both weights.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Where to compute.")
    parser.add_argument("--json", type=Path, help="Write the numbers and samples to this file too.")
    for name in DATA_FLAGS:
        field = DataArguments.__dataclass_fields__[name]
        kind = int if name == "block_size" else str
        parser.add_argument(f"--{name}", type=kind, help=f"In place of the run's. {field.metadata['help']}")
    args = parser.parse_args(argv)
    for name, least in (("batch_size", 1), ("max_blocks", 1), ("max_new_tokens", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value} is too small. Give at least {least}.")
    return args


def read_recipe(path: Path) -> dict[str, Any]:
    """Read how the run of a folder made its data; of merged checkpoints, the run of the last one."""
    if not path.is_dir():
        raise InputError(f"{path} is not a folder. Give the folder of a run, or one of its checkpoints.")
    source, record = path, path / RECORD_NAME
    if record.is_file():
        source = (path / json.loads(record.read_text(encoding="utf-8"))["checkpoints"][-1]["path"]).resolve()
    for folder in (path, source, *source.resolve().parents[:2]):  # _pre_decay/checkpoint-N lies two levels deep
        if (folder / RECIPE).is_file():
            return yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    merged = f", merged into {path}," if source != path else ""
    raise InputError(f"There is no {RECIPE} in {source}{merged} or above it. Give the folder of a run of run_clm.py.")


def load_data(
    args: argparse.Namespace, recipe: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[datasets.Dataset, TextSize]:
    """Make the validation blocks: the run's, or those of the data that flags name."""
    given = {name: getattr(args, name) for name in DATA_FLAGS if getattr(args, name) is not None}
    sources = {"train_file", "validation_file", "dataset_name"} & given.keys()
    if "validation_file" in given:
        given.setdefault("train_file", given["validation_file"])  # the training side is never read
    data = (
        recipe["data"]
        | {"overwrite_cache": False}
        | (dict.fromkeys(("dataset_config_name", *DATA_FLAGS[:3])) if sources else {})
        | given
    )
    if args.max_blocks is not None:
        data["max_eval_samples"] = args.max_blocks
    try:
        model_args, data_args = ModelArguments(**recipe["model"]), DataArguments(**data)
    except ValueError as error:
        raise InputError(str(error)) from error
    text = load_texts(model_args, data_args)["validation"]
    blocks, size = validation_blocks(text, tokenizer, data_args.block_size, data_args)
    if not given and vars(size) != recipe["validation"]:  # the standard library, or a file, of another version
        print(f"NOTE: the validation text is {vars(size)}, that of the run was {recipe['validation']}.")
    return blocks, size


def folders(path: Path) -> tuple[Path, Path | None]:
    """Return the folders of evaluation and of training weights; None for a run that holds no checkpoint."""
    if is_checkpoint(path):
        return path, path
    try:
        newest = newest_loadable_checkpoint(path)
    except FileNotFoundError:
        return path, None
    return (path if holds_model(path) else newest), newest  # the model at the root has the evaluation weights


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Return whether two models hold the same numbers, to the last bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, blocks: datasets.Dataset, batch_size: int, name: str) -> float:
    """Return the mean loss in nats per token; blocks are equally long, so it is the mean over blocks too."""
    total = 0.0
    for batch in tqdm(blocks.with_format("torch").iter(batch_size), total=-(-len(blocks) // batch_size), desc=name):
        ids = batch["input_ids"].to(model.device)
        total += model(input_ids=ids, labels=ids).loss.item() * len(ids)
    return total / len(blocks)


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> str:
    """Generate text from the prompt, with the seed set anew."""
    if args.max_new_tokens == 0:
        return ""
    ids = tokenizer(args.prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].long().to(model.device)
    if ids.shape[1] == 0:  # an empty prompt: begin as after the end of a document
        ids = torch.tensor([[tokenizer.eos_token_id]], device=model.device)
    torch.manual_seed(args.seed)
    options = {"do_sample": True, "top_k": 50, "pad_token_id": tokenizer.eos_token_id}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.max_new_tokens, **options)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def compare(args: argparse.Namespace) -> list[Column]:
    """Measure the evaluation weights and, where they differ, the training weights."""
    recipe = read_recipe(args.path)
    trust = {"trust_remote_code": recipe["model"]["trust_remote_code"]}
    evaluated, trained = folders(args.path)
    try:
        models = {"evaluation weights": (load_evaluation_model(evaluated, **trust), evaluated)}
        if trained is not None:
            models["training weights"] = load_model_folder(trained, **trust), trained
        holds_tokenizer = (args.path / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(args.path if holds_tokenizer else trained or args.path, **trust)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"Cannot load {args.path}: {error}") from error
    blocks, size = load_data(args, recipe, tokenizer)
    if trained is None:
        print(f"{args.path} holds no checkpoint, so there are no training weights to compare with.")
    elif same_weights(*(model for model, _ in models.values())):
        print(f"The evaluation weights of {args.path} are the training weights of {trained}.")
        del models["training weights"]
    columns = []
    for name, (model, source) in models.items():
        model = model.to(args.device).eval()
        loss = mean_loss(model, blocks, args.batch_size, name)
        numbers = {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": bits_per_byte(loss, size)}
        columns.append({"name": name, "source": str(source), **numbers, "sample": sample(model, tokenizer, args)})
    tokens = len(blocks[0]["input_ids"])
    print(f"{len(blocks)} blocks of {tokens} tokens, {size.bytes / size.tokens:.2f} bytes per token")
    return columns


def table(columns: list[Column]) -> str:
    """Lay the numbers out side by side, the samples below each other."""
    kinds = {"": "name", "from": "source", "loss (nats per token)": "loss", "perplexity": "perplexity"}
    formats = {"loss": ".4f", "perplexity": ".2f", "bits_per_byte": ".4f"}
    lines = [
        [title, *(format(column[key], formats.get(key, "")) for column in columns)]
        for title, key in (kinds | {"bits per byte": "bits_per_byte"}).items()
    ]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    samples = [f"--- sample, {column['name']} ---\n{column['sample']}" for column in columns if column["sample"]]
    return "\n".join([*rows, *samples])


def main() -> None:
    """Parse, compare, print; a wrong request ends in one sentence and exit code 2."""
    args = parse_arguments()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    try:
        columns = compare(args)
    except InputError as error:
        fail(error)
    print(table(columns))
    if args.json:
        args.json.resolve().parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(columns, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
