"""Curves, scales and drawings."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.report import axes, chart
from gemma_tune.report.curves import Chart, Curve, Sheet, make_charts, unused_keys
from gemma_tune.report.series import DRAWN, columns, make_series, speeds, trend

NUMBERS = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12)


def chart_of(values: list[tuple[int, float | None]], **sheet: object) -> Chart:
    one = make_series("training", values, "train")
    assert one is not None
    return Chart(Sheet("Loss", "nats", (), **sheet), (one,))  # type: ignore[arg-type]


def test_a_long_curve_keeps_its_extremes() -> None:
    values = [(step, math.sin(step / 999)) for step in range(100_000)]
    values[54_321] = (54_321, 9.0)
    values[77_777] = (77_777, -9.0)
    one = make_series("x", values)
    assert one is not None and len(one.points) <= DRAWN and one.gathered
    assert max(point.high for point in one.points) == one.highest[1] == 9.0 and one.highest[0] == 54_321
    assert min(point.low for point in one.points) == one.lowest[1] == -9.0 and one.lowest[0] == 77_777
    assert one.first == values[0] and one.last == values[-1] and one.points[-1].step == 99_999


def test_a_short_curve_is_itself() -> None:
    one = make_series("x", [(1, 3.0), (2, None), (3, 5.0)], scale=2.0)
    assert one is not None and [(point.step, point.mean) for point in one.points] == [(1, 6.0), (3, 10.0)]
    assert one.missing == (2,) and not one.gathered
    assert make_series("x", [(1, None)]) is None and make_series("x", []) is None


def test_what_is_no_number_is_missing() -> None:
    rows = [{"step": 1, "a": None, "b": True, "c": "1"}, {"step": 2, "a": math.nan, "c": math.inf}, {"a": 1.0}]
    assert columns(rows)["a"] == [(1, None), (2, None)]
    assert columns(rows)["b"] == [(1, None)] and columns(rows)["c"] == [(1, None), (2, None)]


def test_speed_is_that_of_a_step_not_of_the_run() -> None:
    rows = [
        {"step": 0, "tokens_seen": 0, "train_seconds": 0.0},
        {"step": 1, "tokens_seen": 100, "train_seconds": 1.0},
        {"step": 1, "tokens_seen": 100, "train_seconds": 1.0, "eval_loss": 1.0},
        {"step": 2, "tokens_seen": 400, "train_seconds": 2.0},
    ]
    assert speeds(rows) == [(1, 100.0), (2, 300.0)]


def test_a_trend_follows_and_a_spike_does_not_move_the_spiky_one() -> None:
    one = make_series("x", [(step, 100.0 if step == 50 else 1.0) for step in range(100)])
    assert one is not None
    plain, robust = trend(one.points), trend(one.points, spiky=True)
    assert plain is not None and robust is not None
    assert max(plain) > 5 and set(robust) == {1.0}
    assert trend(one.points[:20]) is None


@settings(max_examples=200, deadline=None)
@given(NUMBERS, NUMBERS)
def test_a_linear_scale_holds_its_values_and_few_ticks(first: float, second: float) -> None:
    low, high = sorted((first, second))
    scale = axes.linear(low, high, 100.0, 0.0)
    rounding = 1e-8 * (scale.high - scale.low)
    assert scale.low - rounding <= low <= high <= scale.high + rounding
    assert 2 <= len(scale.ticks) <= 8
    assert len({text for _, text in scale.ticks}) == len(scale.ticks), "labels tell ticks apart"
    for value, _ in scale.ticks:
        assert -1e-6 <= scale.place(value) <= 100 + 1e-6


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 8.7, ["0.0", "2.5", "5.0", "7.5", "10.0"]),
        (-120, -57, ["−120", "−100", "−80", "−60", "−40"]),
        (0.0, 2e-4, ["0", "5e−5", "1e−4", "1.5e−4", "2e−4"]),
        (3.0, 3.0, ["2.6", "2.8", "3.0", "3.2", "3.4"]),
    ],
)
def test_ticks_are_round(low: float, high: float, labels: list[str]) -> None:
    assert [text for _, text in axes.linear(low, high, 0, 1).ticks] == labels


def test_powers_of_ten() -> None:
    scale = axes.logarithmic(0.002, 700.0, 100.0, 0.0)
    assert [text for _, text in scale.ticks] == ["0.001", "0.1", "10", "1,000"]
    assert scale.place(0.001) == 100 and scale.place(1000) == 0 and scale.place(1.0) == pytest.approx(50)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), NUMBERS), min_size=1, max_size=400).filter(any), st.booleans(), st.booleans())
def test_every_drawing_stays_on_its_sheet(values: list[float | None], spiky: bool, share: bool) -> None:
    one = chart_of(list(enumerate(values)), spiky=spiky, share=share, wide=True)
    for (_, drawing), (width, height) in zip(chart.drawings(one), (chart.WIDE, chart.NARROW), strict=True):
        assert "nan" not in drawing and "inf" not in drawing
        line = re.search(r'<path class="line train" d="([^"]*)"', drawing)
        assert line
        numbers = [float(text) for text in re.findall(r"-?\d+\.\d+", line[1])]
        assert all(0 <= place <= width for place in numbers[::2]) and all(
            0 <= place <= height for place in numbers[1::2]
        )


def test_a_spike_asks_for_powers_of_ten_only_where_it_may() -> None:
    values = [(step, 500.0 if step == 9 else 1.0) for step in range(1, 20)]
    assert ">1,000<" in chart.svg(chart_of(values, spiky=True), *chart.NARROW)
    assert ">1,000<" not in chart.svg(chart_of(values), *chart.NARROW)


def test_names_at_the_ends_do_not_lie_on_one_another() -> None:
    series = [make_series(name, [(1, 1.0), (2, 1.0 + index / 1000)]) for index, name in enumerate(("a", "b", "c"))]
    drawing = chart.svg(Chart(Sheet("x", "", ()), tuple(one for one in series if one)), *chart.NARROW)
    heights = sorted(float(text) for text in re.findall(r'class="name[^>]* y="([\d.]+)"', drawing))
    assert len(heights) == 3 and min(b - a for a, b in pairwise(heights)) >= 13.9


def test_the_read_out_has_the_texts_of_the_points() -> None:
    one = chart_of([(1, 0.25), (2, 0.5)], share=True)
    (series,) = json.loads(chart.data(one))["series"]
    assert series["steps"] == [1, 2] and series["texts"] == ["25.0 %", "50.0 %"] and series["name"] == "training"
    assert chart.summary(one).startswith("Loss, nats. training: 25.0 % at step 1 to 50.0 % at step 2")


def test_memory_has_the_estimate_and_the_device_where_it_is_near() -> None:
    rows = [{"step": step, "peak_cuda": 8 * 2**30} for step in (1, 2)]
    (near,) = make_charts("sft", rows, estimate=9 * 2**30, room=10 * 2**30)
    assert [text for _, text in near.marks] == ["estimated 9.00 GiB", "the device has 10.00 GiB"]
    (far,) = make_charts("sft", rows, estimate=9 * 2**30, room=80 * 2**30)
    assert [text for _, text in far.marks] == ["estimated 9.00 GiB"]


def test_keys_that_no_chart_shows_are_named() -> None:
    assert unused_keys("sft", [{"step": 1, "loss": 1.0, "mine": 2.0}]) == ["mine"]
    assert Curve("loss", "training").scale == 1.0
