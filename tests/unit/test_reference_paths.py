"""Scripts for the reference find their imports under the same paths."""

from __future__ import annotations

import importlib
import logging
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.optimization import get_scheduler as oracle_get_scheduler
from diffusers.pipelines.kandinsky2_2 import pipeline_kandinsky2_2_inpainting as oracle_inpainting
from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2 import downscale_height_and_width as oracle_downscale
from diffusers.training_utils import EMAModel as OracleEMA
from diffusers.training_utils import compute_snr as oracle_snr
from diffusers.training_utils import set_seed as oracle_set_seed
from tests.unit.tiny_models import TINY_MOVQ

import kandinsky22
from kandinsky22 import DDPMScheduler, InputError, MissingDependencyError, VQModel
from kandinsky22.compat import functions, modules
from kandinsky22.compat.training import (
    SCHEDULES,
    EMAModel,
    cast_training_params,
    compute_snr,
    free_memory,
    get_scheduler,
    set_seed,
)

# What the newest version of the reference has no longer, and scripts of its earlier versions import.
OLDER_PATHS = {"models.prior_transformer", "models.unet_2d_condition"}
OLDER_NAMES = {"KandinskyPriorPipelineOutput", "downscale_height_and_width", "prepare_image", "randn_tensor"}


@pytest.mark.parametrize("path", modules.NAMES)
def test_every_path_has_its_names(path: str) -> None:
    module = importlib.import_module(f"kandinsky22.{path}")
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


@pytest.mark.parametrize("path", sorted(set(modules.NAMES) - OLDER_PATHS))
def test_the_reference_has_the_path_and_the_names(path: str) -> None:
    theirs = importlib.import_module(f"diffusers.{path}")
    ours = importlib.import_module(f"kandinsky22.{path}")
    assert {name for name in ours.__all__ if not hasattr(theirs, name)} <= OLDER_NAMES


def test_names_are_the_same_objects_everywhere() -> None:
    from kandinsky22.models.unets.unet_2d_condition import UNet2DConditionModel
    from kandinsky22.pipelines.kandinsky import KandinskyPriorPipelineOutput
    from kandinsky22.pipelines.kandinsky2_2.pipeline_kandinsky2_2_prior import KandinskyV22PriorPipeline
    from kandinsky22.pipelines.pipeline_utils import ImagePipelineOutput
    from kandinsky22.schedulers.scheduling_ddpm import DDPMScheduler as SameScheduler
    from kandinsky22.utils import load_image, randn_tensor
    from kandinsky22.utils.torch_utils import randn_tensor as same_randn_tensor

    from kandinsky22.pipelines import DiffusionPipeline

    assert KandinskyV22PriorPipeline is kandinsky22.KandinskyV22PriorPipeline is kandinsky22.KandinskyPriorPipeline
    assert UNet2DConditionModel is kandinsky22.UNet2DConditionModel
    assert DiffusionPipeline is kandinsky22.DiffusionPipeline
    assert KandinskyPriorPipelineOutput is kandinsky22.KandinskyPriorPipelineOutput
    assert ImagePipelineOutput is kandinsky22.ImagePipelineOutput
    assert SameScheduler is DDPMScheduler
    assert load_image is kandinsky22.load_image
    assert randn_tensor is same_randn_tensor


