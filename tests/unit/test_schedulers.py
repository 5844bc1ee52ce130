"""Schedulers as objects: settings, exchange of files, timesteps, and errors."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from kandinsky22 import schedulers
from kandinsky22.errors import CheckpointError, ConfigError, InputError
from kandinsky22.noise import randn_tensor
from kandinsky22.schedulers import DDIMScheduler, DDPMScheduler, Scheduler, UnCLIPScheduler
from kandinsky22.schedulers.base import SchedulerProtocol

CLASSES = [DDPMScheduler, DDIMScheduler, UnCLIPScheduler]
DECODER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "variance_type": "learned_range",
    "thresholding": False,
    "trained_betas": None,
}


def public(config: Any) -> dict[str, Any]:
    return {name: value for name, value in dict(config).items() if not name.startswith("_")}


# Settings


@pytest.mark.parametrize("cls", CLASSES)
def test_settings_and_defaults_are_those_of_the_reference(cls: type[Scheduler]) -> None:
    assert public(cls().config) == public(getattr(diffusers, cls.__name__)().config)


def test_config_reads_as_attributes_keys_and_dictionary() -> None:
    config = DDPMScheduler(beta_end=0.012).config
    assert config.beta_end == config["beta_end"] == dict(config)["beta_end"] == config.get("beta_end") == 0.012
    assert "nothing" not in config
    assert not hasattr(config, "nothing")
    with pytest.raises(KeyError):
        config["nothing"]


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.__setitem__("beta_end", 0.5),
        lambda config: config.update(beta_end=0.5),
        lambda config: config.pop("beta_end"),
        lambda config: setattr(config, "beta_end", 0.5),
    ],
)
def test_config_cannot_be_changed(change: Any) -> None:
    config = DDPMScheduler().config
    with pytest.raises((TypeError, AttributeError)):
        change(config)
    assert config.beta_end == config["beta_end"] == 0.02


@pytest.mark.parametrize("cls", CLASSES)
def test_schedulers_can_be_copied_and_pickled(cls: type[Scheduler]) -> None:
    scheduler = cls.from_config({"clip_sample": False, "only_elsewhere": 3})
    scheduler.set_timesteps(7)
    for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert twin.config == scheduler.config
        assert dict(twin.config) == dict(scheduler.config)
        assert torch.equal(twin.timesteps, scheduler.timesteps)


@pytest.mark.parametrize("betas", [np.full(10, 0.1), torch.full((10,), 0.1), [0.1] * 10])
def test_betas_may_be_any_array(betas: Any, tmp_path: Path) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=10, trained_betas=betas)
    scheduler.save_pretrained(tmp_path)
    for reader in (DDPMScheduler, diffusers.DDPMScheduler):
        assert torch.equal(reader.from_pretrained(tmp_path).betas, torch.full((10,), 0.1))


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (DDPMScheduler, {"beta_schedule": "quadratic"}, r"DDPMScheduler: beta_schedule='quadratic'.*scaled_linear"),
        (DDPMScheduler, {"prediction_type": "flow"}, "prediction_type='flow'.*v_prediction"),
        (DDPMScheduler, {"variance_type": "large"}, "variance_type='large'.*learned_range"),
        (DDPMScheduler, {"timestep_spacing": "even"}, "timestep_spacing='even'.*trailing"),
        (DDPMScheduler, {"num_train_timesteps": 0}, "num_train_timesteps=0.*above 0"),
        (DDPMScheduler, {"num_train_timesteps": 10.5}, "num_train_timesteps=10.5.*integer"),
        (DDPMScheduler, {"num_train_timesteps": True}, "num_train_timesteps=True.*integer"),
        (DDPMScheduler, {"beta_start": -0.1}, "beta_start=-0.1.*above 0"),
        (DDPMScheduler, {"beta_end": float("nan")}, "beta_end=nan.*above 0"),
        (DDPMScheduler, {"beta_end": "0.1"}, "beta_end='0.1'.*number"),
        (DDPMScheduler, {"steps_offset": -1}, "steps_offset=-1"),
        (DDPMScheduler, {"clip_sample": "yes"}, "clip_sample='yes'.*True or False"),
        (DDPMScheduler, {"clip_sample_range": 0}, "clip_sample_range=0"),
        (DDPMScheduler, {"dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio=1.5"),
        (DDPMScheduler, {"sample_max_value": float("inf")}, "sample_max_value=inf"),
        (DDPMScheduler, {"trained_betas": [0.1, 2.0]}, "trained_betas.*at most 1"),
        (DDPMScheduler, {"trained_betas": [0.1, 0.2]}, r"len\(trained_betas\)=2 .*num_train_timesteps=1000"),
        (DDPMScheduler, {"beta_begin": 0.1}, "beta_begin"),
        (DDIMScheduler, {"set_alpha_to_one": 1}, "DDIMScheduler: set_alpha_to_one=1.*True or False"),
        (DDIMScheduler, {"variance_type": "fixed_small"}, "DDIMScheduler.*variance_type"),
        (UnCLIPScheduler, {"beta_schedule": "linear"}, "UnCLIPScheduler: beta_schedule='linear'.*squaredcos_cap_v2"),
        (UnCLIPScheduler, {"prediction_type": "v_prediction"}, "prediction_type='v_prediction'.*epsilon, sample"),
        (UnCLIPScheduler, {"variance_type": "fixed_small"}, "variance_type='fixed_small'.*fixed_small_log"),
    ],
)
def test_invalid_settings_are_named(cls: type[Scheduler], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls(**settings)


# Across classes, and files


def test_a_config_keeps_settings_of_other_classes() -> None:
    decoder = DDPMScheduler(**DECODER)
    there = DDIMScheduler.from_config(decoder.config)
    assert there.config.variance_type == "learned_range"
    assert there.config.beta_end == 0.012
    back = DDPMScheduler.from_config(there.config)
    assert public(back.config) == public(decoder.config)


def test_defaults_of_one_class_do_not_become_settings_of_another() -> None:
    """As in the reference, a setting that was left at its default gets the new class's default."""
    assert UnCLIPScheduler.from_config({**DDPMScheduler().config, "beta_schedule": "squaredcos_cap_v2"})
    assert "variance_type" not in DDIMScheduler.from_config(DDPMScheduler().config).config
    with pytest.raises(ConfigError, match="variance_type='fixed_large'"):
        UnCLIPScheduler.from_config(DDPMScheduler(variance_type="fixed_large").config)


