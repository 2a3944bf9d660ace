"""What the probe lets pass and what it stops, in numbers; real engines: `test_probe_engines.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tapo_train.build.limits import probe_tolerance
from tapo_train.errors import ProbeError
from tapo_train.recipe.compose import load_recipe
from tapo_train.training.probe import Agreement, Probe, Scores, Turn, compare, could_be_sampled
from tapo_train.types import Image

PAD = 9
ROOT = Path(__file__).resolve().parent.parent


class Table:
    """Scores that are given."""

    def __init__(self, scores: npt.ArrayLike) -> None:
        self.scores = np.asarray(scores, dtype=np.float32)

    def score(
        self, tokens: npt.NDArray[np.int32], images: Sequence[Image]
    ) -> npt.NDArray[np.float32]:
        return self.scores


def turn(tokens: Sequence[int], sampled_from: int) -> Turn:
    return Turn(tokens=np.array(tokens, dtype=np.int32), images=(), sampled_from=sampled_from)


def scores(learner: npt.ArrayLike, engine: npt.ArrayLike) -> Scores:
    return Scores(
        learner=np.asarray(learner, dtype=np.float32), engine=np.asarray(engine, dtype=np.float32)
    )


def probe(tolerance: float = 0.01, *, length: int = 101) -> Probe:
    """Over `length` - 1 sampled tokens."""
    return Probe(lambda: turn([1] * length, sampled_from=1), unsampled=[PAD], tolerance=tolerance)


def test_judged_are_the_turn_and_what_of_the_prompt_either_side_finds_probable() -> None:
    asked = turn([1, 2, PAD, 4, 5, 6, 7], sampled_from=5)
    found = scores([-4.9, -0.1, -20, -30, -40, -0.2], [-6, -0.1, -4.9, -30, -0.1, -0.2])
    judged = could_be_sampled(asked, found, np.array([PAD]))
    assert judged.tolist() == [True, False, True, False, True, True]


def test_mean_quantile_maximum_and_lag_are_those_of_the_numbers() -> None:
    first = scores([-1, -2, -3, -4], [-1, -2, -3, -4])
    now = scores([-1.5, -2, -2, -4], [-1.25, -2, -2.5, -4.3])
    found = compare(now, first)
    assert found.mean == pytest.approx((0.25 + 0 + 0.5 + 0.3) / 4, abs=1e-6)
    assert found.quantile == pytest.approx(0.3 + 0.7 * 0.2, abs=1e-6)  # 2.7th of 0, .25, .3, .5
    assert found.maximum == pytest.approx(0.5, abs=1e-6)
    assert found.lag == pytest.approx(1 - (0.25 + 0.5) / (0.5 + 1.0), abs=1e-6)


def test_a_row_of_metrics_tells_the_lag_only_where_there_is_a_change() -> None:
    found = Agreement(mean=0.1, quantile=0.2, maximum=0.3, lag=None).metrics()
    assert found == {
        "probe/mean_abs_diff": 0.1,
        "probe/p90_abs_diff": 0.2,
        "probe/max_abs_diff": 0.3,
    }
    assert Agreement(mean=0.1, quantile=0.2, maximum=0.3, lag=0.4).metrics() == found | {
        "probe/lag": 0.4
    }


@pytest.mark.parametrize(
    ("difference", "where"),
    [
        (np.full(100, 0.011), "0.011 nat on average; wanted at most probe.tolerance = 0.01"),
        ([0.041] * 11 + [0] * 89, "0.041 nat or more at a tenth of the tokens; wanted at most 4"),
        ([0.51] + [0] * 99, "0.51 nat at one token; wanted at most 50 times"),
        ([np.nan] + [0] * 99, "nan nat on average"),
    ],
)
def test_differences_beyond_the_tolerance_stop_the_run(
    difference: npt.ArrayLike, where: str
) -> None:
    base = np.full(100, -1.0)
    with pytest.raises(ProbeError, match=where):
        probe()(Table(base), Table(base + np.asarray(difference)), version=3)


@pytest.mark.parametrize(
    "difference",
    [np.full(100, -0.0099), [0.039] * 11 + [0] * 89, [0.49] + [0] * 99],
)
def test_differences_within_it_do_not(difference: npt.ArrayLike) -> None:
    base = np.full(100, -1.0)
    found = probe()(Table(base), Table(base + np.asarray(difference)), version=0)
    assert found.lag is None


def test_an_engine_that_does_not_follow_is_found_below_the_tolerance() -> None:
    """Both differ by a thousandth at first; then the learner alone moves by five of them."""
    random = np.random.default_rng(0)
    base = random.uniform(-3, 0, 100)
    noise = 1e-3 * random.choice([-1, 1], (3, 100))
    change = 5e-3 * random.choice([-1, 1], 100)
    learner, engine, watched = Table(base), Table(base + noise[0]), probe()
    assert watched(learner, engine, version=0).lag is None
    learner.scores = (base + change + noise[1]).astype(np.float32)
    engine.scores = (base + change + noise[2]).astype(np.float32)
    lag = watched(learner, engine, version=1).lag
    assert lag is not None and abs(lag) < 0.3
    engine.scores = (base + noise[2]).astype(np.float32)
    with pytest.raises(ProbeError, match=r"version 2.*engine lacks .*% of the learner's change"):
        watched(learner, engine, version=2)


def test_a_change_within_the_rounding_says_nothing_about_the_engine() -> None:
    base = np.full(100, -1.0)
    learner, engine, watched = Table(base), Table(base + 2e-3), probe()
    watched(learner, engine, version=0)
    learner.scores = (base + 7e-3).astype(np.float32)
    assert watched(learner, engine, version=1).lag is None
    # Also where both agree to the last bit: float32 itself rounds.
    watched = probe()
    watched(Table(base), Table(base), version=0)
    assert watched(Table(base + 5e-6), Table(base), version=1).lag is None


def test_without_a_tolerance_of_its_own_a_recipe_has_that_of_its_number_type() -> None:
    recipe = ROOT / "recipes/demo_cpu.yaml"
    found = [
        probe_tolerance(load_recipe(recipe, overrides))
        for overrides in (
            ["model.dtype=float32"],
            ["model.dtype=bfloat16"],
            ["probe.tolerance=0.2"],
        )
    ]
    assert found == [1e-3, 0.05, 0.2]
