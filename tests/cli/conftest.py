"""The command, run in this process, and tiny random models for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.helpers import DEFAULTS, SIZE, Command, Result
from tests.pipelines.tiny import DECODER_SCHEDULER, DIM, PRIOR_SCHEDULER, clip_towers, save_tokenizer

from kandinsky22 import (
    DDPMScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22ControlnetPipeline,
    KandinskyV22InpaintCombinedPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from kandinsky22.cli.main import main


@pytest.fixture(autouse=True)
def _no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use an empty folder for settings: those of the user must not change tests."""
    monkeypatch.delenv("KANDINSKY22_CONFIG")
    for name in ("XDG_CONFIG_HOME", "APPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "settings"))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `kandinsky22 ARGUMENTS...` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints `combined/`, `inpaint/`, `control/decoder/` next to `control/prior/`, `a/decoder/`
    and `b/prior/`; the first three have generation defaults."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(2)
    pipe = _tiny_pipeline(folder)
    pipe.prior_pipe.save_pretrained(folder / "b" / "prior")
    pipe.decoder_pipe.save_pretrained(folder / "a" / "decoder")
    pipe.generation_defaults = DEFAULTS
    pipe.save_pretrained(folder / "combined")
    inpaint = KandinskyV22InpaintCombinedPipeline(**{**pipe.components, "unet": _tiny_unet(in_channels=9)})
    inpaint.generation_defaults = DEFAULTS
    inpaint.save_pretrained(folder / "inpaint")
    control = KandinskyV22ControlnetPipeline(
        _tiny_unet(in_channels=8, addition_embed_type="image_hint"), pipe.scheduler, pipe.movq
    )
    control.generation_defaults = {"num_inference_steps": 2, "guidance_scale": 2.0}
    control.save_pretrained(folder / "control" / "decoder")
    pipe.prior_pipe.save_pretrained(folder / "control" / "prior")
    return folder


@pytest.fixture(scope="session")
def model(models: Path) -> Path:
    return models / "combined"


@pytest.fixture
def embedded(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the embedded model by the tiny random one."""
    parts = {
        "prior": models / "b" / "prior",
        "decoder": models / "combined",
        "inpaint": models / "inpaint",
        "control": models / "control" / "decoder",
    }
    monkeypatch.setattr("kandinsky22.checkpoints.hub.embedded_folder", parts.__getitem__)


@pytest.fixture
def broken_model(model: Path, tmp_path: Path) -> Path:
    """A copy of the model with truncated UNet weights."""
    copy = tmp_path / "broken"
    shutil.copytree(model, copy)
    (weights,) = (copy / "unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    return copy


def _tiny_pipeline(folder: Path) -> Any:
    tokenizer = save_tokenizer(folder / "words")
    text_encoder, image_encoder, image_processor = clip_towers(tokenizer)
    unet = _tiny_unet()
    movq = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        num_vq_embeddings=12,
    )
    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=12, num_layers=2, embedding_dim=DIM)
    with torch.no_grad():
        # Untrained, the standard deviation of embeddings is zero, and all embeddings would be zero.
        prior.clip_std.fill_(1.0)
    return KandinskyV22CombinedPipeline(
        unet=unet,
        scheduler=DDPMScheduler(**DECODER_SCHEDULER),
        movq=movq.eval(),
        prior_prior=prior.eval(),
        prior_image_encoder=image_encoder,
        prior_text_encoder=text_encoder,
        prior_tokenizer=tokenizer,
        prior_scheduler=UnCLIPScheduler(**PRIOR_SCHEDULER),
        prior_image_processor=image_processor,
    )


def _tiny_unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        layers_per_block=1,
        encoder_hid_dim=DIM,
        cross_attention_dim=16,
        attention_head_dim=8,
        **options,
    ).eval()
