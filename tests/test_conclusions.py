"""What docs/comparison.md and the README say of the comparison in words is so in its numbers.

Oracle: the losses in docs/comparison.json, from which differences are computed here anew.
"""

import json
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = " ".join((ROOT / "docs" / "comparison.md").read_text("utf-8").split())
README = " ".join((ROOT / "README.md").read_text("utf-8").split())
DATA = json.loads((ROOT / "docs" / "comparison.json").read_text("utf-8"))
COSINE, RAW, EWA, WSD, WSD_S, FREE = DATA["arms"]


def above(losses, others):
    """Per cent at each horizon, in the mean of the seeds."""
    pairs = zip(losses, others, strict=True)
    return [100 * statistics.fmean(a / b - 1 for a, b in zip(*seeds, strict=True)) for seeds in pairs]


def below(losses, others):
    return [-difference for difference in above(losses, others)]


def warmed(arm, horizon, **wanted):
    """The lowest loss of the first seed with a longer warm-up, and how far it is above the cosine of that seed."""
    tried = [each for each in arm["warmed"] if all(each[name] == value for name, value in wanted.items())]
    loss = min(each["losses"][horizon] for each in tried)
    return loss, 100 * (loss / COSINE["losses"][horizon][0] - 1)


TWICE = {"warmup": 0, "beta2": 0.99, "rate": 2 * EWA["rates"][-1]}
AVERAGE_GAINS = below(EWA["losses"], EWA["own_raw"])
DECAY_GAINS = below(WSD["losses"], WSD["own_raw"])
AGAINST_COSINE = above(EWA["losses"], COSINE["losses"])
AGAINST_WSD = above(WSD_S["losses"], WSD["losses"])
CHECK = below(COSINE["losses"], COSINE["longest"])
SEEDS = 100 * (max(COSINE["losses"][2]) / min(COSINE["losses"][2]) - 1)
WORST = max(100 * (a / b - 1) for a, b in zip(WSD_S["losses"][2], WSD["losses"][2], strict=True))
FREE_GAINS = 100 * (1 - warmed(FREE, 2)[0] / FREE["losses"][2][0])
TUNING = [arm["updates_to_tune"] for arm in (COSINE, EWA)]
SERVING = [arm["updates_to_serve"] for arm in (COSINE, EWA, WSD, WSD_S)]


@pytest.mark.parametrize(
    "words",
    [
        f"It lies {AVERAGE_GAINS[2]:.1f} % below the weights that it is of at the last horizon and "
        f"{AVERAGE_GAINS[1]:.1f} % at the second",
        f"an average lags, {AVERAGE_GAINS[0]:.1f} %, just short of the claim",
        f"where the average is {AGAINST_COSINE[2]:.1f} % above: there the cosine has a rate of {COSINE['rates'][2]:g}",
        f"behind a warm-up of {COSINE['warmups'][2]} updates",
        f"with {SERVING[0]} updates in place of {SERVING[1]}, with {TUNING[0]} updates of tuning in place of "
        f"{TUNING[1]}, and with seeds",
        f"seeds that are {SEEDS:.1f} % apart",
        f"A decay gains {DECAY_GAINS[2]:.1f} % at the last horizon**, {DECAY_GAINS[1]:.1f} % at the second",
        f"{DECAY_GAINS[0]:.1f} % at the first, less than claimed",
        f"the same at the first horizon, then {AGAINST_WSD[1]:.2f} and {AGAINST_WSD[2]:.2f} % above",
        f"one seed is {WORST:.1f} % above. It makes {SERVING[3]} updates in place of {SERVING[2]}",
        f"nearer than {warmed(FREE, 2)[1]:.1f} % at the last",
        f"It is {CHECK[0]:.1f} and {CHECK[1]:.1f} % better",
        f"the average ends at {warmed(EWA, 2, **TWICE)[0]:.3f} instead of {EWA['losses'][2][0]:.3f}, "
        f"{warmed(EWA, 2, **TWICE)[1]:.1f} % above the cosine of the same seed",
        f"Schedule-free gains {FREE_GAINS:.1f} % at most",
    ],
)
def test_every_number_in_words(words):
    assert words in DOCUMENT


def test_what_is_said_without_numbers():
    assert EWA["rates"] == RAW["rates"] and COSINE["rates"][2] == 8 * EWA["rates"][2]
    assert all(difference < 0 for difference in above(EWA["losses"], WSD["losses"]))
    assert WSD_S["losses"][0] == WSD["losses"][0]
    assert COSINE["warmups"] == [max(w for w in (53, 106, 212, 424) if 2 * w <= h) for h in DATA["horizons"]]
    # With 0.99 and twice the rate: better at every horizon, and more than half of what is lacking at the last.
    assert all(warmed(EWA, at, **TWICE)[0] < EWA["losses"][at][0] for at in range(3))
    assert warmed(EWA, 2, **TWICE)[1] < 50 * (EWA["losses"][2][0] / COSINE["losses"][2][0] - 1)
    # A linear warm-up at twice the rate: more at the first two, nothing at the last.
    linear = [warmed(EWA, at, warmup=106, rate=TWICE["rate"])[0] for at in range(3)]
    assert all(linear[at] < warmed(EWA, at, **TWICE)[0] for at in (0, 1))
    assert linear[2] == pytest.approx(EWA["losses"][2][0], rel=1e-3)
    assert warmed(EWA, 2, rate=EWA["rates"][2])[0] > EWA["losses"][2][0]  # a longer warm-up at the same rate
    assert [difference < 0 for difference in above(FREE["losses"], RAW["losses"])] == [False, True, True]
    assert all(warmed(FREE, at, warmup=106, rate=2 * FREE["rates"][-1])[1] < 1 for at in (0, 1))


def test_the_readme():
    near = AGAINST_COSINE[:2] + above(WSD["losses"], COSINE["losses"])[:2]
    assert "Averages and WSD are within 1 % of the cosine at two horizons" in README and max(map(abs, near)) < 1
    last = {f"and {above(arm['losses'], COSINE['losses'])[2]:.0f} % above it at the last" for arm in (EWA, WSD)}
    assert len(last) == 1 and last.pop() in README
    free = above(FREE["losses"], COSINE["losses"])
    assert f"Schedule-free is {min(free):.0f} to {max(free):.0f} % above" in README
