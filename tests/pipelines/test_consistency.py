"""Components of different checkpoints that do not fit each other are refused before a network runs."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.pipelines.pictures import photo
from tests.pipelines.tiny import DIM, PIXELS, load_quietly, pair, save_tokenizer, seeded

from kandinsky22 import (
    CheckpointError,
    InputError,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UNet2DConditionModel,
    VQModel,
)
from kandinsky22.pipelines.consistency import _is_vocabulary, processor_size


def text_tower(**settings: Any) -> Any:
    common = {"hidden_size": DIM, "projection_dim": DIM, "intermediate_size": 37, "num_attention_heads": 4}
    tokens = {"vocab_size": 87, "bos_token_id": 85, "eos_token_id": 86, "pad_token_id": 86, "num_hidden_layers": 2}
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**{**common, **tokens, **settings}))


def vision_tower(**settings: Any) -> Any:
    common = {"hidden_size": DIM, "projection_dim": DIM, "intermediate_size": 37, "num_attention_heads": 4}
    sizes = {"image_size": PIXELS, "patch_size": 8, "num_hidden_layers": 2}
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**{**common, **sizes, **settings}))


def tiny_prior(**settings: Any) -> PriorTransformer:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "embedding_dim": DIM, "num_layers": 1}
    return PriorTransformer(**{**sizes, **settings})


def tokenizer(pipe: Any, **settings: Any) -> Any:
    """Return a changed copy of the pipeline's tokenizer."""
    changed = copy.deepcopy(pipe.tokenizer)
    for name, value in settings.items():
        if name == "tokens":
            changed.add_tokens(value)
        else:
            setattr(changed, name, value)
    return changed


def processor(size: int) -> Any:
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    return kind(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


PRIOR_CASES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "more tokens than rows": (
        "tokenizer",
        lambda pipe: tokenizer(pipe, tokens=["<new>"]),
        r"len\(tokenizer\)=88 does not fit text_encoder.config.vocab_size=87",
    ),
    "fewer tokens than rows": (
        "text_encoder",
        lambda pipe: text_tower(vocab_size=5000),
        r"len\(tokenizer\)=87 does not fit text_encoder.config.vocab_size=5000",
    ),
    "another end token": (
        "text_encoder",
        lambda pipe: text_tower(eos_token_id=80),
        r"tokenizer.eos_token_id=86 does not fit text_encoder.config.eos_token_id=80",
    ),
    "no end token": (
        "text_encoder",
        lambda pipe: text_tower(eos_token_id=None),
        r"tokenizer.eos_token_id=86 does not fit text_encoder.config.eos_token_id=None",
    ),
    "length without a limit": (
        "tokenizer",
        lambda pipe: tokenizer(pipe, model_max_length=10**30),
        r"tokenizer.model_max_length=1000000000000000\d* does not fit prior.config.num_embeddings=77",
    ),
    "another length": (
        "prior",
        lambda pipe: tiny_prior(num_embeddings=20),
        r"tokenizer.model_max_length=77 does not fit prior.config.num_embeddings=20",
    ),
    "a shorter context": (
        "text_encoder",
        lambda pipe: text_tower(max_position_embeddings=40),
        r"tokenizer.model_max_length=77 does not fit text_encoder.config.max_position_embeddings=40",
    ),
    "another text projection": (
        "text_encoder",
        lambda pipe: text_tower(projection_dim=16),
        r"text_encoder.config.projection_dim=16 does not fit prior.config.embedding_dim=32",
    ),
    "another text width": (
        "text_encoder",
        lambda pipe: text_tower(hidden_size=64),
        r"text_encoder.config.hidden_size=64 does not fit prior.config.embedding_dim=32",
    ),
    "another image projection": (
        "image_encoder",
        lambda pipe: vision_tower(projection_dim=48),
        r"image_encoder.config.projection_dim=48 does not fit prior.config.embedding_dim=32",
    ),
    "another picture size": (
        "image_encoder",
        lambda pipe: vision_tower(image_size=64),
        r"image_processor.crop_size=\(32, 32\) does not fit image_encoder.config.image_size=64",
    ),
    "another crop": (
        "image_processor",
        lambda pipe: processor(24),
        r"image_processor.crop_size=\(24, 24\) does not fit image_encoder.config.image_size=32",
    ),
    "another prior": (
        "prior",
        lambda pipe: tiny_prior(embedding_dim=16),
        r"text_encoder.config.projection_dim=32 does not fit prior.config.embedding_dim=16",
    ),
}


@pytest.mark.usefixtures("no_network_runs")
@pytest.mark.parametrize("case", PRIOR_CASES)
def test_components_of_the_prior(case: str, prior: Any, combined: Any) -> None:
    """The constructor refuses them at once, and an assignment at the next call, before a network runs."""
    name, make, message = PRIOR_CASES[case]
    component = make(prior)
    with pytest.raises(InputError, match=f"KandinskyV22PriorPipeline: {message}: expected"):
        KandinskyV22PriorPipeline(**{**prior.components, name: component})
    with pytest.raises(InputError, match="does not fit"):
        KandinskyV22PriorPipeline.from_pretrained(prior.origin, **{name: component})
    with pytest.raises(InputError, match=r"KandinskyV22CombinedPipeline: .*prior_.* does not fit .*prior_"):
        KandinskyV22CombinedPipeline(**{**combined.components, f"prior_{name}": component})
    setattr(prior, name, component)
    calls: list[Callable[[], Any]] = [
        lambda: prior("a cat", num_inference_steps=2),
        lambda: prior.interpolate(["a cat", photo(0)], [0.5, 0.5]),
    ]
    for call in calls:
        with pytest.raises(InputError, match=message):
            call()
    setattr(combined, f"prior_{name}", component)
    with pytest.raises(InputError, match="does not fit"):
        combined("a cat", num_inference_steps=2, prior_num_inference_steps=2)


