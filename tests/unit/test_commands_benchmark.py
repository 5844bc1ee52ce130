"""The benchmark of whole commands: stages without gaps, commands, processes, the system's cache, tables."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from benchmarks import commands, commands_report, page_cache, timed_command
from benchmarks.commands import CASES, Case, Folders, command_of, passes, reason_to_skip
from benchmarks.measured_process import FailedError, measure
from benchmarks.stopwatch import Stopwatch, peak_per_stage, seconds_per_stage

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has these interfaces")


def folders(folder: Path) -> Folders:
    return Folders(folder / "prior", folder / "decoder", folder)


# Stages


def test_stages_have_no_gaps_and_the_innermost_counts() -> None:
    events = [(10.0, "import"), (12.0, "load"), (15.0, "import"), (16.0, "load"), (20.0, "exit")]
    seconds = seconds_per_stage(events, 21.5)
    assert seconds == {"import": 3.0, "load": 7.0, "exit": 1.5}
    assert sum(seconds.values()) == 11.5


def test_samples_belong_to_the_stage_that_runs() -> None:
    events = [(1.0, "load"), (2.0, "prior"), (3.0, "load")]
    samples = [(0.5, 9.0), (1.5, 1.0), (2.0, 5.0), (2.9, 4.0), (3.5, 2.0)]
    assert peak_per_stage(events, samples) == {"load": 2.0, "prior": 5.0}


def test_a_stopwatch_nests_switches_and_forgets_short_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 2.0, 2.0, 2.0005, 4.0, 5.0, 9.0])
    monkeypatch.setattr("benchmarks.stopwatch.time.time", lambda: next(now))
    watch = Stopwatch(0.0, "other")
    with watch.stage("decode"):  # at 1
        watch.switch("steps")  # at 2
        with watch.stage("import"):  # from 2 to 2.0005
            pass
        with watch.stage("steps"):  # the same stage
            pass
    watch.switch("save")  # the end of the outer stage is at 4, this at 5
    watch.write(tmp_path / "stages.json")
    events = json.loads((tmp_path / "stages.json").read_text())["events"]
    expected = [[0.0, "other"], [1.0, "decode"], [2.0, "steps"], [4.0, "other"], [5.0, "save"], [9.0, "exit"]]
    assert events == expected


def test_other_threads_do_not_change_the_stage() -> None:
    watch = Stopwatch(0.0, "other")
    thread = threading.Thread(target=lambda: watch.switch("load"))
    thread.start()
    thread.join()
    assert watch.current == "other"


def test_the_steps_of_the_decoder_have_a_first_step_and_a_decoding() -> None:
    watch = Stopwatch(0.0, "prior")
    steps = timed_command.timed_steps(watch, lambda count: iter(range(count)))
    assert list(steps(5)) == [0, 1, 2, 3, 4]
    watch.switch("first step")
    running = steps(2)
    next(running)
    assert watch.current == "other steps"
    assert list(running) == [1]
    assert watch.current == "decode"
    assert watch.counts == {"prior steps": 5, "decoder steps": 2}


def test_the_functions_whose_time_is_read_exist_and_their_stages_are_in_the_table() -> None:
    for stage, module, path in timed_command.WRAPPED:
        owner, name = timed_command.owner_of(module, path)
        assert callable(getattr(owner, name))
        assert stage in timed_command.STAGES
    timed_command.owner_of(*timed_command.LOOP)
    with pytest.raises(AttributeError):
        timed_command.owner_of("kandinsky22.cli.run", "no_such_function")


# Commands


def test_commands_differ_only_by_the_process_that_runs_them(tmp_path: Path) -> None:
    case = Case("balanced bf16", ("--dtype", "bfloat16"))
    plain = command_of(case, folders(tmp_path), 512, stages=None)
    timed = command_of(case, folders(tmp_path), 512, stages=tmp_path / "stages.json")
    assert plain[0].endswith("kandinsky22")
    assert plain[1:] == timed[timed.index("generate") :]
    assert plain[plain.index("--size") + 1] == "512x512"


def test_the_reference_runs_as_many_steps_as_the_preset(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.library == commands.THEIRS)
    command = command_of(case, folders(tmp_path), 512, stages=None)
    assert command[command.index("--steps") + 1] == "8"
    assert command[command.index("--prior-steps") + 1] == "5"
    assert json.loads(command[command.index("--scheduler-settings") + 1]) == {"timestep_spacing": "trailing"}


def test_a_prepared_checkpoint_and_the_embedded_model_have_their_own_arguments(tmp_path: Path) -> None:
    prepared = Case("prepared", prepare=("--dtype", "bf16"))
    command = command_of(prepared, folders(tmp_path), 512, stages=None)
    assert command[command.index("--model") + 1] == str(folders(tmp_path).prepared(prepared))
    assert "--prior" not in command
    embedded = command_of(Case("embedded", model=commands.EMBEDDED, quality=None), folders(tmp_path), 512, stages=None)
    assert not {"--model", "--size", "--quality"} & set(embedded)


def test_each_kind_of_pass_comes_before_a_second_one() -> None:
    assert passes(3, 1, 2) == ["whole", "stages", "dropped", "whole", "dropped", "whole"]
    assert passes(0, 0, 0) == []


def test_cases_of_missing_options_and_packages_are_left_out() -> None:
    assert reason_to_skip(Case("plain"), "", "") is None
    engine = Case("engine", option="--engine", package="json")
    assert reason_to_skip(engine, "options: --engine NAME", "") is None
    assert "--engine" in str(reason_to_skip(engine, "options: --engineering", ""))
    assert "no_such_package" in str(reason_to_skip(Case("package", package="no_such_package"), "", ""))
    assert "prepare" in str(reason_to_skip(Case("prepared", prepare=()), "", "list, pull, info"))


def test_names_of_cases_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


# Processes and the system's cache


@linux
def test_a_process_is_measured() -> None:
    words = "import sys, time; data = bytearray(80_000_000); time.sleep(0.2); print(sys.argv[1])"
    measured = measure([sys.executable, "-c", words, "{started}"], timeout=60)
    assert measured.seconds >= 0.2
    assert measured.peak > 0.08
    assert measured.anonymous is not None and measured.anonymous > 0.08
    assert float(measured.output) == measured.started


@linux
def test_failures_and_time_limits_are_errors() -> None:
    with pytest.raises(FailedError, match="exit code 3: broken"):
        measure([sys.executable, "-c", "import sys; print('broken', file=sys.stderr); sys.exit(3)"], timeout=60)
    with pytest.raises(FailedError, match="time limit"):
        measure([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2)


@linux
def test_files_are_read_into_the_cache_and_dropped(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(2**20))
    page_cache.read([file])
    assert page_cache.cached_bytes([file]) == 2**20
    page_cache.drop([file])
    cached = page_cache.cached_bytes([file])
    if cached == 2**20:
        pytest.skip("this file system keeps its files in memory")
    assert cached == 0


# Tables


def record(kind: str, seconds: float, **others: Any) -> dict[str, Any]:
    figures = {"cpu": seconds, "peak": seconds / 4, "anonymous": seconds / 8, "read": 0.0, "checkpoint_gb": 2.0}
    return {"case": "balanced bf16", "kind": kind, "seconds": seconds, "cached_gb": 2.0, **figures, **others}


REPORT = {
    "options": {"config": "tiny", "towers": "thin", "size": 64},
    "machine": {"processor": "CPU", "cores": 2, "memory_gib": 8.0, "load": 0.5, "versions": {"torch": "2"}},
    "elapsed": 120.0,
    "left_out": {"engine": "no option"},
    "records": [
        record("whole", 40.0),
        record("whole", 44.0),
        record("whole", 41.0),
        record("stages", 90.0, stages={"load": 60.0, "prior": 30.0}, counts={"prior steps": 5, "decoder steps": 8}),
        record("dropped", 60.0, cached_gb=0.0, stages={"load": 60.0}, counts={}),
    ],
}


def test_totals_are_those_of_the_unchanged_command() -> None:
    text = commands_report.markdown(REPORT)
    assert (
        "| balanced bf16 | warm | 41.0 (40.0 to 44.0) | 11.00 | 5.50 | 0.00 (0.00 to 0.00) | 100 % | 50 % | 3 |" in text
    )
    assert "| balanced bf16 | dropped | 60.0 | 15.00 | 7.50 | 0.00 | 0 % | 50 % | 1 |" in text
    assert "| balanced bf16, warm | 0.00 | 0.00 | 60.00 |" in text
    assert "Left out: engine (no option)." in text


def test_a_page_is_written_between_its_markers_again_and_again(tmp_path: Path) -> None:
    page = tmp_path / "commands.md"
    page.write_text(f"# Title\n\n{commands_report.BEGIN}\nold\n{commands_report.END}\n\nThe end.\n")
    for _ in range(2):
        commands_report.write_page(page, REPORT)
    text = page.read_text()
    assert text.startswith("# Title\n\n") and text.endswith("The end.\n")
    assert text.count("balanced bf16, warm") == 1 and "old" not in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="no markers"):
        commands_report.write_page(page, REPORT)


@pytest.mark.slow
@linux
def test_a_command_is_measured_by_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = dataclasses.replace(commands.CASES[-1], arguments=("--steps", "2", "--prior-steps", "2"))
    monkeypatch.setattr(commands, "CASES", (quick,))
    out = tmp_path / "commands.json"
    arguments = ["--config", "tiny", "--rounds", "0", "--dropped-rounds", "0", "--out", str(out)]
    assert commands.main(arguments) == 0
    (entry,) = json.loads(out.read_text())["records"]
    assert entry["counts"] == {"prior steps": 2, "decoder steps": 2}
    for stage in ("import", "load", "prior", "first step", "other steps", "decode"):
        assert entry["stages"][stage] > 0
    assert sum(entry["stages"].values()) == pytest.approx(entry["seconds"], abs=0.1)
