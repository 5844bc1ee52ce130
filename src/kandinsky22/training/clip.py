"""The CLIP of the embedded model: tokenizer, text tower and vision tower, trained together from scratch.

Contrast alone learns little at this scale, so both towers also answer questions about the scene (`Probe`) from their
embeddings, while training only. The questions are put to both with the same linear heads, which makes a text embedding
say "the left shape is small" in the same direction as an image embedding does.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from kandinsky22.training.captions import FULL, VOCABULARY, Caption, caption, distracted
from kandinsky22.training.loop import Draw, Settings, train
from kandinsky22.training.probe import QUESTIONS, UNKNOWN, Probe, Seen, answers, told
from kandinsky22.training.scenes import (
    Scene,
    Shape,
    is_held_out,
    render,
    repaint,
    sample_scene,
)

IMAGE_SIZE = 64
PATCH_SIZE = 16
WIDTH = 128
EMBEDDING = 128
CONTEXT = 77
START, END = "<|startoftext|>", "<|endoftext|>"
BATCH = 128
GROUP = 4  # scenes that differ in one attribute each, side by side in a batch

SETTINGS = Settings(steps=3000, learning_rate=1e-3, warmup=300, weight_decay=0.01, average=0.998, bf16=True)


def build_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """Write a CLIP tokenizer whose merges make one token of every word of VOCABULARY, and load it from `folder`.

    Other words fall apart into letters, and letters of other scripts into bytes, so that any text can be tokenised.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The printable stand-ins of the 256 bytes, as in GPT-2's byte-level encoding.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[str] = []
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in VOCABULARY]
    while pairs := [pair for piece in pieces for pair in itertools.pairwise(piece)]:
        best = max(sorted(set(pairs)), key=pairs.count)
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
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(str(folder))
    return tokenizer


