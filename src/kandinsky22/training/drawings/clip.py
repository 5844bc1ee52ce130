"""Recipe of the embedded CLIP: both towers, trained together from scratch.

The contrastive loss alone teaches little at this scale. During training, linear heads (`Probe`) therefore also read the
attributes of the scene from both embeddings. The same heads serve both towers, thus "the left thing is small" is the
same direction in text and in image embeddings.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from kandinsky22.training.drawings.captions import FULL, VOCABULARY, add_nonsense_word, caption
from kandinsky22.training.drawings.patches import PatchHeads, PatchLabels
from kandinsky22.training.drawings.probe import QUESTIONS, UNKNOWN, Probe, SceneLabels, caption_answers
from kandinsky22.training.drawings.rendering import render
from kandinsky22.training.drawings.scenes import DRAWN_STYLES, Mixture, Scene, is_held_out, sample_scene
from kandinsky22.training.drawings.sprites import Sprites
from kandinsky22.training.loop import Settings, StepRandomness, train
from kandinsky22.training.towers import Towers, TowerSizes, build_tokenizer, initialise_patches

SIZES = TowerSizes()
CELLS = SIZES.image // SIZES.patch  # number of patches along each side of an image
BATCH = 128
GROUP = 2  # scenes per group of a batch; those of a group differ in one attribute each
SETTINGS = Settings(
    steps=700, learning_rate=1e-3, warmup=100, decay=400, weight_decay=0.05, average=0.998, bf16=True, muon=True
)


# The first stage ends as soon as parts and heads are good. The towers need more examples: their training goes on.
TOWERS = Settings(
    steps=2000,
    learning_rate=7e-4,
    warmup=100,
    decay=1600,
    weight_decay=0.05,
    average=0.998,
    bf16=True,
    muon=True,
    muon_interval=4,
    seed=6,
)
TOWERS_MIXTURE = Mixture(styles=DRAWN_STYLES)
ZERO_WEIGHT = 10.0  # the negative embedding of guidance must stay what the decoder is trained with


class Clip(nn.Module):
    """Towers and probe, which are trained together.

    Args:
        towers: Both towers.
        probe: Heads that read attributes from embeddings.
    """

    def __init__(self, towers: Towers, probe: Probe) -> None:
        super().__init__()
        self.towers, self.probe = towers, probe

    @classmethod
    def load(cls, folder: Path) -> Clip:
        """Return trained towers and their probe, frozen.

        Args:
            folder: Folder of the stage.
        """
        towers = Towers.load(folder / "model")
        probe = Probe(SIZES.embedding)
        probe.load_state_dict(torch.load(folder / "model" / "probe.pt", weights_only=True))
        return cls(towers, probe).eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write the towers in the published layout, and the probe next to them.

        Args:
            folder: Folder of the stage.
        """
        self.towers.save(folder / "model")
        torch.save(self.probe.state_dict(), folder / "model" / "probe.pt")


def neighbours(scene: Scene, count: int, rng: np.random.Generator, mixture: Mixture | None = None) -> list[Scene]:
    """Return a scene and variants that differ in one attribute, which the contrastive loss must learn to tell apart.

    Args:
        scene: The scene, which comes first.
        count: Number of scenes to return.
        rng: Random generator.
        mixture: Shares of what scenes consist of; None takes the defaults.
    """
    group = [scene]
    while len(group) < count:
        other = sample_scene(rng, mixture, arrangement=scene.arrangement)
        slot = int(rng.integers(len(scene.things)))
        thing, replacement = scene.things[slot], other.things[slot]
        things = list(scene.things)
        change = int(rng.integers(5))
        if change == 0:
            variant = dataclasses.replace(scene, background=other.background)
        elif change == 1:
            variant = dataclasses.replace(scene, style=other.style)
        elif change == 2 and len(things) > 1:  # the first two things exchange what they are
            first, second = things[:2]
            things[0] = dataclasses.replace(first, name=second.name, color=second.color)
            things[1] = dataclasses.replace(second, name=first.name, color=first.color)
            variant = dataclasses.replace(scene, things=tuple(things))
        elif change == 3:
            things[slot] = dataclasses.replace(replacement, name=thing.name, color=thing.color)
            variant = dataclasses.replace(scene, things=tuple(things), position=other.position)
        else:
            things[slot] = dataclasses.replace(thing, name=replacement.name, color=replacement.color)
            variant = dataclasses.replace(scene, things=tuple(things))
        visible = all(thing.color != variant.background.name for thing in variant.things)
        distinct = len({thing.name for thing in variant.things}) == len(variant.things)
        if visible and distinct and variant != scene and not is_held_out(variant):
            group.append(variant)
    return group


