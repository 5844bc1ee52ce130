"""Options without effect: each is refused where it has none, and settings without effect are left out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.cli.helpers import Command, assert_one_line

from kandinsky22.cli.settings_file import settings_path
from kandinsky22.errors import InputError
from kandinsky22.training.finetuning import checkpoints
from kandinsky22.training.finetuning.data import read_examples
from kandinsky22.training.finetuning.distill import distill
from kandinsky22.training.finetuning.effects import (
    INVERSION_LACKS,
    OF_ADAPTERS,
    OF_DECODERS,
    OF_PICTURES,
    TINY_DECODER_LACKS,
)
from kandinsky22.training.finetuning.finetune import finetune
from kandinsky22.training.finetuning.option import IneffectiveOptionError, flag_of
from kandinsky22.training.finetuning.options import (
    DistillOptions,
    SubjectOptions,
    TinyDecoderOptions,
    TrainingOptions,
)
from kandinsky22.training.finetuning.subject import train_subject
from kandinsky22.training.finetuning.training_base import FULL, LORA

DREAMBOOTH = {"method": "dreambooth", "class_data_dir": "others"}
HINTS = {"mode": "hint", "hint_type": "edges"}
# Class, options, where one of them has no effect, and the name of that one; without it the others are accepted.
INEFFECTIVE: list[tuple[type[TrainingOptions], dict[str, Any], str, str]] = [
    (TrainingOptions, {"split": "test"}, "without --dataset-name", "split"),
    (TrainingOptions, {"dataset_config_name": "en"}, "without --dataset-name", "dataset_config_name"),
    (TrainingOptions, {"crops_per_image": 9}, "without --random-crop", "crops_per_image"),
    (TrainingOptions, {"ema_decay": 0.9}, "without --use-ema", "ema_decay"),
    (TrainingOptions, {"caption_dropout": 0.5}, "with --stage decoder", "caption_dropout"),
    (TrainingOptions, {"caption_column": "text"}, "with --stage decoder and --image-embeds encoder", "caption_column"),
    (TrainingOptions, {"image_embeds": "prior", "random_flip": True}, "on captions, which --image", "random_flip"),
    (TrainingOptions, {"image_embeds": "prior", "random_crop": True}, "on captions, which --image", "random_crop"),
    (TrainingOptions, {"stage": "prior", "condition_dropout": 0.5}, "with --stage prior", "condition_dropout"),
    (TrainingOptions, {"stage": "prior", "vlb_weight": 0.1}, "with --stage prior", "vlb_weight"),
    (TrainingOptions, {"stage": "prior", "random_crop": True}, "with --stage prior", "random_crop"),
    (TrainingOptions, {"stage": "prior", "aspect_buckets": True}, "with --stage prior", "aspect_buckets"),
    (TrainingOptions, {"stage": "prior", "hint_type": "edges"}, "with --stage prior", "hint_type"),
    (TrainingOptions, {"stage": "prior", "mode": "plain"}, "with --stage prior", "mode"),
    (TrainingOptions, {"stage": "prior", "resolution": 64}, "with --stage prior and without --valid", "resolution"),
    (TrainingOptions, {"mode": "plain", "hint_type": "edges"}, "for a decoder of the kind plain", "hint_type"),
    (TrainingOptions, {"mode": "inpaint", "hint_type": "edges"}, "for a decoder of the kind inpaint", "hint_type"),
    (TrainingOptions, {"mode": "inpaint", "validation_prompt": "a"}, "of the kind inpaint", "validation_prompt"),
    (TrainingOptions, {"mode": "hint", "validation_prompt": "a"}, "of the kind hint", "validation_prompt"),
    (SubjectOptions, {"rank": 8}, "with --method inversion", "rank"),
    (SubjectOptions, {"lora_alpha": 8.0}, "with --method inversion", "lora_alpha"),
    (SubjectOptions, {"target_modules": "blocks"}, "with --method inversion", "target_modules"),
    (SubjectOptions, {"condition_dropout": 0.5}, "with --method inversion", "condition_dropout"),
    (SubjectOptions, {"vlb_weight": 0.1}, "with --method inversion", "vlb_weight"),
    (SubjectOptions, {"validation_prompt": "a cat"}, "with --method inversion", "validation_prompt"),
    (SubjectOptions, {"num_class_images": 7}, "with --method inversion", "num_class_images"),
    (SubjectOptions, {"prior_loss_weight": 0.5}, "with --method inversion", "prior_loss_weight"),
    (SubjectOptions, {"class_data_dir": "others"}, "with --method inversion", "class_data_dir"),
    (SubjectOptions, {"hint_type": "edges"}, "with --method inversion", "hint_type"),
    (SubjectOptions, {"caption_dropout": 0.5}, "with --stage decoder", "caption_dropout"),
    (SubjectOptions, {**DREAMBOOTH, "class_prompt": "a"}, "with --class-data-dir", "class_prompt"),
    (
        SubjectOptions,
        {"method": "dreambooth", "prior_loss_weight": 0.0, "num_class_images": 7},
        *("with --prior-loss-weight 0", "num_class_images"),
    ),
    (DistillOptions, {"stage": "prior", "random_crop": True}, "with --stage prior", "random_crop"),
    (DistillOptions, {"mode": "inpaint", "validation_prompt": "a"}, "of the kind inpaint", "validation_prompt"),
    (DistillOptions, {"use_ema": False, "ema_decay": 0.5}, "without --use-ema", "ema_decay"),
    (DistillOptions, {"full": True, "rank": 8}, "with --full", "rank"),
    (DistillOptions, {"num_images_per_prompt": 2}, "without --prompts", "num_images_per_prompt"),
    (DistillOptions, {"condition_dropout": 0.5}, "in distillation", "condition_dropout"),
]


@pytest.mark.parametrize("case", INEFFECTIVE, ids=lambda case: f"{case[0].__name__} {case[1]}")
def test_options_without_effect_are_refused(case: tuple[type[TrainingOptions], dict[str, Any], str, str]) -> None:
    kind, values, where, name = case
    with pytest.raises(IneffectiveOptionError, match=f"^{flag_of(name)} has no effect .*{re.escape(where)}") as error:
        kind(train_data_dir="x", **values)
    assert error.value.name == name
    rest = {each: value for each, value in values.items() if each != name}
    defaults = {option.name: option.default for option in kind.options()}
    kind(train_data_dir="x", **rest)
    kind(train_data_dir="x", **rest, **{name: defaults[name]})  # the default counts as not set


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (TrainingOptions, {"stage": "both", "caption_dropout": 0.5, "condition_dropout": 0.5, "random_crop": True}),
        (TrainingOptions, {"stage": "both", "mode": "inpaint", "validation_prompt": "a cat"}),
        (TrainingOptions, {"stage": "prior", "resolution": 64, "validation_prompt": "a cat", "random_flip": True}),
        (TrainingOptions, {"use_ema": True, "ema_decay": 0.9, "random_crop": True, "crops_per_image": 9, **HINTS}),
        (TrainingOptions, {"image_embeds": "prior", "caption_column": "text", "validation_prompt": "a cat"}),
        (TrainingOptions, {"train_data_dir": None, "dataset_name": "a/b", "split": "test"}),
        (SubjectOptions, {**DREAMBOOTH, "rank": 8, "num_class_images": 7, "prior_loss_weight": 0.5, "vlb_weight": 0.0}),
        (SubjectOptions, {"use_ema": True, "random_crop": True, "snr_gamma": 5.0}),
        (DistillOptions, {"ema_decay": 0.5, "rank": 8, **HINTS}),
    ],
)
def test_options_with_an_effect_are_accepted(kind: type[TrainingOptions], values: dict[str, Any]) -> None:
    kind(**{"train_data_dir": "x", **values})


def test_the_names_of_ineffective_options_are_names_of_options() -> None:
    of_subjects = {option.name for option in SubjectOptions.options()}
    assert {*INVERSION_LACKS, *OF_ADAPTERS, *OF_DECODERS, *OF_PICTURES} <= of_subjects
    assert set(TINY_DECODER_LACKS) <= {option.name for option in TinyDecoderOptions.options()}


def test_adapters_have_no_effect_where_all_weights_are_trained(options: Any) -> None:
    with pytest.raises(IneffectiveOptionError, match="--rank has no effect where all weights are trained"):
        finetune(options(rank=2), FULL)
    assert not Path(options().output_dir).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_prompt": "a"}, "--validation-prompt has no effect for a decoder of the kind inpaint"),
        ({"hint_type": "edges"}, "--hint-type has no effect for a decoder of the kind inpaint"),
        ({"hint_type": "edges", "stage": "both"}, "--hint-type has no effect for a decoder of the kind inpaint"),
    ],
)
def test_the_kind_of_the_checkpoints_decoder_counts(
    changes: dict[str, Any], message: str, options: Any, models: Path, tmp_path: Path
) -> None:
    choices = {"model": str(models / "inpaint"), **changes}
    with pytest.raises(InputError, match=message):
        finetune(options(**choices), LORA)
    with pytest.raises(InputError, match=message):
        distill(options(DistillOptions, **choices))
    if "stage" not in changes:
        dreambooth = options(SubjectOptions, method="dreambooth", class_prompt="a cat", **choices)
        with pytest.raises(InputError, match=message):
            train_subject(dreambooth)
    assert not any((tmp_path / "out").rglob("*"))


def test_columns_have_no_effect_on_a_folder_without_a_table(options: Any, pictures: Path) -> None:
    with pytest.raises(InputError, match=r"--image-column has no effect on .*pictures, a folder without a table"):
        read_examples(options(image_column="file_name"))
    (pictures / "metadata.csv").write_text("file_name,words\np1.png,a cat\n")
    assert len(read_examples(options(image_column="file_name"))) == 1


# The command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("subject", "--rank", 8), "--rank has no effect with --method inversion"),
        (("lora", "--mode", "inpaint", "--validation-prompt", "a cat"), "--validation-prompt has no effect for a dec"),
        (("lora", "--stage", "prior", "--condition-dropout", 0.5), "--condition-dropout has no effect with --stage"),
        (("full", "--stage", "prior", "--random-crop"), "--random-crop has no effect with --stage prior"),
    ],
)
def test_the_command_refuses_options_without_effect(
    arguments: tuple[object, ...], words: str, command: Command, model: Path, pictures: Path
) -> None:
    base = ("--model", model, "--train-data-dir", pictures)
    assert_one_line(command("train", *arguments, *base), 1, words, "leave it out")


def test_settings_without_effect_are_left_out(command: Command, models: Path, pictures: Path) -> None:
    path = settings_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('[train]\nrank = 8\nuse-ema = true\nema-decay = 0.5\n[train.lora]\nvalidation-prompt = "a cat"\n')
    short = ("--train-data-dir", pictures, "--max-train-steps", 1, "--validation-images", 0, "-q")
    subject = command("train", "subject", "--model", models / "combined", *short)
    assert (subject.code, subject.err) == (0, "")
    inpaint = command("train", "lora", "--model", models / "inpaint", *short, "--no-use-ema")
    assert (inpaint.code, inpaint.err) == (0, "")
    stored = {
        name: checkpoints.read_checkpoint(Path(f"kandinsky22-{name}/checkpoint-000001"))["options"]
        for name in ("subject/subject", "training/decoder")
    }
    learned, adapter = stored.values()
    assert (learned["rank"], learned["ema_decay"]) == (16, 0.5)
    assert (adapter["rank"], adapter["ema_decay"], adapter["validation_prompt"]) == (8, 0.999, ())
    result = command("train", "subject", "--model", models / "combined", *short, "--rank", 8)
    assert_one_line(result, 1, "--rank has no effect with --method inversion")
    Path("options.yaml").write_text("rank: 8\n")
    result = command("train", "subject", "--model", models / "combined", *short, "--config", "options.yaml")
    assert_one_line(result, 1, "--rank has no effect with --method inversion")