def test_packages_are_attributes_and_nothing_is_imported_early() -> None:
    program = (
        "import sys, kandinsky22, kandinsky22.utils\n"
        "assert 'torch' not in sys.modules\n"
        "kandinsky22.utils.logging.set_verbosity_error()\n"
        "assert 'torch' not in sys.modules\n"
        "from kandinsky22.utils import *\n"
        "assert make_image_grid and 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, capture_output=True)


def test_unknown_paths_and_names_are_import_errors() -> None:
    for name in ("kandinsky22.pipelines.kandinsky3", "kandinsky22.utils.torch_utils.deep", "kandinsky22.loaders"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
    with pytest.raises(ImportError, match="StableDiffusionPipeline"):
        from kandinsky22.pipelines import StableDiffusionPipeline  # type: ignore[attr-defined]  # noqa: F401


def test_installing_twice_adds_one_finder() -> None:
    before = len(sys.meta_path)
    modules.install()
    assert len(sys.meta_path) == before


# Messages and progress bars


def test_verbosity() -> None:
    from kandinsky22.utils import logging as verbosity

    logger = logging.getLogger("kandinsky22")
    level, handlers = logger.level, list(logger.handlers)
    try:
        verbosity.set_verbosity_info()
        assert verbosity.get_verbosity() == logging.INFO == verbosity.INFO
        verbosity.set_verbosity_error()
        assert not verbosity.get_logger("kandinsky22.inputs.prompts").isEnabledFor(logging.WARNING)
        verbosity.set_verbosity_debug()
        assert verbosity.get_logger().isEnabledFor(logging.DEBUG)
        verbosity.set_verbosity_warning()
        assert verbosity.get_verbosity() == logging.WARNING
    finally:
        logger.setLevel(level)
        logger.handlers[:] = handlers


# Functions


@pytest.mark.parametrize("size", [(64, 64), (65, 511), (768, 1), (1000, 1024)])
def test_size_of_latents(size: tuple[int, int]) -> None:
    assert functions.downscale_height_and_width(*size) == oracle_downscale(*size)
    assert functions.downscale_height_and_width(*size, scale_factor=4) == oracle_downscale(*size, scale_factor=4)


def test_masks_and_images() -> None:
    masks = (torch.rand(2, 1, 9, 7) < 0.8).float()
    before = masks.clone()
    assert torch.equal(functions.prepare_mask(masks), oracle_inpainting.prepare_mask(masks.clone()))
    assert torch.equal(masks, before)
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    mask = np.zeros((64, 64), dtype=np.float32)
    mask[10:30, 20:50] = 1
    ours = functions.prepare_mask_and_masked_image(picture, mask, 64, 64)
    theirs = oracle_inpainting.prepare_mask_and_masked_image(picture, mask.copy(), 64, 64)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert functions.prepare_image(picture, 32, 16).shape == (1, 3, 16, 32)
    assert functions.pt_to_pil(torch.zeros(2, 3, 4, 4))[1].getpixel((0, 0)) == (128, 128, 128)


def test_animations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [PIL.Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    path = functions.export_to_gif(frames, tmp_path / "a.gif", fps=20)
    with PIL.Image.open(path) as animation:
        assert animation.n_frames == 3  # type: ignore[attr-defined]
        assert animation.info["duration"] == 50
    assert functions.export_to_gif(frames).endswith(".gif")
    with pytest.raises(InputError, match=r"^image=\[\]"):
        functions.export_to_gif([])
    monkeypatch.setitem(sys.modules, "imageio", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="imageio"):
        functions.export_to_video(frames)


def test_versions_and_packages() -> None:
    assert functions.is_torch_version(">=", "2.0")
    assert not functions.is_torch_version("<", "2.0")
    assert functions.is_accelerate_available() == functions.is_accelerate_version(">", "0.1")
    assert functions.is_transformers_available()
    functions.check_min_version("99.0")
    with pytest.raises(InputError, match="operation='~'"):
        functions.is_torch_version("~", "2")


def test_example_docstrings() -> None:
    @functions.replace_example_docstring("EXAMPLE\\1")
    def function() -> None:
        """Do it.

        Examples:
        """

    assert "EXAMPLE\\1" in (function.__doc__ or "")


# Training


def test_signal_to_noise_ratio() -> None:
    scheduler, timesteps = DDPMScheduler(), torch.tensor([0, 10, 999])
    torch.testing.assert_close(compute_snr(scheduler, timesteps), oracle_snr(scheduler, timesteps))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75}, {"min_decay": 0.5, "update_after_step": 3}],
)
def test_moving_averages_are_the_references(options: dict[str, Any]) -> None:
    network = torch.nn.Linear(3, 2)
    network.bias.requires_grad_(False)
    averages = [kind(network.parameters(), decay=0.9, **options) for kind in (EMAModel, OracleEMA)]
    for _ in range(8):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        for average in averages:
            average.step(network.parameters())
    ours, theirs = averages
    assert ours.cur_decay_value == theirs.cur_decay_value
    for one, other in zip(ours.shadow_params, theirs.shadow_params, strict=True):
        torch.testing.assert_close(one, other)


