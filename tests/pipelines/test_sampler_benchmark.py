"""The benchmark of samplers: comparable cells, stored measurements, and written pages."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import sampler_cells, sampler_curves, sampler_report, samplers
from benchmarks.sampler_cells import KINDS, SPECIFICATION, Cell
from benchmarks.samplers import Bench

from kandinsky22 import KandinskyV22CombinedPipeline
from kandinsky22.noise import randn_tensor
from kandinsky22.sampling.presets import Preset, Sampler

PAGE = Path(__file__).parents[2] / "docs" / sampler_report.PAGE
QUICK = Cell(KINDS["DDIM"].steps(2), KINDS["DPM++ 2M"].steps(2))
SHORT = Preset(QUICK.decoder, QUICK.prior)


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, combined: KandinskyV22CombinedPipeline) -> list[str]:
    """Arguments for four prompts on a tiny model, and a grid of two cells."""
    load = lambda name: KandinskyV22CombinedPipeline(**combined.components)  # noqa: E731 (the tiny model replaces the embedded one)
    monkeypatch.setattr(samplers.AutoPipelineForText2Image, "from_pretrained", load)
    monkeypatch.setattr(samplers, "REFERENCE", Cell(KINDS["DPM++ 2M"].steps(40)))
    monkeypatch.setattr(samplers, "grid", lambda: {group: [QUICK] for group in samplers.SUCCESS_GROUPS})
    monkeypatch.setattr(samplers, "distance_grid", lambda: [Cell(KINDS["DDIM"].steps(3))])
    (tmp_path / sampler_report.PAGE).write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    outputs = ["--results", str(tmp_path / "new" / "samplers.jsonl"), "--docs", str(tmp_path)]
    return ["--count", "4", "--references", "2", *outputs]


@pytest.fixture
def bench(options: list[str]) -> Bench:
    return Bench(samplers.parse(options))


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "new" / "samplers.jsonl").read_text().splitlines()]


def test_a_rerun_resumes_the_last_run(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samplers.main([*options, "--only", "presets", "others", "time"])
    assert [record["kind"] for record in records(tmp_path)] == ["success", "success", "success", "time"]
    assert len(records(tmp_path)[0]["right"]) == 4
    monkeypatch.setattr(Bench, "measure_success", None)
    monkeypatch.setattr(Bench, "measure_times", None)
    samplers.main(options)
    assert [record["kind"] for record in records(tmp_path)][3:] == ["time", "distance"]
    with pytest.raises(TypeError):  # these prompts were not measured
        samplers.main([*options, "--seed", "3"])


def test_measurements_of_other_weights_do_not_count(
    bench: Bench, options: list[str], combined: KandinskyV22CombinedPipeline
) -> None:
    bench.measure_success(QUICK)
    assert Bench(samplers.parse(options)).find("success", QUICK) is not None
    assert bench.find("success", Cell(KINDS["DDIM"].steps(3), QUICK.prior)) is None
    assert bench.find("time", QUICK) is None
    weight = next(combined.unet.parameters())
    weight.data.add_(1)
    record_found = Bench(samplers.parse(options)).find("success", QUICK)
    weight.data.sub_(1)
    assert record_found is None


@pytest.mark.parametrize("name", ["scheduler", "prior_scheduler"])
def test_measurements_of_other_scheduler_files_do_not_count(
    bench: Bench, options: list[str], combined: KandinskyV22CombinedPipeline, name: str
) -> None:
    """Both a changed setting and a setting that the file leaves to the class count as another file."""
    bench.measure_success(QUICK)
    file_scheduler = getattr(combined, name)
    without_setting = file_scheduler.from_config(
        {key: value for key, value in file_scheduler.config.to_json().items() if key != "clip_sample"}
    )
    assert without_setting.config.clip_sample is file_scheduler.config.clip_sample
    for other in (file_scheduler.from_config(file_scheduler.config, clip_sample_range=3.0), without_setting):
        setattr(combined, name, other)
        assert Bench(samplers.parse(options)).find("success", QUICK) is None
    setattr(combined, name, file_scheduler)
    assert Bench(samplers.parse(options)).find("success", QUICK) is not None


def test_other_prompts_leave_the_page_alone_and_print_their_presets(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sampler_report, "SPECIFICATION", SHORT)
    balanced = dataclasses.replace(SHORT, decoder=QUICK.prior)
    monkeypatch.setattr(sampler_report, "presets", lambda: {"balanced": balanced})
    cells = [Cell.of(preset) for preset in (SHORT, balanced)]
    monkeypatch.setattr(samplers, "grid", lambda: {group: cells for group in samplers.SUCCESS_GROUPS})
    samplers.main([*options, "--only", "presets", "others"])
    page = (tmp_path / sampler_report.PAGE).read_text(encoding="utf-8")
    capsys.readouterr()
    samplers.main([*options, "--seed", "2", "--report"])
    assert (tmp_path / sampler_report.PAGE).read_text(encoding="utf-8") == page
    printed = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    written = [line.split(" | ") for line in page.splitlines() if line.startswith("| `balanced`")]
    assert printed[3][0] == "| `balanced`"
    assert printed[3][5].split(" (")[0] == written[1][3].split(" (")[0]
    right = [record["right"].count("1") for record in records(tmp_path)][1::2]
    assert written[1][4].startswith(f"{100 * sum(right) / 12:.1f} %")


def test_a_picture_depends_on_neither_batch_nor_cells_before(bench: Bench) -> None:
    together = bench._generate(QUICK, bench.prompts)(bench.prompts)
    bench._generate(Cell(KINDS["DDPM"].steps(3)), bench.prompts)(bench.prompts[:1])
    bench._embeddings.clear()
    bench.batch = 1
    alone = [bench._generate(QUICK, bench.prompts)([prompt])[0] for prompt in bench.prompts]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_every_cell_starts_from_the_same_noise(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[torch.Tensor]] = {}

    def record(*arguments: Any, **keywords: Any) -> torch.Tensor:
        noise = randn_tensor(*arguments, **keywords)
        drawn[cell.prior.scheduler].append(noise)
        return noise

    monkeypatch.setattr("kandinsky22.pipelines.denoising.randn_tensor", record)
    for prior in (KINDS["UnCLIP (specification)"].steps(3), KINDS["DPM++ 2M"].steps(2)):
        cell = Cell(QUICK.decoder, prior)
        drawn[prior.scheduler] = []
        bench._generate(cell, bench.distance_prompts)(bench.distance_prompts)
    for one, other in zip(*drawn.values(), strict=True):
        assert torch.equal(one, other)
    assert {noise.ndim for noise in drawn["UnCLIPScheduler"]} == {2, 4}
    flat = [noise.flatten()[:8] for noise in drawn["UnCLIPScheduler"]]
    assert not torch.equal(flat[0], flat[-1])


def test_the_distance_falls_with_the_steps_and_vanishes_at_the_solution(bench: Bench) -> None:
    short, long = (Cell(KINDS["Euler"].steps(steps)) for steps in (2, 12))
    for cell in (short, long, samplers.REFERENCE):
        bench.measure_distance(cell)
    near, far, same = (bench.find("distance", cell)["distance"] for cell in (long, short, samplers.REFERENCE))
    assert same < 1e-6 < near < far / 2


def test_differences_are_those_of_pairs() -> None:
    base = {"right": "1" * 90 + "0" * 10}
    assert sampler_report.difference(base, base)[0] == 0
    gap, low, high = sampler_report.difference({"right": "1" * 85 + "0" * 15}, base)
    assert gap == pytest.approx(-0.05)
    assert low < -0.05 < high
    # With equal shares, more changes per pair widen the interval.
    other = {"right": "0" * 10 + "1" * 80 + "1" * 5 + "0" * 5}
    assert sampler_report.difference(other, base)[0] == pytest.approx(-0.05)
    assert sampler_report.difference(other, base)[1] < low


def test_every_measurement_has_a_table_and_a_style(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record_found = {
        "right": "1011",
        "evaluations": 3,
        "prior_evaluations": 2,
        "distance": 0.1,
        "median": 1.0,
        "faster": 1.0,
    }
    page = PAGE.read_text(encoding="utf-8")
    for name, text in sampler_report.tables(
        lambda kind, cell: record_found, {1: lambda kind, cell: record_found}
    ).items():
        page = sampler_report.fill(page, name, text)
    assert page.count("75.0 %") > 20
    curves = sampler_curves.draw_curves(
        lambda kind, cell: {**record_found, "evaluations": cell.decoder.steps}, tmp_path
    )
    assert [path.name for path in curves if path.stat().st_size] == [
        "samplers-success.svg",
        "samplers-distance.svg",
        "samplers-time.svg",
    ]
    assert all(f"({path.name})" in page for path in curves)
    nothing = sampler_report.tables(lambda kind, cell: None, {1: lambda kind, cell: record_found})
    assert nothing["presets"] == nothing["others"] == sampler_report.NOT_MEASURED
    with pytest.raises(ValueError, match="no markers for decoder"):
        sampler_report.fill("a page", "decoder", "")


def test_methods_are_known_by_name() -> None:
    assert sampler_cells.name_of(SPECIFICATION.decoder) == "DDPM (specification)"
    assert sampler_cells.name_of(Sampler("LCMScheduler", 4, {"timestep_spacing": "linspace"})) == (
        "LCM (timestep_spacing=linspace)"
    )
    assert set(sampler_curves.STYLES) <= set(KINDS)
    distances = {sampler_cells.name_of(cell.decoder) for cell in sampler_cells.distance_grid()}
    assert distances == {name for name, kind in KINDS.items() if not kind.draws_noise} <= set(sampler_curves.STYLES)
