"""Training of tiny models: losses fall, files load, bad input is one line, checkpoints stay whole."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.cli.helpers import Command, assert_one_line, pixels, stored
from tests.training.conftest import write_pictures
from torch import Tensor

from kandinsky22 import KandinskyV22CombinedPipeline, KandinskyV22Pipeline, KandinskyV22PriorPipeline, load_subject
from kandinsky22.checkpoints.subject_file import Subject, save_subject
from kandinsky22.cli.failures import failure_message
from kandinsky22.errors import CheckpointError, InputError
from kandinsky22.training.finetuning import checkpoints
from kandinsky22.training.finetuning.batches import Draw
from kandinsky22.training.finetuning.class_pictures import class_pictures
from kandinsky22.training.finetuning.data import read_examples
from kandinsky22.training.finetuning.finetune import finetune
from kandinsky22.training.finetuning.frames import Frame
from kandinsky22.training.finetuning.objectives import DecoderObjective
from kandinsky22.training.finetuning.optimizer import new_accelerator
from kandinsky22.training.finetuning.options import SubjectOptions, TrainingOptions, read_config
from kandinsky22.training.finetuning.prior_samples import EMBEDS_PER_CAPTION, PriorSampling, Sample
from kandinsky22.training.finetuning.run import Stage, TrainingRun
from kandinsky22.training.finetuning.stages import Training
from kandinsky22.training.finetuning.subject import _dreambooth, _inversion, train_subject
from kandinsky22.training.finetuning.training_base import FULL, LORA


def ignore(line: str) -> None:
    """Receive a line."""


def stage_of(options: Any, name: str, kind: str) -> tuple[Stage, Training]:
    training = Training(options, new_accelerator(options), ignore)
    examples = read_examples(options)
    if name == "subject":
        return _inversion(training, options, examples), training
    return (training.prior_stage if name == "prior" else training.decoder_stage)(examples, kind), training


CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "prior": ("prior", LORA, "combined", {"stage": "prior", "learning_rate": 0.02}),
    "prior, full": ("prior", FULL, "combined", {"stage": "prior", "learning_rate": 0.002}),
    "decoder": ("decoder", LORA, "combined", {"learning_rate": 0.02, "gradient_checkpointing": True}),
    "decoder, full": ("decoder", FULL, "combined", {"learning_rate": 0.002, "snr_gamma": 5.0, "random_crop": True}),
    "inpaint": ("decoder", LORA, "inpaint", {"learning_rate": 0.02, "random_flip": True}),
    "hint": ("decoder", LORA, "control/decoder", {"learning_rate": 0.02, "hint_type": "edges"}),
    "decoder, prior's embeddings": ("decoder", FULL, "combined", {"learning_rate": 0.002, "image_embeds": "prior"}),
    "inpaint, prior's embeddings": ("decoder", LORA, "inpaint", {"learning_rate": 0.02, "image_embeds": "prior"}),
    "subject": ("subject", LORA, "combined", {"learning_rate": 0.3}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_objective_decreases_on_a_fixed_batch(case: str, options: Any, models: Path) -> None:
    name, kind, folder, changes = CASES[case]
    options_kind = SubjectOptions if name == "subject" else TrainingOptions
    stage, training = stage_of(options(options_kind, model=str(models / folder), **changes), name, kind)
    run = TrainingRun(stage, training.options, training.folder / name, training.accelerator, ignore)
    draws = [Draw(index, (7, index)) for index in range(4)]

    def fixed(step: int) -> list[Draw]:
        return draws[:2]

    stage.streams[0].plan.draws = fixed  # type: ignore[method-assign]  # every step trains on the same examples
    losses = [float(stage.streams[0].objective.losses(run.network, fixed(0))["loss"].detach())]
    for _ in range(12):
        run.advance()
    losses.append(float(stage.streams[0].objective.losses(run.network, fixed(0))["loss"].detach()))
    assert losses[1] < losses[0] * (0.9999 if name == "subject" else 0.97), losses


def test_only_adapters_are_trained(options: Any) -> None:
    stage, training = stage_of(options(learning_rate=0.01), "decoder", LORA)
    before = {name: value.clone() for name, value in stage.network.state_dict().items()}
    training.run(stage)
    after = stage.network.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in after if ".lora_" in name}


def test_groups_of_layers_get_adapters(options: Any) -> None:
    trained = {}
    for groups in (("attention",), ("attention", "blocks"), ("blocks", "to_out.0")):
        stage, _ = stage_of(options(target_modules=groups), "decoder", LORA)
        names = {name for name, parameter in stage.network.named_parameters() if parameter.requires_grad}
        trained[groups] = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names}
    assert {"to_q", "add_k_proj"} <= trained[("attention",)] and "conv1" not in trained[("attention",)]
    assert trained[("attention", "blocks")] >= trained[("attention",)] | {"conv1", "conv2", "time_emb_proj"}
    assert "conv1" in trained[("blocks", "to_out.0")] and "to_q" not in trained[("blocks", "to_out.0")]
    with pytest.raises(InputError, match="--target-modules"):
        stage_of(options(target_modules=()), "decoder", LORA)


@pytest.mark.slow
def test_an_adapter_loads_and_changes_pictures_in_proportion(options: Any, model: Path) -> None:
    (path,) = finetune(options(stage="both", learning_rate=0.05, max_train_steps=6), LORA)
    names = set(load_file(path))
    assert all(name.startswith(("unet.", "prior.")) for name in names)
    pipe = KandinskyV22CombinedPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"prompt": "a cat", "output_type": "pt", "num_inference_steps": 2}

    def draw() -> Tensor:
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images

    plain = draw()
    pipe.load_lora_weights(str(path), adapter_name="style")
    with_adapter = draw()
    pipe.set_adapters("style", 0.0)
    assert torch.equal(plain, draw())
    assert (with_adapter - plain).abs().max() > 1e-3


def test_the_trained_layers_and_the_loaded_file_agree(options: Any, model: Path) -> None:
    stage, training = stage_of(options(learning_rate=0.05, lora_alpha=3.0), "decoder", LORA)
    training.run(stage)
    (path,) = [stage_path for stage_path in (training.folder / "decoder").glob("checkpoint-*04")]
    pipe = KandinskyV22Pipeline.from_pretrained(model, movq=None)
    pipe.load_lora_weights(str(path))
    sample, embeds = torch.randn(1, 4, 8, 8), {"image_embeds": torch.randn(1, pipe.unet.config.encoder_hid_dim)}
    with torch.no_grad():
        ours, loaded = (net(sample, 500, added_cond_kwargs=embeds).sample for net in (stage.network, pipe.unet))
    torch.testing.assert_close(ours, loaded, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_full_training_writes_pipelines(options: Any, tmp_path: Path) -> None:
    changes = {"stage": "both", "learning_rate": 0.001, "aspect_buckets": True, "use_ema": True}
    prior, decoder = finetune(options(**changes, rank=16), FULL)  # the default
    assert KandinskyV22PriorPipeline.from_pretrained(prior).prior is not None
    pipe = KandinskyV22CombinedPipeline.from_pretrained(decoder)  # finds the prior next to it
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a cat", num_inference_steps=1, prior_num_inference_steps=2).images[0].size == (32, 32)
    state = checkpoints.read_checkpoint(checkpoints.checkpoints(decoder)[-1])
    torch.testing.assert_close(pipe.unet.conv_in.weight, state["average"]["conv_in.weight"])
    assert not torch.equal(state["average"]["conv_in.weight"], state["parameters"]["conv_in.weight"])


@pytest.mark.slow
def test_log_validation_and_samples(options: Any) -> None:
    finetune(options(max_train_steps=4, validation_prompt=("a cat", "a dog"), log_every=1), LORA)
    folder = Path(options().output_dir) / "decoder"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    assert {"loss", "prediction", "variance", "norm", "lr"} <= lines[0].keys()
    assert "total_loss" not in lines[0]  # it would be the loss
    assert lines[-1]["validation_loss"] > 0
    assert Image.open(folder / "samples-000004.png").size == (64, 32)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["combined", "inpaint", "control/decoder"])
def test_sheets_of_pictures(folder: str, options: Any, models: Path) -> None:
    hints = {"hint_type": "edges"} if folder == "control/decoder" else {}
    finetune(options(model=str(models / folder), validation_images=2, **hints), LORA)
    rows = 2 if folder == "combined" else 3
    sheet = Path(options().output_dir) / "decoder" / "samples-000004.png"
    assert Image.open(sheet).size == (64, 32 * rows)


def test_decoders_are_trained_with_embeddings_that_the_prior_samples(options: Any, model: Path) -> None:
    choices = options(image_embeds="prior", condition_dropout=0.0, seed=3)
    stage, _ = stage_of(choices, "decoder", LORA)
    (stream,) = stage.streams
    objective = stream.objective
    assert isinstance(objective, DecoderObjective)
    prior = KandinskyV22CombinedPipeline.from_pretrained(model).prior_pipe
    prior.set_progress_bar_config(disable=True)
    used = set()
    for draw in (draw for step in range(4) for draw in stream.plan.draws(step)):
        caption = objective.entries[draw.index].caption
        assert caption is not None
        embeds = objective.batch([draw], objective.entries, training=True).condition["image_embeds"]
        distances = []
        for number in range(EMBEDS_PER_CAPTION):
            generator = Sample(caption, number).generator(choices.seed)
            sampled = prior(caption, generator=generator, **prior.generation_defaults).image_embeds
            distances.append(float((sampled - embeds).abs().max()))
        assert min(distances) < 1e-5
        used.add(distances.index(min(distances)))
    assert len(used) > 1  # of the samples of a caption


@pytest.mark.slow
def test_a_training_with_the_priors_embeddings_is_resumed_as_such(options: Any) -> None:
    finetune(options(max_train_steps=2, image_embeds="prior"), LORA)
    with pytest.raises(InputError, match="belongs to another training: --image-embeds was"):
        finetune(options(max_train_steps=4, resume="latest"), LORA)


# Subjects


def test_a_subject_starts_at_the_mean_of_its_pictures_and_is_learned(options: Any, model: Path) -> None:
    choices = options(SubjectOptions, validation_images=0, max_train_samples=3, max_train_steps=2, learning_rate=1e-9)
    (path,) = train_subject(choices)
    pipe = KandinskyV22CombinedPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pictures = [Image.open(example.picture.name).convert("RGB") for example in read_examples(choices)]
    cut = [Frame((32, 32)).cut(picture) for picture in pictures]
    mean = pipe.prior_pipe.interpolate(cut, [1 / 3] * 3).image_embeds
    subject = load_subject(path, embedding_dim=mean.shape[1])
    torch.testing.assert_close(subject.image_embeds, mean, rtol=1e-4, atol=1e-5)
    assert subject.pictures == 3
    mixed = pipe.prior_pipe.interpolate([subject.image_embeds, "a cat"], [0.5, 0.5], num_inference_steps=2)
    images = pipe.decoder_pipe(**mixed, num_inference_steps=1).images
    assert images[0].size == (32, 32)


@pytest.mark.slow
def test_dreambooth_keeps_other_pictures(options: Any, tmp_path: Path) -> None:
    others = write_pictures(tmp_path / "others", 3, captions=False, seed=9)
    choices = options(SubjectOptions, method="dreambooth", class_data_dir=str(others), prior_loss_weight=0.25)
    (path,) = train_subject(choices)
    assert path.name == "pytorch_lora_weights.safetensors"
    lines = (Path(options().output_dir) / "subject" / "log.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert first["total_loss"] == pytest.approx(first["loss"] + 0.25 * first["class_loss"], rel=1e-4)


def test_pictures_of_a_folder_keep_the_encoders_embeddings(options: Any, tmp_path: Path) -> None:
    others = write_pictures(tmp_path / "others", 3, captions=False, seed=9)
    choices = options(SubjectOptions, method="dreambooth", class_data_dir=str(others), image_embeds="prior")
    training = Training(choices, new_accelerator(choices), ignore)
    stage = _dreambooth(training, choices, read_examples(choices))
    own, other = (stream.objective for stream in stage.streams)
    assert isinstance(own, DecoderObjective) and isinstance(other, DecoderObjective)
    sampled = PriorSampling(training)
    for entry in own.entries:
        assert entry.caption is not None
        samples = [Sample(entry.caption, number) for number in range(EMBEDS_PER_CAPTION)]
        assert entry.sampled == tuple(cached.path for cached in sampled.embeddings(samples))
    assert not any(entry.sampled for entry in other.entries) and len(other.entries) == 3


def test_class_pictures_keep_the_embeddings_that_they_were_drawn_from(options: Any) -> None:
    prompts = ("a cat", "a dog", "a cat")  # one that is repeated counts once
    choices = options(
        SubjectOptions, method="dreambooth", class_prompt=prompts, num_class_images=3, random_flip=True, resolution=48
    )
    training = Training(choices, new_accelerator(choices), ignore)
    pictures = class_pictures(training, choices)
    stage = _dreambooth(training, choices, read_examples(choices))
    objective = stage.streams[1].objective
    assert isinstance(objective, DecoderObjective) and len(objective.entries) == 3
    expected = [Sample("a cat", 0), Sample("a dog", 0), Sample("a cat", 1)]
    prior: Any = KandinskyV22CombinedPipeline.from_pretrained(choices.model).prior_pipe
    pipe: Any = KandinskyV22Pipeline.from_pretrained(choices.model)
    for entry, sample, example in zip(objective.entries, expected, pictures.examples, strict=True):
        (path,) = entry.sampled
        drawn = prior([sample.prompt], generator=[sample.generator(choices.seed)], **prior.generation_defaults)
        embeds = training.store[path]["embeds"]
        torch.testing.assert_close(embeds, drawn.image_embeds)
        (latents,) = {
            tuple(objective.item(Draw(0, (key,)), entry, training=True)["noised"].sample.flatten().tolist())
            for key in range(8)
        }  # never mirrored: the embedding is that of the picture
        plain = training.store[entry.path]["latents"][0]
        assert latents == tuple(plain.flatten().tolist())
        batch = objective.batch([Draw(0, (0,))], [entry], training=False)
        assert torch.equal(batch.condition["image_embeds"], embeds)
        again = pipe(
            image_embeds=embeds,
            negative_image_embeds=drawn.negative_image_embeds,
            generator=sample.generator(choices.seed),
            **{**pipe.generation_defaults, "height": 48, "width": 48},
        ).images[0]
        difference = np.asarray(again).astype(int) - np.asarray(example.picture.open())
        assert np.abs(difference).max() <= 1  # they were drawn in batches of two


@pytest.mark.parametrize("arguments", [("lora",), ("subject", "--method", "dreambooth", "--class-prompt", "a cat")])
def test_captions_are_required_before_any_network_runs(
    arguments: tuple[str, ...], command: Command, model: Path, tmp_path: Path
) -> None:
    bare = write_pictures(tmp_path / "bare", 2, captions=False)
    base = ("--model", model, "--train-data-dir", bare, "--image-embeds", "prior", "--output-dir", tmp_path / "new")
    assert_one_line(
        command("train", *arguments, *base), 1, "2 of 2 pictures have no caption, which --image-embeds prior"
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_dreambooth_draws_the_other_pictures(options: Any) -> None:
    choices = options(SubjectOptions, method="dreambooth", class_prompt="a cat", num_class_images=2, max_train_steps=1)
    train_subject(choices)
    drawn = Path(choices.output_dir) / "class-pictures"
    contents = {path: path.read_bytes() for path in sorted(drawn.iterdir())}
    assert len(contents) == 2
    damaged = next(iter(contents))
    before = pixels(damaged).astype(int)
    damaged.write_bytes(b"damaged")  # is drawn again
    train_subject(dataclasses.replace(choices, resume="latest"))
    assert np.abs(pixels(damaged) - before).max() <= 1  # alone, not in a batch of two
    assert sorted(drawn.iterdir()) == list(contents)
    with pytest.raises(InputError, match="has checkpoints up to"):
        train_subject(dataclasses.replace(choices, class_prompt=("a dog",)))
    with pytest.raises(InputError, match="--resume checkpoint-7 is not a checkpoint"):
        train_subject(dataclasses.replace(choices, class_prompt=("a dog",), resume="checkpoint-7"))
    assert len(list(drawn.iterdir())) == 2
    with pytest.raises(InputError, match="belongs to another training: --class-prompt was"):
        train_subject(dataclasses.replace(choices, class_prompt=("a dog",), resume="latest"))


@pytest.mark.parametrize("change", ["prompt", "resolution", "decoder", "image_encoder", "steps"])
def test_class_pictures_of_another_run_are_not_reused(
    change: str, options: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model, tmp_path / "model")
    choices = options(
        SubjectOptions, model=str(tmp_path / "model"), method="dreambooth", class_prompt="a cat", num_class_images=1
    )
    (first,) = drawn_class_pictures(choices)
    assert drawn_class_pictures(choices) == [first]
    if change == "prompt":
        choices = dataclasses.replace(choices, class_prompt=("a dog",))
    elif change == "resolution":
        choices = dataclasses.replace(choices, resolution=48)
    elif change in ("decoder", "image_encoder"):
        folder = "unet" if change == "decoder" else "prior_image_encoder"
        (path,) = (tmp_path / "model" / folder).glob("*.safetensors")
        save_file({name: 1.5 * value for name, value in load_file(path).items()}, path)
    else:
        path = tmp_path / "model" / KandinskyV22Pipeline.defaults_name
        defaults = {**json.loads(path.read_text()), "num_inference_steps": 3}
        path.write_text(json.dumps(defaults))
    (second,) = drawn_class_pictures(choices)
    assert second != first
    assert Image.open(second).size == ((48, 48) if change == "resolution" else (32, 32))


def test_the_decoder_is_not_moved_if_all_class_pictures_are_there(
    options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = options(SubjectOptions, method="dreambooth", class_prompt="a cat", num_class_images=1)
    moved: list[Any] = []
    original = KandinskyV22Pipeline.to

    def to(pipe: Any, *arguments: Any, **named: Any) -> Any:
        moved.append(arguments)
        return original(pipe, *arguments, **named)

    monkeypatch.setattr(KandinskyV22Pipeline, "to", to)
    (path,) = drawn_class_pictures(choices)
    assert len(moved) == 1
    assert drawn_class_pictures(choices) == [path]
    assert len(moved) == 1
    path.write_bytes(b"damaged")
    assert drawn_class_pictures(choices) == [path]
    assert len(moved) == 2


def drawn_class_pictures(choices: SubjectOptions) -> list[Path]:
    training = Training(choices, new_accelerator(choices), ignore)
    return [Path(example.picture.name) for example in class_pictures(training, choices).examples]


def test_an_impossible_resolution_is_found_before_class_pictures_are_drawn(options: Any) -> None:
    choices = options(SubjectOptions, method="dreambooth", class_prompt="a cat", resolution=30)
    with pytest.raises(InputError, match="--resolution=30"):
        train_subject(choices)
    assert not (Path(choices.output_dir) / "class-pictures").exists()


@pytest.fixture
def subject(tmp_path: Path) -> Path:
    """The file of a subject for the tiny model."""
    path = tmp_path / "my cat.safetensors"
    save_subject(path, Subject(torch.randn(1, 32), "digest", 4))
    return path


def test_subjects_in_generate(subject: Path, command: Command, model: Path) -> None:
    base = ("generate", "a cat", "--model", model, "--seed", 1)
    for name, weight in (("half.png", ""), ("most.png", ":0.9"), ("none.png", ":0")):
        result = command(*base, "--subject", f"{subject}{weight}", "-o", name)
        assert result.code == 0, result.err
    assert command(*base, "-o", "plain.png").code == 0
    assert stored(Path("half.png"))["subject"]["weight"] == 0.5
    assert (pixels(Path("half.png")) != pixels(Path("most.png"))).any()
    assert (pixels(Path("half.png")) != pixels(Path("plain.png"))).any()
    assert (pixels(Path("none.png")) == pixels(Path("plain.png"))).all()
    assert command("generate", "--from", "most.png", "-o", "again.png").code == 0
    assert (pixels(Path("again.png")) == pixels(Path("most.png"))).all()
    assert f"0.9 of {subject}, sha256 " in command("info", "most.png").out


def test_subjects_in_mix(subject: Path, command: Command, model: Path) -> None:
    result = command("mix", "--text", "a cat", 0.4, "--subject", subject, 0.6, "--model", model, "-o", "mix.png")
    assert result.code == 0, result.err
    assert command("mix", "--from", "mix.png", "-o", "again.png").code == 0
    assert (pixels(Path("again.png")) == pixels(Path("mix.png"))).all()
    item = stored(Path("mix.png"))["parts"][1]
    assert (item["weight"], item["subject"]["name"]) == (0.6, str(subject))


def test_wrong_subjects_are_one_line(subject: Path, command: Command, model: Path) -> None:
    base = ("generate", "a cat", "--model", model, "--subject")
    assert_one_line(command(*base, "missing"), 1, "missing")
    assert_one_line(command(*base, f"{subject}:1.5"), 1, "subject=", "a weight from 0 to 1")
    Path("text").write_text("no subject")
    assert_one_line(command(*base, "text"), 1, "text is not a subject")
    save_subject("wide.safetensors", Subject(torch.randn(1, 48), "digest", 4))
    assert_one_line(command(*base, "wide.safetensors"), 1, "32")


@pytest.mark.slow
def test_dreambooth_of_other_decoders_needs_a_folder(options: Any, models: Path) -> None:
    choices = options(SubjectOptions, method="dreambooth", class_prompt="a cat", model=str(models / "inpaint"))
    with pytest.raises(
        InputError, match=r"--class-prompt='a cat' is invalid: expected none for a decoder of the kind inpaint; name"
    ):
        train_subject(choices)


@pytest.mark.slow
def test_tensorboard_has_losses_and_samples(options: Any) -> None:
    pytest.importorskip("tensorboard")
    finetune(options(report_to="tensorboard", max_train_steps=1), LORA)
    (events,) = (Path(options().output_dir) / "decoder" / "tensorboard").iterdir()
    assert b"decoder/samples" in events.read_bytes()


def test_files_of_subjects_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "subject.safetensors"
    save_subject(path, Subject(torch.arange(6.0)[None], "digest", 4))
    assert load_subject(path).image_embeds.tolist() == [[0, 1, 2, 3, 4, 5]]
    with pytest.raises(CheckpointError, match="another model: its embedding has 6 elements, expected 32"):
        load_subject(path, embedding_dim=32)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        load_subject(tmp_path / "missing")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError):
        load_subject(path)


# Several passes and types


def gradients(options: Any) -> Mapping[str, Tensor]:
    stage, training = stage_of(options, "decoder", FULL)
    run = TrainingRun(stage, options, training.folder, training.accelerator, ignore)
    run.backward()
    return {name: parameter.grad for name, parameter in run.parameters.items() if parameter.grad is not None}


def test_accumulated_gradients_are_those_of_the_whole_batch(options: Any) -> None:
    whole = gradients(options(train_batch_size=4))
    parts = gradients(options(train_batch_size=1, gradient_accumulation_steps=4))
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, parts[name], rtol=1e-4, atol=1e-6)


# Checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("image_embeds", ["encoder", "prior"])
def test_a_resumed_training_equals_an_uninterrupted_one(image_embeds: str, options: Any, tmp_path: Path) -> None:
    choices = options(max_train_steps=6, use_ema=True, lr_warmup_steps=2, image_embeds=image_embeds)
    (whole,) = finetune(choices, LORA)
    parts = dataclasses.replace(choices, output_dir=str(tmp_path / "parts"))
    stage, training = stage_of(parts, "decoder", LORA)
    run = TrainingRun(stage, parts, training.folder / "decoder", training.accelerator, ignore)
    for _ in range(3):
        run.advance()
    run.save()
    run.advance()  # lost
    (resumed,) = finetune(dataclasses.replace(parts, resume="latest"), LORA)
    ours, theirs = load_file(whole), load_file(resumed)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.slow
def test_old_checkpoints_are_deleted(options: Any) -> None:
    finetune(options(max_train_steps=5, checkpointing_steps=1, checkpoints_total_limit=2), LORA)
    folder = Path(options().output_dir) / "decoder"
    assert [path.name for path in checkpoints.checkpoints(folder)] == ["checkpoint-000004", "checkpoint-000005"]


@pytest.mark.slow
def test_checkpoints_of_another_training_are_refused(options: Any, model: Path, tmp_path: Path) -> None:
    finetune(options(max_train_steps=2), LORA)
    with pytest.raises(InputError, match=r"has checkpoints up to checkpoint-000002: add --resume to continue"):
        finetune(options(), LORA)
    with pytest.raises(InputError, match=r"belongs to another training: pictures per step was 2 and is 3"):
        finetune(options(resume="latest", train_batch_size=3), LORA)
    with pytest.raises(InputError, match=r"--rank was 2 and is 3"):
        finetune(options(resume="checkpoint-000002", rank=3), LORA)
    with pytest.raises(InputError, match=r"belongs to another training: --lora-alpha was 2.0 and is 8.0$"):
        finetune(options(resume="latest", lora_alpha=8.0), LORA)
    other = str(tmp_path / "other")
    pipe = KandinskyV22Pipeline.from_pretrained(model)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.1)
    KandinskyV22CombinedPipeline.from_pretrained(model, **pipe.components).save_pretrained(other)
    with pytest.raises(InputError, match=r"belongs to another training: weights was '\w+' and is '\w+'$"):
        finetune(options(resume="latest", model=other), LORA)
    with pytest.raises(InputError, match=r"expected latest, a path or one of .*checkpoint-000002"):
        finetune(options(resume="checkpoint-000009"), LORA)


def test_the_scale_of_adapters_is_part_of_a_training(options: Any) -> None:
    network = torch.nn.Linear(2, 2)

    def signature(kind: str = LORA, **changes: Any) -> dict[str, Any]:
        return Training(options(**changes), new_accelerator(options()), ignore).signature(kind, network, [])

    assert signature(rank=4, lora_alpha=4.0) == signature(rank=4)  # the default
    assert len({json.dumps(signature(**each)) for each in ({}, {"lora_alpha": 1.0}, {"lora_alpha": 8.0})}) == 3
    assert not any(name.startswith("--") for name in signature(FULL))


def test_an_inversion_in_other_units_is_another_training(options: Any, model: Path, tmp_path: Path) -> None:
    train_subject(options(SubjectOptions, max_train_steps=1))
    shutil.copytree(model, tmp_path / "model")
    (path,) = (tmp_path / "model" / "prior_prior").glob("*.safetensors")
    weights = load_file(path)
    save_file({**weights, "clip_std": 2 * weights["clip_std"]}, path)
    with pytest.raises(InputError, match=r"belongs to another training: deviation of embeddings was '\w+' and is"):
        train_subject(options(SubjectOptions, resume="latest", model=str(tmp_path / "model")))


def test_a_resumed_training_has_the_hyperparameters_of_its_options(options: Any) -> None:
    choices = options(max_train_steps=4)
    stage, training = stage_of(choices, "decoder", LORA)
    run = TrainingRun(stage, choices, training.folder, training.accelerator, ignore)
    run.advance()
    run.save()
    other = dataclasses.replace(
        choices, resume="latest", adam_weight_decay=0.5, adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=1e-3
    )
    resumed = TrainingRun(stage_of(other, "decoder", LORA)[0], other, training.folder, training.accelerator, ignore)
    assert {(group["betas"], group["eps"]) for group in resumed.optimizer.param_groups} == {((0.5, 0.6), 1e-3)}
    assert [group["weight_decay"] for group in resumed.optimizer.param_groups] == [0.5]
    assert resumed.step == 1
    moments = [state["exp_avg"] for state in resumed.optimizer.state.values()]
    assert moments and any(moment.any() for moment in moments)


def test_moments_of_another_form_are_refused(options: Any) -> None:
    choices = options(max_train_steps=4)
    stage, training = stage_of(choices, "decoder", LORA)
    run = TrainingRun(stage, choices, training.folder, training.accelerator, ignore)
    run.options = dataclasses.replace(choices, use_8bit_adam=True)  # as if bitsandbytes had written it
    run.save()
    with pytest.raises(InputError, match="belongs to another training: use_8bit_adam was True and is False"):
        TrainingRun(stage, dataclasses.replace(choices, resume="latest"), training.folder, training.accelerator, ignore)


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(options: Any) -> None:
    choices = options(max_train_steps=4)
    stage, training = stage_of(choices, "decoder", LORA)
    run = TrainingRun(stage, choices, training.folder / "decoder", training.accelerator, ignore)
    run.advance()
    run.save()
    (last,) = checkpoints.checkpoints(run.folder)
    before = {path.name: path.read_bytes() for path in last.iterdir()}
    run.advance()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # The first part of a file is written, as on a disk that becomes full in between.
        for size in (len(before[checkpoints.STATE]) // 2, 100):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(CheckpointError) as failure:
                run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    message = failure_message(failure.value)
    assert message == (
        f"checkpoint {run.folder / 'checkpoint-000002'} cannot be written: File too large; the last complete one is "
        "checkpoint-000001"
    )
    assert [path.name for path in run.folder.iterdir() if path.is_dir()] == ["checkpoint-000001"]
    assert {path.name: path.read_bytes() for path in last.iterdir()} == before
    finetune(dataclasses.replace(choices, resume="latest"), LORA)


@pytest.mark.slow
def test_damaged_checkpoints_are_named(options: Any) -> None:
    finetune(options(max_train_steps=2), LORA)
    path = Path(options().output_dir) / "decoder" / "checkpoint-000002" / checkpoints.STATE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="checkpoint-000002 cannot be read"):
        finetune(options(resume="latest"), LORA)


# The command


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--rank", "0"), 2, ("--rank", "at least 1")),
        (("--train-data-dir", "empty"), 1, ("empty holds no pictures",)),
        (("--train-data-dir", "missing"), 1, ("--train-data-dir='missing'",)),
        (("--dataset-name", "a/b"), 1, ("both of --train-data-dir and --dataset-name",)),
        (("--resolution", "30"), 1, ("--resolution=30", "a multiple of 4")),
        (("--rank", "500"), 1, ("--rank=500",)),
        (("--target-modules", "to_x"), 1, ("--target-modules='to_x'", "to_q")),
        (("--mode", "inpaint"), 1, ("is not --mode inpaint",)),
        (("--use-8bit-adam",), 1, ("bitsandbytes",)),
        (("--report-to", "tensorboard"), 1, ("--report-to tensorboard needs the package tensorboard",)),
        (("--mixed-precision", "fp16"), 1, ("--mixed-precision='fp16'", "no or bf16")),
        (("--config", "missing.yaml"), 1, ("--config missing.yaml cannot be read",)),
        (("--learning-rate", "nan"), 2, ("--learning-rate", "finite")),
        (("--lr-warmup-steps", "2000"), 1, ("--lr-warmup-steps=2000",)),
        (("--image-embeds", "prior", "--stage", "both"), 1, ("--image-embeds='prior'", "encoder with --stage both")),
        (("--image-embeds", "prior", "--random-flip"), 1, ("--random-flip", "leave it out")),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...],
    code: int,
    words: tuple[str, ...],
    command: Command,
    model: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("empty").mkdir()
    for package in ("tensorboard", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    data = () if "--train-data-dir" in arguments else ("--train-data-dir", pictures)
    result = command("train", "lora", "--model", model, "--max-train-steps", 1, "-q", *data, *arguments)
    assert_one_line(result, code, *words)


def test_config_files_hold_options_and_the_command_line_wins(command: Command, model: Path, pictures: Path) -> None:
    text = f"model: {model}\ntrain-data-dir: {pictures}\nmax_train_steps: 9\nlearning_rate: 1e-3\nuse-ema: true\n"
    Path("options.yaml").write_text(text + "train_batch_size: 2\nrank: 2\nresolution: 16\n")
    assert read_config("options.yaml")["max_train_steps"] == 9
    result = command("train", "lora", "--config", "options.yaml", "--max-train-steps", 2, "--output-dir", "out")
    assert result.code == 0, result.err
    assert result.paths == [Path("out/pytorch_lora_weights.safetensors")]
    stored = checkpoints.read_checkpoint(Path("out/decoder/checkpoint-000002"))["options"]
    assert (stored["max_train_steps"], stored["learning_rate"], stored["use_ema"]) == (2, 0.001, True)
    Path("options.yaml").write_text("rnak: 3\n")
    assert_one_line(command("train", "lora", "--config", "options.yaml"), 1, "no option is named rnak")
    Path("options.yaml").write_text("rank: 3\n")
    assert_one_line(command("train", "full", "--config", "options.yaml"), 1, "train full has no option rank")


def test_quiet_trainings_print_the_result_alone(command: Command, model: Path, pictures: Path) -> None:
    result = command("train", "subject", "--model", model, "--train-data-dir", pictures, "--max-train-steps", 1, "-q")
    assert (result.code, result.err, result.paths) == (0, "", [Path("kandinsky22-subject/subject.safetensors")])


def test_the_subjects_options_contradict_each_other(command: Command, pictures: Path) -> None:
    base = ("train", "subject", "--train-data-dir", pictures)
    assert_one_line(command(*base, "--method", "dreambooth"), 1, "--class-data-dir", "--prior-loss-weight 0")
    assert_one_line(command(*base, "--class-prompt", "a cat"), 1, "no effect with --method inversion")
    dreambooth = (*base, "--method", "dreambooth", "--class-prompt", "a cat")
    assert_one_line(command(*dreambooth, "--prior-loss-weight", 0), 1, "no effect with --prior-loss-weight 0")
    assert_one_line(command(*dreambooth, "--class-data-dir", pictures), 1, "no effect with --class-data-dir")
    assert_one_line(command(*dreambooth, "a dog", "--num-class-images", 1), 1, "--num-class-images=1", "at least 2")
    assert_one_line(command(*dreambooth, " "), 1, "--class-prompt=", "a list of texts that are not empty")
    Path("empty").mkdir()
    empty = ("--method", "dreambooth", "--class-data-dir", "empty")
    assert_one_line(command(*base, *empty), 1, "--class-data-dir empty contains no pictures")
    assert_one_line(command(*base, "--stage", "both"), 1, "--stage='both'")
    assert_one_line(command(*base, "--image-embeds", "prior"), 1, "--image-embeds='prior'", "--method inversion")