def _merge(piece: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in piece:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


@dataclasses.dataclass(frozen=True)
class TextEmbedding:
    """What the prior knows of a batch of prompts: `embeds` (N, D), `hidden` (N, L, width), `mask` (N, L) bool."""

    embeds: Tensor
    hidden: Tensor
    mask: Tensor


class Towers(nn.Module):
    """Both CLIP towers with their tokenizer, and the probe that belongs to them."""

    def __init__(
        self, tokenizer: CLIPTokenizer, text: CLIPTextModelWithProjection, vision: CLIPVisionModelWithProjection
    ) -> None:
        super().__init__()
        self.tokenizer, self.text, self.vision = tokenizer, text, vision
        self.probe = Probe(int(text.config.projection_dim or EMBEDDING))
        self.logit_scale = nn.Parameter(torch.tensor(2.66))  # log(1/0.07), as in the CLIP paper

    @classmethod
    def create(cls, tokenizer: CLIPTokenizer) -> Towers:
        """Untrained towers at the embedded model's size."""
        text = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=EMBEDDING,
                num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=CONTEXT, hidden_act="gelu",
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
        vision = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=EMBEDDING, num_hidden_layers=4,
                num_attention_heads=4, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, hidden_act="gelu",
            )
        )  # fmt: skip
        return cls(tokenizer, text, vision)

    @classmethod
    def load(cls, folder: str | Path) -> Towers:
        """Trained towers from the folder that `save` wrote, frozen."""
        folder = Path(folder)
        towers = cls(
            CLIPTokenizer.from_pretrained(str(folder / "tokenizer")),
            CLIPTextModelWithProjection.from_pretrained(str(folder / "text_encoder")),
            CLIPVisionModelWithProjection.from_pretrained(str(folder / "image_encoder")),
        )
        towers.probe.load_state_dict(torch.load(folder / "probe.pt", weights_only=True))
        return towers.eval().requires_grad_(False)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer, towers and image processor in the published layout, and the probe beside them."""
        folder = Path(folder)
        build_tokenizer(folder / "tokenizer")
        self.text.save_pretrained(str(folder / "text_encoder"))
        self.vision.save_pretrained(str(folder / "image_encoder"))
        image_processor().save_pretrained(str(folder / "image_processor"))
        torch.save(self.probe.state_dict(), folder / "probe.pt")

    def embed_images(self, images: Tensor) -> Tensor:
        """Image embeddings (N, D) of pictures (N, 3, H, W) in [0, 1]."""
        if images.shape[-1] != IMAGE_SIZE or images.shape[-2] != IMAGE_SIZE:
            images = functional.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)
        embeds: Tensor = self.vision(pixel_values=(images - 0.5) / 0.5).image_embeds
        return embeds

    def embed_texts(self, texts: Sequence[str], *, trim: bool = True) -> TextEmbedding:
        """Text embeddings of prompts; with `trim` only as long as the longest of them, which changes no value kept."""
        padding = "longest" if trim else "max_length"
        tokens = self.tokenizer(list(texts), padding=padding, max_length=CONTEXT, truncation=True, return_tensors="pt")
        output = self.text(input_ids=tokens.input_ids)
        return TextEmbedding(output.text_embeds, output.last_hidden_state, tokens.attention_mask.bool())


def image_processor() -> CLIPImageProcessor:
    """The preprocessing of pictures that belongs to the vision tower."""
    return CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip


@torch.no_grad()
def initialise(towers: Towers, seed: int) -> None:
    """Start the vision tower from the data: patch filters are its principal components, half whitened.

    From the usual small random filters, contrast at this scale stalls before it sees shapes. Dividing by the fourth
    root of the eigenvalue is between plain components (which drown edges in flat colour) and full whitening (noise).
    """
    rng = np.random.default_rng([seed, 1])
    images = render([sample_scene(rng) for _ in range(512)], IMAGE_SIZE) * 2 - 1
    patches = functional.unfold(images, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    values, vectors = values.flip(0)[:WIDTH], vectors.flip(1)[:, :WIDTH]
    filters = (vectors * values.clamp_min(values[0] * 1e-6) ** -0.25).T
    filters = filters / (patches @ filters.T).std()
    embeddings = towers.vision.vision_model.embeddings
    embeddings.patch_embedding.weight.copy_(filters.view_as(embeddings.patch_embedding.weight))
    generator = torch.Generator().manual_seed(seed)
    embeddings.position_embedding.weight.normal_(0.0, 0.5, generator=generator)


def neighbours(scene: Scene, count: int, rng: np.random.Generator) -> list[Scene]:
    """`scene` and variants of it that differ in one attribute: what contrast must learn to tell apart."""
    group = [scene]
    while len(group) < count:
        other = sample_scene(rng, shapes=len(scene.shapes))
        slot = int(rng.integers(len(scene.shapes)))
        ours, theirs = scene.shapes[slot], other.shapes[slot]
        change = int(rng.integers(5))
        if change == 0:
            variant = dataclasses.replace(scene, background=other.background)
        elif change == 1 and len(scene.shapes) == 2:  # the two shapes trade looks
            a, b = scene.shapes
            variant = dataclasses.replace(scene, shapes=(_moved(b, a), _moved(a, b)))
        else:
            fields: list[dict[str, Any]] = [
                {"kind": theirs.kind},
                {"color": theirs.color},
                {"size": theirs.size, "radius": theirs.radius},
            ]
            if change == 1:
                fields.append({"x": theirs.x, "y": theirs.y})
            shapes = list(scene.shapes)
            shapes[slot] = dataclasses.replace(ours, **fields[change - 2])
            variant = dataclasses.replace(scene, shapes=tuple(shapes))
        looks = {(shape.kind, shape.color) for shape in variant.shapes}
        visible = all(shape.color != variant.background for shape in variant.shapes)
        if visible and len(looks) == len(variant.shapes) and variant != scene and not is_held_out(variant):
            group.append(variant)
    return group


def _moved(shape: Shape, place: Shape) -> Shape:
    return dataclasses.replace(shape, x=place.x, y=place.y)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Pictures with what is to be seen in them, and captions of the first of them with what they tell.

    The pictures after these have arbitrary colours: without them, what the vision tower learns of a shape or a place
    holds for eight colours, and for no combination of them that training left out.
    """

    images: Tensor
    texts: list[str]
    seen: Seen
    told: Tensor


