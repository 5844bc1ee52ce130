"""Draw the documentation's drawings: `python docs/drawings/draw.py`; with --check, compare the files instead."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the folder is not part of a package

from svg import Drawing

FOLDER = Path(__file__).parent


def two_stages() -> Drawing:
    """Draw the way from a prompt to an image through prior and decoder."""
    drawing = Drawing(
        "two-stages",
        "The two stages of Kandinsky 2.2",
        "The prior turns a prompt into an image embedding: CLIP's text tower encodes the prompt, and a causal "
        "transformer denoises the embedding. The decoder turns the embedding into an image: a UNet denoises latents, "
        "and MoVQ decodes them to pixels.",
        width=640,
        height=744,
    )
    left, width, middle = 40, 370, 225
    side, side_width = 450, 160
    drawing.box(105, 10, 240, [("name", "prompt")], "data")
    drawing.group(20, 76, 600, 226, "Stage 1: prior")
    drawing.arrow((middle, 48), (middle, 116))
    drawing.box(left, 116, width, [("name", "CLIP text tower"), ("note", "77 token states and one text embedding")])
    drawing.arrow((middle, 174), (middle, 210))
    drawing.box(
        left,
        210,
        width,
        [
            ("code", "PriorTransformer"),
            ("note", "20 causal layers, 25 steps"),
            ("note", "predicts the clean embedding"),
        ],
    )
    drawing.box(side, 220, side_width, [("name", "noise"), ("note", "1280")], "data")
    drawing.arrow((side, 249), (left + width, 249))
    drawing.arrow((middle, 288), (middle, 330))
    drawing.box(105, 330, 240, [("name", "image embedding"), ("note", "1280")], "data")
    drawing.group(20, 416, 600, 242, "Stage 2: decoder")
    drawing.arrow((middle, 388), (middle, 456))
    drawing.box(
        left,
        456,
        width,
        [
            ("code", "UNet2DConditionModel"),
            ("note", "1.25 billion parameters, 100 steps"),
            ("note", "predicts the noise"),
        ],
    )
    drawing.box(side, 436, side_width, [("name", "noise"), ("note", "4 × 64 × 64")], "data")
    drawing.arrow((side, 474), (left + width, 474))
    drawing.box(
        side, 512, side_width, [("name", "optional"), ("note", "start image, mask"), ("note", "or hint")], "optional"
    )
    drawing.arrow((side, 522), (left + width, 522))
    drawing.arrow((middle, 534), (middle, 584))
    drawing.text(middle + 14, 564, "latents 4 × 64 × 64")
    drawing.box(left, 584, width, [("code", "VQModel"), ("note", "MoVQ decoder: 8 × 8 pixels per latent position")])
    drawing.arrow((middle, 642), (middle, 676))
    drawing.box(105, 676, 240, [("name", "image"), ("note", "3 × 512 × 512")], "data")
    return drawing


def sampling_loop() -> Drawing:
    """Draw what happens once per call, at each timestep, and at the end."""
    drawing = Drawing(
        "sampling-loop",
        "The sampling loop",
        "Once per call the condition, the timesteps and the initial noise are computed. Each timestep scales the "
        "sample, runs the network, applies guidance, makes a scheduler step, runs the post-step hook and the "
        "callback. The final sample becomes an embedding or an image.",
        width=640,
        height=792,
    )
    drawing.group(20, 10, 600, 138, "Once per call")
    for x, name, notes in (
        (36, "encode_condition", ("keys, values and", "embeddings")),
        (231, "set_timesteps", ("the scheduler's", "noise schedule")),
        (426, "initial noise", ("from the generator,", "or a noised image")),
    ):
        style = "name" if " " in name else "code"
        drawing.box(x, 52, 178, [(style, name), *(("note", note) for note in notes)])
    drawing.text(264, 168, "sample, condition, timesteps")
    drawing.group(20, 178, 600, 524, "For each timestep")
    drawing.arrow((250, 148), (250, 218))
    left, width, middle, y = 60, 380, 250, 218
    steps = (
        ("scale_model_input", "the sample; two copies with guidance"),
        ("denoise", "(sample, timestep, condition) → prediction"),
        ("guidance", "uncond + guidance_scale · (cond − uncond)"),
        ("scheduler.step", "prediction → sample with less noise"),
        ("post-step hook", "inpainting restores the known region"),
        ("callback_on_step_end", "may replace tensors or interrupt the call"),
    )
    for index, (name, note) in enumerate(steps):
        style = "name" if name in ("guidance", "post-step hook") else "code"
        drawing.box(left, y, width, [(style, name), ("note", note)])
        if index + 1 < len(steps):
            drawing.arrow((middle, y + 58), (middle, y + 82))
        y += 82
    drawing.arrow((left + width, y - 53), (510, y - 53), (510, 247), (left + width, 247))
    drawing.text(522, 456, "next")
    drawing.text(522, 476, "timestep")
    drawing.arrow((middle, y - 24), (middle, 724))
    drawing.box(
        left, 724, width, [("name", "result"), ("note", "prior: embedding; decoder: MoVQ gives pixels")], "data"
    )
    return drawing


def package_layout() -> Drawing:
    """Draw the folders of the package, each above those that it may import."""
    drawing = Drawing(
        "package-layout",
        "Layout of the package",
        "From top to bottom: cli; training, batch and serve; generation and compat; pipelines; engines and sampling; "
        "models, adapters and runtime; schedulers, inputs and checkpoints; kernels, embedded and the common modules. "
        "A folder imports only from the same or lower rows.",
        width=640,
        height=721,
    )
    rows = (
        (("cli", "the command kandinsky22 and its subcommands"),),
        (
            ("training", "loop, fine-tuning,", "embedded model"),
            ("batch", "rows, shards,", "workers, Ray"),
            ("serve", "job queue, APIs,", "the studio"),
        ),
        (
            ("generation", "one request: modes, recipes,", "input images, both stages"),
            ("compat", "import paths and functions", "of the reference"),
        ),
        (("pipelines", "join everything below: prior, decoder, combined, auto"),),
        (
            ("engines", "other libraries that run", "the networks: OpenVINO"),
            ("sampling", "one generation: loop, guidance,", "scheduler adapter, presets"),
        ),
        (
            ("models", "networks: tensors in,", "tensors out"),
            ("adapters", "LoRA, fine-tuned", "weights"),
            ("runtime", "devices, offloading,", "quantization"),
        ),
        (
            ("schedulers", "mathematics", "of sampling"),
            ("inputs", "user input", "to tensors"),
            ("checkpoints", "files, the Hub,", "fingerprints"),
        ),
        (
            ("kernels", "fast exact", "CPU layers"),
            ("embedded", "weights of the", "small model"),
            ("errors, config", "outputs, noise:", "used everywhere"),
        ),
    )
    left, right, gap, y = 70, 630, 14, 10.0
    for row in rows:
        width = (right - left - gap * (len(row) - 1)) / len(row)
        for index, (name, *notes) in enumerate(row):
            drawing.box(left + index * (width + gap), y, width, [("code", name), *(("note", note) for note in notes)])
        y += Drawing.box_height(len(row[0])) + gap
    drawing.arrow((40, 12), (40, y - gap - 2))
    drawing.text(10, y + 6, "The arrow points from a row to the rows that it may import.")
    return drawing


DRAWINGS: tuple[Callable[[], Drawing], ...] = (two_stages, sampling_loop, package_layout)


def check() -> list[str]:
    """Return a sentence for each overlap in a drawing, and for each file that differs from its drawing."""
    messages = []
    for draw in DRAWINGS:
        drawing = draw()
        messages += [f"{drawing.name}: {problem}" for problem in drawing.problems()]
        path = FOLDER / f"{drawing.name}.svg"
        if not path.is_file() or path.read_text(encoding="utf-8") != drawing.svg():
            messages.append(f"{path.name} is out of date: run python docs/drawings/draw.py")
    return messages


def main(arguments: list[str]) -> int:
    """Write the files, or check them.

    Args:
        arguments: Empty, or ``["--check"]``.

    Returns:
        The exit code: 1 if the check found a problem.
    """
    if arguments != ["--check"]:
        for draw in DRAWINGS:
            drawing = draw()
            (FOLDER / f"{drawing.name}.svg").write_text(drawing.svg(), encoding="utf-8")
    messages = check()
    print("\n".join(messages), end="\n" if messages else "", file=sys.stderr)
    return bool(messages)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
