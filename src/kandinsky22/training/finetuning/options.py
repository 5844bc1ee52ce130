"""Options of fine-tuning: one table for Python, the command, YAML files and the reference page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kandinsky22.errors import InputError, invalid
from kandinsky22.training.finetuning.effects import (
    INVERSION_LACKS,
    OF_ADAPTERS,
    OF_CLASS_PICTURES,
    OF_DECODERS,
    OF_PICTURES,
    OF_THE_HUB,
    TINY_DECODER_LACKS,
    Ineffective,
    ineffective_in_mode,
)
from kandinsky22.training.finetuning.option import OptionTable, option_field

STAGES = ("prior", "decoder", "both")
MODES = ("plain", "inpaint", "hint")
PRECISIONS = ("no", "fp16", "bf16")
LR_SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
HINT_KINDS = ("file", "edges")
FROM_ENCODER, FROM_PRIOR = "encoder", "prior"
IMAGE_EMBEDS = (FROM_ENCODER, FROM_PRIOR)
ATTENTION, BLOCKS = "attention", "blocks"  # groups of layers
REPORTS = ("none", "tensorboard")
SUBJECT_METHODS = ("inversion", "dreambooth")
LARGEST_WIDTH = 4096

_MODEL, _DATA, _CONDITION, _LORA = "model", "data", "objective", "LoRA"
_OPTIMIZER, _RUN, _CHECK, _SUBJECT = "optimizer", "run", "validation", "subject"
_DISTILL, _TINY = "distillation", "tiny decoder"
_TARGET_HELP = (
    "layers that get adapters: attention, blocks (residual blocks and feed-forward), or endings of layer names"
)


@dataclass(frozen=True)
class TrainingOptions(OptionTable):
    """Options of `kandinsky22 train lora` and `train full`. `options()` describes them.

    Raises:
        InputError: A value is not accepted, or two options contradict each other.
    """

    model: str = option_field(str, "embedded", _MODEL, "folder or Hub id of a decoder")
    prior: str | None = option_field(str, None, _MODEL, "folder or Hub id of a prior; by default the one of the model")
    variant: str | None = option_field(str, None, _MODEL, "variant of the weight files, such as fp16")
    revision: str | None = option_field(str, None, _MODEL, "branch, tag or commit on the Hub")
    stage: str = option_field(str, "decoder", _MODEL, "networks to train", choices=STAGES)
    mode: str | None = option_field(
        str, None, _MODEL, "kind of decoder; by default the one of the checkpoint", choices=MODES
    )

    train_data_dir: str | None = option_field(
        str, None, _DATA, "folder of pictures, CSV file, or .tar shard or folder of shards (webdataset)"
    )
    dataset_name: str | None = option_field(str, None, _DATA, "data set on the Hub, instead of --train-data-dir")
    dataset_config_name: str | None = option_field(str, None, _DATA, "configuration of the data set on the Hub")
    split: str = option_field(str, "train", _DATA, "split of the data set on the Hub")
    image_column: str | None = option_field(str, None, _DATA, "column of pictures or file names")
    caption_column: str | None = option_field(str, None, _DATA, "column of captions")
    max_train_samples: int | None = option_field(int, None, _DATA, "number of pictures that are used", lowest=1)
    resolution: int | None = option_field(
        int, None, _DATA, "side of the pictures in pixels; by default that of the model", lowest=8, highest=4096
    )
    aspect_buckets: bool = option_field(bool, False, _DATA, "keep the proportions of pictures, at about the same area")
    random_flip: bool = option_field(bool, False, _DATA, "mirror half of the pictures")
    random_crop: bool = option_field(bool, False, _DATA, "cut out random parts instead of the centre")
    crops_per_image: int = option_field(
        int, 4, _DATA, "number of different random parts per picture", lowest=1, highest=256
    )
    hint_type: str = option_field(
        str, "file", _DATA, "hints of a hint decoder: files named NAME.hint.png, or edges", choices=HINT_KINDS
    )
    cache_dir: str | None = option_field(
        str, None, _DATA, "folder of stored embeddings and latents; by default OUTPUT_DIR/cache"
    )

    caption_dropout: float = option_field(
        float, 0.1, _CONDITION, "share of captions replaced by the empty text (prior)", lowest=0, highest=1
    )
    condition_dropout: float = option_field(
        float,
        0.1,
        _CONDITION,
        "share of image embeddings replaced by that of the zero image (decoder)",
        lowest=0,
        highest=1,
    )
    image_embeds: str = option_field(
        str,
        FROM_ENCODER,
        _CONDITION,
        "source of the decoder's image embeddings, the pictures or samples of the prior for their captions",
        choices=IMAGE_EMBEDS,
    )
    snr_gamma: float | None = option_field(
        float, None, _CONDITION, "gamma of min-SNR weights, 5 is usual; by default unweighted", lowest=0, above=True
    )
    vlb_weight: float = option_field(
        float, 0.001, _CONDITION, "weight of the learned variance's loss, for decoders that predict one", lowest=0
    )

    rank: int = option_field(int, 16, _LORA, "rank of the adapters", lowest=1, highest=4096)
    lora_alpha: float | None = option_field(
        float, None, _LORA, "adapters are scaled by lora_alpha / rank; by default by 1", lowest=0, above=True
    )
    target_modules: tuple[str, ...] = option_field(
        str,
        (ATTENTION,),
        _LORA,
        _TARGET_HELP,
        repeatable=True,
    )

    learning_rate: float | None = option_field(
        float,
        None,
        _OPTIMIZER,
        "largest learning rate; by default 0.0001, of an inverted subject 0.02",
        lowest=0,
        above=True,
    )
    lr_scheduler: str = option_field(
        str, "constant", _OPTIMIZER, "course of the learning rate after the warm-up", choices=LR_SCHEDULES
    )
    lr_warmup_steps: int = option_field(int, 0, _OPTIMIZER, "steps in which the learning rate grows", lowest=0)
    train_batch_size: int = option_field(int, 1, _OPTIMIZER, "pictures per process and pass", lowest=1, highest=65536)
    gradient_accumulation_steps: int = option_field(
        int, 1, _OPTIMIZER, "passes whose gradients are added up per step", lowest=1, highest=65536
    )
    max_train_steps: int = option_field(int, 1000, _OPTIMIZER, "number of steps", lowest=1)
    adam_beta1: float = option_field(float, 0.9, _OPTIMIZER, "decay of AdamW's first moment", lowest=0, highest=0.99999)
    adam_beta2: float = option_field(
        float, 0.999, _OPTIMIZER, "decay of AdamW's second moment", lowest=0, highest=0.99999
    )
    adam_weight_decay: float = option_field(float, 0.01, _OPTIMIZER, "weight decay of matrices", lowest=0)
    adam_epsilon: float = option_field(float, 1e-8, _OPTIMIZER, "epsilon of AdamW", lowest=0, above=True)
    max_grad_norm: float = option_field(float, 1.0, _OPTIMIZER, "largest norm of the gradients", lowest=0, above=True)
    use_8bit_adam: bool = option_field(bool, False, _OPTIMIZER, "AdamW with moments of 8 bits (bitsandbytes, CUDA)")
    use_ema: bool = option_field(bool, False, _OPTIMIZER, "save the moving average of the weights")
    ema_decay: float = option_field(float, 0.999, _OPTIMIZER, "decay of the moving average", lowest=0, highest=0.999999)

    output_dir: str = option_field(str, "kandinsky22-training", _RUN, "folder of results and checkpoints")
    seed: int = option_field(int, 0, _RUN, "seed of all random numbers", lowest=0)
    mixed_precision: str = option_field(str, "no", _RUN, "type that networks compute in", choices=PRECISIONS)
    gradient_checkpointing: bool = option_field(bool, False, _RUN, "less memory, a third more time")
    checkpointing_steps: int = option_field(int, 500, _RUN, "steps between two checkpoints", lowest=1)
    checkpoints_total_limit: int | None = option_field(int, None, _RUN, "number of checkpoints that are kept", lowest=1)
    resume: str | None = option_field(str, None, _RUN, "checkpoint to continue, latest or a path")
    report_to: str = option_field(str, "none", _RUN, "where the log is written besides log.jsonl", choices=REPORTS)
    log_every: int = option_field(int, 10, _RUN, "steps per line of the log", lowest=1)

    validation_prompt: tuple[str, ...] = option_field(
        str, (), _CHECK, "prompt of a sample picture; may be repeated", repeatable=True
    )
    validation_steps: int = option_field(int, 100, _CHECK, "steps between two sheets of samples", lowest=1)
    validation_images: int | None = option_field(
        int, None, _CHECK, "pictures held out for the validation loss; by default a tenth, at most 16", lowest=0
    )

    def _check_data(self) -> None:
        if (self.train_data_dir is None) == (self.dataset_name is None):
            count = "neither" if self.train_data_dir is None else "both"
            raise InputError(f"pictures: {count} of --train-data-dir and --dataset-name set: expected exactly one")

    def _check_combinations(self) -> None:
        self._check_data()
        for where, names in self._ineffective():
            self.refuse(where, *names)
        if self.image_embeds == FROM_PRIOR and self.stage != "decoder":
            advice = "train the decoder by itself, with --prior FOLDER of a trained prior"
            raise invalid("--image-embeds", self.image_embeds, f"{FROM_ENCODER} with --stage {self.stage}", advice)
        if self.lr_warmup_steps > self.max_train_steps:
            expected = f"at most --max-train-steps={self.max_train_steps}"
            raise invalid("--lr-warmup-steps", self.lr_warmup_steps, expected)

    def _ineffective(self) -> Iterator[Ineffective]:
        """Yield the options that have no effect, as far as the other options say so."""
        if self.dataset_name is None:
            yield "without --dataset-name", OF_THE_HUB
        if not self.random_crop:
            yield "without --random-crop", ("crops_per_image",)
        if not self.use_ema:
            yield "without --use-ema", ("ema_decay",)
        if self.stage == "prior":
            yield "with --stage prior", OF_DECODERS
            if not self.validation_prompt:
                yield "with --stage prior and without --validation-prompt", ("resolution",)
        if self.stage == "decoder":
            yield "with --stage decoder", ("caption_dropout",)
            if self.image_embeds == FROM_ENCODER:
                yield f"with --stage decoder and --image-embeds {FROM_ENCODER}", ("caption_column",)
            else:
                where = f"on captions, which --image-embeds {FROM_PRIOR} samples embeddings for"
                yield where, ("random_flip", "random_crop")
        if self.mode is not None:
            yield from ineffective_in_mode(self.mode, self.stage)

    def check_mode(self, mode: str) -> None:
        """Check that all options have an effect for a kind of decoder.

        Args:
            mode: Kind of decoder that the checkpoint has.

        Raises:
            IneffectiveOptionError: One of them has none.
        """
        for where, names in ineffective_in_mode(mode, self.stage):
            self.refuse(where, *names)

    @property
    def largest_learning_rate(self) -> float:
        """The largest learning rate, or its default."""
        return 1e-4 if self.learning_rate is None else self.learning_rate

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step.

        Args:
            step: Number of the step, counted from 0.
        """
        if step < self.lr_warmup_steps:
            return self.largest_learning_rate * (step + 1) / self.lr_warmup_steps
        progress = (step - self.lr_warmup_steps) / max(self.max_train_steps - self.lr_warmup_steps, 1)
        if self.lr_scheduler == "linear":
            return self.largest_learning_rate * max(1.0 - progress, 0.0)
        if self.lr_scheduler == "cosine":
            return self.largest_learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
        return self.largest_learning_rate


