"""Real runs at a constant learning rate, whose checkpoints can be merged."""

import tiny
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, default_data_collator

from hf_radam import RAdamTrainer

UPDATES = [6, 12, 18, 20]


def tokenizer():
    words = {"<unk>": 0} | {f"w{number}": number for number in range(1, tiny.VOCABULARY)}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")))
    made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return made


def train(folder, model, **options):
    """A run at a constant learning rate with checkpoints after 6, 12, 18 and 20 steps."""
    options = {"optim": "radam", "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 6} | options
    args = tiny.arguments(folder, **options)
    parts = {"processing_class": tokenizer(), "data_collator": default_data_collator}
    RAdamTrainer(model, args, train_dataset=tiny.TRAIN, **parts).train()
    return [folder / f"checkpoint-{step}" for step in UPDATES]
