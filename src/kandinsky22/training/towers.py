"""Both CLIP towers with a tokenizer whose words are the vocabulary of captions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from kandinsky22.pipelines.clip_tokenizer import CLIPTokenizer

CONTEXT = 77
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class TowerSizes:
    """Sizes of both towers.

    Attributes:
        embedding: Dimension D of the embeddings, and width of the text tower: the prior reads both alike.
        vision_width: Width of the vision tower.
        text_layers: Number of layers of the text tower.
        vision_layers: Number of layers of the vision tower.
        text_heads: Number of attention heads of the text tower.
        vision_heads: Number of attention heads of the vision tower.
        image: Side of the images that the vision tower reads, in pixels.
        patch: Side of its patches, in pixels.
    """

    embedding: int = 256
    vision_width: int = 192
    text_layers: int = 3
    vision_layers: int = 6
    text_heads: int = 4
    vision_heads: int = 6
    image: int = 128
    patch: int = 16


@dataclass(frozen=True)
class TextEmbedding:
    """Text embeddings of N prompts, as the prior takes them.

    Attributes:
        embeds: Projected embeddings (N, D).
        hidden: Last hidden states (N, L, width).
        mask: Attention mask (N, L), True for tokens of the prompt.
    """

    embeds: Tensor
    hidden: Tensor
    mask: Tensor


@dataclass(frozen=True)
class ImageEmbedding:
    """Image embeddings of N images, and what the vision tower computes them from.

    Attributes:
        embeds: Projected embeddings (N, D).
        patches: Last states of the patches, row by row, (N, patches, width).
    """

    embeds: Tensor
    patches: Tensor


def build_tokenizer(folder: Path, vocabulary: Sequence[str]) -> CLIPTokenizer:
    """Write a CLIP tokenizer whose merges make one token of each word of a vocabulary, and load it.

    Other words are split into letters, and letters of other scripts into bytes, thus any text can be tokenised.

    Args:
        folder: Folder to write into.
        vocabulary: Words in lower case.

    Returns:
        The tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Printable characters that represent the 256 bytes, as in GPT-2's byte-level encoding.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[str] = []
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary]
    while pairs := [pair for piece in pieces for pair in itertools.pairwise(piece)]:
        counts: dict[tuple[str, str], int] = {}
        for pair in pairs:
            counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(" ".join(best))
        tokens.append("".join(best))
        pieces = [_merge(piece, best) for piece in pieces]
    tokens += [START, END]
    specials = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT, "do_lower_case": True, **specials}
    files = {
        "vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "special_tokens_map.json": json.dumps(specials, indent=2),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def _merge(piece: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in piece:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


class Towers(nn.Module):
    """Both CLIP towers with their tokenizer.

    Args:
        tokenizer: Tokenizer.
        text: Text tower.
        vision: Vision tower.
    """

    def __init__(
        self, tokenizer: CLIPTokenizer, text: CLIPTextModelWithProjection, vision: CLIPVisionModelWithProjection
    ) -> None:
        super().__init__()
        self.tokenizer, self.text, self.vision = tokenizer, text, vision
        self.logit_scale = nn.Parameter(torch.tensor(2.66))  # log(1/0.07), as in the CLIP paper

    @classmethod
    def create(cls, tokenizer: CLIPTokenizer, sizes: TowerSizes) -> Towers:
        """Return untrained towers.

        Args:
            tokenizer: Tokenizer.
            sizes: Sizes of the towers.
        """
        text = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=sizes.embedding,
                intermediate_size=4 * sizes.embedding,
                projection_dim=sizes.embedding,
                num_hidden_layers=sizes.text_layers,
                num_attention_heads=sizes.text_heads,
                max_position_embeddings=CONTEXT,
                hidden_act="gelu",
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        vision = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=sizes.vision_width,
                intermediate_size=4 * sizes.vision_width,
                projection_dim=sizes.embedding,
                num_hidden_layers=sizes.vision_layers,
                num_attention_heads=sizes.vision_heads,
                image_size=sizes.image,
                patch_size=sizes.patch,
                hidden_act="gelu",
            )
        )
        return cls(tokenizer, text, vision)

    @classmethod
    def load(cls, folder: Path) -> Towers:
        """Return trained towers, frozen.

        Args:
            folder: Folder that `save` has written.
        """
        towers = cls(
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            CLIPTextModelWithProjection.from_pretrained(str(folder / "text_encoder")),
            CLIPVisionModelWithProjection.from_pretrained(str(folder / "image_encoder")),
        )
        return towers.eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write the towers and the image processor in the published layout; `build_tokenizer` writes the tokenizer.

        Args:
            folder: Folder to write into.
        """
        self.text.save_pretrained(str(folder / "text_encoder"))
        self.vision.save_pretrained(str(folder / "image_encoder"))
        image_processor(self.image_size).save_pretrained(str(folder / "image_processor"))

    @property
    def image_size(self) -> int:
        """Side of the images that the vision tower reads, in pixels."""
        size = self.vision.config.image_size
        assert isinstance(size, int)
        return size

    def embed_images(self, images: Tensor) -> Tensor:
        """Return image embeddings (N, D).

        Args:
            images: RGB images (N, 3, H, W) in [0, 1].
        """
        return self.embed_patches(images).embeds

    def embed_patches(self, images: Tensor) -> ImageEmbedding:
        """Return image embeddings and the states of the patches.

        Args:
            images: RGB images (N, 3, H, W) in [0, 1].
        """
        size = (self.image_size, self.image_size)
        if images.shape[2:] != size:
            images = functional.interpolate(images, size, mode="bicubic", antialias=True)
        output = self.vision(pixel_values=(images - 0.5) / 0.5)
        return ImageEmbedding(output.image_embeds, output.last_hidden_state[:, 1:])

    def embed_texts(self, texts: Sequence[str], *, trim: bool = True) -> TextEmbedding:
        """Return the text embeddings of prompts.

        Args:
            texts: Prompts.
            trim: Whether sequences are only as long as the longest prompt, which changes no value of its tokens.
        """
        padding = "longest" if trim else "max_length"
        tokens = self.tokenizer(list(texts), padding=padding, max_length=CONTEXT, truncation=True, return_tensors="pt")
        output = self.text(input_ids=tokens.input_ids)
        return TextEmbedding(output.text_embeds, output.last_hidden_state, tokens.attention_mask.bool())


def image_processor(size: int) -> CLIPImageProcessor:
    """Return the image processor of the vision tower.

    Args:
        size: Side of the images that it reads, in pixels.
    """
    return CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


@torch.no_grad()
def initialise_patches(towers: Towers, images: Tensor, seed: int) -> None:
    """Initialise the vision tower's patch filters with the half-whitened principal components of patches.

    With the usual small random filters, the contrastive loss stalls at this scale before shapes are recognised. Each
    component is divided by the fourth root of its eigenvalue. This is a compromise between unscaled components, where
    flat colour outweighs edges, and full whitening, which amplifies noise.

    Args:
        towers: Towers, changed in place.
        images: RGB images (N, 3, H, W) in [0, 1], of the size that the tower reads.
        seed: Seed of the position embeddings.
    """
    embeddings = towers.vision.vision_model.embeddings
    filters = embeddings.patch_embedding.weight
    side = filters.shape[-1]
    patches = functional.unfold(images * 2 - 1, side, stride=side).transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    values, vectors = values.flip(0)[: len(filters)], vectors.flip(1)[:, : len(filters)]
    components = (vectors * values.clamp_min(values[0] * 1e-6) ** -0.25).T
    filters.copy_((components / (patches @ components.T).std()).view_as(filters))
    generator = torch.Generator().manual_seed(seed)
    embeddings.position_embedding.weight.normal_(0.0, 0.5, generator=generator)
