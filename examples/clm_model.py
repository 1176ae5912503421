"""The model that `run_clm.py` trains: an existing one, or a new one built to fit the tokenizer."""

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

from hf_radam.config_files import close_matches, one_sentence

logger = logging.getLogger(__name__)

# The model when none is named: 4.2 million parameters with 4096 tokens, small enough for two CPU cores.
DEFAULT_MODEL_TYPE = "llama"
DEFAULT_MODEL = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
DEFAULT_MODEL |= {"num_key_value_heads": 4, "tie_word_embeddings": True}
DEFAULT_BLOCK_SIZE = 1024


class InputError(ValueError):
    """A request that cannot be carried out as written; its message is all that the user needs."""


def parse_overrides(text: str, config: PreTrainedConfig) -> dict[str, Any]:
    """Parse `name=value,name=value`; a value gets the type that it has in the configuration."""
    overrides: dict[str, Any] = {}
    known = [*config.to_dict()]
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"config_overrides: {pair!r} has no `=`. Write name=value,name=value.")
        name = _constructor_name(type(config), name)
        if name not in known:
            raise InputError(f"config_overrides: {type(config).__name__} has no {name!r}: {close_matches(name, known)}")
        overrides[name] = _typed(name, value, getattr(config, name))
    return overrides


def _typed(name: str, value: str, current: Any) -> Any:
    if isinstance(current, bool):
        if value.lower() not in ("true", "false"):
            raise InputError(f"config_overrides: {name}={value} is not a boolean. Write true or false.")
        return value.lower() == "true"
    kinds = [type(current)] if isinstance(current, int | float | str) else [int, float, str] if current is None else []
    for kind in kinds:
        try:
            return kind(value)
        except ValueError:
            continue
    fix = f"Give one {type(current).__name__}" if kinds else "Give the folder of a config.json as config_name"
    raise InputError(f"config_overrides: {name}={value} is no {type(current).__name__}. {fix}.")


def _constructor_name(kind: type[PreTrainedConfig], name: str) -> str:
    """Translate a common name to that of the architecture's constructor (gpt2: hidden_size is n_embd)."""
    return kind.attribute_map.get(name, name)


def new_config(model_type: str | None, overrides: str | None, fitted: dict[str, Any]) -> PreTrainedConfig:
    """Build the configuration of a new model: defaults, then what fits the tokenizer, then the overrides."""
    kind = CONFIG_MAPPING[model_type or DEFAULT_MODEL_TYPE]
    defaults = DEFAULT_MODEL if model_type is None else {}
    return _construct(kind, defaults, fitted, parse_overrides(overrides or "", kind()))


def _construct(kind: type[PreTrainedConfig], *layers: dict[str, Any]) -> PreTrainedConfig:
    """Call the constructor, so that what it derives (a head's size) follows the overrides; later layers win."""
    values = {_constructor_name(kind, name): value for layer in layers for name, value in layer.items()}
    try:
        return kind(**values)
    except StrictDataclassError as error:
        raise InputError(f"{kind.__name__} refuses these values: {one_sentence(error)}") from error


def hub_kwargs(model_args) -> dict[str, Any]:
    """Collect the arguments that every `from_pretrained` shares."""
    shared = {name: getattr(model_args, name) for name in ("cache_dir", "token", "trust_remote_code")}
    return shared | {"revision": model_args.model_revision}


def load_named_config(model_args) -> PreTrainedConfig | None:
    """Load the configuration that the arguments name; None for a new model by `model_type`."""
    name = model_args.config_name or model_args.model_name_or_path
    if name is None:
        return None
    try:
        return AutoConfig.from_pretrained(name, **hub_kwargs(model_args))
    except (OSError, ValueError) as error:
        raise InputError(f"No configuration can be loaded from {name!r}: {one_sentence(error)}") from error


def resolve_block_size(block_size: int | None, model_args, named: PreTrainedConfig | None, tokenizer) -> int:
    """Return the tokens of a block: the request, or 1024 at most, within what tokenizer and model take."""
    # Architectures without positions (state-space models, ALiBi) have no such entry: no limit.
    limit = getattr(named, "max_position_embeddings", None)
    if model_args.config_overrides:
        config = named or CONFIG_MAPPING[model_args.model_type or DEFAULT_MODEL_TYPE]()
        overrides = parse_overrides(model_args.config_overrides, config)
        limit = overrides.get(_constructor_name(type(config), "max_position_embeddings"), limit)
    if block_size is None:
        return min(size for size in (DEFAULT_BLOCK_SIZE, tokenizer.model_max_length, limit) if size)
    if limit is not None and block_size > limit:
        raise InputError(f"block_size={block_size} is longer than the model takes. Give at most {limit}.")
    return block_size


def build_model(
    model_args, named: PreTrainedConfig | None, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> PreTrainedModel:
    """Load the model that the arguments name, or build a new one, and log its size."""
    config = named if model_args.model_name_or_path else _fit_config(model_args, named, tokenizer, block_size)
    dtype = model_args.dtype if model_args.dtype == "auto" else getattr(torch, model_args.dtype)
    options: dict[str, Any] = {"trust_remote_code": model_args.trust_remote_code}
    if model_args.attn_implementation:
        options["attn_implementation"] = model_args.attn_implementation
    name = model_args.model_name_or_path
    try:
        if name:
            options |= hub_kwargs(model_args)
            model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype, **options)
        else:
            dtype = config.dtype or torch.float32 if dtype == "auto" else dtype
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"No model can be made from {name or type(config).__name__}: {one_sentence(error)}") from error
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    logger.info("%s: %s parameters (%s)", type(model).__name__, f"{model.num_parameters():,}", model.dtype)
    return model


def _fit_config(model_args, named: PreTrainedConfig | None, tokenizer, block_size: int) -> PreTrainedConfig:
    """Build the configuration of a new model that fits tokenizer and block size."""
    fitted = {"vocab_size": len(tokenizer)}
    fitted |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if named is None:
        fitted["max_position_embeddings"] = block_size
        config = new_config(model_args.model_type, model_args.config_overrides, fitted)
    else:
        # The file as written, not `named`: what a constructor derived must be derived again from the overrides.
        values = PreTrainedConfig.get_config_dict(model_args.config_name, **hub_kwargs(model_args))[0]
        config = _construct(type(named), values, fitted, parse_overrides(model_args.config_overrides or "", named))
    if config.vocab_size < len(tokenizer):
        raise InputError(
            f"vocab_size={config.vocab_size} in config_overrides is smaller than the tokenizer ({len(tokenizer)}). "
            "Leave it out, or train a smaller tokenizer with --vocab_size."
        )
    return config
