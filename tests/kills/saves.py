"""Interrupts saves at every instant and counts what is in the folder afterwards: the old model, the new one, a mix.

Run as a program, because it forks: `python -m tests.kills.saves --count 500 --seed 1`. It prints one JSON object.
A save is interrupted before one of its system calls, or after a random time, by SIGKILL or SIGINT.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

import torch
import transformers

import kandinsky22
from kandinsky22 import CheckpointError, KandinskyV22Pipeline, KandinskyV22PriorPipeline, PriorTransformer, VQModel
from kandinsky22.models import base as models_base
from kandinsky22.pipelines import base as pipelines_base

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.scandir", "fcntl.flock")
SHARDED = {"max_shard_size": "20KB"}
PRIOR = {"num_attention_heads": 2, "attention_head_dim": 8, "embedding_dim": 16, "num_layers": 1}
MOVQ = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "latent_channels": 4,
    "num_vq_embeddings": 12,
    "vq_embed_dim": 4,
    "layers_per_block": 1,
    "norm_type": "spatial",
}
UNET = {
    "in_channels": 4,
    "out_channels": 8,
    "addition_embed_type": "image",
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "encoder_hid_dim": 16,
    "encoder_hid_dim_type": "image_proj",
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "scale_shift",
}


# Models, each in two versions


def tokenizer(folder: Path, extra: str) -> Any:
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(letter + "</w>" for letter in letters), extra, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{extra[0]} {extra[1]}\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return transformers.CLIPTokenizer.from_pretrained(str(folder))


def prior_pipeline(folder: Path, version: int) -> Any:
    words = tokenizer(folder / f"words{version}", ("ab", "cd")[version])
    common = {"hidden_size": 16, "projection_dim": 16, "intermediate_size": 20, "num_attention_heads": 2}
    text = transformers.CLIPTextConfig(
        **common,
        num_hidden_layers=1,
        vocab_size=len(words),
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    vision = transformers.CLIPVisionConfig(**common, num_hidden_layers=1, image_size=16, patch_size=8)
    return KandinskyV22PriorPipeline(
        prior=PriorTransformer(**PRIOR),
        image_encoder=transformers.CLIPVisionModelWithProjection(vision),
        text_encoder=transformers.CLIPTextModelWithProjection(text),
        tokenizer=words,
        scheduler=kandinsky22.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0 + version),
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 16}, crop_size=16, image_mean=[0.4 + version / 10] * 3
        ),
    )


def decoder_pipeline(version: int) -> Any:
    pipe = KandinskyV22Pipeline(
        unet=kandinsky22.UNet2DConditionModel(**UNET),
        movq=VQModel(**MOVQ),
        scheduler=kandinsky22.DDPMScheduler(beta_end=0.012 + version / 1000, variance_type="learned_range"),
    )
    if version:
        pipe.generation_defaults = {"num_inference_steps": 7}
    return pipe


def state(model: Any) -> Any:
    """Everything that distinguishes a loaded model from another, by component."""
    if isinstance(model, torch.nn.Module):
        return [(name, hash(tensor.numpy().tobytes())) for name, tensor in sorted(model.state_dict().items())]
    if isinstance(model, pipelines_base.DiffusionPipeline):
        parts = {name: state(getattr(model, name)) for name in model.components}
        return parts | {"defaults": model.generation_defaults}
    if isinstance(model, kandinsky22.schedulers.Scheduler):
        return {name: value for name, value in model.config.items() if not name.startswith("_")}
    if hasattr(model, "get_vocab"):
        return model.get_vocab()
    return {"mean": list(model.image_mean)}


class Case:
    """An old and a new model of one kind, how they are saved and what must be in the folder afterwards."""

    def __init__(
        self, name: str, old: Any, new: Any, *, subfolder: str = "", options: tuple[Any, Any] = ({}, {})
    ) -> None:
        self.name, self.old, self.new, self.subfolder, self.options = name, old, new, subfolder, options
        self.states = {"old": state(old), "new": state(new)}
        if subfolder:  # one component of a pipeline is replaced
            self.states["new"] = {**self.states["old"], subfolder: state(new)}
        self.calls = 0
        self.seconds = 0.0

    def save(self, folder: Path, version: str) -> None:
        if version == "old":
            self.old.save_pretrained(folder, **self.options[0])
        else:
            self.new.save_pretrained(folder / self.subfolder, **self.options[1])

    def read(self, folder: Path) -> str:
        """What is in the folder: old, new, mixed, or an error."""
        try:
            loaded = state(type(self.old).from_pretrained(folder))
        except CheckpointError as error:
            return f"error: {error}"
        return next((version for version, expected in self.states.items() if expected == loaded), "mixed")

    def read_plainly(self, folder: Path) -> str:
        """What a program finds that knows nothing of interrupted saves."""

        def read_once(_: Path, read: Callable[[], Any]) -> Any:
            return read()

        with (
            mock.patch.object(models_base, "read_consistently", read_once),
            mock.patch.object(pipelines_base, "read_consistently", read_once),
        ):
            return self.read(folder)


def make_cases(folder: Path) -> list[Case]:
    torch.manual_seed(0)
    movqs, priors = [VQModel(**MOVQ) for _ in range(2)], [prior_pipeline(folder, version) for version in range(2)]
    decoders = [decoder_pipeline(version) for version in range(2)]
    return [
        Case("sharded network", *movqs, options=(SHARDED, SHARDED)),
        Case("network: shards over one file", *movqs, options=({}, SHARDED)),
        Case("network: one file over shards", *movqs, options=(SHARDED, {})),
        Case(
            "network: .bin", *movqs, options=({"safe_serialization": False}, {**SHARDED, "safe_serialization": False})
        ),
        Case("decoder pipeline", *decoders),
        Case("sharded decoder pipeline", *decoders[::-1], options=(SHARDED, SHARDED)),
        Case("prior pipeline", *priors),
        Case("prior pipeline: shards over one file", *priors[::-1], options=({}, SHARDED)),
        Case("component of a pipeline", decoders[0], movqs[0], subfolder="movq", options=({}, SHARDED)),
    ]


# Interruptions


class Interruption:
    """A signal to this process before its n-th system call that concerns files; 0 counts only."""

    def __init__(self, signal_number: int, at: int) -> None:
        self.signal_number, self.at, self.calls = signal_number, at, 0

    def install(self) -> None:
        fsync = os.fsync

        def counted_fsync(descriptor: int) -> None:
            self.count()
            fsync(descriptor)

        os.fsync = counted_fsync
        sys.addaudithook(lambda event, _: self.count() if event in EVENTS else None)

    def count(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), self.signal_number)


def fork(act: Callable[[], Any]) -> int:
    """Run a function in a forked process, which ends with it."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)  # progress bars of transformers
        act()
        status = 0
    except KeyboardInterrupt:
        status = 2
    finally:
        os._exit(status)


