"""Digests of the results of fixed calls, and their comparison with an earlier record: no bit may change.

    python -m benchmarks.regression --write before.json     # on the old commit
    python -m benchmarks.regression --check before.json     # on the new one, same machine and packages

The calls cover the ten pipeline classes, `interpolate`, every scheduler, every subcommand, tiling, feature caching,
low memory, bfloat16, 8-bit weights, presets and guidance options. They also cover networks that are large enough for
the packed, Winograd and tiled code. Only public names are used, thus the script runs on old and new commits. Digests
depend on the processor, the number of threads and the versions of packages; a record contains these, and a check
requires the same.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PROMPT = "a red circle to the left of a blue square on a yellow background"
OTHER = "a large green star on a purple background"


def seeded(seed: int) -> Any:
    """Return a seeded generator on the CPU.

    Args:
        seed: Its seed.
    """
    import torch

    return torch.Generator().manual_seed(seed)


def digest(values: Any) -> str:
    """Return the SHA-256 digest of dtype, shape and bytes.

    Args:
        values: A tensor, an array, an image, or a list of them.
    """
    import numpy as np
    import torch

    total = hashlib.sha256()
    for value in values if isinstance(values, list | tuple) else [values]:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous()
            value = (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()
        array = np.ascontiguousarray(np.asarray(value))
        total.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return total.hexdigest()


def load(name: str, **options: Any) -> Any:
    """Return a pipeline of the embedded model without progress bars.

    Args:
        name: Name of the class.
        **options: Further arguments of `from_pretrained`.
    """
    import kandinsky22

    pipe = getattr(kandinsky22, name).from_pretrained("embedded", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def photo() -> Any:
    """Return an image for img2img and inpainting."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (128, 128), (250, 210, 30))
    ImageDraw.Draw(image).ellipse((20, 30, 70, 80), fill=(220, 40, 40))
    return image


def mask() -> Any:
    """Return a mask, which is white where `photo` is repainted."""
    from PIL import Image

    image = Image.new("L", (128, 128))
    image.paste(255, (60, 24, 124, 100))
    return image


def hint() -> Any:
    """Return a hint for the ControlNet pipelines."""
    from PIL import Image

    image = Image.new("RGB", (128, 128))
    image.paste((255, 255, 255), (20, 50, 60, 90))
    return image


def embeddings(dtype: Any = None, rows: int = 1) -> dict[str, Any]:
    """Return random image embeddings of the embedded model's width, and negative ones, as arguments of a decoder.

    Args:
        dtype: Their dtype; None for float32.
        rows: Number of embeddings.
    """
    import torch

    width = load("KandinskyV22Pipeline").unet.config.encoder_hid_dim
    embeds = torch.randn(2, rows, width, generator=seeded(5)).to(dtype or torch.float32)
    return {"image_embeds": embeds[0], "negative_image_embeds": embeds[1]}


Call = Callable[[], Any]