@dataclass(frozen=True)
class Batch:
    """Images with captions and labels.

    Attributes:
        images: RGB images (N, 3, H, W), about [0, 1].
        texts: N captions.
        scenes: The N scenes.
        text_answers: Answers to QUESTIONS that the captions give, (N, questions), or UNKNOWN.
    """

    images: Tensor
    texts: list[str]
    scenes: list[Scene]
    text_answers: Tensor


def sample_batch(
    sprites: Sprites, randomness: StepRandomness, count: int = BATCH, mixture: Mixture | None = None
) -> Batch:
    """Return a random batch: groups of similar scenes, their images with a little noise as in generated images.

    Args:
        sprites: Pixels of all things.
        randomness: Random generators of the step.
        count: Number of images.
        mixture: Shares of what scenes consist of; None takes the defaults.
    """
    rng = randomness.numpy
    scenes: list[Scene] = []
    while len(scenes) < count:
        scenes += neighbours(sample_scene(rng, mixture), GROUP, rng, mixture)
    captions = [caption(scene, rng, FULL if rng.random() < 0.4 else None) for scene in scenes]
    texts = [add_nonsense_word(c.text, rng) if rng.random() < 0.05 else c.text for c in captions]
    images = render(sprites, scenes, SIZES.image)
    noise = 0.03 * torch.rand(len(images), 1, 1, 1, generator=randomness.torch)
    return Batch(
        images + noise * torch.randn(images.shape, generator=randomness.torch),
        texts,
        scenes,
        torch.tensor([caption_answers(c.description) for c in captions]),
    )


def _contrastive_loss(clip: Clip, images: Tensor, texts: Tensor, labels: SceneLabels, text_answers: Tensor) -> Tensor:
    """Return the symmetric contrastive loss; captions that are true of several images are not negatives for them."""
    scale = clip.towers.logit_scale.clamp(max=4.6).exp()
    logits = scale * functional.normalize(images.float()) @ functional.normalize(texts.float()).T
    stated = text_answers[None, :, :]
    agrees = ((stated == labels.answers[:, None, :]) | (stated == UNKNOWN)).all(2)
    logits = logits.masked_fill(agrees & ~torch.eye(len(logits), dtype=torch.bool), -1e4)
    target = torch.arange(len(logits))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def clip_losses(
    clip: Clip,
    sprites: Sprites,
    randomness: StepRandomness,
    count: int = BATCH,
    *,
    mixture: Mixture | None = None,
    patches: PatchHeads | None = None,
) -> dict[str, Tensor]:
    """Return the losses of one training step.

    Args:
        clip: Towers and probe to be trained.
        sprites: Pixels of all things.
        randomness: Random generators of the step.
        count: Number of images in the batch.
        mixture: Shares of what scenes consist of; None takes the defaults.
        patches: Heads that read patches; None for no such loss.

    Returns:
        Scalars: "contrastive", "text_answers", those of `Probe.image_losses`, "patches", and their weighted sum "loss".
    """
    batch = sample_batch(sprites, randomness, count, mixture)
    labels = SceneLabels.of(batch.scenes)
    # For such short sequences in bfloat16, the backward pass of fused attention is several times slower.
    with sdpa_kernel(SDPBackend.MATH):
        images = clip.towers.embed_patches(batch.images)
        texts = clip.towers.embed_texts(batch.texts).embeds
    losses = {
        "contrastive": _contrastive_loss(clip, images.embeds, texts, labels, batch.text_answers),
        "text_answers": clip.probe.answer_loss(texts, batch.text_answers),
        **clip.probe.image_losses(images.embeds, labels),
    }
    if patches is not None:
        losses["patches"] = patches.loss(images.patches, PatchLabels.of(sprites, batch.scenes, CELLS))
    return {"loss": sum(losses.values(), -0.7 * losses["contrastive"]), **losses}