@pytest.mark.parametrize("source", ["DDPMScheduler", "DDIMScheduler", "UnCLIPScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("target", CLASSES)
def test_configs_travel_between_us_and_the_reference(source: str, target: type[Scheduler]) -> None:
    settings = {"num_train_timesteps": 100, "prediction_type": "sample"}
    theirs = getattr(diffusers, source)(**settings)
    ours = target.from_config(theirs.config)
    # The reference loses the beta schedule of UnCLIPScheduler, because that class has no setting for it.
    curve = {"beta_schedule": "squaredcos_cap_v2"} if source == "UnCLIPScheduler" else {}
    reference = getattr(diffusers, target.__name__).from_config(theirs.config, **curve)
    assert public(ours.config) == public(reference.config)
    again = getattr(diffusers, source).from_config(ours.config)
    curve = {"beta_schedule": "squaredcos_cap_v2"} if target is UnCLIPScheduler else {}
    assert public(again.config) == public(getattr(diffusers, source).from_config(reference.config, **curve).config)


@pytest.mark.parametrize("kind", [UnCLIPScheduler, diffusers.UnCLIPScheduler])
@pytest.mark.parametrize("target", sorted({*schedulers.__all__} - {"Scheduler", "SchedulerOutput"}))
def test_the_noise_a_network_was_trained_with_is_never_lost(kind: Any, target: str) -> None:
    source = kind(prediction_type="sample")
    target_scheduler = getattr(schedulers, target).from_config(source.config)
    assert torch.equal(target_scheduler.betas[:-1], source.betas[:-1])  # rescale_betas_zero_snr changes the last
    assert target_scheduler.config["prediction_type"] == "sample"
    theirs = diffusers.DDIMScheduler.from_config(UnCLIPScheduler().config)
    torch.testing.assert_close(theirs.betas, UnCLIPScheduler().betas)


def test_default_betas_carry_over() -> None:
    """The reference would use the new class's defaults, which differ between classes."""
    heun = schedulers.HeunDiscreteScheduler()
    for source in (heun, diffusers.HeunDiscreteScheduler()):
        assert torch.equal(DDPMScheduler.from_config(source.config).betas, heun.betas)


def test_overrides_win_and_unknown_ones_are_refused() -> None:
    config = DDPMScheduler(**DECODER).config
    assert DDIMScheduler.from_config(config, beta_end=0.015, clip_sample=True).config.beta_end == 0.015
    with pytest.raises(ConfigError, match=r"overrides=\['beta_stop'\] is invalid.*beta_start"):
        DDIMScheduler.from_config(config, beta_stop=0.5)
    with pytest.raises(InputError, match="from_pretrained"):
        DDPMScheduler.from_config("folder")  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("subfolder", [None, "scheduler"])
def test_files_are_those_of_the_reference(cls: type[Scheduler], subfolder: str | None, tmp_path: Path) -> None:
    reference = getattr(diffusers, cls.__name__)
    changed = {"num_train_timesteps": 500, "clip_sample_range": 2.0}
    folder = tmp_path / subfolder if subfolder else tmp_path
    cls(**changed).save_pretrained(folder)
    stored = json.loads((folder / "scheduler_config.json").read_text())
    assert stored["_class_name"] == cls.__name__
    theirs = reference.from_pretrained(tmp_path, subfolder=subfolder)
    assert public(theirs.config) == public(reference(**changed).config)

    reference(**changed).save_pretrained(folder)
    ours = cls.from_pretrained(tmp_path, subfolder=subfolder, clip_sample=False)
    assert public(ours.config) == public(cls(**changed, clip_sample=False).config)
    assert sorted(path.name for path in folder.iterdir()) == ["scheduler_config.json"]


def test_files_keep_settings_of_other_classes(tmp_path: Path) -> None:
    DDIMScheduler.from_config(DDPMScheduler(**DECODER).config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "DDIMScheduler"
    for reader in (DDPMScheduler, diffusers.DDPMScheduler):
        assert reader.from_pretrained(tmp_path).config.variance_type == "learned_range"


@pytest.mark.parametrize("content", [None, "{", "[1]", "\xff"])
def test_missing_and_damaged_files_are_named(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "scheduler_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json"):
        DDPMScheduler.from_pretrained(tmp_path)


def test_a_wrong_value_in_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "scheduler_config.json").write_text('{"beta_schedule": "cubic"}')
    with pytest.raises(ConfigError, match="beta_schedule='cubic'"):
        DDPMScheduler.from_pretrained(tmp_path)


def test_unwritable_folders_are_reported(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(CheckpointError, match="taken"):
        DDPMScheduler().save_pretrained(tmp_path / "taken")


# Timesteps


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("steps", [0, -3, 1001, 2.5, "ten", True, None, torch.tensor([1, 2])])
def test_invalid_step_counts_are_refused(cls: type[Scheduler], steps: Any) -> None:
    scheduler = cls()
    with pytest.raises(InputError, match=r"num_inference_steps.* is invalid: expected"):
        scheduler.set_timesteps(steps)
    assert scheduler.num_inference_steps is None
    assert len(scheduler.timesteps) == 1000


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "timesteps", [[], [1, 2, 3], [5, 5], [500, 3, -1], [1000, 3], [3.5, 1], ["a"], [True], torch.tensor([0.5])]
)
def test_invalid_timesteps_are_refused(cls: type[Scheduler], timesteps: Any) -> None:
    with pytest.raises(InputError, match=r"timesteps.* is invalid: expected"):
        cls().set_timesteps(timesteps=timesteps)


@pytest.mark.parametrize("cls", CLASSES)
def test_steps_and_timesteps_exclude_each_other(cls: type[Scheduler]) -> None:
    with pytest.raises(InputError, match="exactly one"):
        cls().set_timesteps(3, timesteps=[3, 2, 1])


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("timesteps", [(900, 20, 3), torch.tensor([900, 20, 3]), np.array([900, 20, 3])])
def test_custom_timesteps_are_followed(cls: type[Scheduler], timesteps: Any) -> None:
    scheduler = cls()
    scheduler.set_timesteps(timesteps=timesteps)
    assert scheduler.timesteps.tolist() == [900, 20, 3]
    assert scheduler.num_inference_steps == 3
    assert [scheduler.previous_timestep(t) for t in scheduler.timesteps] == [20, 3, -1]
    scheduler.set_timesteps(np.int64(5))  # type: ignore[arg-type]
    assert len(scheduler.timesteps) == 5


def test_an_offset_that_leaves_the_table_is_refused_before_sampling() -> None:
    with pytest.raises(InputError, match=r"timesteps\[0\]=1000 .*num_train_timesteps=1000.*steps_offset"):
        DDPMScheduler(steps_offset=1).set_timesteps(1000)


def test_assigned_timesteps_are_followed() -> None:
    scheduler = DDPMScheduler()
    scheduler.timesteps = torch.tensor([700, 30])
    assert scheduler.previous_timestep(700) == 30
    with pytest.raises(InputError, match=r"timestep=29.*700, 30"):
        scheduler.previous_timestep(29)


# Steps


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("timestep", [-1, 1000, 2.0, None, torch.tensor([1, 2])])
def test_timesteps_of_a_step_are_checked(cls: type[Scheduler], timestep: Any) -> None:
    scheduler = cls()
    scheduler.set_timesteps(10)
    with pytest.raises(InputError, match=r"timestep=.*expected an integer from 0 to 999"):
        scheduler.step(torch.zeros(1, 4), timestep, torch.zeros(1, 4))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 4, 8, 8), (1, 4, 8), (1, 16, 8, 8)])