DECODER_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "other latents": (
        {"in_channels": 5},
        r"unet.config.in_channels=5 does not fit movq.config.latent_channels=4: expected one of 4, 8, 9",
    ),
    "other outputs": (
        {"out_channels": 6},
        r"unet.config.out_channels=6 does not fit movq.config.latent_channels=4: expected 4 or 8",
    ),
}


@pytest.mark.usefixtures("no_network_runs")
@pytest.mark.parametrize("case", DECODER_CASES)
def test_components_of_the_decoder(case: str, decoder: Any) -> None:
    settings, message = DECODER_CASES[case]
    unet = UNet2DConditionModel(**{**decoder.unet.config, **settings})
    with pytest.raises(InputError, match=message):
        KandinskyV22Pipeline(**{**decoder.components, "unet": unet})
    decoder.unet = unet
    with pytest.raises(InputError, match=message):
        decoder(**pair(), num_inference_steps=2)


@pytest.mark.usefixtures("no_network_runs")
def test_latents_of_another_movq(decoder: Any) -> None:
    movq = VQModel(**{**decoder.movq.config, "latent_channels": 3, "vq_embed_dim": 3})
    with pytest.raises(InputError, match=r"unet.config.in_channels=4 does not fit movq.config.latent_channels=3"):
        KandinskyV22Pipeline(**{**decoder.components, "movq": movq})


@pytest.mark.usefixtures("no_network_runs")
def test_prior_and_decoder_of_different_models(combined: Any) -> None:
    unet = UNet2DConditionModel(**{**combined.unet.config, "encoder_hid_dim": 48})
    message = r"prior_prior.config.embedding_dim=32 does not fit unet.config.encoder_hid_dim=48"
    with pytest.raises(InputError, match=message):
        KandinskyV22CombinedPipeline(**{**combined.components, "unet": unet})
    combined.unet = unet
    with pytest.raises(InputError, match=message):
        combined("a cat", num_inference_steps=2, prior_num_inference_steps=2)


def test_components_are_replaced_one_after_the_other(prior: Any, tmp_path: Path) -> None:
    """Between two assignments the components do not fit, which is no error until a network would run."""
    tokens = save_tokenizer(tmp_path)
    tokens.add_tokens(["<new>"])
    prior.tokenizer = tokens
    prior.text_encoder = text_tower(vocab_size=88).eval()
    assert prior("a <new> cat", num_inference_steps=2, generator=seeded(1)).image_embeds.shape == (1, DIM)


def test_missing_components_are_skipped(prior: Any) -> None:
    for name in prior.components:
        pipe = KandinskyV22PriorPipeline(**{**prior.components, name: None})
        assert pipe.components[name] is None


def test_the_lazy_encoder_is_not_loaded_by_the_check(prior: Any) -> None:
    KandinskyV22PriorPipeline(**prior.components)
    assert not prior.components["image_encoder"].is_loaded


@pytest.mark.parametrize(("tokens", "rows", "fits"), [(49408, 49408, True), (49409, 49408, False), (2, 49408, False)])
def test_vocabularies(tokens: int, rows: int, fits: bool) -> None:
    assert _is_vocabulary(tokens, rows) is fits


def test_padded_vocabularies() -> None:
    """`resize_token_embeddings(pad_to_multiple_of=64)` gives more rows than there are tokens."""
    assert _is_vocabulary(49410, 49472)
    assert not _is_vocabulary(49410, 49999)


def test_sizes_of_image_processors() -> None:
    assert processor_size(processor(PIXELS)) == (PIXELS, PIXELS)
    assert processor_size(None) is None


# Vocabularies on the disk


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt", "both"])
def test_missing_vocabularies(missing: str, checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints / "prior", tmp_path / "prior"))
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    save_tokenizer(folder / "tokenizer")
    assert load_quietly(KandinskyV22PriorPipeline, folder)
    for name in ("vocab.json", "merges.txt") if missing == "both" else (missing,):
        (folder / "tokenizer" / name).unlink()
    first = "vocab.json" if missing == "both" else missing
    with pytest.raises(CheckpointError, match=f"missing file: .*tokenizer/{first}"):
        KandinskyV22PriorPipeline.from_pretrained(folder)


def test_missing_limit_of_the_tokenizer(checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints / "prior", tmp_path / "prior"))
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer.model_max_length=\d+ does not fit prior.config.num_embeddings=77"):
        KandinskyV22PriorPipeline.from_pretrained(folder)


def test_a_vocabulary_of_two_tokens(checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints / "prior", tmp_path / "prior"))
    shutil.rmtree(folder / "tokenizer")
    save_tokenizer(folder / "tokenizer")
    (folder / "tokenizer/vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    with pytest.raises((CheckpointError, InputError), match="tokenizer"):
        KandinskyV22PriorPipeline.from_pretrained(folder)


def test_embeddings_keep_their_values(prior: Any) -> None:
    """The check changes no random number and no result."""
    torch.manual_seed(5)
    first = prior("a cat", num_inference_steps=2).image_embeds
    torch.manual_seed(5)
    assert torch.equal(prior("a cat", num_inference_steps=2).image_embeds, first)