def pipelines() -> Iterator[tuple[str, Call]]:
    """Yield calls of the ten pipeline classes with their options, by name."""
    steps = {"num_inference_steps": 4, "output_type": "np"}
    pair = {"prior_num_inference_steps": 3, **steps}

    def prior(**options: Any) -> Any:
        pipe = load("KandinskyV22PriorPipeline")
        return list(pipe(generator=seeded(1), num_inference_steps=4, **options).to_tuple())

    yield "prior", lambda: prior(prompt=PROMPT)
    yield "prior, two prompts, negatives", lambda: prior(prompt=[PROMPT, OTHER], negative_prompt="a blue square")
    yield "prior, unguided, np", lambda: prior(prompt=PROMPT, guidance_scale=1.0, output_type="np")
    yield (
        "prior emb2emb",
        lambda: list(
            load("KandinskyV22PriorEmb2EmbPipeline")(
                PROMPT, image=photo(), strength=0.6, num_inference_steps=5, generator=seeded(1)
            ).to_tuple()
        ),
    )
    yield (
        "prior interpolate",
        lambda: list(
            load("KandinskyV22PriorPipeline")
            .interpolate([PROMPT, photo()], [0.4, 0.6], num_inference_steps=3, generator=seeded(2))
            .to_tuple()
        ),
    )
    yield (
        "emb2emb interpolate, negative",
        lambda: list(
            load("KandinskyV22PriorEmb2EmbPipeline")
            .interpolate(
                [OTHER, photo()], [0.5, 0.5], num_inference_steps=3, generator=seeded(2), negative_prompt="a star"
            )
            .to_tuple()
        ),
    )

    def decoder(kind: str = "", prepare: Callable[[Any], Any] = lambda pipe: None, **options: Any) -> Any:
        pipe = load(f"KandinskyV22{kind}Pipeline")
        prepare(pipe)
        return pipe(**{**embeddings(), **steps, **options}, generator=seeded(3)).images

    yield "decoder", decoder
    yield "decoder, batch of 2 x 2", lambda: decoder(num_images_per_prompt=2, **embeddings(rows=2))
    yield "decoder, unguided", lambda: decoder(guidance_scale=1.0)
    yield "decoder, wide", lambda: decoder(width=192, height=64)
    yield "decoder, pt", lambda: decoder(output_type="pt")
    yield "decoder, latent", lambda: decoder(output_type="latent")
    yield "decoder, rescale", lambda: decoder(guidance_rescale=0.7)
    yield "decoder, interval", lambda: decoder(guidance_interval=(0.0, 0.6))
    yield "decoder, threshold", lambda: decoder(guidance_threshold=0.99)
    yield "decoder, cached", lambda: decoder(prepare=lambda pipe: pipe.enable_feature_caching(2))
    yield "decoder, low memory", lambda: decoder(prepare=lambda pipe: pipe.enable_low_memory())
    yield "decoder, tiled", lambda: decoder(prepare=lambda pipe: pipe.movq.enable_tiling(), width=256, height=256)
    yield "decoder, int8", lambda: decoder(prepare=lambda pipe: pipe.quantize("int8"))
    yield "decoder, int8-dynamic", lambda: decoder(prepare=lambda pipe: pipe.quantize("int8-dynamic"))
    yield "img2img", lambda: decoder("Img2Img", image=photo(), strength=0.7)
    yield "inpaint", lambda: decoder("Inpaint", image=photo(), mask_image=mask())
    yield "inpaint, kept pixels", lambda: decoder("Inpaint", image=photo(), mask_image=mask(), keep_pixels=True)
    yield "controlnet", lambda: decoder("Controlnet", hint=hint())
    yield "controlnet img2img", lambda: decoder("ControlnetImg2Img", image=photo(), hint=hint(), strength=0.7)

    def combined(kind: str, **options: Any) -> Any:
        return load(f"KandinskyV22{kind}CombinedPipeline")(PROMPT, generator=seeded(4), **{**pair, **options}).images

    yield "combined", lambda: combined("")
    yield "combined, negative", lambda: combined("", negative_prompt="a blue square", num_images_per_prompt=2)
    yield "combined img2img", lambda: combined("Img2Img", image=photo(), strength=0.6)
    yield "combined inpaint", lambda: combined("Inpaint", image=photo(), mask_image=mask())

    def half() -> Any:
        import torch

        pipe = load("KandinskyV22CombinedPipeline", torch_dtype=torch.bfloat16)
        return pipe(PROMPT, generator=seeded(4), **pair).images

    yield "combined, bfloat16", half

    def preset(name: str) -> Any:
        import kandinsky22

        pipe = load("KandinskyV22CombinedPipeline")
        options = kandinsky22.apply_quality(pipe, name)
        return pipe(PROMPT, generator=seeded(4), **options, output_type="np").images

    for name in ("draft", "balanced"):
        yield f"preset {name}", lambda name=name: preset(name)


