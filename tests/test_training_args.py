"""`RAdamTrainingArguments`: the meaning of `auto`, names that work, and errors."""

import dataclasses
import math
import pickle
import re
from dataclasses import dataclass

import pytest
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from hf_radam import RAdamTrainingArguments
from hf_radam.names import OptimizerName, SchedulerName
from hf_radam.schedules import WSDS
from hf_radam.training_args import UPSTREAM_DEFAULT_SCHEDULE


def make(tmp_path, **options) -> RAdamTrainingArguments:
    return RAdamTrainingArguments(**{"output_dir": str(tmp_path), "max_steps": 100, "report_to": "none"} | options)


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        ({}, UPSTREAM_DEFAULT_SCHEDULE),
        ({"optim": "adamw_torch"}, UPSTREAM_DEFAULT_SCHEDULE),
        ({"optim": "radam"}, "wsd"),
        ({"optim": "radam", "warmup_steps": 5}, "wsd"),
        ({"optim": "radam", "ewa": True}, "constant"),
        ({"optim": "adamw_torch", "ewa": True, "warmup_steps": 5}, "constant_with_warmup"),
        ({"optim": "radam_schedulefree"}, "constant"),
        ({"optim": "schedule_free_radam", "warmup_steps": 0.1}, "constant_with_warmup"),
        ({"optim": "radam", "lr_scheduler_type": "cosine"}, "cosine"),
        ({"optim": "radam", "lr_scheduler_type": "wsd", "ewa": True}, "wsd"),
    ],
)
def test_auto_is_resolved_when_the_arguments_are_made(tmp_path, options, schedule):
    args = make(tmp_path, **options)
    assert args.lr_scheduler_type == schedule and args.optim != "schedule_free_radam"


def test_every_upstream_name_still_works(tmp_path):
    refused = {"schedule_free_adamw", "schedule_free_sgd"}
    for member in OptimizerNames:
        if member.value not in refused and member != OptimizerNames.SCHEDULE_FREE_RADAM:
            args = make(tmp_path, optim=member.value, max_steps=-1)
            assert args.optim == member and {member: 1}[args.optim] == 1  # found in upstream's table of optimizers
            assert type(args.optim)("radam") == "radam"  # as search back-ends set a new value
    for member in SchedulerType:
        args = make(tmp_path, lr_scheduler_type=member.value, eval_strategy="steps", eval_steps=5)
        assert SchedulerType(args.lr_scheduler_type) is member
        assert type(args.lr_scheduler_type)("wsd_s") == "wsd_s"


def test_with_none_of_our_flags_the_fields_are_upstreams(tmp_path):
    args = make(tmp_path).to_dict()
    stock = TrainingArguments(output_dir=str(tmp_path), max_steps=100, report_to="none").to_dict()
    assert {name: args[name] for name in stock} == stock
    assert not make(tmp_path).uses_hf_radam
    defaults = {f.name: f.default for f in dataclasses.fields(RAdamTrainingArguments)}
    changed = [f.name for f in dataclasses.fields(TrainingArguments) if f.default != defaults[f.name]]
    assert changed == ["lr_scheduler_type"]


def test_arguments_survive_pickle_replace_and_yaml(tmp_path):
    args = make(tmp_path, optim="radam", lr_scheduler_type="wsd_s", budgets=[40])
    for copy in (pickle.loads(pickle.dumps(args)), dataclasses.replace(args, seed=7)):
        assert (copy.optim, copy.lr_scheduler_type, copy.budgets) == ("radam", "wsd_s", [40])
        assert copy.schedule(100) == args.schedule(100)
    assert dataclasses.replace(make(tmp_path, ewa=True), ewa_decay=0.9).ewa_decay == 0.9  # another window
    for given in (True, "true", "True"):  # as in a YAML file
        assert make(tmp_path, optim="radam", fused_optimizer=given).fused_optimizer == "true"


def test_flags_on_the_command_line(tmp_path):
    (args,) = HfArgumentParser(RAdamTrainingArguments).parse_args_into_dataclasses(
        f"--output_dir {tmp_path} --optim radam --lr_scheduler_type wsd_s --budgets 0.3 700 --max_steps 1000 "
        "--ewa --ewa_every 4 --min_lr_ratio 0.1 --decay_type inverse --report_to none".split(),
        look_for_args_file=False,
    )
    assert args.optim is OptimizerName.RADAM and args.lr_scheduler_type is SchedulerName.WSD_S
    assert args.ewa and args.ewa_every == 4
    shape = {"decay_type": "inverse", "min_lr_ratio": 0.1}
    assert args.schedule(1000) == WSDS(budgets=(300, 700, 1000), decay_steps=(30, 70, 100), **shape)