@dataclass(frozen=True)
class SubjectOptions(TrainingOptions):
    """Options of `kandinsky22 train subject`.

    Raises:
        InputError: A value is not accepted, or two options contradict each other.
    """

    max_train_steps: int = option_field(int, 300, _OPTIMIZER, "number of steps", lowest=1)
    output_dir: str = option_field(str, "kandinsky22-subject", _RUN, "folder of results and checkpoints")

    method: str = option_field(
        str, "inversion", _SUBJECT, "learn one image embedding, or an adapter of the decoder", choices=SUBJECT_METHODS
    )
    class_data_dir: str | None = option_field(
        str, None, _SUBJECT, "dreambooth: folder of class pictures, of the subject's kind or of other things"
    )
    class_prompt: tuple[str, ...] = option_field(
        str,
        (),
        _SUBJECT,
        "dreambooth: prompts for generating the class pictures, used in turn",
        repeatable=True,
    )
    num_class_images: int = option_field(
        int, 50, _SUBJECT, "dreambooth: number of class pictures, of all prompts together", lowest=1, highest=100000
    )
    prior_loss_weight: float = option_field(
        float, 1.0, _SUBJECT, "dreambooth: weight of the loss on class pictures", lowest=0
    )

    @property
    def largest_learning_rate(self) -> float:
        """The largest learning rate, or its default: an embedding is learned in units of its standard deviation."""
        if self.learning_rate is None and self.method == "inversion":
            return 0.02
        return super().largest_learning_rate

    def _check_combinations(self) -> None:
        super()._check_combinations()
        if self.stage != "decoder":
            raise invalid("--stage", self.stage, "decoder", "subjects are learned with the decoder alone")
        if self.num_class_images < (prompts := len(set(self.class_prompt))):
            raise invalid("--num-class-images", self.num_class_images, f"at least {prompts}, one per --class-prompt")
        if self.method == "inversion" and self.mode not in (None, "plain"):
            raise invalid("--mode", self.mode, "plain", "embeddings are learned with the plain decoder")
        if self.method == "inversion" and self.image_embeds != FROM_ENCODER:
            expected = f"{FROM_ENCODER} with --method inversion"
            raise invalid("--image-embeds", self.image_embeds, expected, "add --method dreambooth")
        has_class = self.class_data_dir is not None or bool(self.class_prompt)
        if self.method == "dreambooth" and self.prior_loss_weight > 0 and not has_class:
            raise InputError(
                "--method dreambooth: neither --class-data-dir nor --class-prompt set: expected one of them, or "
                "--prior-loss-weight 0 to train without prior preservation"
            )

    def _ineffective(self) -> Iterator[Ineffective]:
        if self.method == "inversion":
            yield "with --method inversion", INVERSION_LACKS
        elif self.prior_loss_weight == 0:
            yield "with --prior-loss-weight 0", OF_CLASS_PICTURES
        elif self.class_data_dir is not None:
            yield "with --class-data-dir", ("class_prompt",)
        yield from super()._ineffective()


