"""Training of tiny decoders: the difference to MoVQ falls, and the result serves pipelines and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.cli.helpers import Command, assert_one_line, pixels, stored

from kandinsky22 import KandinskyV22Pipeline, TinyDecoder
from kandinsky22.errors import InputError
from kandinsky22.training.finetuning import checkpoints
from kandinsky22.training.finetuning.batches import Draw
from kandinsky22.training.finetuning.data import read_examples
from kandinsky22.training.finetuning.losses import picture_losses
from kandinsky22.training.finetuning.optimizer import new_accelerator
from kandinsky22.training.finetuning.options import TinyDecoderOptions
from kandinsky22.training.finetuning.run import TrainingRun
from kandinsky22.training.finetuning.stages import Training
from kandinsky22.training.finetuning.tiny_decoder import tiny_decoder_stage, train_tiny_decoder


def ignore(line: str) -> None:
    """Receive a line."""


@pytest.fixture
def tiny_options(options: Any) -> Callable[..., TinyDecoderOptions]:
    def make(**changes: Any) -> TinyDecoderOptions:
        return options(TinyDecoderOptions, **{"rank": 16, "block_out_channels": ("8", "8"), **changes})

    return make


def run_of(options: TinyDecoderOptions) -> TrainingRun:
    training = Training(options, new_accelerator(options), ignore)
    stage = tiny_decoder_stage(training, options, read_examples(options))
    return TrainingRun(stage, options, training.folder / stage.name, training.accelerator, ignore)


def test_losses_are_those_of_their_definition() -> None:
    target = torch.zeros(1, 3, 4, 4)
    target[..., 2:] = 1.0
    assert all(float(value) < 1e-6 for value in picture_losses(target, target, 1.0).values())
    losses = picture_losses(target - 0.5, target, 2.0)
    assert float(losses["gradient"]) == 0.0 and float(losses["loss"]) == float(losses["colour"])
    assert float(losses["colour"]) == pytest.approx((0.5**2 + 0.01**2) ** 0.5 - 0.01)
    assert float(losses["levels"]) == pytest.approx(0.5 * 127.5)
    flat = picture_losses(torch.full_like(target, 0.5), target, 2.0)
    assert float(flat["gradient"]) == pytest.approx(1 / 3)
    assert float(flat["loss"]) == pytest.approx(float(flat["colour"]) + 2 / 3)


def test_the_difference_to_movq_falls(tiny_options: Callable[..., TinyDecoderOptions]) -> None:
    run = run_of(tiny_options(learning_rate=0.01, max_train_steps=100, lr_scheduler="constant"))
    objective, draws = run.stage.streams[0].objective, [Draw(index, (7, index)) for index in range(4)]
    before = float(objective.losses(run.network, draws)["loss"].detach())
    for _ in range(25):
        run.advance()
    assert float(objective.losses(run.network, draws)["loss"].detach()) < 0.9 * before
    tensors = objective.store[objective.entries[0].path]  # type: ignore[attr-defined]
    assert tensors["latents"].shape == (2, 4, 16, 16) and tensors["pixels"].shape == (2, 3, 32, 32)
    assert not torch.equal(tensors["latents"][0], tensors["latents"][1]), "the second row has noise"


def test_the_result_serves_pipelines_and_the_command(
    tiny_options: Callable[..., TinyDecoderOptions], model: Path, command: Command
) -> None:
    choices = tiny_options(use_ema=True, log_every=1, random_flip=True, aspect_buckets=True)
    (folder,) = train_tiny_decoder(choices)
    assert folder == Path(choices.output_dir) / "tiny_decoder"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {"loss", "colour", "gradient", "levels", "norm", "lr"} <= lines[0].keys()
    assert "validation_levels" in lines[-1]
    with Image.open(folder / "samples-000004.png") as sheet:
        assert sheet.height > sheet.width / 2
    last = checkpoints.checkpoints(folder)[-1]
    state = checkpoints.read_checkpoint(last)
    trained = TinyDecoder.from_pretrained(folder)
    torch.testing.assert_close(trained.conv_in.weight, state["average"]["conv_in.weight"])
    torch.testing.assert_close(TinyDecoder.from_pretrained(last / "tiny_decoder").state_dict(), trained.state_dict())
    pipe = KandinskyV22Pipeline.from_pretrained(model)
    assert trained.belongs_to(pipe.movq)
    for source in (folder, last, choices.output_dir):
        pipe.enable_tiny_decoder(source)
    base = ("generate", "a cat", "--model", model, "--seed", 1)
    assert command(*base, "--tiny-decoder", folder, "-o", "tiny.png").code == 0
    assert command(*base, "-o", "plain.png").code == 0
    assert (pixels(Path("tiny.png")) != pixels(Path("plain.png"))).any()
    assert stored(Path("tiny.png"))["tiny_decoder"]["name"] == str(folder)


@pytest.mark.slow
def test_a_resumed_training_equals_an_uninterrupted_one(
    tiny_options: Callable[..., TinyDecoderOptions], tmp_path: Path
) -> None:
    whole = TinyDecoder.from_pretrained(train_tiny_decoder(tiny_options(gradient_checkpointing=True))[0])
    parts = tiny_options(output_dir=str(tmp_path / "parts"), gradient_checkpointing=True)
    run = run_of(parts)
    run.advance()
    run.save()
    run.advance()  # lost
    resumed = TinyDecoder.from_pretrained(
        train_tiny_decoder(tiny_options(output_dir=parts.output_dir, resume="latest", gradient_checkpointing=True))[0]
    )
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    with pytest.raises(InputError, match="belongs to another training: latent_noise was"):
        train_tiny_decoder(tiny_options(output_dir=parts.output_dir, resume="latest", latent_noise=0.5))


def test_the_command_trains_and_names_what_is_wrong(command: Command, model: Path, pictures: Path) -> None:
    base = ("train", "tiny-decoder", "--model", model, "--train-data-dir", pictures, "--output-dir", "out")
    short = ("--max-train-steps", 2, "--train-batch-size", 2)
    result = command(*base, *short, "--block-out-channels", 8, 8)
    assert result.code == 0, result.err
    assert result.paths == [Path("out/tiny_decoder")]
    for arguments, words in (
        (("--block-out-channels", 8, 8, 8), ("len(block_out_channels)", "2, one per resolution level")),
        (("--block-out-channels", 8, "x"), ("--block-out-channels='x'", "integers from 1")),
        (("--resolution", 21), ("--resolution=21", "a multiple of")),
    ):
        assert_one_line(command(*base, *short, *arguments, "--output-dir", "new"), 1, *words)
    assert_one_line(command(*base, *short), 1, "out/tiny_decoder has checkpoints up to checkpoint-000002: add --resume")
    Path("empty").mkdir()
    assert_one_line(command(*base[:4], "--train-data-dir", "empty"), 1, "holds no pictures")
    assert command(*base, "--rank", 3).code == 2, "a tiny decoder has no rank"
    Path("options.yaml").write_text("rank: 3\n")
    assert_one_line(command(*base, "--config", "options.yaml"), 1, "train tiny-decoder has no option rank")


def test_options_of_other_trainings_are_refused(pictures: Path) -> None:
    for name, value in (("rank", 3), ("stage", "prior"), ("validation_prompt", ("a cat",)), ("hint_type", "edges")):
        with pytest.raises(InputError, match="a tiny decoder has no such setting"):
            TinyDecoderOptions(train_data_dir=str(pictures), **{name: value})  # type: ignore[arg-type]
