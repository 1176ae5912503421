"""The model that `run_clm.py` trains: one that exists, or a new one built to fit the tokenizer."""

import logging
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from clm_parser import InputError, close_matches, one_sentence

logger = logging.getLogger(__name__)

# The model when none is named: about 4.2 million parameters with 4096 tokens, small enough for two CPU cores.
DEFAULT_MODEL_TYPE = "llama"
DEFAULT_MODEL = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
DEFAULT_BLOCK_SIZE = 1024


def parse_overrides(text: str, config: PreTrainedConfig) -> dict[str, Any]:
    """Read `name=value,name=value`; a value has the type that the configuration has there now.

    Raises:
        InputError: a pair without `=`, a name that the configuration does not have, a value of another type.
    """
    overrides: dict[str, Any] = {}
    known = [*config.to_dict()]
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"config_overrides: {pair!r} has no `=`: write name=value,name=value")
        name = _own_name(type(config), name)
        if name not in known:
            raise InputError(f"config_overrides: {type(config).__name__} has no {name!r}: {close_matches(name, known)}")
        overrides[name] = _typed(name, value, getattr(config, name))
    return overrides


def _typed(name: str, value: str, current: Any) -> Any:
    if isinstance(current, bool):
        if value.lower() not in ("true", "false"):
            raise InputError(f"config_overrides: {name}={value} must be true or false")
        return value.lower() == "true"
    kinds = [type(current)] if isinstance(current, int | float | str) else [int, float, str] if current is None else []
    for kind in kinds:
        try:
            return kind(value)
        except ValueError:
            continue
    wanted = type(current).__name__
    way_out = "write it in a config.json and give its folder as config_name" if not kinds else f"give one {wanted}"
    raise InputError(f"config_overrides: {name}={value} cannot be read as {wanted}: {way_out}")


def check_overrides(model_type: str | None, text: str) -> None:
    """Refuse overrides that the configuration of a new model does not take (InputError)."""
    new_config(model_type, text, {})


def new_config(model_type: str | None, overrides: str | None, fitted: dict[str, Any]) -> PreTrainedConfig:
    """Build the configuration of a new model: defaults, then what fits the tokenizer, then the user's overrides.

    Everything goes through the constructor, so that what it derives (a head's size) follows the overrides.
    """
    kind = CONFIG_MAPPING[model_type or DEFAULT_MODEL_TYPE]
    defaults = DEFAULT_MODEL if model_type is None else {}
    return _construct(kind, defaults, fitted, parse_overrides(overrides or "", kind()))


def _construct(kind: type[PreTrainedConfig], *layers: dict[str, Any]) -> PreTrainedConfig:
    """Call the constructor with the layers on top of each other, the last one uppermost."""
    values = {_own_name(kind, name): value for layer in layers for name, value in layer.items()}
    try:
        return kind(**values)
    except StrictDataclassError as error:
        raise InputError(f"{kind.__name__} refuses these values: {one_sentence(error)}") from error


def hub_kwargs(model_args) -> dict[str, Any]:
    """Collect the arguments that every `from_pretrained` of a run shares."""
    return {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }


def load_named_config(model_args) -> PreTrainedConfig | None:
    """Load the configuration that the arguments name; None where they ask for a new one by `model_type`."""
    name = model_args.config_name or model_args.model_name_or_path
    if name is None:
        return None
    try:
        return AutoConfig.from_pretrained(name, **hub_kwargs(model_args))
    except (OSError, ValueError) as error:
        raise InputError(f"no configuration can be loaded from {name!r}: {one_sentence(error)}") from error


def resolve_block_size(block_size: int | None, model_args, named: PreTrainedConfig | None, tokenizer) -> int:
    """Give the tokens of a block: the request, or 1024 at most, within what tokenizer and model take.

    Raises:
        InputError: the request is longer than the model takes.
    """
    limit = _positions(named) if named is not None else None
    if model_args.config_overrides:
        kind = named if named is not None else CONFIG_MAPPING[model_args.model_type or DEFAULT_MODEL_TYPE]()
        overrides = parse_overrides(model_args.config_overrides, kind)
        limit = overrides.get(_own_name(type(kind), "max_position_embeddings"), limit)
    if block_size is None:
        return min(size for size in (DEFAULT_BLOCK_SIZE, tokenizer.model_max_length, limit) if size)
    if limit is not None and block_size > limit:
        raise InputError(f"block_size={block_size} is longer than the model takes: give at most {limit}")
    return block_size


def _positions(config: PreTrainedConfig) -> int | None:
    # Architectures without positions (state-space models, ALiBi) have no such entry: no limit.
    return getattr(config, "max_position_embeddings", None)


def _own_name(kind: type[PreTrainedConfig], name: str) -> str:
    """Translate a common name to the one this architecture's constructor takes (gpt2: hidden_size is n_embd)."""
    return kind.attribute_map.get(name, name)


def fit_config(model_args, named: PreTrainedConfig | None, tokenizer, block_size: int) -> PreTrainedConfig:
    """Give the configuration of a new model that fits tokenizer and block size.

    Raises:
        InputError: the overrides leave the vocabulary smaller than the tokenizer.
    """
    fitted = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if named is None:
        config = new_config(
            model_args.model_type, model_args.config_overrides, {**fitted, "max_position_embeddings": block_size}
        )
    else:
        # The file as written, not `named`: what a constructor derived must be derived again from the overrides.
        values = PreTrainedConfig.get_config_dict(model_args.config_name, **hub_kwargs(model_args))[0]
        config = _construct(type(named), values, fitted, parse_overrides(model_args.config_overrides or "", named))
    if config.vocab_size < len(tokenizer):
        raise InputError(
            f"vocab_size={config.vocab_size} in config_overrides is smaller than the tokenizer ({len(tokenizer)} "
            "tokens): leave it out, or train a smaller tokenizer with --vocab_size"
        )
    return config


def build_model(
    model_args, named: PreTrainedConfig | None, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> PreTrainedModel:
    """Load the model that the arguments name, or build a new one, and log its size.

    Raises:
        InputError: transformers cannot load or build it so, in its words.
    """
    config = named if model_args.model_name_or_path else fit_config(model_args, named, tokenizer, block_size)
    try:
        model = _create(model_args, config)
    except (OSError, ValueError, ImportError) as error:
        name = model_args.model_name_or_path or type(config).__name__
        raise InputError(f"no model can be made from {name}: {one_sentence(error)}") from error
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    parameters = sum(p.numel() for p in model.parameters())  # tied weights are listed once
    logger.info("%s: %s parameters (%s)", type(model).__name__, f"{parameters:,}", model.dtype)
    return model


def _create(model_args, config: PreTrainedConfig) -> PreTrainedModel:
    options: dict[str, Any] = {"trust_remote_code": model_args.trust_remote_code}
    if model_args.attn_implementation:
        options["attn_implementation"] = model_args.attn_implementation
    dtype = model_args.dtype if model_args.dtype == "auto" else getattr(torch, model_args.dtype)
    if model_args.model_name_or_path:
        options |= hub_kwargs(model_args)
        return AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path, config=config, dtype=dtype, **options
        )
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