def measure(case: Case, folder: Path) -> None:
    """Count the system calls of a save and take its time."""
    counts = folder.parent / "calls"

    def act() -> None:
        interruption = Interruption(signal.SIGKILL, 0)
        interruption.install()
        case.save(folder, "new")
        calls = interruption.calls
        counts.write_text(str(calls))

    start = time.monotonic()
    assert os.waitpid(fork(act), 0)[1] == 0, f"{case.name}: saving failed"
    case.seconds, case.calls = time.monotonic() - start, int(counts.read_text())


def interrupt(case: Case, folder: Path, number: int, at: float) -> None:
    """Save the new model in another process and interrupt it at a fraction of its system calls or of its time."""
    signal_number = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT)[number % 3]
    if number % 4:
        interruption = Interruption(signal_number, 1 + int(at * case.calls))

        def act() -> None:
            interruption.install()
            case.save(folder, "new")

        os.waitpid(fork(act), 0)
    else:
        process = fork(lambda: case.save(folder, "new"))
        time.sleep(at * case.seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal_number)
        os.waitpid(process, 0)


def hidden(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


def instants(count: int, source: random.Random) -> Iterator[float]:
    """Fractions from 0 to 1, evenly spread and shuffled."""
    fractions = [(index + source.random()) / count for index in range(count)]
    source.shuffle(fractions)
    return iter(fractions)


def interrupt_saves(cases: list[Case], root: Path, count: int, seed: int) -> dict[str, Any]:
    source = random.Random(seed)
    outcomes: collections.Counter[str] = collections.Counter()
    problems: list[str] = []
    for index, case in enumerate(cases):
        folder = root / f"case{index}"
        case.save(folder, "old")
        (folder / "README.md").write_text("the user's own file")
        measure(case, folder)
        repetitions = count // len(cases) + (index < count % len(cases))
        for number, at in enumerate(instants(repetitions, source)):
            case.save(folder, "old")
            place = f"{case.name}, {number}, {at:.3f}"
            interrupt(case, folder, number + index, at)
            if hidden(folder):
                outcomes["interrupted with something left"] += 1
            plain = case.read_plainly(folder)
            outcome = case.read(folder)
            outcomes[f"other programs: {plain.split(':')[0]}"] += 1
            outcomes[outcome.split(":")[0]] += 1
            if outcome not in ("old", "new") or plain == "mixed":
                problems.append(f"{place}: {outcome}; other programs: {plain}")
            case.save(folder, "new")  # the next save must work, and clean up
            if case.read(folder) != "new" or hidden(folder) or not (folder / "README.md").is_file():
                problems.append(f"{place}: after the next save {case.read(folder)}, {hidden(folder)}")
    return {"interruptions": count, "outcomes": dict(sorted(outcomes.items())), "problems": problems}


def race(cases: list[Case], root: Path, count: int, seed: int) -> dict[str, Any]:
    """Two processes save into one folder while this one reads it; sometimes one of them is killed."""
    source = random.Random(seed)
    outcomes: collections.Counter[str] = collections.Counter()
    problems: list[str] = []
    for number in range(count):
        case = cases[number % len(cases)]
        folder = root / f"race{number % len(cases)}"
        case.save(folder, "old")
        processes = [fork(lambda version=version: case.save(folder, version)) for version in ("old", "new")]  # noqa: B023
        during = case.read(folder)
        if number % 2:
            time.sleep(source.random() * 0.1)
            with contextlib.suppress(ProcessLookupError):
                os.kill(source.choice(processes), signal.SIGKILL)
        statuses = [os.waitpid(process, 0)[1] for process in processes]
        outcome = case.read(folder)
        outcomes[f"during: {during.split(':')[0]}"] += 1
        outcomes[outcome.split(":")[0]] += 1
        if {during, outcome} - {"old", "new"} or (not number % 2 and any(statuses)):
            problems.append(f"{case.name}, {number}: during {during}, after {outcome}, statuses {statuses}")
        case.save(folder, "new")
        if case.read(folder) != "new" or hidden(folder):
            problems.append(f"{case.name}, {number}: after the next save {case.read(folder)}, {hidden(folder)}")
    return {"races": count, "outcomes": dict(sorted(outcomes.items())), "problems": problems}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--races", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # where waiting for the disk takes no time
    with tempfile.TemporaryDirectory(dir=memory) as name:
        cases = make_cases(Path(name))
        result = {
            "kills": interrupt_saves(cases, Path(name), arguments.count, arguments.seed),
            "races": race(cases, Path(name), arguments.races or max(8, arguments.count // 10), arguments.seed),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