REFUSED = [
    ({"optim": "radam_schedulefree", "lr_scheduler_type": "wsd"}, "needs a constant learning rate. Use auto, constant"),
    ({"optim": "schedule_free_adamw"}, "transformers evaluates and saves its gradient point"),
    ({"optim": "radam", "lr_scheduler_type": "constant", "warmup_steps": 5}, "ignores warmup_steps=5"),
    ({"optim": "radam", "decay_steps": math.nan}, "decay_steps"),
    ({"optim": "radam", "lr_scheduler_type": "wsd_s", "budgets": [150]}, "budgets=[150] must lie after step 0"),
    ({"optim": "radam", "budgets": [50]}, "budgets=[50] has no effect with lr_scheduler_type=wsd. Use wsd_s, or"),
    ({"optim": "radam", "ewa": True, "decay_steps": 0.2}, "decay_steps=0.2 has no effect with"),
    ({"optim": "radam", "lr_scheduler_kwargs": {"a": 1}}, "a has no effect with wsd. Use the flags, and here nothing"),
    ({"ewa_decay": 0.9}, "ewa_decay=0.9 has no effect without ewa. Set --ewa"),
    ({"ewa": True, "ewa_decay": 0.9, "ewa_half_life_ratio": 0.1}, "two windows for one average"),
    ({"ewa": True, "ewa_start_step": 100}, "leave no averaging in a run of 100 steps"),
    ({"ewa": True, "ewa_device": "gpu"}, "ewa_device='gpu' is not known. Use cpu"),
    ({"optim": "radam", "fused_optimizer": "yes"}, "fused_optimizer='yes' is not known. Use auto, true or false"),
    ({"optim": "adamw_torch", "fused_optimizer": "true"}, "fused_optimizer=true has no effect with optim=adamw_torch"),
    ({"optim": "radam", "learning_rate": math.nan}, "learning_rate=nan must be a finite number"),
    ({"optim": "radam", "warmup_steps": 2.5}, "warmup_steps=2.5 must be a whole number"),
    ({"optim": "radam_schedulefree", "adam_beta1": 0.0}, "beta1=0.0 leaves x undefined"),
    ({"optim": "radam_schedulefree", "optim_args": "power=2"}, "radam_schedulefree has no option 'power'"),
    ({"optim": "radam", "optim_args": "foreach=perhaps"}, "foreach='perhaps' is not valid: invalid truth value"),
    ({"recalibrate_batch_norm_batches": -1}, "recalibrate_batch_norm_batches=-1 is negative. Use 0"),
    ({"ewa": True, "bf16_full_eval": True, "use_cpu": True}, "bf16_full_eval=True leaves the parameters cast"),
    ({"ewa": True, "extend_from": "nowhere"}, "extend_from=nowhere is not a folder"),
    ({"ewa": True, "extend_from": "tests", "max_steps": -1}, "needs a new length of the run. Set --max_steps"),
    ({"lr_scheduler_type": "cosine", "extend_from": "tests"}, "extend_from=tests with lr_scheduler_type=cosine"),
    ({"ewa": True, "extend_from": "tests", "resume_from_checkpoint": "x"}, "exclude each other. Drop one"),
    ({"optim": "radam", "auto_find_batch_size": True}, "auto_find_batch_size=True begins again at step 0"),
    # Also where the length of the run is not known yet
    ({"optim": "radam", "max_steps": -1, "decay_type": "sqrt"}, "got 'sqrt'"),
    ({"optim": "radam", "max_steps": -1, "min_lr_ratio": math.nan}, "min_lr_ratio must lie in [0, 1), got nan"),
    ({"optim": "radam", "max_steps": -1, "decay_steps": math.nan}, "decay_steps must be a whole number"),
    ({"lr_scheduler_type": "wsd_s", "max_steps": -1, "budgets": [0.5, 2.5]}, "budgets must be a whole number"),
    ({"optim": "radan"}, "radan"),
    ({"lr_scheduler_type": "wds"}, "wds"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_refused_at_construction(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(tmp_path, **options)


def test_without_max_steps_the_horizon_is_checked_when_it_is_known(tmp_path):
    args = make(tmp_path, max_steps=-1, optim="radam", decay_steps=50, warmup_steps=60)
    with pytest.raises(ValueError, match="60"):
        args.schedule(100)
    args = make(tmp_path, max_steps=-1, ewa=True, ewa_start_step=200)
    with pytest.raises(ValueError, match="leave no averaging in a run of 100 steps"):
        args.check_horizon(100)


def test_options_of_the_optimizers_reach_them(tmp_path):
    options = "r=1, weight_lr_power=3.0, silent_sgd_phase=False"
    cls, kwargs = make(tmp_path, optim="radam_schedulefree", optim_args=options).optimizer_class_and_kwargs()
    assert cls.__name__ == "RAdamScheduleFree"
    assert (kwargs["r"], kwargs["weight_lr_power"], kwargs["silent_sgd_phase"]) == (1.0, 3.0, False)


@dataclass
class Further(TrainingArguments):
    """A configuration of another library: a field of its own, and changed defaults of transformers."""

    learning_rate: float = 2e-5
    logging_steps: float = 10
    rounds: int = 3


@dataclass
class First(RAdamTrainingArguments, Further):
    """Each default is that of the class that declares it, in both orders."""


@dataclass
class Last(Further, RAdamTrainingArguments):
    """Likewise."""


@pytest.mark.parametrize("kind", [First, Last])
def test_defaults_beside_those_of_another_dataclass(tmp_path, kind):
    args = kind(str(tmp_path), optim="radam", ewa=True)
    assert (args.learning_rate, args.logging_steps, args.rounds, args.lr_scheduler_type) == (2e-5, 10, 3, "constant")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    assert "radam_schedulefree" in fields["optim"].metadata["help"]
    flags = ["--output_dir", str(tmp_path), "--learning_rate", "1.0"]
    (parsed,) = HfArgumentParser([kind]).parse_args_into_dataclasses(flags)
    assert (parsed.learning_rate, parsed.logging_steps, parsed.rounds) == (1.0, 10, 3)


def test_a_class_that_is_no_dataclass_but_needs_to_be_is_refused(tmp_path):
    class Forgotten(RAdamTrainingArguments, Further):
        pass

    class Enough(First):
        """Has nothing that its one base does not have."""

    with pytest.raises(TypeError, match="Forgotten has fields of several dataclasses. Write @dataclass above it"):
        Forgotten(str(tmp_path))
    assert Enough(str(tmp_path)).logging_steps == 10
