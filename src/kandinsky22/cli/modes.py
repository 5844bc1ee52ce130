"""The subcommands that generate images, each declared by its mode, its help and its options."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from kandinsky22.cli import option_values, options
from kandinsky22.cli.settings import SUPERSEDES
from kandinsky22.generation.limits import MAX_IMAGES
from kandinsky22.generation.modes import MODES, Mode
from kandinsky22.generation.request import Request

# Options whose values a preset, or the recipe of --from, has too. Both are on the command line, settings are not.
PRESET_OPTIONS = (
    "scheduler",
    "steps",
    "guidance_interval",
    "prior_scheduler",
    "prior_steps",
    "prior_guidance_interval",
)
RECIPE_OPTIONS = (*(field.name for field in dataclasses.fields(Request)), "quality", "size", "seed", "count")


@dataclasses.dataclass(frozen=True)
class Subcommand:
    """One subcommand.

    Attributes:
        mode: Mode of generation, whose name is that of the subcommand.
        summary: Line in the list of subcommands.
        description: Sentence at the top of the subcommand's help.
        example: Arguments of the example at the end of the help.
        add_inputs: Function that adds the subcommand's own options to a group.
        labels: Names of required settings in usage errors, by field of `Request`.
    """

    mode: Mode
    summary: str
    description: str
    example: str
    add_inputs: Callable[[argparse._ArgumentGroup], None]
    labels: Mapping[str, str]

    def add_parser(
        self,
        subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
        run: Callable[[Subcommand, argparse.Namespace], None],
    ) -> None:
        """Add the subcommand.

        Args:
            subparsers: Subcommands of the command's parser.
            run: Function that runs the subcommand.
        """
        parser = subparsers.add_parser(
            self.mode.name,
            help=self.summary,
            description=f"{self.description}\nEach image contains its recipe: see `kandinsky22 info`.",
            epilog=f"example:\n  kandinsky22 {self.mode.name} {self.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_inputs(parser.add_argument_group("input"))
        parser.add_argument(
            "--from",
            dest="source",
            type=Path,
            metavar="FILE",
            help="repeat the recipe of this image; other options override it",
        )
        output = parser.add_argument_group("output")
        output.add_argument(
            "--count",
            "-n",
            type=option_values.integer(1, MAX_IMAGES),
            dest="count",
            metavar="N",
            help="number of images (default: 1)",
        )
        default = "picture.png; with --from, the repeated file's name with -again"
        options.add_output_options(output, default)
        output.add_argument(
            "--preview", action="store_true", help="show the image in the terminal while it is generated"
        )
        options.add_sampling_options(parser)
        options.add_model_options(parser)
        options.add_server_options(parser)
        supersedes = {"source": RECIPE_OPTIONS, "quality": PRESET_OPTIONS, "model": ("prior",)}
        parser.set_defaults(run=lambda args: run(self, args), fail=parser.error, **{SUPERSEDES: supersedes})

    def check(self, request: Request, fail: Callable[[str], NoReturn]) -> None:
        """Report a missing setting, or an option that cannot have an effect.

        Args:
            request: Settings of the command.
            fail: Function that reports a usage error and exits.
        """
        if (field := self.mode.missing_setting(request)) is not None:
            fail(f"{self.labels[field]} is required, unless --from names an image whose recipe is repeated")
        if (pair := self.mode.ineffective_setting(request)) is not None:
            fail(f"--{pair.name} requires --{pair.other}")


def _add_generate_inputs(group: argparse._ArgumentGroup) -> None:
    options.add_prompt(group)
    options.add_subject(group)


def _add_img2img_inputs(group: argparse._ArgumentGroup) -> None:
    options.add_prompt(group)
    options.add_image(group, "image", "image to start from")
    options.add_strength(
        group, "fraction of the steps that run: 0 only encodes and decodes the image, 1 keeps little of it"
    )


def _add_inpaint_inputs(group: argparse._ArgumentGroup) -> None:
    options.add_prompt(group)
    options.add_image(group, "image", "image to repaint in part")
    options.add_image(group, "mask", "mask: white where the image is repainted, black where it is preserved")
    group.add_argument(
        "--keep-pixels",
        action=argparse.BooleanOptionalAction,
        help="copy the preserved pixels from the image, exactly; otherwise the decoder reproduces them closely",
    )
    group.add_argument(
        "--crop",
        type=option_values.integer(0),
        metavar="[PADDING]",
        help="repaint only the part around the mask, with PADDING pixels around it "
        f"(default: {option_values.DEFAULT_CROP_PADDING}), and keep the image's own size and all its other pixels",
    )
    group.add_argument("--no-crop", dest="crop", action="store_false", default=None, help="repaint the entire image")
    group.add_argument(
        "--extend",
        type=option_values.pixel_margins,
        metavar="L,T,R,B",
        help="add margins to the left, top, right and bottom, in pixels, and paint them",
    )


def _add_control_inputs(group: argparse._ArgumentGroup) -> None:
    options.add_prompt(group)
    options.add_image(group, "hint", "ControlNet hint, such as a depth map")
    options.add_image(group, "image", "image to start from (optional)")
    options.add_strength(group, "with --image, fraction of the steps that run, 0 to 1")


def _add_variations_inputs(group: argparse._ArgumentGroup) -> None:
    group.add_argument("image", nargs="?", type=option_values.image_path, metavar="IMAGE", help="image to vary")
    group.add_argument(
        "--prompt", metavar="TEXT", help=f"description towards which the variations are moved{options.TEXT_SOURCES}"
    )
    options.add_strength(group, "with --prompt, how far: 0 not at all, 1 until little of the image is left")


SUBCOMMANDS = (
    Subcommand(
        mode=MODES["generate"],
        summary="generate images from a prompt",
        description="Generate images from a prompt.",
        example='"a red circle to the left of a blue square on a yellow background" -o picture.png',
        add_inputs=_add_generate_inputs,
        labels={"prompt": "PROMPT"},
    ),
    Subcommand(
        mode=MODES["img2img"],
        summary="generate images from a prompt and an image to start from",
        description="Generate images from a prompt, starting from an image instead of pure noise.",
        example='"a red star on a blue background" --image photo.png --strength 0.6 -o star.png',
        add_inputs=_add_img2img_inputs,
        labels={"prompt": "PROMPT", "image": "--image"},
    ),
    Subcommand(
        mode=MODES["inpaint"],
        summary="repaint the masked part of an image",
        description="Repaint the part of an image that is white in a mask.",
        example='"a green triangle" --image photo.png --mask mask.png --keep-pixels -o repainted.png',
        add_inputs=_add_inpaint_inputs,
        labels={"prompt": "PROMPT", "image": "--image", "mask": "--mask or --extend"},
    ),
    Subcommand(
        mode=MODES["control"],
        summary="generate images from a prompt with the composition of a hint",
        description="Generate images from a prompt with the composition of a ControlNet hint, such as a depth map.",
        example='"a white circle on a purple background" --hint depth.png -o composed.png',
        add_inputs=_add_control_inputs,
        labels={"prompt": "PROMPT", "hint": "--hint"},
    ),
    Subcommand(
        mode=MODES["mix"],
        summary="generate images from a weighted mixture of texts and images",
        description="Generate images from a mixture of texts and images: the weighted sum of their embeddings.",
        example='--text "a red circle on a white background" 0.6 --image photo.png 0.4 -o between.png',
        add_inputs=options.add_mixture,
        labels={"parts": "at least one --text, --image or --subject"},
    ),
    Subcommand(
        mode=MODES["variations"],
        summary="generate variations of an image",
        description="Generate variations of an image from its embedding.",
        example="photo.png -n 4 -o variation.png",
        add_inputs=_add_variations_inputs,
        labels={"image": "IMAGE"},
    ),
)
