"""What docs/comparison.md and the README say in words follows from the numbers of the comparison.

Oracle: the losses in docs/comparison.json, from which differences are computed here.
"""

import json
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = " ".join((ROOT / "docs" / "comparison.md").read_text("utf-8").split())
README = " ".join((ROOT / "README.md").read_text("utf-8").split())
DATA = json.loads((ROOT / "docs" / "comparison.json").read_text("utf-8"))
COSINE, RAW, EWA, WSD, WSD_S, FREE = DATA["arms"]


def above(one, other):
    """Per cent at each horizon, in the mean of the seeds."""
    pairs = zip(one, other, strict=True)
    return [100 * statistics.fmean(a / b - 1 for a, b in zip(*seeds, strict=True)) for seeds in pairs]


def warmed(arm, horizon, **wanted):
    """The lowest loss of the first seed with a longer warm-up, and how far it is above the cosine of that seed."""
    tried = [each for each in arm["warmed"] if all(each[name] == value for name, value in wanted.items())]
    loss = min(each["losses"][horizon] for each in tried)
    return loss, 100 * (loss / COSINE["losses"][horizon][0] - 1)


RATE = EWA["rates"][-1]
TWICE = {"warmup": 0, "beta2": 0.99, "rate": 2 * RATE}
LINEAR = {"warmup": 106, "rate": 2 * FREE["rates"][-1]}
AVERAGE, DECAY = (above(arm["losses"], arm["own_raw"]) for arm in (EWA, WSD))
EWA_COSINE, FREE_COSINE = (above(arm["losses"], COSINE["losses"]) for arm in (EWA, FREE))
FREE_RAW, S_WSD = above(FREE["losses"], RAW["losses"]), above(WSD_S["losses"], WSD["losses"])
SEEDS = 100 * (max(COSINE["losses"][2]) / min(COSINE["losses"][2]) - 1)
SERVING = [arm["steps_to_serve"] for arm in (COSINE, EWA, WSD, WSD_S)]
LAST, LAST_COSINE = EWA["losses"][2][0], COSINE["losses"][2][0]
AT_106 = min(next(g["losses"] for g in COSINE["grids"] if (g["horizon"], g["warmup"]) == (1060, 106)))
HOLDS = {claim["words"]: claim["holds"] for claim in DATA["claims"]}
SAME = DATA["same_at_first_budget"]
LONGER = [longer["loss"] for longer in DATA["longer_cosines"]]
BEATEN = (COSINE["losses"][0][0], LONGER[0], COSINE["losses"][1][0], LONGER[1])

# Words of the document, and whether they are true; numbers in them are computed.
WORDS = {
    f"the seeds of the cosine at the last horizon are {SEEDS:.1f} % apart": True,
    f"the text that chooses ({DATA['settings']['evaluated'] * DATA['settings']['block']:,} tokens)": True,
    f"It ends {-AVERAGE[2]:.1f} % below its training weights at the last horizon, {-AVERAGE[1]:.1f} % at the second, "
    f"and {-AVERAGE[0]:.2f} % at the first": True,
    f"where the average is {EWA_COSINE[2]:.1f} % above": True,
    f"with 106 steps it ends {100 * (1 - AT_106 / LAST):.1f} % below the average (first seed), with "
    f"{COSINE['warmups'][2]} steps {100 * (1 - LAST_COSINE / LAST):.1f} % below": True,
    f"The cosines need {SERVING[0]} steps instead of {SERVING[1]}**": True,
    f"A decay gains {-DECAY[2]:.1f} % at the last horizon**, {-DECAY[1]:.1f} % at the second, and {-DECAY[0]:.1f} % in "
    f"its {0.2 * DATA['horizons'][0]:.0f} steps at the first": True,
    f"then {S_WSD[1]:.2f} and {S_WSD[2]:.2f} % above. It needs {SERVING[3]} steps instead of {SERVING[2]}": True,
    "equal at the first horizon, where both have taken the same steps": S_WSD[0] == 0 and SAME["wsd_s"] == SAME["wsd"],
    f"Schedule-free is {min(FREE_COSINE):.1f} to {max(FREE_COSINE):.1f} % above the cosine in the mean**": True,
    f"it is {-warmed(FREE, 0, **LINEAR)[1]:.1f} % below the cosine at 265 steps and "
    f"{warmed(FREE, 1, **LINEAR)[1]:.1f} % above at 530; nothing that was tried came nearer than "
    f"{warmed(FREE, 2)[1]:.1f} % at 1060": True,
    "It does, at 265 steps hardly: {:.3f} against {:.3f}, and {:.3f} against {:.3f} at 530".format(*BEATEN): BEATEN[0]
    < BEATEN[1]
    < 1.001 * BEATEN[0]
    and BEATEN[2] < BEATEN[3],
    f"it then ends at {warmed(EWA, 2, **TWICE)[0]:.3f} instead of {LAST:.3f}: {warmed(EWA, 2, **TWICE)[1]:.1f} % above "
    f"the cosine of the same seed instead of {100 * (LAST / LAST_COSINE - 1):.1f} %": True,
    f"Schedule-free gains {100 * (1 - warmed(FREE, 2)[0] / FREE['losses'][2][0]):.1f} % at most** at the last": True,
    "The best warm-up was the longest allowed, at every horizon": COSINE["warmups"]
    == [max(w for w in (53, 106, 212, 424) if 2 * w <= h) for h in DATA["horizons"]],
    "At every horizon it is as good as WSD": max(above(EWA["losses"], WSD["losses"])) < 0,
    "the claim holds at 265 and 530 steps and fails at 1060": [True, True, False]
    == HOLDS["The average is at most 1 % above a cosine tuned for the horizon"],
    "WSD-S stays within 1 % of WSD in the mean": all(HOLDS["WSD-S is not farther than 1 % from WSD"]),
    "ahead of raw weights at the last two horizons only": FREE_RAW[0] > 0 > max(FREE_RAW[1:]),
    "take twice the learning rate.** With beta2 0.99": warmed(EWA, 2) == warmed(EWA, 2, **TWICE),
    "and lower at the first two horizons, too": all(
        warmed(EWA, at, **TWICE)[0] < EWA["losses"][at][0] for at in (0, 1)
    ),
    "At the same learning rate no warm-up helps it at the last": warmed(EWA, 2, rate=RATE)[0] > LAST,
}


@pytest.mark.parametrize("words", WORDS)
def test_the_document_is_true(words):
    assert words in DOCUMENT and WORDS[words]


def test_the_readme_is_true():
    near = EWA_COSINE[:2] + above(WSD["losses"], COSINE["losses"])[:2]
    assert "EWA and WSD end within 1 % of the loss of the cosine at the first two lengths" in README
    assert max(map(abs, near)) < 1
    last = {f"and {above(arm['losses'], COSINE['losses'])[2]:.0f} % above it at the last." for arm in (EWA, WSD)}
    assert len(last) == 1 and last.pop() in README
    ends = [above(arm["losses"], COSINE["losses"])[2] for arm in (WSD_S, FREE)]
    assert "At the last, WSD-S ends {:.1f} % above it, and RAdamScheduleFree {:.1f} %.".format(*ends) in README
    assert f"The cosines needed {SERVING[0]} steps to have a model at each length, EWA {SERVING[1]}." in README
