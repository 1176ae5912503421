"""Language-model pretraining without a fixed horizon, in a drop-in `transformers.Trainer`.

The public names are loaded when first used, so that `import hf_radam.schedules` needs neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_radam.averaging import WeightAverage
    from hf_radam.batch_norm import recalibrate_batch_norm
    from hf_radam.checkpoints.load import load_evaluation_model
    from hf_radam.optim import RAdam, RAdamScheduleFree
    from hf_radam.trainer import RAdamTrainer, RAdamTrainerMixin
    from hf_radam.training_args import RAdamTrainingArguments

__version__ = "0.2.0.dev0"

__all__ = [
    "RAdam",
    "RAdamScheduleFree",
    "RAdamTrainer",
    "RAdamTrainerMixin",
    "RAdamTrainingArguments",
    "WeightAverage",
    "__version__",
    "load_evaluation_model",
    "recalibrate_batch_norm",
]

_MODULE_OF = {
    "RAdam": "hf_radam.optim",
    "RAdamScheduleFree": "hf_radam.optim",
    "RAdamTrainer": "hf_radam.trainer",
    "RAdamTrainerMixin": "hf_radam.trainer",
    "RAdamTrainingArguments": "hf_radam.training_args",
    "WeightAverage": "hf_radam.averaging",
    "load_evaluation_model": "hf_radam.checkpoints.load",
    "recalibrate_batch_norm": "hf_radam.batch_norm",
}


def __getattr__(name: str) -> object:
    """Load a public name on first use and keep it (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value