def test_shapes_of_a_step_are_checked(cls: type[Scheduler], shape: tuple[int, ...]) -> None:
    scheduler = cls()
    scheduler.set_timesteps(10)
    with pytest.raises(InputError, match=r"model_output\.shape="):
        scheduler.step(torch.zeros(shape), scheduler.timesteps[0], torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("cls", [DDPMScheduler, UnCLIPScheduler])
def test_a_missing_learned_variance_is_named(cls: type[Scheduler]) -> None:
    scheduler = cls(variance_type="learned_range")
    scheduler.set_timesteps(10)
    with pytest.raises(
        InputError, match=r"model_output\.shape=\(1, 4\).*twice the channels.*variance_type='learned_range'"
    ):
        scheduler.step(torch.zeros(1, 4), scheduler.timesteps[0], torch.zeros(1, 4))


def test_arguments_of_a_ddim_step_are_checked() -> None:
    scheduler, zeros = DDIMScheduler(), torch.zeros(1, 4)
    with pytest.raises(InputError, match="before set_timesteps"):
        scheduler.step(zeros, 1, zeros)
    scheduler.set_timesteps(10)
    for eta in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match="eta="):
            scheduler.step(zeros, 1, zeros, eta=eta)
    with pytest.raises(InputError, match=r"variance_noise=.*None if a generator"):
        scheduler.step(zeros, 1, zeros, eta=1.0, generator=torch.Generator(), variance_noise=zeros)