@torch.no_grad()
def evaluate(
    clip: Clip, sprites: Sprites, *, count: int = 500, seed: int = 12345, mixture: Mixture | None = None
) -> dict[str, float]:
    """Return how often attributes are read correctly from embeddings, on scenes that are held out and others.

    Args:
        clip: Trained towers and probe.
        sprites: Pixels of all things.
        count: Number of scenes per group.
        seed: Seed of the scenes.
        mixture: Shares of what scenes consist of; None takes the defaults.

    Returns:
        Shares per question and for all questions together, by names such as "one_held_out/image/thing0".
    """
    report: dict[str, float] = {}
    groups = [("one", None), ("beside", "beside"), ("on", "on"), ("row", "row")]
    for (name, arrangement), held_out in ((group, held_out) for group in groups for held_out in (False, True)):
        rng = np.random.default_rng([seed, held_out])
        scenes = [sample_scene(rng, mixture, arrangement=arrangement, held_out=held_out) for _ in range(count)]
        captions = [caption(scene, rng, FULL) for scene in scenes]
        embeds = {
            "image": torch.cat(
                [
                    clip.towers.embed_images(render(sprites, scenes[i : i + 100], SIZES.image))
                    for i in range(0, count, 100)
                ]
            ),
            "text": clip.towers.embed_texts([c.text for c in captions]).embeds,
        }
        answers = {
            "image": SceneLabels.of(scenes).answers,
            "text": torch.tensor([caption_answers(c.description) for c in captions]),
        }
        for source, embeddings in embeds.items():
            correct = clip.probe.correct(embeddings, answers[source])
            prefix = f"{name}{'_held_out' if held_out else ''}/{source}"
            known = (answers[source] != UNKNOWN).any(0).tolist()
            shares = correct.float().mean(0).tolist()
            report |= {
                f"{prefix}/{q}": share for q, share, is_known in zip(QUESTIONS, shares, known, strict=True) if is_known
            }
            report[prefix] = float(correct.all(1).float().mean())
    return {key: round(value, 4) for key, value in report.items()}


def train_clip(
    folder: Path, sprites: Sprites, settings: Settings = SETTINGS, *, count: int = BATCH, evaluated: int = 500
) -> Clip:
    """Train both towers, or resume their training, and save them in the subfolder "model".

    Args:
        folder: Folder of the stage.
        sprites: Pixels of all things.
        settings: Hyperparameters.
        count: Number of images per batch.
        evaluated: Number of scenes per group of the evaluation.

    Returns:
        Towers and probe, frozen.
    """
    torch.manual_seed(settings.seed)
    clip = Clip(
        Towers.create(build_tokenizer(folder / "model" / "tokenizer", VOCABULARY), SIZES), Probe(SIZES.embedding)
    )
    rng = np.random.default_rng([settings.seed, 1])
    initialise_patches(
        clip.towers, render(sprites, [sample_scene(rng) for _ in range(4 * count)], SIZES.image), settings.seed
    )
    train(clip, lambda randomness: clip_losses(clip, sprites, randomness, count), settings, folder)
    clip.save(folder)
    report = evaluate(clip.requires_grad_(False), sprites, count=evaluated)
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return clip


def train_towers(
    folder: Path,
    clip: Clip,
    sprites: Sprites,
    settings: Settings = TOWERS,
    *,
    count: int = BATCH,
    evaluated: int = 500,
) -> Clip:
    """Train both towers further, or resume their training, and save them in the subfolder "model".

    The vision tower learns from its patches too, on the styles that the decoder draws. Parts and heads stay as they
    are, thus networks can be trained on sums of parts meanwhile.

    Args:
        folder: Folder of the stage.
        clip: Trained towers and probe. Its towers are changed.
        sprites: Pixels of all things.
        settings: Hyperparameters.
        count: Number of images per batch.
        evaluated: Number of scenes per group of the evaluation.

    Returns:
        Towers and probe, frozen.
    """
    zero_image = torch.full((1, 3, SIZES.image, SIZES.image), 0.5)
    with torch.no_grad():
        zero_embedding = clip.towers.embed_images(zero_image).float()
    clip.towers.requires_grad_(True)
    torch.manual_seed(settings.seed)
    patches = PatchHeads(SIZES.vision_width)

    def objective(randomness: StepRandomness) -> dict[str, Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            zero = clip.towers.embed_images(zero_image).float()
        losses = clip_losses(clip, sprites, randomness, count, mixture=TOWERS_MIXTURE, patches=patches)
        losses["zero"] = ZERO_WEIGHT * (zero - zero_embedding).square().mean()
        losses["loss"] = losses["loss"] + losses["zero"]
        return losses

    train(nn.ModuleDict({"clip": clip, "patches": patches}), objective, settings, folder)
    clip.requires_grad_(False)
    build_tokenizer(folder / "model" / "tokenizer", VOCABULARY)
    clip.save(folder)
    report = evaluate(clip, sprites, count=evaluated, mixture=TOWERS_MIXTURE)
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return clip