@dataclass(frozen=True)
class DistillOptions(TrainingOptions):
    """Options of `kandinsky22 train distill`.

    Raises:
        InputError: A value is not accepted, or two options contradict each other.
    """

    # Nothing draws without a condition when guidance is part of the weights.
    caption_dropout: float = option_field(float, 0.0, _CONDITION, "no captions are dropped", lowest=0, highest=1)
    condition_dropout: float = option_field(float, 0.0, _CONDITION, "no conditions are dropped", lowest=0, highest=1)
    rank: int = option_field(int, 64, _LORA, "rank of the adapters", lowest=1, highest=4096)
    target_modules: tuple[str, ...] = option_field(
        str,
        (ATTENTION, BLOCKS),
        _LORA,
        _TARGET_HELP,
        repeatable=True,
    )
    learning_rate: float | None = option_field(
        float, None, _OPTIMIZER, "largest learning rate; by default 0.0001, with --full 0.00001", lowest=0, above=True
    )
    use_ema: bool = option_field(
        bool, True, _OPTIMIZER, "compare with, and save, the moving average of the weights instead of the weights"
    )
    ema_decay: float = option_field(float, 0.95, _OPTIMIZER, "decay of the moving average", lowest=0, highest=0.999999)
    output_dir: str = option_field(str, "kandinsky22-distilled", _RUN, "folder of results and checkpoints")

    prompts: str | None = option_field(
        str, None, _DISTILL, "file with a prompt per line: the model draws what it is trained on, instead of pictures"
    )
    num_images_per_prompt: int = option_field(int, 1, _DISTILL, "samples drawn per prompt", lowest=1, highest=100000)
    full: bool = option_field(bool, False, _DISTILL, "train all weights instead of adapters")
    guidance_scale: float | None = option_field(
        float, None, _DISTILL, "guidance scale that becomes part of the weights; by default that of the model", lowest=1
    )
    guidance_scale_max: float | None = option_field(
        float, None, _DISTILL, "draw guidance scales from --guidance-scale up to this one", lowest=1
    )
    num_ddim_timesteps: int = option_field(
        int,
        50,
        _DISTILL,
        "steps of the original model with DDIM; a training example spans one of them",
        lowest=1,
        highest=1000,
    )
    huber_c: float = option_field(
        float,
        0.001,
        _DISTILL,
        "smaller errors count squared, larger ones as they are (pseudo-Huber loss)",
        lowest=0,
        above=True,
    )
    num_inference_steps: int = option_field(
        int,
        4,
        _DISTILL,
        "steps of sample pictures and of the result: a distilled adapter names them, and so do the pipelines of --full",
        lowest=1,
        highest=1000,
    )

    @property
    def largest_learning_rate(self) -> float:
        """The largest learning rate, or its default."""
        return 1e-5 if self.learning_rate is None and self.full else super().largest_learning_rate

    def _check_data(self) -> None:
        sources = {
            "--train-data-dir": self.train_data_dir,
            "--dataset-name": self.dataset_name,
            "--prompts": self.prompts,
        }
        chosen = [name for name, value in sources.items() if value is not None]
        if len(chosen) != 1:
            count = " and ".join(chosen) if chosen else "none"
            raise InputError(f"pictures: {count} of {', '.join(sources)} set: expected exactly one")

    def _check_combinations(self) -> None:
        super()._check_combinations()
        if self.guidance_scale_max is not None and self.guidance_scale_max < (self.guidance_scale or math.inf):
            expected = "None without --guidance-scale"
            if self.guidance_scale is not None:
                expected = f"at least --guidance-scale={self.guidance_scale:g}"
            raise invalid("--guidance-scale-max", self.guidance_scale_max, expected)
        if self.num_inference_steps > self.num_ddim_timesteps:
            expected = f"at most --num-ddim-timesteps={self.num_ddim_timesteps}"
            raise invalid("--num-inference-steps", self.num_inference_steps, expected)

    def _ineffective(self) -> Iterator[Ineffective]:
        if self.prompts is None:
            yield "without --prompts", ("num_images_per_prompt",)
        else:
            yield "with --prompts", OF_PICTURES
        yield "in distillation", tuple(option.name for option in self.options() if option.group == _CONDITION)
        if self.full:
            yield "with --full", OF_ADAPTERS
        yield from super()._ineffective()


