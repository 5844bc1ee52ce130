"""The subcommands that draw, each a declaration: what it reads beside the common options, and which networks draw."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kandinsky22.cli import options
from kandinsky22.cli.request import Request

PRIOR, PRIOR_FROM_PICTURE = "KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline"


@dataclasses.dataclass(frozen=True)
class Mode:
    """One subcommand. `needs` are the options without which nothing can be drawn, `together` those that act only
    beside another; `shaped_by` are the pictures that lie under the drawn one, of which the first gives it its shape;
    `published` is the Hub id of the published weights."""

    name: str
    summary: str
    description: str
    example: str
    declare: Callable[[Any], None]
    needs: Mapping[str, str]
    decoder: Callable[[Request], str]
    prior: Callable[[Request], str] = lambda request: PRIOR
    together: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shaped_by: tuple[str, ...] = ()
    published: str = "kandinsky-community/kandinsky-2-2-decoder"

    def add_parser(self, subparsers: argparse._SubParsersAction[Any], run: Callable[..., None]) -> None:
        """Declare the subcommand, which calls `run(mode, args)`."""
        parser = subparsers.add_parser(
            self.name,
            help=self.summary,
            description=f"{self.description}\nEach picture carries its recipe: see `kandinsky22 info`.",
            epilog=f"example:\n  kandinsky22 {self.name} {self.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.declare(parser.add_argument_group("input"))
        parser.add_argument(
            "--from", dest="source", type=Path, metavar="FILE", help="repeat this picture's recipe; other options win"
        )
        options.add_output_options(parser)
        options.add_sampling_options(parser)
        options.add_model_options(parser)
        parser.set_defaults(run=lambda args: run(self, args), fail=parser.error)

    def check(self, request: Request, fail: Callable[[str], Any]) -> None:
        """Call `fail` with a message if something is missing, or can have no effect."""
        for name, what in self.needs.items():
            if getattr(request, name) is None:
                fail(f"{what} is needed, or a picture to repeat: --from picture.png")
        for name, other in self.together.items():
            if getattr(request, name) is not None and getattr(request, other) is None:
                fail(f"--{name} acts only together with --{other}")


def _generate(group: Any) -> None:
    options.add_prompt(group)


def _img2img(group: Any) -> None:
    options.add_prompt(group)
    options.add_picture(group, "image", "the picture to start from")
    options.add_strength(group, "part of the steps that run: 0 leaves the picture as it is, 1 keeps little of it")


def _inpaint(group: Any) -> None:
    options.add_prompt(group)
    options.add_picture(group, "image", "the picture to repaint in part")
    options.add_picture(group, "mask", "white where it is repainted, black where it is kept")
    group.add_argument(
        "--keep-pixels",
        action=argparse.BooleanOptionalAction,
        help="copy the kept part from the picture itself, exactly; else it is the decoder's close rendering of it",
    )


def _control(group: Any) -> None:
    options.add_prompt(group)
    options.add_picture(group, "hint", "the composition, such as a depth map")
    options.add_picture(group, "image", "a picture to start from, too")
    options.add_strength(group, "with --image, part of the steps that run, 0 to 1")


def _mix(group: Any) -> None:
    options.add_portions(group)


def _variations(group: Any) -> None:
    group.add_argument("image", nargs="?", type=options.picture_file, metavar="PICTURE", help="what is to be varied")
    group.add_argument("--prompt", metavar="TEXT", help="lead the variations towards this")
    options.add_strength(group, "with --prompt, how far: 0 not at all, 1 until little of the picture is left")


PROMPT, IMAGE = {"prompt": "a PROMPT"}, {"image": "--image"}

MODES = (
    Mode(
        name="generate",
        summary="draw pictures from a prompt",
        description="Draw pictures from a prompt.",
        example='"a red circle to the left of a blue square on a yellow background" -o picture.png',
        declare=_generate,
        needs=PROMPT,
        decoder=lambda request: "KandinskyV22Pipeline",
    ),
    Mode(
        name="img2img",
        summary="draw pictures from a prompt and a picture to start from",
        description="Draw pictures from a prompt, starting from a picture instead of from nothing.",
        example='"a red star on a blue background" --image photo.png --strength 0.6 -o star.png',
        declare=_img2img,
        needs=PROMPT | IMAGE,
        decoder=lambda request: "KandinskyV22Img2ImgPipeline",
        shaped_by=("image",),
    ),
    Mode(
        name="inpaint",
        summary="repaint the part of a picture that a mask shows",
        description="Repaint the part of a picture that a mask shows in white.",
        example='"a green triangle" --image photo.png --mask mask.png --keep-pixels -o repainted.png',
        declare=_inpaint,
        needs=PROMPT | IMAGE | {"mask": "--mask"},
        decoder=lambda request: "KandinskyV22InpaintPipeline",
        shaped_by=("image", "mask"),
        published="kandinsky-community/kandinsky-2-2-decoder-inpaint",
    ),
    Mode(
        name="control",
        summary="draw pictures from a prompt, composed as a hint shows",
        description="Draw pictures from a prompt, composed as a hint, such as a depth map, shows.",
        example='"a white circle on a purple background" --hint depth.png -o composed.png',
        declare=_control,
        needs=PROMPT | {"hint": "--hint"},
        decoder=lambda request: f"KandinskyV22Controlnet{'' if request.image is None else 'Img2Img'}Pipeline",
        together={"strength": "image"},
        shaped_by=("hint", "image"),
        published="kandinsky-community/kandinsky-2-2-controlnet-depth",
    ),
    Mode(
        name="mix",
        summary="draw pictures between texts and pictures",
        description="Draw pictures of what lies between texts and pictures, each with a weight of its own.",
        example='--text "a red circle on a white background" 0.6 --image photo.png 0.4 -o between.png',
        declare=_mix,
        needs={"parts": "something to mix (--text or --image)"},
        decoder=lambda request: "KandinskyV22Pipeline",
    ),
    Mode(
        name="variations",
        summary="draw variations of a picture",
        description="Draw pictures that show what a picture shows, each in its own way.",
        example="photo.png -n 4 -o variation.png",
        declare=_variations,
        needs={"image": "a PICTURE"},
        decoder=lambda request: "KandinskyV22Pipeline",
        prior=lambda request: PRIOR if request.prompt is None else PRIOR_FROM_PICTURE,
        together={"strength": "prompt"},
    ),
)
