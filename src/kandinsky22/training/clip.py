"""The CLIP of the embedded model: tokenizer, text tower and vision tower, trained together from scratch.

The contrastive loss alone teaches little at this scale. During training, linear heads (`Probe`) therefore also read the
attributes of the scene from both embeddings. The same heads serve both towers, thus "the left shape is small" is the
same direction in text and in image embeddings.
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
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from kandinsky22.pipelines.clip_tokenizer import CLIPTokenizer
from kandinsky22.training.captions import FULL, VOCABULARY, Caption, add_nonsense_word, caption
from kandinsky22.training.loop import Settings, StepRandomness, train
from kandinsky22.training.probe import QUESTIONS, UNKNOWN, Probe, SceneLabels, caption_answers, scene_answers
from kandinsky22.training.scenes import (
    Scene,
    Shape,
    is_held_out,
    random_palette,
    render,
    sample_scene,
)
from kandinsky22.training.towers import TextEmbedding

IMAGE_SIZE = 64
PATCH_SIZE = 16
WIDTH = 128
EMBEDDING = 128
CONTEXT = 77
START, END = "<|startoftext|>", "<|endoftext|>"
BATCH = 128
GROUP = 4  # scenes per group of a batch; those of a group differ in one attribute each

SETTINGS = Settings(steps=3000, learning_rate=1e-3, warmup=300, weight_decay=0.01, average=0.998, bf16=True)


def build_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """Write a CLIP tokenizer whose merges make one token of each word of VOCABULARY, and load it.

    Other words are split into letters, and letters of other scripts into bytes, thus any text can be tokenised.

    Args:
        folder: Folder to write into.

    Returns:
        The tokenizer.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Printable characters that represent the 256 bytes, as in GPT-2's byte-level encoding.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
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
    """Both CLIP towers with their tokenizer and probe.

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
        self.probe = Probe(int(text.config.projection_dim or EMBEDDING))
        self.logit_scale = nn.Parameter(torch.tensor(2.66))  # log(1/0.07), as in the CLIP paper

    @classmethod
    def create(cls, tokenizer: CLIPTokenizer) -> Towers:
        """Return untrained towers of the embedded model's size.

        Args:
            tokenizer: Tokenizer.
        """
        text = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                projection_dim=EMBEDDING,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=CONTEXT,
                hidden_act="gelu",
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        vision = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                projection_dim=EMBEDDING,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=IMAGE_SIZE,
                patch_size=PATCH_SIZE,
                hidden_act="gelu",
            )
        )
        return cls(tokenizer, text, vision)

    @classmethod
    def load(cls, folder: str | Path) -> Towers:
        """Return trained towers, frozen.

        Args:
            folder: Folder that `save` has written.
        """
        folder = Path(folder)
        towers = cls(
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            CLIPTextModelWithProjection.from_pretrained(str(folder / "text_encoder")),
            CLIPVisionModelWithProjection.from_pretrained(str(folder / "image_encoder")),
        )
        towers.probe.load_state_dict(torch.load(folder / "probe.pt", weights_only=True))
        return towers.eval().requires_grad_(False)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer, towers and image processor in the published layout, and the probe next to them.

        Args:
            folder: Folder to write into.
        """
        folder = Path(folder)
        build_tokenizer(folder / "tokenizer")
        self.text.save_pretrained(str(folder / "text_encoder"))
        self.vision.save_pretrained(str(folder / "image_encoder"))
        image_processor().save_pretrained(str(folder / "image_processor"))
        torch.save(self.probe.state_dict(), folder / "probe.pt")

    def embed_images(self, images: Tensor) -> Tensor:
        """Return image embeddings (N, D).

        Args:
            images: RGB images (N, 3, H, W) in [0, 1].
        """
        if images.shape[-1] != IMAGE_SIZE or images.shape[-2] != IMAGE_SIZE:
            images = functional.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)
        embeds: Tensor = self.vision(pixel_values=(images - 0.5) / 0.5).image_embeds
        return embeds

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


def image_processor() -> CLIPImageProcessor:
    """Return the image processor of the vision tower."""
    return CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


