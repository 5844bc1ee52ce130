"""Random weights with the published configs of Kandinsky 2.2, saved by the reference; both libraries load these files.

There are three pipeline folders: `prior` (CLIP towers of one layer), `prior-full` (towers as published) and `decoder`.

    python -m benchmarks.compare_weights FOLDER published prior
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

UNET_BLOCKS = {
    "down_block_types": ("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
    "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
    "encoder_hid_dim_type": "image_proj",
    "addition_embed_type": "image",
    "in_channels": 4,
    "out_channels": 8,
}
MOVQ = {
    "latent_channels": 4,
    "vq_embed_dim": 4,
    "norm_type": "spatial",
    "down_block_types": ("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
}
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "published": {
        "prior": {"embedding_dim": 1280},
        "unet": {
            **UNET_BLOCKS,
            "sample_size": 64,
            "block_out_channels": (384, 768, 1152, 1536),
            "layers_per_block": 3,
            "encoder_hid_dim": 1280,
            "cross_attention_dim": 768,
            "attention_head_dim": 64,
        },
        "movq": {
            **MOVQ,
            "block_out_channels": (128, 256, 256, 512),
            "layers_per_block": 2,
            "num_vq_embeddings": 16384,
        },
        # CLIP ViT-bigG/14, which the prior was trained with
        "text": {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32},
        "vision": {
            "hidden_size": 1664,
            "intermediate_size": 8192,
            "num_attention_heads": 16,
            "num_hidden_layers": 48,
            "patch_size": 14,
            "image_size": 224,
        },
    },
    "tiny": {  # the same classes at the size of tests
        "prior": {"embedding_dim": 32, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2},
        "unet": {
            **UNET_BLOCKS,
            "sample_size": 8,
            "block_out_channels": (32, 32, 64, 64),
            "layers_per_block": 1,
            "encoder_hid_dim": 32,
            "cross_attention_dim": 16,
            "attention_head_dim": 8,
            "norm_num_groups": 8,  # more groups would have two values each at the lowest resolution level
        },
        "movq": {**MOVQ, "block_out_channels": (32, 32, 32, 64), "layers_per_block": 1, "num_vq_embeddings": 12},
        "text": {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2},
        "vision": {
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "patch_size": 8,
            "image_size": 32,
        },
    },
}
VOCABULARY = 49408  # tokens of CLIP
PARTS = ("prior", "prior-full", "decoder")
SIZES = {"published": 512, "tiny": 64}  # default side of the image in pixels


def ensure(folder: Path, config: str, parts: tuple[str, ...]) -> None:
    """Write the parts that the folder lacks, each in a separate process, which frees its memory.

    Args:
        folder: Folder of the weights.
        config: Name of a config.
        parts: Names of parts, of PARTS.

    Raises:
        RuntimeError: A process has failed.
        ValueError: The folder has networks of another config.
    """
    for part in parts:
        if not (folder / part / "model_index.json").exists():
            print(f"writing random weights: {part} ({config})", flush=True)
            command = [sys.executable, "-m", "benchmarks.compare_weights", str(folder), config, part]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"writing {part} failed:\n{result.stderr}")
        network = "unet" if part == "decoder" else "prior"
        stored = json.loads((folder / part / network / "config.json").read_text(encoding="utf-8"))
        for name, value in CONFIGS[config][network].items():
            expected = list(value) if isinstance(value, tuple) else value
            if stored.get(name) != expected:
                raise ValueError(
                    f"{folder / part} does not have the {config} config: {name} is {stored.get(name)}, not {expected}"
                )


def make(folder: Path, config: str, part: str) -> None:
    """Write one part; an interruption leaves no incomplete folder.

    Args:
        folder: Folder of the weights.
        config: Name of a config.
        part: One of PARTS.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{part}-") as name:
        temporary = Path(name) / part
        if part == "prior-full":
            make_full_towers(folder / "prior", temporary, CONFIGS[config])
        else:
            (make_prior if part == "prior" else make_decoder)(temporary, CONFIGS[config])
        temporary.rename(folder / part)


def make_prior(folder: Path, config: dict[str, dict[str, Any]]) -> None:
    """Write a prior pipeline whose CLIP towers have the full width and a single layer.

    Args:
        folder: Folder to write.
        config: Configs of the networks, from CONFIGS.
    """
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    prior = diffusers.PriorTransformer(**config["prior"])
    with torch.no_grad():  # these are zero before training, which would hide differences
        prior.clip_mean.normal_()
        prior.clip_std.fill_(1.0)
        prior.positional_embedding.normal_(std=0.02)
        prior.prd_embedding.normal_(std=0.02)
    text, vision = make_towers(config, layers=1)
    side = vision.config.image_size
    diffusers.KandinskyV22PriorPipeline(
        prior=prior,
        image_encoder=vision,
        text_encoder=text,
        tokenizer=make_tokenizer(folder.parent / "words"),
        scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
    ).save_pretrained(folder)


def make_towers(config: dict[str, dict[str, Any]], layers: int | None = None) -> tuple[Any, Any]:
    """Return CLIP's text tower and vision tower with random weights.

    The vision tower with all layers is in half precision, as published.

    Args:
        config: Configs of the networks, from CONFIGS.
        layers: Number of layers; None takes that of the config.
    """
    import torch
    import transformers

    shared: dict[str, Any] = {"projection_dim": config["prior"]["embedding_dim"], "hidden_act": "gelu"}
    if layers is not None:
        shared["num_hidden_layers"] = layers
    text_config = transformers.CLIPTextConfig(**{**config["text"], **shared})
    vision_config = transformers.CLIPVisionConfig(**{**config["vision"], **shared})
    text = transformers.CLIPTextModelWithProjection(text_config)
    torch.set_default_dtype(torch.float32 if layers is not None else torch.float16)
    try:
        return text, transformers.CLIPVisionModelWithProjection(vision_config)
    finally:
        torch.set_default_dtype(torch.float32)


def make_tokenizer(folder: Path) -> Any:
    """Return a CLIP tokenizer with one token per byte, since the published vocabulary cannot be shipped.

    Tokens that no text has fill the vocabulary up to the rows of the published text tower.

    Args:
        folder: Folder to write.
    """
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    vocabulary += [f"unused {index}</w>" for index in range(VOCABULARY - 2 - len(vocabulary))]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def make_full_towers(thin: Path, folder: Path, config: dict[str, dict[str, Any]]) -> None:
    """Write a prior pipeline again, with towers that have all layers; the file of the prior is shared.

    Args:
        thin: Folder of the pipeline with towers of one layer.
        folder: Folder to write.
        config: Configs of the networks, from CONFIGS.
    """
    import torch

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copy2(source, target)

    shutil.copytree(thin, folder, copy_function=link, ignore=shutil.ignore_patterns("text_encoder", "image_encoder"))
    torch.manual_seed(2)
    for name, tower in zip(("text_encoder", "image_encoder"), make_towers(config), strict=True):
        tower.save_pretrained(folder / name)


def make_decoder(folder: Path, config: dict[str, dict[str, Any]]) -> None:
    """Write a decoder pipeline.

    Args:
        folder: Folder to write.
        config: Configs of the networks, from CONFIGS.
    """
    import diffusers
    import torch

    torch.manual_seed(1)
    diffusers.KandinskyV22Pipeline(
        unet=diffusers.UNet2DConditionModel(**config["unet"]),
        scheduler=diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear"),
        movq=diffusers.VQModel(**config["movq"]),
    ).save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