@dataclass(frozen=True)
class TinyDecoderOptions(TrainingOptions):
    """Options of `kandinsky22 train tiny-decoder`.

    Raises:
        InputError: A value is not accepted, or two options contradict each other.
    """

    learning_rate: float | None = option_field(
        float, None, _OPTIMIZER, "largest learning rate; by default 0.001", lowest=0, above=True
    )
    train_batch_size: int = option_field(int, 8, _OPTIMIZER, "pictures per process and pass", lowest=1, highest=65536)
    max_train_steps: int = option_field(int, 10000, _OPTIMIZER, "number of steps", lowest=1)
    lr_scheduler: str = option_field(
        str, "cosine", _OPTIMIZER, "course of the learning rate after the warm-up", choices=LR_SCHEDULES
    )
    output_dir: str = option_field(
        str, "kandinsky22-tiny-decoder", _RUN, "folder of results and checkpoints; the result is in tiny_decoder"
    )

    block_out_channels: tuple[str, ...] = option_field(
        str,
        (),
        _TINY,
        "channels per resolution level, from full size to latent size; by default 32 64 128 192 for the published MoVQ",
        repeatable=True,
    )
    gradient_weight: float = option_field(
        float, 1.0, _TINY, "weight of the loss on differences between neighbouring pixels", lowest=0
    )
    latent_noise: float = option_field(
        float, 0.1, _TINY, "largest standard deviation of noise in half of the latents", lowest=0, highest=10
    )

    @property
    def largest_learning_rate(self) -> float:
        """The largest learning rate, or its default."""
        return 1e-3 if self.learning_rate is None else self.learning_rate

    @property
    def widths(self) -> tuple[int, ...] | None:
        """Channels per resolution level; None for those that suit MoVQ."""
        return tuple(int(text) for text in self.block_out_channels) or None

    def _check_combinations(self) -> None:
        for option in self.options():
            if option.name in TINY_DECODER_LACKS and getattr(self, option.name) != option.default:
                expected = f"{option.default!r}, because a tiny decoder has no such setting"
                raise invalid(option.flag, getattr(self, option.name), expected)
        super()._check_combinations()
        for text in self.block_out_channels:
            if not text.isdecimal() or not 1 <= int(text) <= LARGEST_WIDTH:
                raise invalid("--block-out-channels", text, f"integers from 1 to {LARGEST_WIDTH}, one per level")


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the options in a YAML file.

    Args:
        path: The file: one mapping of option names to values.

    Raises:
        InputError: The file cannot be read, or is not such a mapping.
        MissingDependencyError: PyYAML is not installed.
    """
    from kandinsky22.inputs.sources import read_file  # imports PIL
    from kandinsky22.requirements import require

    yaml = require("yaml", "--config", install="pyyaml")
    try:
        content = yaml.safe_load(read_file(str(path)).decode("utf-8"))
    except OSError as error:
        raise InputError(f"--config {path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or an impossible date
        raise InputError(f"--config {path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: expected one mapping of option names to values")
    return {str(name).replace("-", "_"): value for name, value in content.items()}
