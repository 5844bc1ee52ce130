"""The benchmark against the reference: stages compute the same in both libraries, and measurements are reported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from benchmarks import compare, compare_report, compare_switches, compare_weights, machine
from benchmarks.compare_stages import OURS, STAGES, THEIRS, Setting
from benchmarks.compare_worker import Server, Worker

from kandinsky22.kernels import settings
from kandinsky22.kernels.linear import apply_linear

SIZE = compare_weights.SIZES["tiny"]
TOLERANCE = 1e-4  # relative, for a chain of random networks in float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    created = tmp_path_factory.mktemp("compare")
    for part in compare_weights.PARTS:
        compare_weights.make(created, "tiny", part)
    return created


def setting(folder: Path, library: str, stage: str, **options: Any) -> Setting:
    return Setting(library, stage, str(folder), size=SIZE, prior_steps=4, steps=2, **options)


def flat(result: Any) -> torch.Tensor:
    return torch.cat([tensor.float().flatten() for tensor in (result if isinstance(result, list) else [result])])


# Stages


@pytest.mark.parametrize("full", [False, True], ids=["thin", "full"])
@pytest.mark.parametrize("stage", ["text", "prior", "step", "decode", "picture"])
def test_a_stage_gives_the_same_in_both_libraries(folder: Path, stage: str, full: bool) -> None:
    theirs, ours = (
        flat(STAGES[stage](setting(folder, library, stage, full_towers=full)).call(0)) for library in (THEIRS, OURS)
    )
    assert theirs.std() > 0.01
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < TOLERANCE


@pytest.mark.parametrize("stage", ["text", "prior", "step", "decode"])
def test_calls_differ_so_that_caches_of_the_last_call_do_not_help(folder: Path, stage: str) -> None:
    ours = STAGES[stage](setting(folder, OURS, stage))
    assert not torch.equal(flat(ours.call(1)), flat(ours.call(2)))


def test_the_thin_towers_have_one_layer_and_the_full_ones_all_and_half_precision(folder: Path) -> None:
    for part, layers, kind in (("prior", 1, "float32"), ("prior-full", 2, "float16")):
        config = json.loads((folder / part / "image_encoder" / "config.json").read_text())
        assert (config["num_hidden_layers"], config["dtype"]) == (layers, kind)
    assert (folder / "prior-full/prior/diffusion_pytorch_model.safetensors").samefile(
        folder / "prior/prior/diffusion_pytorch_model.safetensors"
    )


def test_low_memory_and_fast_stages_give_pictures(folder: Path) -> None:
    baseline = STAGES["picture"](setting(folder, OURS, "picture")).call(0)
    low = STAGES["low-memory"](setting(folder, OURS, "low-memory", low_memory=True)).call(0)
    assert float((low - baseline).abs().max()) < 1e-4
    fast = STAGES["fast"](setting(folder, OURS, "fast", quality="draft")).call(0)
    assert fast.shape == baseline.shape
    assert not torch.equal(fast, baseline)


def test_feature_caching_and_compilation_act(folder: Path) -> None:
    baseline, cached = (
        STAGES["fast"](setting(folder, OURS, "fast", quality="draft", caching=every)).call(0) for every in (None, 2)
    )
    assert not torch.equal(baseline, cached)
    compiled = STAGES["step"](setting(folder, OURS, "step", compiled=True))
    assert any(module._compiled_call_impl is not None for module in compiled.unet.modules())


def test_quantized_weights_are_used(folder: Path) -> None:
    pytest.importorskip("torchao")
    baseline, quantized = (STAGES["step"](setting(folder, OURS, "step", quantize=kind)) for kind in (None, "int8"))
    one, other = flat(baseline.call(0)), flat(quantized.call(0))
    assert 0 < float((one - other).abs().max() / one.abs().max()) < 0.2


def test_a_pause_does_not_count_and_separates_peaks(folder: Path) -> None:
    server = Server(setting(folder, OURS, "picture"))
    server.start()
    measured = server.do_call(0)
    assert server.stage is not None
    assert server.stage.pause > 0
    assert measured["seconds"] == pytest.approx(measured["wall"] - server.stage.pause)
    assert len(server.do_memory()["peaks"]) == 2


def test_loading_is_timed_apart_from_importing(folder: Path) -> None:
    server = Server(setting(folder, OURS, "load"))
    measured = server.start()
    assert set(measured) == {"import", "load", "cpu"}
    assert min(measured.values()) > 0
    assert [type(pipe).__name__ for pipe in server.stage.pipes] == ["KandinskyV22PriorPipeline", "KandinskyV22Pipeline"]
    assert server.stage.operations(machine.count_operations) is None


# Arithmetic


@pytest.mark.parametrize("packed", [False, True])
def test_operations_of_layers_are_counted_packed_or_not(packed: bool) -> None:
    linear = torch.nn.Linear(512, 256).requires_grad_(False)
    query = torch.randn(1, 2, 8, 16)
    convolution, picture = torch.nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 8, 8)

    def call() -> None:
        with torch.no_grad():
            apply_linear(linear, torch.randn(64, 512))
            torch.nn.functional.scaled_dot_product_attention(query, query, query)
            convolution(picture)

    with settings.optimisations(packed_linear=packed):
        counts = machine.count_operations(call)
    assert counts["product"] == 2 * 64 * 512 * 256 + 2 * (2 * 2 * 8 * 8 * 16)
    assert counts["convolution"] == 2 * 2 * 5 * 8 * 8 * 3 * 9


def test_packed_convolutions_are_counted() -> None:
    features = torch.randn(2, 16, 8, 8)
    call = machine._packed_convolution(features, torch.randn(32, 16, 3, 3))
    if call is None:
        pytest.skip("this torch has no packed convolutions")
    assert machine.count_operations(call) == {"convolution": 2 * 2 * 32 * 64 * 16 * 9, "product": 0}


def test_prior_operations_are_extrapolated_from_two_and_three_steps(folder: Path) -> None:
    theirs, ours = (STAGES["prior"](setting(folder, library, "prior")) for library in (THEIRS, OURS))
    measured = theirs.operations(machine.count_operations)
    assert measured == machine.count_operations(lambda: theirs.call(-1, 4))  # equal to a count of the whole call
    mine = ours.operations(machine.count_operations)
    assert measured is not None
    assert mine is not None
    assert 0 < mine["product"] < measured["product"] / 3


def test_a_step_needs_at_most_the_references_operations(folder: Path) -> None:
    theirs, ours = (
        STAGES["step"](setting(folder, library, "step")).operations(machine.count_operations)
        for library in (THEIRS, OURS)
    )
    assert theirs is not None
    assert ours is not None
    assert 0 < ours["product"] < theirs["product"]
    assert 0 < ours["convolution"] <= theirs["convolution"]


def test_peak_throughputs_are_measured() -> None:
    result = machine.peaks("float32", seconds=0.0, small=True)
    assert set(result) == {"convolution", "product"}
    assert min(result.values()) > 1e6


def test_memory_is_read_from_a_status_file(tmp_path: Path) -> None:
    file = tmp_path / "status"
    file.write_text("Name:\tx\nVmHWM:\t 3145728 kB\nRssAnon:\t 1048576 kB\n")
    assert machine.status("VmHWM", file) == 3.0
    assert machine.status("RssAnon", file) == 1.0
    assert machine.status("RssAnon", tmp_path / "none") is None
    assert machine.peak_memory() > 0.05


# Switches


def test_one_optimisation_is_off_at_a_time(folder: Path) -> None:
    assert {"packed_linear", "batched_timesteps"} <= set(compare_switches.available("prior"))
    assert "batched_timesteps" not in compare_switches.available("decode")
    stage = STAGES["prior"](setting(folder, OURS, "prior"))
    everything_on = settings.current()
    reference = flat(stage.call(0))
    for name in compare_switches.available("prior"):
        with compare_switches.without(name):
            assert settings.current() == dataclasses.replace(everything_on, **{name: False})
            assert float((flat(stage.call(0)) - reference).abs().max() / reference.abs().max()) < TOLERANCE
    with compare_switches.without(None):
        assert settings.current() == everything_on
    assert settings.current() == everything_on


def test_a_worker_switches_off_one_optimisation_during_its_calls(folder: Path) -> None:
    server = Server(setting(folder, OURS, "decode"))
    server.start()
    assert server.stage is not None
    during: list[settings.Optimisations] = []
    server.stage.call = lambda number: during.append(settings.current())  # type: ignore[method-assign]
    for name in ("winograd", None):
        server.answer({"do": "switch", "off": name})
        server.answer({"do": "call", "number": 1})
    assert [(state.winograd, state.packed_linear) for state in during] == [(False, True), (True, True)]


def test_switches_are_optimisations_of_this_version() -> None:
    assert set(compare_switches.available()) <= set(settings.NAMES)
    with pytest.raises(TypeError, match="no field 'nothing'"):
        compare_switches.without("nothing")


# Processes


def test_a_worker_answers_over_pipes_and_reports_its_error(folder: Path) -> None:
    measured = setting(folder, OURS, "")
    with Worker(measured) as worker:
        assert set(worker.ask("peaks", small=True)) == {"convolution", "product"}
        assert worker.ask("memory")["peaks"][0] > worker.own_memory / 2 > 0.01
        with pytest.raises(RuntimeError, match="do_nonsense"):
            worker.ask("nonsense")


@pytest.mark.slow
def test_a_run_writes_tables_and_reports_equal_results(folder: Path, tmp_path: Path) -> None:
    options = ["--config", "tiny", "--folder", folder, "--out", tmp_path, "--threads", 1, "--only", "decode"]
    assert compare.main([*map(str, options), "--rounds", "2", "--switches"]) == 0
    result = json.loads((tmp_path / "compare.json").read_text())
    assert [(r["stage"], r["library"], len(r["seconds"])) for r in result["records"]] == [
        ("decode", library, 2) for library in (THEIRS, OURS)
    ]
    assert all(record["peaks"][0] > record["own_memory"] > 0.05 for record in result["records"])
    assert result["differences"][0]["difference"] < TOLERANCE
    assert {entry["off"] for entry in result["switches"]} == set(compare_switches.available("decode"))
    page = (tmp_path / "compare.md").read_text()
    assert page == compare_report.page(result)
    assert ElementTree.fromstring((tmp_path / "compare.svg").read_text()).tag.endswith("svg")


# Options


@pytest.mark.parametrize(
    "words", ["--rounds 0", "--threads 0", "--size 100", "--prior-steps 2", "--only nothing", "--dtype int3"]
)
def test_invalid_options_are_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.parse(words.split())
    assert words.split()[0] in capsys.readouterr().err


def test_a_folder_of_another_config_is_refused(folder: Path) -> None:
    compare_weights.ensure(folder, "tiny", compare_weights.PARTS)
    with pytest.raises(ValueError, match="does not have the published config"):
        compare_weights.ensure(folder, "published", ("decoder",))


def test_clock_allows_a_first_round_of_each_part_and_more_while_time_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(compare.time, "perf_counter", lambda: now[0])
    clock = compare.Clock(1.0, parts=2)
    assert clock.next_part()
    now[0] = 20.0
    assert clock.another(9.0)
    assert not clock.another(11.0)
    now[0] = 59.0
    assert clock.next_part()
    now[0] = 61.0
    assert not clock.next_part()
    assert compare.Clock(None, parts=1).another(1e9)


# Reports


def run_result(ours: list[float], difference: float = 1e-6) -> dict[str, Any]:
    """Return the result of a run of the step alone, in which the reference takes 2, 3 and 40 seconds."""
    common = {
        "stage": "step",
        "dtype": "fp32",
        "cpu": [1.0, 1.0, 1.0],
        "peaks": [4.0],
        "own_memory": 1.0,
        "load": [1.0],
    }
    work = {"convolution": 10**12, "product": 10**12}
    return {
        "options": {**vars(compare.parse([])), "threads": 1},
        "machine": machine.describe(),
        "elapsed": 60.0,
        "left_out": ["decode, fp32: no time was left"],
        "switches": [],
        "peaks": [{"dtype": "fp32", "convolution": 1e12, "product": 2e12}],
        "differences": [{"stage": "step", "dtype": "fp32", "difference": difference}],
        "records": [
            {**common, "library": THEIRS, "seconds": [2.0, 3.0, 40.0], "operations": work},
            {**common, "library": OURS, "seconds": ours, "operations": work},
        ],
    }


def test_the_ratio_is_the_median_of_the_rounds_ratios() -> None:
    theirs, ours = run_result([1.0, 3.0, 2.0])["records"]
    assert (
        compare_report.times_as_fast(theirs, ours) == 2.0
    )  # the median of 2, 1 and 20; the ratio of the medians is 1.5


def test_the_report_has_shares_of_the_peak_and_omissions() -> None:
    page = compare_report.markdown(run_result([2.0, 3.0, 3.0]))
    assert "| guided UNet step | 3 | 3 | 1.00 | 1.3 | 1.0e-06 |" in page
    assert "| guided UNet step, kandinsky22 | 1 | 1 | 1.5 | 3 | 50 % |" in page
    assert "The peaks are 1000 GFLOP/s for convolutions and 2000 GFLOP/s for products." in page
    assert "- guided UNet step: 2 s; ours takes 1.50 times that." in page
    assert "Left out: decode, fp32: no time was left." in page


def test_the_report_has_imports_and_memory_of_whole_pictures() -> None:
    run = run_result([1.0, 1.0, 1.0])
    theirs, ours = run["records"]
    for name, library, peaks in (("load", theirs, [9.0]), ("load", ours, [3.0])):
        run["records"].append({**library, "stage": name, "peaks": peaks, "import": [6.0, 6.0, 6.0]})
    for library, peaks in ((theirs, [14.0, 7.0]), (ours, [4.0, 7.0])):
        run["records"].append({**library, "stage": "picture", "peaks": peaks})
    page = compare_report.markdown(run)
    assert "| import | 6 | 6 | 1.00 |" in page
    assert "| load both pipelines | 3 | 1 | 3.00 | 3 |" in page
    assert "| text to image, 4 steps | 14.00 + 7.00 | 4.00 + 7.00 |" in page
    assert "Our peak is 0.33 of the sum of the reference's two pipelines" in page


@pytest.mark.parametrize(("difference", "wrong"), [(1e-6, []), (2e-3, ["step"]), (float("nan"), ["step"])])
def test_differing_float32_results_are_reported(difference: float, wrong: list[str]) -> None:
    assert compare_report.wrong_stages(run_result([1.0, 1.0, 1.0], difference)) == wrong


def test_whole_pictures_are_extrapolated_from_stages() -> None:
    run = run_result([1.0, 1.0, 1.0])
    assert compare_report.total_seconds(run, "fp32", OURS) is None
    step = run["records"][1]
    run["records"] += [
        {**step, "stage": stage, "seconds": [seconds]} for stage, seconds in (("prior", 7), ("decode", 5))
    ]
    assert compare_report.total_seconds(run, "fp32", OURS) == 7 + 100 + 5


def test_settings_travel_as_json() -> None:
    created = Setting(OURS, "step", "here", quality="draft")
    assert Setting(**json.loads(json.dumps(dataclasses.asdict(created)))) == created
