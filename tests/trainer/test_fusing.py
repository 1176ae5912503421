"""Whether a training fuses its steps: as asked for, or wherever that is possible; and that it resumes bit for bit."""

import pytest
import tiny
import torch
from test_fused import OPTIONS, make, parameters

from hf_radam import RAdam, RAdamScheduleFree
from hf_radam.optim import fused
from hf_radam.optim.fused import agree_on_fused
from hf_radam.sharding import LocalSharding

pytestmark = pytest.mark.skipif(isinstance(fused.load_library(), str), reason=str(fused.load_library()))


def decided(caplog, given, wanted, kind=RAdamScheduleFree):
    """Return the decision and the log."""
    optimizer = make(kind, given)
    sharding = LocalSharding((str(number), p) for number, p in enumerate(given))
    caplog.clear()
    with caplog.at_level("INFO", logger="hf_radam"):
        agree_on_fused(optimizer, wanted, sharding, log=True)
    return optimizer.fused, " ".join(caplog.messages)


@pytest.mark.parametrize("kind", OPTIONS)
def test_auto_fuses_what_it_can_and_says_so(kind, caplog):
    assert decided(caplog, parameters(), "auto", kind) == (True, "The optimizer's steps are fused.")
    assert decided(caplog, parameters(), "true", kind)[0]
    assert decided(caplog, parameters(), "false", kind) == (False, "")


@pytest.mark.parametrize(
    ("given", "kind", "reason"),
    [
        (torch.zeros(10, device="meta"), RAdam, "there is no kernel for meta"),
        (torch.zeros(10, dtype=torch.complex64), RAdam, "a parameter is complex64"),
        (torch.zeros(10), RAdamScheduleFree, "there is no compiler"),
    ],
)
def test_what_cannot_be_fused_is_said(given, kind, reason, caplog, monkeypatch):
    monkeypatch.setattr(fused, "load_library", lambda: "there is no compiler")
    p = [torch.nn.Parameter(given)]
    assert decided(caplog, p, "auto", kind) == (
        False,
        f"The optimizer's steps are not fused (fused_optimizer=auto): {reason}.",
    )
    with pytest.raises(ValueError, match=f"fused_optimizer=true is not possible: {reason}. Leave it out"):
        decided(caplog, p, "true", kind)


@pytest.mark.parametrize("method", ["wsd", "schedule_free_ewa"])
def test_a_fused_run_resumes_bit_for_bit(method, tmp_path):
    options = tiny.METHODS[method] | {"fused_optimizer": "true", "save_strategy": "steps", "save_steps": 10}
    straight = tiny.trained(tmp_path / "straight", **options)
    resumed = tiny.trained(tmp_path / "resumed", **options, resume=tmp_path / "straight/checkpoint-10")
    unfused = tiny.trained(tmp_path / "unfused", **options | {"fused_optimizer": "false"})
    assert [trainer.optimizer.optimizer.fused for trainer in (straight, resumed, unfused)] == [True, True, False]
    assert tiny.same(tiny.state(straight), tiny.state(resumed))
    assert not tiny.same(tiny.parameters(straight.model), tiny.parameters(unfused.model))