def test_moving_averages_in_a_training_script(tmp_path: Path) -> None:
    network = VQModel(**TINY_MOVQ)
    average = EMAModel(network.parameters(), model_cls=VQModel, model_config=network.config, decay=0.5, foreach=True)
    original = [parameter.detach().clone() for parameter in network.parameters()]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    average.step(network.parameters())
    average.to("cpu")
    average.store(network.parameters())
    average.copy_to(network.parameters())
    assert torch.equal(next(network.parameters()), average.shadow_params[0])
    average.restore(network.parameters())
    torch.testing.assert_close(next(network.parameters()), original[0] + 1)

    average.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, VQModel)
    assert (loaded.decay, loaded.optimization_step) == (0.5, 1)
    for one, other in zip(loaded.shadow_params, average.shadow_params, strict=True):
        assert torch.equal(one, other)
    other = EMAModel(network.parameters())
    other.load_state_dict(average.state_dict())
    assert other.optimization_step == 1


def test_invalid_moving_averages() -> None:
    network = torch.nn.Linear(3, 2)
    average = EMAModel(network.parameters())
    for call, message in [
        (lambda: average.restore(network.parameters()), "restore: there are no stored parameters"),
        (lambda: average.save_pretrained("x"), "save_pretrained: pass model_cls="),
        (lambda: average.step([network.weight]), r"len\(parameters\)=1"),
        (lambda: average.load_state_dict({"decay": 2}), "decay=2"),
        (lambda: average.load_state_dict({"shadow_params": 3}), "shadow_params=3"),
        (lambda: EMAModel(network.parameters(), beta=1), "EMAModel does not accept beta"),
    ]:
        with pytest.raises(InputError, match=f"^{message}"):
            call()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_are_those_of_the_reference(name: str) -> None:
    rates = []
    for get in (get_scheduler, oracle_get_scheduler):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        steps: Any = {"num_warmup_steps": 3, "num_training_steps": 12, "num_cycles": 2, "power": 1.5}
        schedule = get(name, optimizer=optimizer, **steps)
        rates.append([(optimizer.step(), schedule.step(), schedule.get_last_lr()[0])[-1] for _ in range(12)])
    assert rates[0] == pytest.approx(rates[1])


def test_learning_rates_that_cannot_be_made_are_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    with pytest.raises(InputError, match="name='steep' is invalid"):
        get_scheduler("steep", optimizer)
    with pytest.raises(InputError, match="num_training_steps=None is invalid"):
        get_scheduler("cosine", optimizer, num_warmup_steps=0)
    with pytest.raises(InputError, match="step_rules='1:10' is invalid"):
        get_scheduler("constant", optimizer, step_rules="1:10")


def test_every_public_scheduler_has_a_path() -> None:
    names = {name for names in modules._SCHEDULERS.values() for name in names.split()}
    assert names >= {name for name in kandinsky22.__all__ if name.endswith("Scheduler")}


def test_seeds_are_those_of_all_generators() -> None:
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    set_seed(3)
    first = draws()
    oracle_set_seed(3)
    assert draws() == first
    for seed in (-1, 2**32, 1.0, True):
        with pytest.raises(InputError, match=r"^seed="):
            set_seed(seed)  # type: ignore[arg-type]


def test_only_trained_parameters_are_cast() -> None:
    network = torch.nn.Linear(2, 2).half()
    network.bias.requires_grad_(False)
    cast_training_params([network])
    assert (network.weight.dtype, network.bias.dtype) == (torch.float32, torch.float16)
    free_memory()