@torch.no_grad()
def initialise(towers: Towers, seed: int) -> None:
    """Initialise the vision tower's patch filters with the half-whitened principal components of rendered patches.

    With the usual small random filters, the contrastive loss stalls at this scale before shapes are recognised. Each
    component is divided by the fourth root of its eigenvalue. This is a compromise between unscaled components, where
    flat colour outweighs edges, and full whitening, which amplifies noise.

    Args:
        towers: Towers, changed in place.
        seed: Seed of the rendered scenes and of the position embeddings.
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
    """Return a scene and variants that differ in one attribute, which the contrastive loss must learn to tell apart.

    Args:
        scene: The scene, which comes first.
        count: Number of scenes to return.
        rng: Random generator.
    """
    group = [scene]
    while len(group) < count:
        other = sample_scene(rng, shapes=len(scene.shapes))
        slot = int(rng.integers(len(scene.shapes)))
        shape, replacement = scene.shapes[slot], other.shapes[slot]
        change = int(rng.integers(5))
        if change == 0:
            variant = dataclasses.replace(scene, background=other.background)
        elif change == 1 and len(scene.shapes) == 2:  # the two shapes exchange their centres
            a, b = scene.shapes
            variant = dataclasses.replace(scene, shapes=(_moved(b, a), _moved(a, b)))
        else:
            fields: list[dict[str, Any]] = [
                {"kind": replacement.kind},
                {"color": replacement.color},
                {"size": replacement.size, "radius": replacement.radius},
            ]
            if change == 1:
                fields.append({"x": replacement.x, "y": replacement.y})
            shapes = list(scene.shapes)
            shapes[slot] = dataclasses.replace(shape, **fields[change - 2])
            variant = dataclasses.replace(scene, shapes=tuple(shapes))
        looks = {(shape.kind, shape.color) for shape in variant.shapes}
        visible = all(shape.color != variant.background for shape in variant.shapes)
        if visible and len(looks) == len(variant.shapes) and variant != scene and not is_held_out(variant):
            group.append(variant)
    return group


def _moved(shape: Shape, target: Shape) -> Shape:
    """Return `shape` at the centre of `target`."""
    return dataclasses.replace(shape, x=target.x, y=target.y)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images with their labels, and captions of the first M of them.

    The images without captions have arbitrary colours. Without them, everything that the vision tower learns of a shape
    or a position is limited to eight colours, and to the combinations that are not left out of training.

    Attributes:
        images: RGB images (N, 3, H, W), about [0, 1].
        texts: Captions of the first M images.
        labels: Labels of the N images.
        text_answers: Answers to QUESTIONS that the captions give, (M, questions), or UNKNOWN.
    """

    images: Tensor
    texts: list[str]
    labels: SceneLabels
    text_answers: Tensor


