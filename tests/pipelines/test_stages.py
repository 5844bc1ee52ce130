"""Combined pipelines and their two stages: components, settings, memory, copies, and arguments in errors."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from tests.pipelines.fake_accelerator import fake_accelerator
from tests.pipelines.tiny import difference, seeded

from kandinsky22 import (
    DDIMScheduler,
    InputError,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
)
from kandinsky22.models.feature_cache import FeatureCache
from kandinsky22.runtime import device_offload

SMALL: dict[str, Any] = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "height": 32, "width": 32}


def draw(pipe: Any, **options: Any) -> torch.Tensor:
    """Return the latents of a prompt."""
    return pipe("a red cat", **{**SMALL, "output_type": "latent", "generator": seeded(0), **options}).images


def other_prior(combined: KandinskyV22CombinedPipeline) -> KandinskyV22PriorPipeline:
    """Return a prior pipeline with networks of its own, whose prior gives other embeddings."""
    pipe = copy.deepcopy(KandinskyV22PriorPipeline.from_pipe(combined))
    with torch.no_grad():
        for parameter in pipe.prior.parameters():
            parameter.mul_(1.5)
    return pipe


# Components


def test_components_of_stages_are_those_of_the_whole(combined: KandinskyV22CombinedPipeline) -> None:
    """As in the reference, what is assigned to a stage counts in calls; here the whole shows it as well."""
    scheduler = DDIMScheduler.from_config(combined.scheduler.config)
    theirs = diffusers.KandinskyV22CombinedPipeline(**combined.components)
    before = draw(combined)
    for pipe in (combined, theirs):
        pipe.decoder_pipe.scheduler = scheduler
        assert pipe.decoder_pipe.scheduler is scheduler
    assert combined.scheduler is combined.components["scheduler"] is scheduler
    after = draw(combined)
    assert not torch.equal(after, before)
    assert combined.decoder_pipe.scheduler is scheduler
    combined.prior_scheduler = other = copy.deepcopy(combined.prior_scheduler)
    assert combined.prior_pipe.scheduler is other
    combined.scheduler = copy.deepcopy(scheduler)
    assert combined.decoder_pipe.scheduler is combined.scheduler is not scheduler
    assert torch.equal(draw(combined), after)


@pytest.mark.parametrize("name", ["unet", "movq", "prior_prior", "prior_text_encoder", "prior_image_encoder"])
@pytest.mark.parametrize("how", ["assigned None", "deleted"])
@pytest.mark.parametrize("where", ["whole", "stage"])
def test_removed_networks_leave_memory(name: str, how: str, where: str, combined: KandinskyV22CombinedPipeline) -> None:
    draw(combined)
    network = weakref.ref(getattr(combined, name))
    stage = combined.prior_pipe if name.startswith("prior_") else combined.decoder_pipe
    owner, own_name = (combined, name) if where == "whole" else (stage, name.removeprefix("prior_"))
    if how == "deleted":
        delattr(owner, own_name)
    else:
        setattr(owner, own_name, None)
    gc.collect()
    assert network() is None
    assert (name in combined.components) == (how != "deleted")
    with pytest.raises(InputError, match=f"constructed without {name.removeprefix('prior_')}"):
        draw(combined)


def test_a_unet_leaves_the_memory_of_cuda_graphs(decoder: KandinskyV22Pipeline) -> None:
    from kandinsky22.runtime.cuda_graphs import DenoisingGraphs

    decoder._cuda_graphs = graphs = DenoisingGraphs()
    graphs._graphs["recorded"] = decoder.unet  # type: ignore[assignment]  # recording needs a GPU
    network = weakref.ref(decoder.unet)
    del graphs
    decoder.unet = None  # type: ignore[assignment]
    gc.collect()
    assert network() is None
    assert isinstance(decoder._cuda_graphs, DenoisingGraphs)


def test_wrong_components_are_named_as_they_were_assigned(combined: KandinskyV22CombinedPipeline) -> None:
    for owner, name in ((combined, "prior_prior"), (combined.prior_pipe, "prior"), (combined.decoder_pipe, "unet")):
        before = getattr(owner, name)
        with pytest.raises(InputError, match=f"^{type(owner).__name__}: {name} is a"):
            setattr(owner, name, "a network")
        assert getattr(owner, name) is before


def test_components_of_a_subclass_belong_to_no_stage(combined: KandinskyV22CombinedPipeline) -> None:
    class WithMore(KandinskyV22CombinedPipeline):
        def __init__(self, *, prior_note: Any = None, **components: Any) -> None:
            super().__init__(**components)
            self.register_modules(prior_note=prior_note)

    pipe: Any = WithMore(**combined.components, prior_note="a")
    assert pipe.prior_note == pipe.components["prior_note"] == "a"
    assert "note" not in pipe.prior_pipe.components
    copied = copy.copy(pipe)
    copied.prior_note = "b"
    assert pipe.prior_note == "a"
    del pipe.prior_note
    assert "prior_note" not in pipe.components


def test_components_cannot_change_during_calls_in_other_threads(combined: KandinskyV22CombinedPipeline) -> None:
    started, end = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        started.set()
        end.wait(60)

    stage_call = {"image_embeds": torch.zeros(1, 32), "negative_image_embeds": torch.zeros(1, 32)}
    calls: list[Callable[[], Any]] = [
        lambda: draw(combined, callback_on_step_end=wait),
        lambda: combined.decoder_pipe(
            **stage_call, num_inference_steps=1, height=32, width=32, callback_on_step_end=wait
        ),
    ]
    for call in calls:
        started.clear()
        end.clear()
        thread = threading.Thread(target=call)
        thread.start()
        try:
            assert started.wait(60)
            for owner in (combined, combined.decoder_pipe):
                with pytest.raises(InputError, match="unet cannot be changed now"):
                    owner.unet = copy.deepcopy(combined.unet)
        finally:
            end.set()
            thread.join()
    combined.unet = copy.deepcopy(combined.unet)


# Stages


def test_an_assigned_prior_is_used_and_left_as_it_is(combined: KandinskyV22CombinedPipeline) -> None:
    pipe = other_prior(combined)
    components, before = pipe.components, draw(combined)
    combined.prior_pipe = pipe
    after = draw(combined)
    assert not torch.equal(after, before)
    assert combined.prior_pipe is pipe
    assert all(pipe.components[name] is part for name, part in components.items())
    assert all(combined.components[f"prior_{name}"] is part for name, part in components.items())
    whole = KandinskyV22CombinedPipeline(**combined.components)
    assert torch.equal(draw(whole), after)
    pipe.scheduler = scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert combined.prior_scheduler is scheduler
    assert not torch.equal(draw(combined), after)


def test_an_assigned_decoder_is_used_and_left_as_it_is(combined: KandinskyV22CombinedPipeline) -> None:
    pipe = copy.deepcopy(KandinskyV22Pipeline.from_pipe(combined))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.enable_feature_caching(every=2)
    components, before = pipe.components, draw(combined)
    combined.decoder_pipe = pipe
    assert combined._feature_caching is pipe._feature_caching is not None
    assert combined.decoder_pipe is pipe
    assert all(pipe.components[name] is combined.components[name] is part for name, part in components.items())
    assert not torch.equal(draw(combined), before)


def test_networks_of_an_assigned_stage_are_offloaded_like_the_others(combined: KandinskyV22CombinedPipeline) -> None:
    pipe = other_prior(combined)
    with fake_accelerator() as device:
        combined.enable_model_cpu_offload(device=device)
        combined.prior_pipe = pipe
        offload = device_offload.offload_of(pipe.prior)
        assert offload is not None and offload.device == device
        assert device_offload.offload_of(pipe.text_encoder) is not None
        combined.remove_all_hooks()
    assert device_offload.offload_of(pipe.prior) is None


def test_stages_cannot_be_replaced_during_calls_in_other_threads(combined: KandinskyV22CombinedPipeline) -> None:
    errors: list[str] = []

    def replace(*_: Any) -> None:
        def run() -> None:
            for name in ("prior_pipe", "decoder_pipe"):
                with pytest.raises(InputError) as caught:
                    setattr(combined, name, copy.copy(getattr(combined, name)))
                errors.append(str(caught.value))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    draw(combined, callback_on_step_end=replace, num_inference_steps=1)
    assert [error.split(" cannot ")[0] for error in errors] == ["prior_pipe", "decoder_pipe"]


# Settings


def test_settings_of_the_decoder_are_those_of_the_whole(
    combined: KandinskyV22CombinedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    original = FeatureCache.__init__

    def init(self: FeatureCache, every: int, levels: int) -> None:
        made.append(every)
        original(self, every, levels)

    monkeypatch.setattr(FeatureCache, "__init__", init)
    combined.enable_feature_caching(every=3)
    draw(combined)
    combined.decoder_pipe.enable_feature_caching(every=2)
    draw(combined)
    assert made == [3, 2]
    assert combined._feature_caching is combined.decoder_pipe._feature_caching
    assert KandinskyV22Pipeline.from_pipe(combined)._feature_caching is combined._feature_caching
    combined.disable_feature_caching()
    draw(combined)
    assert made == [3, 2]


def test_progress_bars_can_be_set_together_and_apart(combined: KandinskyV22CombinedPipeline) -> None:
    """As in the reference."""
    theirs = diffusers.KandinskyV22CombinedPipeline(**combined.components)
    for pipe in (combined, theirs):
        pipe.set_progress_bar_config(desc="both")
        pipe.prior_pipe.set_progress_bar_config(desc="prior")
        configs = [stage._progress_bar_config for stage in (pipe.prior_pipe, pipe.decoder_pipe)]
        assert configs == [{"desc": "prior"}, {"desc": "both"}]


def test_defaults_reach_the_stages_when_they_are_set(combined: KandinskyV22CombinedPipeline) -> None:
    stages = combined.prior_pipe, combined.decoder_pipe
    for steps in (3, 4):
        combined.generation_defaults = {
            "num_inference_steps": steps,
            "prior_num_inference_steps": 2 * steps,
            "prompt_weights": True,
        }
        assert [stage.generation_defaults for stage in stages] == [
            {"num_inference_steps": 2 * steps},
            {"num_inference_steps": steps},
        ]
    combined.prior_pipe.generation_defaults = {"guidance_scale": 2.0}
    assert combined.prior_pipe.generation_defaults == {"guidance_scale": 2.0}
    other = KandinskyV22PriorPipeline.from_pipe(combined)
    other.generation_defaults = {"num_inference_steps": 7, "output_type": "np"}
    combined.prior_pipe = other
    assert combined.generation_defaults == {
        "num_inference_steps": 4,
        "prior_num_inference_steps": 7,
        "prompt_weights": True,
    }


# Copies


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_have_stages_of_their_own(copied: Any, combined: KandinskyV22CombinedPipeline) -> None:
    combined._hub_options = {"token": "secret", "revision": "main"}
    expected = draw(combined)
    twin = copied(combined)
    assert difference(draw(twin), expected) < 1e-4  # rounding depends on the memory alignment of copied weights
    assert twin.decoder_pipe.unet is twin.unet
    assert twin.prior_pipe.prior is twin.prior_prior
    scheduler = combined.scheduler
    twin.scheduler = DDIMScheduler.from_config(scheduler.config)
    twin.decoder_pipe.enable_feature_caching()
    assert combined.scheduler is combined.decoder_pipe.scheduler is scheduler
    assert combined._feature_caching is None
    assert torch.equal(draw(combined), expected)
    assert b"secret" not in pickle.dumps(combined)


def test_a_stage_outlives_the_whole(combined: KandinskyV22CombinedPipeline) -> None:
    components = combined.decoder_pipe.components
    pipe: Any = KandinskyV22CombinedPipeline(**combined.components)
    stage, whole = pipe.decoder_pipe, weakref.ref(pipe)
    del pipe
    assert whole() is None, "no cycle keeps the other networks in memory"
    assert stage.components == components


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_num_inference_steps": 0}, r"^prior_num_inference_steps=0 is invalid"),
        ({"prior_guidance_scale": "4"}, r"^prior_guidance_scale='4' is invalid"),
        ({"prior_callback_on_step_end": 3}, r"^prior_callback_on_step_end=3 is invalid"),
        ({"prior_callback_on_step_end": lambda *_: 5}, r"^prior_callback_on_step_end\(...\)=5 is invalid"),
        ({"prior_callback_on_step_end": lambda *_: {"a": 5}}, r"^a key of prior_callback_on_step_end\(...\)='a' is"),
        ({"prior_timesteps": [3], "prior_sigmas": [3.0, 0.0]}, "^prior_timesteps and prior_sigmas are both passed"),
        ({"prior_sigmas": [3.0, 0.0]}, r"^prior_sigmas=.*expected None, since UnCLIPScheduler.set_timesteps does not"),
        ({"prior_num_inference_steps": 1001}, r"^prior_num_inference_steps=1001 is invalid: expected an integer from"),
        ({"prior_timesteps": [5000]}, r"^prior_timesteps"),
        ({"timesteps": [3], "sigmas": [3.0, 0.0]}, "^timesteps and sigmas are both passed"),
        ({"num_images_per_prompt": 0}, r"^num_images_per_prompt=0 is invalid"),
        ({"generator": 3}, r"^generator=3 is invalid"),
        ({"prompt": 5}, r"^prompt=5 is invalid"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),  # no addresses: workers compare them
)
def test_errors_name_the_argument_of_the_combined_call(
    combined: KandinskyV22CombinedPipeline, options: dict[str, Any], message: str
) -> None:
    call: dict[str, Any] = {"prompt": "a red cat", "num_inference_steps": 2, "prior_num_inference_steps": 2}
    with pytest.raises(InputError, match=message):
        combined(**{**call, **options})