def schedulers() -> Iterator[tuple[str, Call]]:
    """Yield calls of all schedulers in the decoder, and of some in the prior, by name."""
    import kandinsky22

    def decoder(name: str) -> Any:
        pipe = load("KandinskyV22Pipeline")
        pipe.scheduler = getattr(kandinsky22, name).from_config(pipe.scheduler.config)
        return pipe(**embeddings(), num_inference_steps=5, output_type="np", generator=seeded(3)).images

    def prior(name: str) -> Any:
        pipe = load("KandinskyV22PriorPipeline")
        pipe.scheduler = getattr(kandinsky22, name).from_config(pipe.scheduler.config)
        return list(pipe(PROMPT, generator=seeded(1), num_inference_steps=4).to_tuple())

    names = sorted(name for name in kandinsky22.__all__ if name.endswith("Scheduler"))
    for name in names:
        if name != "UnCLIPScheduler":
            yield f"decoder, {name}", lambda name=name: decoder(name)
    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "LCMScheduler"):
        yield f"prior, {name}", lambda name=name: prior(name)


def networks() -> Iterator[tuple[str, Call]]:
    """Yield calls of networks with random weights that are large enough for all fast paths of the CPU, by name."""
    import torch

    def build(name: str, dtype: Any, **config: Any) -> Any:
        import kandinsky22

        torch.manual_seed(0)
        return getattr(kandinsky22, name)(**config).eval().to(dtype)

    def unet(dtype: Any, side: int = 32) -> Any:
        net = build(
            "UNet2DConditionModel",
            dtype,
            block_out_channels=(256, 320, 384, 384),
            layers_per_block=1,
            encoder_hid_dim=64,
        )
        sample = torch.randn(2, 4, side, side, generator=seeded(1)).to(dtype)
        with torch.no_grad():
            condition = net.encode_condition(torch.randn(2, 64, generator=seeded(2)).to(dtype))
            return [net.denoise(sample, timestep, condition) for timestep in (999, 500)]

    def movq(dtype: Any, side: int = 32, tiled: bool = False) -> Any:
        net = build("VQModel", dtype, block_out_channels=(128, 256, 256, 512), layers_per_block=1)
        net.enable_tiling(tiled)
        pixels = torch.rand(1, 3, 8 * side, 8 * side, generator=seeded(1)).to(dtype) * 2 - 1
        with torch.no_grad():
            latents = net.encode(pixels)[0]
            return [latents, net.decode(latents, force_not_quantize=True)[0], net.decode(latents)[0]]

    def prior(dtype: Any) -> Any:
        net = build("PriorTransformer", dtype, num_layers=2, embedding_dim=256, num_attention_heads=16)
        rows = torch.randn(2, 256, generator=seeded(1)).to(dtype)
        states = torch.randn(2, 77, 256, generator=seeded(2)).to(dtype)
        attention = torch.arange(77)[None] < torch.tensor([[9], [30]])
        with torch.no_grad():
            return net(rows, 500, proj_embedding=rows, encoder_hidden_states=states, attention_mask=attention)[0]

    def gradients() -> Any:
        net = build(
            "VQModel",
            torch.float32,
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
        )
        pixels = torch.rand(1, 3, 32, 32, generator=seeded(1))
        net(pixels, return_dict=False)[0].square().mean().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        yield f"UNet, {name}", lambda dtype=dtype: unet(dtype)
        yield f"MoVQ, {name}", lambda dtype=dtype: movq(dtype)
        yield f"MoVQ, tiled, {name}", lambda dtype=dtype: movq(dtype, 48, tiled=True)
        yield f"prior network, {name}", lambda dtype=dtype: prior(dtype)
    yield "gradients", gradients