def sample_batch(rng: np.random.Generator, generator: torch.Generator, count: int = BATCH) -> Batch:
    """Return a random batch: groups of similar scenes, their images with a little noise as in generated images.

    Args:
        rng: Random generator of the scenes and captions.
        generator: Random generator of the noise.
        count: Number of images with captions.
    """
    scenes: list[Scene] = []
    while len(scenes) < count:
        scenes += neighbours(sample_scene(rng, shapes=1 if rng.random() < 0.35 else 2), GROUP, rng)
    captions: list[Caption] = [caption(scene, rng, FULL if rng.random() < 0.5 else None) for scene in scenes]
    texts = [add_nonsense_word(c.text, rng) if rng.random() < 0.05 else c.text for c in captions]
    recoloured = [sample_scene(rng, shapes=1 if rng.random() < 0.35 else 2) for _ in range(count * 3 // 8)]
    palettes = [random_palette(scene, rng) for scene in recoloured]
    images = torch.cat([render(scenes, IMAGE_SIZE), render(recoloured, IMAGE_SIZE, palettes)])
    noise = 0.03 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return Batch(
        images + noise * torch.randn(images.shape, generator=generator),
        texts,
        SceneLabels.of(scenes).followed_by(SceneLabels.of(recoloured, palettes)),
        torch.tensor([caption_answers(c.description) for c in captions]),
    )


def _contrastive_loss(towers: Towers, images: Tensor, texts: Tensor, batch: Batch) -> Tensor:
    """Return the symmetric contrastive loss; captions that are true of several images are not negatives for them."""
    scale = towers.logit_scale.clamp(max=4.6).exp()
    logits = scale * functional.normalize(images.float()) @ functional.normalize(texts.float()).T
    truth = batch.labels.answers[: len(images)]
    stated = batch.text_answers[None, :, :]
    agrees = ((stated == truth[:, None, :]) | (stated == UNKNOWN)).all(2)
    logits = logits.masked_fill(agrees & ~torch.eye(len(logits), dtype=torch.bool), -1e4)
    target = torch.arange(len(logits))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def clip_losses(towers: Towers, randomness: StepRandomness, count: int = BATCH) -> dict[str, Tensor]:
    """Return the losses of one training step.

    Args:
        towers: Towers to be trained.
        randomness: Random generators of the step.
        count: Number of images with captions in the batch.

    Returns:
        Scalars: "contrastive", "text_answers", those of `Probe.image_losses`, and their weighted sum "loss".
    """
    batch = sample_batch(randomness.numpy, randomness.torch, count)
    # For such short sequences in bfloat16, the backward pass of fused attention is several times slower.
    with sdpa_kernel(SDPBackend.MATH):
        images = towers.embed_images(batch.images)
        texts = towers.embed_texts(batch.texts).embeds
    losses = {
        "contrastive": _contrastive_loss(towers, images[: len(texts)], texts, batch),
        "text_answers": towers.probe.answer_loss(texts, batch.text_answers),
        **towers.probe.image_losses(images, batch.labels),
    }
    return {"loss": sum(losses.values(), -0.5 * losses["contrastive"]), **losses}


@torch.no_grad()
def evaluate(towers: Towers, *, count: int = 1000, seed: int = 12345) -> dict[str, float]:
    """Return how often attributes are read correctly from embeddings, on scenes that are held out and others.

    Args:
        towers: Trained towers.
        count: Number of scenes per group.
        seed: Seed of the scenes.

    Returns:
        Shares per question and for all questions together, and losses of image embeddings, by names such as
        "one_held_out/image/kind0".
    """
    report: dict[str, float] = {}
    for shapes, held_out in itertools.product((1, 2), (False, True)):
        name = ("one", "two")[shapes - 1] + ("_held_out" if held_out else "")
        rng = np.random.default_rng([seed, shapes, held_out])
        scenes = [sample_scene(rng, shapes=shapes, held_out=held_out) for _ in range(count)]
        captions = [caption(scene, rng) for scene in scenes]
        images = towers.embed_images(render(scenes, IMAGE_SIZE))
        texts = towers.embed_texts([c.text for c in captions]).embeds
        correct = {
            "image": towers.probe.correct(images, torch.tensor([scene_answers(scene) for scene in scenes])),
            "text": towers.probe.correct(texts, torch.tensor([caption_answers(c.description) for c in captions])),
        }
        for source, values in correct.items():
            shares = values.float().mean(0).tolist()
            report |= {f"{name}/{source}/{question}": v for question, v in zip(QUESTIONS, shares, strict=True)}
            report[f"{name}/{source}"] = float(values.all(1).float().mean())
        losses = towers.probe.image_losses(images, SceneLabels.of(scenes))
        report |= {f"{name}/image/{loss}": float(value) for loss, value in losses.items()}
    return {key: round(value, 4) for key, value in report.items()}


def train_clip(folder: str | Path, settings: Settings = SETTINGS, *, count: int = BATCH) -> Towers:
    """Train both towers, or resume their training, and save them in the subfolder "model".

    Args:
        folder: Folder of the stage.
        settings: Hyperparameters.
        count: Number of images with captions per batch.

    Returns:
        The towers, frozen.
    """
    folder = Path(folder)
    torch.manual_seed(settings.seed)
    towers = Towers.create(build_tokenizer(folder / "model" / "tokenizer"))
    initialise(towers, settings.seed)
    train(towers, lambda randomness: clip_losses(towers, randomness, count), settings, folder)
    towers.save(folder / "model")
    report = evaluate(towers.requires_grad_(False))
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return towers
