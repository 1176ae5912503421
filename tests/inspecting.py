"""Make stock runs, harm files and run the command, for the tests of `hf-radam inspect`."""

from tiny import EVAL, TRAIN, llama
from transformers import Trainer, TrainingArguments

from hf_radam import cli


def stock(folder, model=None, **overrides):
    options = {"max_steps": 10, "save_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 3}
    options |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(str(folder), **options | overrides)
    return Trainer(model or llama(), args, train_dataset=TRAIN, eval_dataset=EVAL)


def snapshot(folder):
    """Every entry below a folder with its bytes, mode and time of change."""
    entries = {}
    for path in [folder, *folder.rglob("*")]:
        facts = path.stat()
        entries[path] = (facts.st_mode, facts.st_mtime_ns, path.read_bytes() if path.is_file() else None)
    return entries


def inspect(path, capsys):
    """Exit code and output of the command, with runs of white space as one blank."""
    code = cli.main(["inspect", str(path)])
    return code, " ".join(capsys.readouterr().out.split())


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
