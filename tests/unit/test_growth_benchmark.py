"""The benchmark of growth: counted operations, predictions from two points, tables and curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from benchmarks import growth, growth_worker
from benchmarks.growth import Line, fit_values, points
from benchmarks.growth_worker import Series, Task


def task(stage: str, axis: str, values: tuple[int, ...], **options: Any) -> Task:
    limits = {"passes": 1, "call_seconds": 60.0, "gib": 64.0, "seconds": 60.0} | options
    return Task(stage, axis, values, size=64, steps=2, config="tiny", dtype="float32", threads=1, **limits)


def records(axis: str, values: list[tuple[int, float, float]]) -> list[dict[str, Any]]:
    return [
        {"value": value, "work": float(value), "seconds": seconds, "working_gib": gib} for value, seconds, gib in values
    ]


def test_operations_grow_with_pixels_and_attention_with_their_square() -> None:
    counts = growth_worker.operations(task("movq", "size", (64, 128, 256)))
    assert counts is not None
    first, second, third = counts.values()
    linear, square = (16 * first - second) / 12, (second - 4 * first) / 12  # first = linear + square
    assert linear > 0 and square > 0
    assert third == pytest.approx(16 * linear + 256 * square)


def test_a_line_goes_through_two_points() -> None:
    line = Line.through((1.0, 3.0), (3.0, 7.0))
    assert (line.fixed, line.rate, line.at(10.0)) == (1.0, 2.0, 21.0)


def test_the_second_fitted_value_is_in_the_middle() -> None:
    assert fit_values((512, 768, 1024, 1536, 2048)) == (512, 1024)
    assert fit_values((1, 2)) == (1, 2)


def test_predictions_are_fitted_on_two_points_and_the_shortest_call_counts() -> None:
    measured = points("batch", [*records("batch", [(1, 3.0, 1.0), (2, 5.0, 2.0), (4, 7.5, 4.0)]),
                                *records("batch", [(1, 2.0, 1.0), (4, 9.0, 3.0)])])  # fmt: skip
    assert [point.seconds for point in measured] == [2.0, 5.0, 7.5]
    # The line goes through 1 and 2, which is in the middle of three values.
    assert [point.predicted_seconds for point in measured] == [2.0, 5.0, 11.0]
    assert [point.fitted for point in measured] == [True, True, False]
    assert measured[2].time_deviation == pytest.approx(7.5 / 11 - 1)
    assert measured[2].memory_deviation == 0


def test_memory_is_linear_in_pixels_and_independent_of_steps() -> None:
    by_size = points("size", records("size", [(1, 1.0, 2.0), (2, 1.0, 5.0), (4, 1.0, 17.0)]))
    assert [point.predicted_gib for point in by_size] == [2.0, 5.0, 17.0]
    by_steps = points("steps", records("steps", [(1, 1.0, 2.0), (2, 2.0, 2.1), (4, 4.0, 3.0)]))
    assert [point.predicted_gib for point in by_steps] == [2.0, 2.0, 2.0]
    assert points("size", records("size", [(1, 1.0, 2.0)])) == []


REPORT = {
    "options": {"dtype": "float32", "threads": 1, "config": "tiny", "passes": 1, "base_size": 64},
    "machine": {"processor": "CPU", "cores": 2, "memory_gib": 8.0, "load": 0.5, "versions": {"torch": "2"}},
    "elapsed": 60.0,
    "left_out": ["guided UNet step, size 4096 (about 300 s a call)"],
    "series": [
        {"stage": "unet", "axis": "size", "records": records("size", [(1, 1.0, 1.0), (2, 2.0, 4.0), (4, 6.0, 16.0)])},
        {"stage": "prior", "axis": "steps", "records": records("steps", [(2, 2.0, 1.0), (4, 4.0, 1.0)])},
    ],
}


def test_deviations_above_a_tenth_are_marked_and_listed() -> None:
    text = growth.markdown(REPORT)
    assert "**+50 %**" in text
    assert "- guided UNet step by size, 4: time +50 %" in text
    assert "memory +" not in text
    assert "Left out: guided UNet step, size 4096" in text


def test_a_page_has_tables_and_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "growth.md"
    page.write_text(f"# Growth\n\n{growth.BEGIN}\n{growth.END}\n")
    growth.write_page(page, REPORT)
    text = page.read_text()
    assert "![Time and working memory](growth.svg)" in text and "## Prior by steps" in text
    assert ElementTree.parse(tmp_path / "growth.svg").getroot().tag.endswith("svg")


@pytest.mark.slow
@pytest.mark.parametrize("stage", growth_worker.STAGES)
def test_a_series_runs_and_leaves_out_what_is_beyond_the_limits(stage: str) -> None:
    reported: list[dict[str, Any]] = []
    Series(task(stage, "batch", (1, 2)), reported.append).run()
    assert [entry["value"] for entry in reported] == [1, 2]
    assert all(entry["seconds"] > 0 for entry in reported)
    reported.clear()
    Series(task(stage, "batch", (1, 2), call_seconds=0.0), reported.append).run()
    assert "seconds" in reported[0] and reported[1]["left_out"].endswith("s a call")