def sample_batch(rng: np.random.Generator, generator: torch.Generator, count: int = BATCH) -> Batch:
    """Groups of neighbouring scenes, their pictures slightly noisy, as generated pictures are."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scenes += neighbours(sample_scene(rng, shapes=1 if rng.random() < 0.35 else 2), GROUP, rng)
    captions: list[Caption] = [caption(scene, rng, FULL if rng.random() < 0.5 else None) for scene in scenes]
    texts = [distracted(c.text, rng) if rng.random() < 0.05 else c.text for c in captions]
    strange = [sample_scene(rng, shapes=1 if rng.random() < 0.35 else 2) for _ in range(count * 3 // 8)]
    palettes = [repaint(scene, rng) for scene in strange]
    images = torch.cat([render(scenes, IMAGE_SIZE), render(strange, IMAGE_SIZE, palettes)])
    noise = 0.03 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return Batch(
        images + noise * torch.randn(images.shape, generator=generator),
        texts,
        Seen.of(scenes).followed_by(Seen.of(strange, palettes)),
        torch.tensor([told(c.named) for c in captions]),
    )


def _contrast(towers: Towers, images: Tensor, texts: Tensor, batch: Batch) -> Tensor:
    """Symmetric contrastive loss in which a caption that also fits another picture is not held against it."""
    scale = towers.logit_scale.clamp(max=4.6).exp()
    logits = scale * functional.normalize(images.float()) @ functional.normalize(texts.float()).T
    truth = batch.seen.answers[: len(images)]
    same = (batch.told[None, :, :] == truth[:, None, :]) | (batch.told[None, :, :] == UNKNOWN)
    fits = same.all(2) & ~torch.eye(len(logits), dtype=torch.bool)
    logits = logits.masked_fill(fits, -1e4)
    target = torch.arange(len(logits))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def objective(towers: Towers, draw: Draw, count: int = BATCH) -> dict[str, Tensor]:
    """Losses of one training step."""
    batch = sample_batch(draw.numpy, draw.torch, count)
    # Fused attention is several times slower backwards in bfloat16 than its parts are, at these short lengths.
    with sdpa_kernel(SDPBackend.MATH):
        images = towers.embed_images(batch.images)
        texts = towers.embed_texts(batch.texts).embeds
    losses = {
        "contrast": _contrast(towers, images[: len(texts)], texts, batch),
        "read": towers.probe.loss(texts, batch.told),
        **towers.probe.picture_losses(images, batch.seen),
    }
    return {"loss": sum(losses.values(), -0.5 * losses["contrast"]), **losses}


@torch.no_grad()
def evaluate(towers: Towers, *, count: int = 1000, seed: int = 12345) -> dict[str, float]:
    """How often embeddings answer rightly, per question and all at once, on known and held-out scenes."""
    report: dict[str, float] = {}
    for shapes, held_out in itertools.product((1, 2), (False, True)):
        name = ("one", "two")[shapes - 1] + ("_held_out" if held_out else "")
        rng = np.random.default_rng([seed, shapes, held_out])
        scenes = [sample_scene(rng, shapes=shapes, held_out=held_out) for _ in range(count)]
        captions = [caption(scene, rng) for scene in scenes]
        images = towers.embed_images(render(scenes, IMAGE_SIZE))
        texts = towers.embed_texts([c.text for c in captions]).embeds
        seen = towers.probe.right(images, torch.tensor([answers(scene) for scene in scenes]))
        read = towers.probe.right(texts, torch.tensor([told(c.named) for c in captions]))
        report |= {f"{name}/image/{q}": v for q, v in zip(QUESTIONS, seen.float().mean(0).tolist(), strict=True)}
        report |= {f"{name}/text/{q}": v for q, v in zip(QUESTIONS, read.float().mean(0).tolist(), strict=True)}
        report[f"{name}/image"] = float(seen.all(1).float().mean())
        report[f"{name}/text"] = float(read.all(1).float().mean())
        losses = towers.probe.picture_losses(images, Seen.of(scenes))
        report |= {f"{name}/image/{loss}": float(value) for loss, value in losses.items()}
    return {key: round(value, 4) for key, value in report.items()}


def train_clip(folder: str | Path, settings: Settings = SETTINGS, *, count: int = BATCH) -> Towers:
    """Train both towers, or go on where `folder` stands, and save them in `folder`/model; returns them frozen."""
    folder = Path(folder)
    torch.manual_seed(settings.seed)
    towers = Towers.create(build_tokenizer(folder / "model" / "tokenizer"))
    initialise(towers, settings.seed)
    train(towers, lambda draw: objective(towers, draw, count), settings, folder)
    towers.save(folder / "model")
    report = evaluate(towers.requires_grad_(False))
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return towers
