"""The subcommands that generate images, each declared by its inputs and its pipeline classes."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from kandinsky22.cli import options
from kandinsky22.cli.limits import MAX_IMAGES
from kandinsky22.cli.request import Request

PRIOR, PRIOR_EMB2EMB = "KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline"


@dataclasses.dataclass(frozen=True)
class Mode:
    """One subcommand.

    Attributes:
        name: Name on the command line.
        summary: Line in the list of subcommands.
        description: Sentence at the top of the subcommand's help.
        example: Arguments of the example at the end of the help.
        add_inputs: Function that adds the subcommand's own options to a group.
        required: Required settings by field of `Request`, as error messages call them.
        decoder_class: Function from the request to the name of the decoder's pipeline class.
        prior_class: Function from the request to the name of the prior's pipeline class.
        alternatives: Required settings that another setting replaces: field to field of the other one.
        depends_on: Options that have an effect only with another option: name to name of the other one.
        base_images: Options of the images that the result is generated over, pixel on pixel. The first one that is set
            determines the default size.
        published_model: Hub id of the published weights.
    """

    name: str
    summary: str
    description: str
    example: str
    add_inputs: Callable[[argparse._ArgumentGroup], None]
    required: Mapping[str, str]
    decoder_class: Callable[[Request], str]
    prior_class: Callable[[Request], str] = lambda request: PRIOR
    alternatives: Mapping[str, str] = dataclasses.field(default_factory=dict)
    depends_on: Mapping[str, str] = dataclasses.field(default_factory=dict)
    base_images: tuple[str, ...] = ()
    published_model: str = "kandinsky-community/kandinsky-2-2-decoder"

    def add_parser(
        self,
        subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
        run: Callable[[Mode, argparse.Namespace], None],
    ) -> None:
        """Add the subcommand.

        Args:
            subparsers: Subcommands of the command's parser.
            run: Function that runs the subcommand.
        """
        parser = subparsers.add_parser(
            self.name,
            help=self.summary,
            description=f"{self.description}\nEach image contains its recipe: see `kandinsky22 info`.",
            epilog=f"example:\n  kandinsky22 {self.name} {self.example}",
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
            "-n", type=options.integer(1, MAX_IMAGES), dest="count", metavar="N", help="number of images (default: 1)"
        )
        default = "picture.png; with --from, the repeated file's name with -again"
        options.add_output_options(output, default)
        options.add_sampling_options(parser)
        options.add_model_options(parser)
        parser.set_defaults(run=lambda args: run(self, args), fail=parser.error)

    def check(self, request: Request, fail: Callable[[str], NoReturn]) -> None:
        """Report a missing setting, or an option that cannot have an effect.

        Args:
            request: Settings of the command.
            fail: Function that reports a usage error and exits.
        """
        for field, label in self.required.items():
            if getattr(request, field) is None and getattr(request, self.alternatives.get(field, field)) is None:
                fail(f"{label} is required, unless --from names an image whose recipe is repeated")
        for name, other in self.depends_on.items():
            if getattr(request, name) is not None and getattr(request, other) is None:
                fail(f"--{name} requires --{other}")


def _add_generate_inputs(group: argparse._ArgumentGroup) -> None:
    options.add_prompt(group)


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
        type=options.integer(0),
        metavar="[PADDING]",
        help="repaint only the part around the mask, with PADDING pixels around it "
        f"(default: {options.DEFAULT_CROP_PADDING}), and keep the image's own size and all its other pixels",
    )
    group.add_argument("--no-crop", dest="crop", action="store_false", default=None, help="repaint the entire image")
    group.add_argument(
        "--extend",
        type=options.pixel_margins,
        metavar="L,T,R,B",
        help="add margins to the left, top, right and bottom, in pixels, and paint them",
    )


def _add_control_inputs(group: argparse._ArgumentGroup) -> None:
    options.add_prompt(group)
    options.add_image(group, "hint", "ControlNet hint, such as a depth map")
    options.add_image(group, "image", "image to start from (optional)")
    options.add_strength(group, "with --image, fraction of the steps that run, 0 to 1")


def _add_variations_inputs(group: argparse._ArgumentGroup) -> None:
    group.add_argument("image", nargs="?", type=options.image_path, metavar="IMAGE", help="image to vary")
    group.add_argument(
        "--prompt", metavar="TEXT", help=f"description towards which the variations are moved{options.TEXT_SOURCES}"
    )
    options.add_strength(group, "with --prompt, how far: 0 not at all, 1 until little of the image is left")


PROMPT, IMAGE = {"prompt": "PROMPT"}, {"image": "--image"}

MODES = (
    Mode(
        name="generate",
        summary="generate images from a prompt",
        description="Generate images from a prompt.",
        example='"a red circle to the left of a blue square on a yellow background" -o picture.png',
        add_inputs=_add_generate_inputs,
        required=PROMPT,
        decoder_class=lambda request: "KandinskyV22Pipeline",
    ),
    Mode(
        name="img2img",
        summary="generate images from a prompt and an image to start from",
        description="Generate images from a prompt, starting from an image instead of pure noise.",
        example='"a red star on a blue background" --image photo.png --strength 0.6 -o star.png',
        add_inputs=_add_img2img_inputs,
        required=PROMPT | IMAGE,
        decoder_class=lambda request: "KandinskyV22Img2ImgPipeline",
        base_images=("image",),
    ),
    Mode(
        name="inpaint",
        summary="repaint the masked part of an image",
        description="Repaint the part of an image that is white in a mask.",
        example='"a green triangle" --image photo.png --mask mask.png --keep-pixels -o repainted.png',
        add_inputs=_add_inpaint_inputs,
        required=PROMPT | IMAGE | {"mask": "--mask or --extend"},
        alternatives={"mask": "extend"},
        decoder_class=lambda request: "KandinskyV22InpaintPipeline",
        base_images=("image", "mask"),
        published_model="kandinsky-community/kandinsky-2-2-decoder-inpaint",
    ),
    Mode(
        name="control",
        summary="generate images from a prompt with the composition of a hint",
        description="Generate images from a prompt with the composition of a ControlNet hint, such as a depth map.",
        example='"a white circle on a purple background" --hint depth.png -o composed.png',
        add_inputs=_add_control_inputs,
        required=PROMPT | {"hint": "--hint"},
        decoder_class=lambda request: f"KandinskyV22Controlnet{'' if request.image is None else 'Img2Img'}Pipeline",
        depends_on={"strength": "image"},
        base_images=("hint", "image"),
        published_model="kandinsky-community/kandinsky-2-2-controlnet-depth",
    ),
    Mode(
        name="mix",
        summary="generate images from a weighted mixture of texts and images",
        description="Generate images from a mixture of texts and images: the weighted sum of their embeddings.",
        example='--text "a red circle on a white background" 0.6 --image photo.png 0.4 -o between.png',
        add_inputs=options.add_mixture,
        required={"parts": "at least one --text or --image"},
        decoder_class=lambda request: "KandinskyV22Pipeline",
    ),
    Mode(
        name="variations",
        summary="generate variations of an image",
        description="Generate variations of an image from its embedding.",
        example="photo.png -n 4 -o variation.png",
        add_inputs=_add_variations_inputs,
        required={"image": "IMAGE"},
        decoder_class=lambda request: "KandinskyV22Pipeline",
        prior_class=lambda request: PRIOR if request.prompt is None else PRIOR_EMB2EMB,
        depends_on={"strength": "prompt"},
    ),
)