@pytest.mark.parametrize("previous", [5, 6, -2, 1.5])
def test_prev_timestep_of_a_unclip_step_is_checked(previous: Any) -> None:
    with pytest.raises(InputError, match=r"prev_timestep=.*from -1 to 4"):
        UnCLIPScheduler().step(torch.zeros(1, 4), 5, torch.zeros(1, 4), prev_timestep=previous)


@pytest.mark.parametrize("cls", CLASSES)
def test_results_are_named_fields_or_a_tuple(cls: type[Scheduler]) -> None:
    scheduler, sample = cls(), torch.randn(2, 4)
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[0]
    out = scheduler.step(sample, t, sample, generator=torch.Generator().manual_seed(0))
    prev, original = scheduler.step(sample, t, sample, generator=torch.Generator().manual_seed(0), return_dict=False)
    assert torch.equal(out.prev_sample, prev)
    assert torch.equal(out["pred_original_sample"], original)
    assert torch.equal(out[0], prev)
    assert scheduler.scale_model_input(sample, t) is sample
    assert (scheduler.order, scheduler.init_noise_sigma, len(scheduler)) == (1, 1.0, 1000)


@pytest.mark.parametrize("name", sorted({*schedulers.__all__} - {"Scheduler", "SchedulerOutput"}))
def test_schedulers_implement_the_protocol(name: str) -> None:
    """A generation uses nothing except what `SchedulerProtocol` lists; the reference's UnCLIPScheduler has no order."""
    assert isinstance(getattr(schedulers, name)(), SchedulerProtocol)
    reference = getattr(diffusers, name)()
    assert isinstance(reference, SchedulerProtocol) == hasattr(reference, "order") == (name != "UnCLIPScheduler")


@pytest.mark.parametrize("timesteps", [torch.tensor([0, 1, 2]), 1000, -1, torch.tensor([0.5]), torch.tensor([1, 1000])])
def test_timesteps_of_noise_are_checked(timesteps: Any) -> None:
    with pytest.raises(InputError, match="timesteps="):
        DDPMScheduler().add_noise(torch.zeros(2, 4), torch.zeros(2, 4), timesteps)


# Noise


def test_each_generator_gives_its_sample_whatever_the_batch() -> None:
    alone = randn_tensor((1, 3, 2), torch.Generator().manual_seed(7))
    both = randn_tensor((2, 3, 2), [torch.Generator().manual_seed(1), torch.Generator().manual_seed(7)])
    assert torch.equal(both[1:], alone)


@pytest.mark.gpu
def test_a_cpu_generator_draws_the_same_noise_for_every_device() -> None:
    draws = [randn_tensor((2, 3), torch.Generator().manual_seed(7), device) for device in ("cpu", "cuda")]
    assert draws[1].device.type == "cuda"
    assert torch.equal(draws[0], draws[1].cpu())


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (
            [torch.Generator(), torch.Generator()],
            r"len\(generator\)=2 is invalid: expected 1 or 3, one generator per batch item",
        ),
        ([], r"len\(generator\)=0 is invalid: expected 1 or 3, one generator per batch item"),
        ([42] * 3, r"generator\[0\]=42 is invalid: expected a torch.Generator, a list of them, or None"),
        (42, "generator=42 is invalid: expected a torch.Generator, a list of them, or None"),
    ],
)
def test_generators_are_checked(generator: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        randn_tensor((3, 2), generator)