def commands() -> Iterator[tuple[str, Call]]:
    """Yield calls of all subcommands that write images, whose pixels are read from the files, by name."""

    def run(*arguments: str) -> Any:
        from PIL import Image

        from kandinsky22.cli.main import main

        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = main([*arguments, "-q"])
        assert code == 0, arguments
        return [Image.open(line) for line in out.getvalue().splitlines() if line.endswith(".png")]

    steps = ("--steps", "4", "--prior-steps", "3", "--seed", "7")
    yield "generate", lambda: run("generate", PROMPT, "-n", "2", *steps)
    yield "generate, bfloat16", lambda: run("generate", PROMPT, "--dtype", "bfloat16", *steps)
    yield "generate, int8", lambda: run("generate", PROMPT, "--quantize", "int8", *steps)
    yield "generate, low memory", lambda: run("generate", PROMPT, "--low-memory", *steps)
    yield "generate, cached", lambda: run("generate", PROMPT, "--cache-every", "2", *steps)
    yield (
        "generate --quality balanced",
        lambda: run("generate", PROMPT, "--quality", "balanced", "--seed", "7", "-o", "balanced.png"),
    )
    yield "generate --from", lambda: run("generate", "--from", "balanced.png", "-o", "again.png")
    yield "img2img", lambda: run("img2img", OTHER, "--image", "photo.png", "--strength", "0.6", *steps)
    inpaint = ("inpaint", "a green triangle", "--image", "photo.png", "--mask", "mask.png", "--keep-pixels")
    yield "inpaint", lambda: run(*inpaint, *steps)
    yield "control", lambda: run("control", "a red square on a white background", "--hint", "hint.png", *steps)
    yield "mix", lambda: run("mix", "--text", PROMPT, "0.6", "--image", "photo.png", "0.4", *steps)
    yield "variations", lambda: run("variations", "photo.png", "--steps", "4", "--seed", "7")
    towards = ("variations", "photo.png", "--prompt", OTHER, "--strength", "0.5")
    yield "variations --prompt", lambda: run(*towards, *steps)
    grid = ("--scheduler", "dpm,ddim", "--steps", "2,3", "--seed", "7", "--prior-steps", "3", "--pictures")
    yield "compare", lambda: run("compare", PROMPT, *grid)[:4]  # the contact sheet, which comes last, shows seconds


def record(only: str | None = None) -> dict[str, str]:
    """Return the digest of each call, by name.

    Args:
        only: Text that names of calls must contain; None takes all calls.
    """
    digests: dict[str, str] = {}
    groups = {"pipelines": pipelines, "schedulers": schedulers, "networks": networks, "commands": commands}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        photo().save("photo.png")
        mask().save("mask.png")
        hint().save("hint.png")
        for group, calls in groups.items():
            for name, call in calls():
                if only is None or only in f"{group}: {name}":
                    digests[f"{group}: {name}"] = digest(call())
                    print(f"{digests[f'{group}: {name}'][:12]}  {group}: {name}", file=sys.stderr, flush=True)
        os.chdir("/")
    return digests


def machine(threads: int) -> dict[str, str]:
    """Return the properties of the machine that digests depend on.

    Args:
        threads: Number of threads of torch.
    """
    import torch
    import transformers

    return {
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(threads),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def commit() -> str:
    """Return the commit of the checkout, or "unknown"."""
    result = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return result.stdout.strip() or "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check a record.

    Args:
        arguments: Command line arguments; None takes those of the process.

    Returns:
        Exit code: 1 if a digest differs, 0 otherwise.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.regression",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="file to write digests into")
    parser.add_argument("--check", type=Path, metavar="FILE", help="file of digests to compare with")
    parser.add_argument("--only", metavar="TEXT", help="only calls whose name contains this text")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(options.threads)
    os.environ["KANDINSKY22_CACHE"] = ""
    files = {name: path.resolve() for name in ("write", "check") if (path := getattr(options, name)) is not None}
    current = {"commit": commit(), "machine": machine(options.threads), "digests": record(options.only)}
    if "write" in files:
        files["write"].write_text(json.dumps(current, indent=1) + "\n", encoding="utf-8")
    if "check" not in files:
        return 0
    before = json.loads(files["check"].read_text(encoding="utf-8"))
    if before["machine"] != current["machine"]:
        parser.error(f"the record belongs to {before['machine']}, this machine is {current['machine']}")
    expected = {
        name: value for name, value in before["digests"].items() if options.only is None or options.only in name
    }
    changed = [name for name in expected if current["digests"].get(name) != expected[name]]
    print(f"{len(expected) - len(changed)} of {len(expected)} digests are equal to those of {before['commit']}")
    for name in changed:
        print(f"differs: {name}")
    return int(bool(changed))


if __name__ == "__main__":
    raise SystemExit(main())
