"""What `run_clm.py` refuses as one of several processes, and who of them says so.

Oracles: the words of the error; the clock.
"""

import time
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

import clm_parser
from clm_arguments import DataArguments
from clm_parser import InputError, leave
from clm_processes import check_processes, check_stream
from hf_radam import RAdamTrainingArguments
from hf_radam.training.launched import check_launched


@pytest.fixture
def args(tmp_path):
    return RAdamTrainingArguments(str(tmp_path), use_cpu=True)


@pytest.mark.parametrize(("variable", "name"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed")])
def test_a_back_end_that_is_not_there_is_refused(variable, name, args, monkeypatch):
    check_launched(args)
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "false")
    check_launched(args)
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(ValueError, match=f"{name} was asked for, but .* here is a cpu.*ddp.yaml, with use_cpu=true"):
        check_launched(args)
    with pytest.raises(InputError, match=f"{name} was asked for"):
        check_processes(args)


def test_processes_launched_for_a_back_end_that_do_not_know_of_each_other(args, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes were launched, but each would train alone"):
        check_processes(args)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="DeepSpeed was asked for"):
        check_processes(args)
    # As `accelerate launch` makes them: of that type from the start, together or not.
    for together in (1, 2):
        state = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, num_processes=together)
        launched = SimpleNamespace(fsdp=None, deepspeed=None, distributed_state=state, device=args.device)
        if together == 2:
            check_launched(launched)
            continue
        with pytest.raises(ValueError, match="DeepSpeed was asked for"):
            check_launched(launched)


@pytest.mark.parametrize("dispatch", [None, True, False])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stream_goes_through_the_first_process(dispatch, processes, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    config = SimpleNamespace(dispatch_batches=dispatch)
    args = SimpleNamespace(world_size=processes, accelerator_config=config)
    check_stream(DataArguments(), args)
    stream = DataArguments(streaming=True, train_file=str(tmp_path / "a.jsonl"))
    if dispatch is False and processes == 2:
        with pytest.raises(InputError, match="dispatch_batches=false would not split a stream evenly"):
            check_stream(stream, args)
    else:
        check_stream(stream, args)


@pytest.mark.parametrize(("rank", "waits"), [(None, False), ("0", False), ("1", True)])
def test_the_first_process_of_a_machine_speaks_at_once_and_the_others_later(rank, waits, monkeypatch, capsys):
    monkeypatch.setattr(clm_parser, "SPEAK_AFTER", 0.2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        leave("this is wrong")
    assert (time.monotonic() - start >= 0.2) == waits
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(": error: this is wrong\n")
