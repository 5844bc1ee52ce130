"""Adapters of pipelines: applied, combined, fused and removed, with every way in which networks run."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.pipelines.adapted import all_pairs, merge_by_hand, networks_of, run, same, state, tensors_for
from tests.pipelines.calls import CLASSES, COMBINED, PRIORS, two_step_call
from tests.pipelines.fake_accelerator import fake_accelerator
from tests.pipelines.tiny import difference, load_quietly, seeded
from tests.unit.adapter_layers import peft_layout
from torch import Tensor, nn

from kandinsky22 import KandinskyV22CombinedPipeline, KandinskyV22Pipeline, KandinskyV22PriorPipeline
from kandinsky22.errors import CheckpointError, InputError, NotFiniteError


@pytest.mark.parametrize("name", CLASSES)
def test_an_adapter_acts_in_every_class_and_leaves_no_trace(name: str, make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline(name)
    plain, weights, parameters = run(pipe, name), state(pipe), next(iter(networks_of(pipe).values())).parameters()
    identities = [id(parameter) for parameter in parameters]
    pipe.load_lora_weights(tensors_for(pipe), adapter_name="style")
    expected = run(merge_by_hand(make_pipeline(name), (0, 1.0)), name)
    assert pipe.get_active_adapters() == ["style"]
    roles = {"prior", "unet"} if name in COMBINED else {"prior"} if name in PRIORS else {"unet"}
    assert {name.removeprefix("prior_") for name in pipe.get_list_adapters()} == roles
    changed = run(pipe, name)
    assert difference(changed, plain) > 1e-3
    assert difference(changed, expected) < 1e-4
    pipe.set_adapters("style", 0.0)
    assert torch.equal(run(pipe, name), plain), "weight 0 gives the very bits of the network without adapter"
    pipe.set_adapters("style", 1.0)
    pipe.disable_lora()
    assert torch.equal(run(pipe, name), plain)
    pipe.enable_lora()
    assert torch.equal(run(pipe, name), changed)
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe, name), plain)
    assert same(state(pipe), weights)
    assert identities == [id(parameter) for parameter in next(iter(networks_of(pipe).values())).parameters()]
    assert pipe.get_list_adapters() == {} and pipe.get_active_adapters() == []


def test_several_adapters_with_weights_add_up(decoder: KandinskyV22Pipeline) -> None:
    expected = run(merge_by_hand(decoder, (1, 0.5), (2, -0.25)))
    decoder.load_lora_weights(tensors_for(decoder, 1))
    decoder.load_lora_weights(tensors_for(decoder, 2))
    assert decoder.get_active_adapters() == ["default_1"]
    assert decoder.get_list_adapters() == {"unet": ["default_0", "default_1"]}
    decoder.set_adapters(["default_1", "default_0"], [-0.25, 0.5])
    both = run(decoder)
    assert difference(both, expected) < 1e-4
    decoder.set_adapters(["default_0", "default_1"], [{"unet": 0.5}, -0.25])
    assert torch.equal(run(decoder), both), "the order of names does not matter"
    decoder.delete_adapters("default_1")
    assert decoder.get_list_adapters() == {"unet": ["default_0"]} and decoder.get_active_adapters() == ["default_0"]
    assert difference(run(decoder), run(merge_by_hand_by_base(decoder, (1, 0.5)))) < 1e-4


def merge_by_hand_by_base(pipe: Any, *weighted: tuple[int, float]) -> Any:
    """Merge into a copy without adapters."""
    bare = copy.copy(pipe)
    bare.unet = copy.deepcopy(pipe.unet)
    bare.unload_lora_weights()
    return merge_by_hand(bare, *weighted)


def test_weights_by_network(combined: KandinskyV22CombinedPipeline) -> None:
    plain = run(combined, "Combined")
    combined.load_lora_weights(tensors_for(combined), adapter_name="both")
    combined.set_adapters("both", {"prior": 0.0, "unet": 0.0})
    assert torch.equal(run(combined, "Combined"), plain)
    combined.set_adapters("both", {"prior_prior": 0.0})
    assert not torch.equal(run(combined, "Combined"), plain)
    prior, unet = combined.prior_prior, combined.unet
    assert same(dict(prior.named_parameters()), prior.state_dict())
    assert not same(dict(unet.named_parameters()), unet.state_dict())


def test_files_with_one_stage_leave_the_other_alone(combined: KandinskyV22CombinedPipeline, tmp_path: Path) -> None:
    for role, pairs in all_pairs(combined).items():
        save_file(peft_layout(pairs), tmp_path / f"{role}.safetensors")
        combined.load_lora_weights(tmp_path / f"{role}.safetensors", adapter_name=role)
    assert combined.get_list_adapters() == {"unet": ["unet"], "prior_prior": ["prior"]}
    assert sorted(combined.get_active_adapters()) == ["prior", "unet"]


@pytest.mark.parametrize("part", ["", "attentions", "mid_block"])
def test_whole_weights_of_a_fine_tuned_network(decoder: KandinskyV22Pipeline, part: str, tmp_path: Path) -> None:
    plain, before = run(decoder), state(decoder)
    tuned = copy.deepcopy(decoder.unet)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if part in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    tensors = {f"unet.{name}": tensor for name, tensor in tuned.state_dict().items() if part in name}
    save_file(tensors, tmp_path / "tuned.safetensors")
    expected = run(KandinskyV22Pipeline.from_pipe(decoder, unet=tuned))
    decoder.load_lora_weights(tmp_path / "tuned.safetensors", adapter_name="tuned")
    assert same(state(decoder), before | {f"unet.{name}": tensor for name, tensor in tuned.named_parameters()})
    assert difference(run(decoder), expected) < 1e-5  # rounding depends on the memory alignment of weights
    decoder.set_adapters("tuned", 0.5)
    for name, tensor in state(decoder).items():
        torch.testing.assert_close(tensor, (before[name] + tensors.get(name, before[name])) / 2)
    decoder.save_lora_weights(tmp_path / "again", adapter_name="tuned")
    decoder.unload_lora_weights()
    assert same(state(decoder), before) and torch.equal(run(decoder), plain)
    decoder.load_lora_weights(tmp_path / "again")
    assert same(state(decoder), before | {f"unet.{name}": tensor for name, tensor in tuned.named_parameters()})


# Fusing and saving


def test_fused_weights_are_saved_and_unfusing_restores_the_bits(decoder: KandinskyV22Pipeline, tmp_path: Path) -> None:
    plain, before = run(decoder), state(decoder)
    decoder.load_lora_weights(tensors_for(decoder), adapter_name="style")
    active = run(decoder)
    decoder.save_pretrained(tmp_path / "active")
    assert torch.equal(run(load_quietly(KandinskyV22Pipeline, tmp_path / "active")), plain)
    decoder.fuse_lora()
    assert decoder.fused_loras == {"style"} and decoder.num_fused_loras == 1
    assert torch.equal(run(decoder), active)
    decoder.save_pretrained(tmp_path / "fused")
    assert difference(run(load_quietly(KandinskyV22Pipeline, tmp_path / "fused")), active) < 1e-5
    decoder.disable_lora()
    assert torch.equal(run(decoder), active), "fused adapters are part of the weights"
    decoder.enable_lora()
    for refused in (lambda: decoder.delete_adapters("style"), lambda: decoder.set_adapters("style")):
        with pytest.raises(InputError, match="unfuse_lora"):
            refused()
    decoder.unfuse_lora()
    assert torch.equal(run(decoder), active)
    decoder.unload_lora_weights()
    assert torch.equal(run(decoder), plain) and same(state(decoder), before)


def test_fused_weights_stay_after_unloading(decoder: KandinskyV22Pipeline) -> None:
    expected = run(merge_by_hand(decoder, (0, 0.5)))
    decoder.load_lora_weights(tensors_for(decoder), adapter_name="style")
    decoder.fuse_lora(lora_scale=0.5)
    decoder.unload_lora_weights()
    assert decoder.get_list_adapters() == {} and decoder.num_fused_loras == 0
    assert difference(run(decoder), expected) < 1e-4
    decoder.unfuse_lora()
    assert difference(run(decoder), expected) < 1e-4


def test_an_adapter_applied_on_top_of_a_fused_one(decoder: KandinskyV22Pipeline) -> None:
    expected = run(merge_by_hand(decoder, (1, 0.5), (2, 1.0)))
    decoder.load_lora_weights(tensors_for(decoder, 1), adapter_name="first")
    decoder.fuse_lora(adapter_names=["first"], lora_scale=0.5)
    decoder.load_lora_weights(tensors_for(decoder, 2), adapter_name="second")
    assert difference(run(decoder), expected) < 1e-4
    assert not same(decoder.unet.state_dict(), dict(decoder.unet.named_parameters()))
    decoder.unfuse_lora()
    decoder.set_adapters(["first", "second"], [0.5, 1.0])
    assert difference(run(decoder), expected) < 1e-4


def test_safe_fusing_refuses_weights_that_are_not_finite(decoder: KandinskyV22Pipeline) -> None:
    tensors = tensors_for(decoder)
    next(iter(tensors.values()))[0, 0] = float("inf")
    decoder.load_lora_weights(tensors, adapter_name="broken")
    decoder.disable_lora()
    plain = run(decoder)
    with pytest.raises(NotFiniteError, match="not finite"):
        decoder.fuse_lora(safe_fusing=True)
    assert decoder.num_fused_loras == 0 and torch.equal(run(decoder), plain)


def test_a_saved_adapter_is_loaded_again(combined: KandinskyV22CombinedPipeline, tmp_path: Path) -> None:
    combined.load_lora_weights(tensors_for(combined), adapter_name="style")
    changed = run(combined, "Combined")
    combined.save_lora_weights(tmp_path / "loaded")
    pairs = all_pairs(combined)
    combined.save_lora_weights(tmp_path / "passed", peft_layout(pairs["unet"]), peft_layout(pairs["prior"]))
    for folder in ("loaded", "passed"):
        combined.unload_lora_weights()
        combined.load_lora_weights(tmp_path / folder)
        assert torch.equal(run(combined, "Combined"), changed)
    combined.unload_lora_weights()
    settings = {"r": 4, "lora_alpha": 2}
    combined.save_lora_weights(tmp_path, peft_layout(pairs["unet"]), unet_lora_adapter_metadata=settings)
    combined.load_lora_weights(tmp_path, adapter_name="half")
    combined.set_adapters("half", 2.0)
    weights = dict(combined.unet.named_parameters())
    combined.unload_lora_weights()
    combined.load_lora_weights(peft_layout(pairs["unet"]))
    again = dict(combined.unet.named_parameters())
    assert all(torch.allclose(weights[name], again[name], atol=1e-6) for name in weights)


def test_the_state_dict_is_that_without_adapters(decoder: KandinskyV22Pipeline) -> None:
    unet = decoder.unet
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    decoder.load_lora_weights(tensors_for(decoder))
    changed = run(decoder)
    assert same(unet.state_dict(), before)
    holder = nn.Module()
    holder.inner = unet
    name = "mid_block.attentions.0.to_q.weight"
    assert torch.equal(holder.state_dict()[f"inner.{name}"], before[name])
    unet.load_state_dict(unet.state_dict())
    assert torch.equal(run(decoder), changed), "loading weights keeps adapters applied"
    other = {name: tensor * 1.01 for name, tensor in before.items()}
    unet.load_state_dict(other)
    decoder.unload_lora_weights()
    assert same(state(decoder), {f"unet.{name}": tensor for name, tensor in other.items()})


# How networks run


MODES = ("enable_sequential_cpu_offload", "enable_low_memory")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded_networks(decoder: KandinskyV22Pipeline, mode: str, when: str) -> None:
    plain, weights = run(decoder), state(decoder)
    tensors = tensors_for(decoder)
    expected = run(merge_by_hand(decoder, (0, 1.0)))
    if when == "before":
        decoder.load_lora_weights(tensors, adapter_name="style")
    getattr(decoder, mode)(**({} if mode == "enable_low_memory" else {"device": "cpu"}))
    if when == "after":
        decoder.load_lora_weights(tensors, adapter_name="style")
    assert all(parameter.is_meta for parameter in decoder.unet.parameters())
    assert difference(run(decoder), expected) < 1e-4
    stored = decoder.unet.state_dict()
    decoder.set_adapters("style", 0.0)
    assert all(parameter.is_meta for parameter in decoder.unet.parameters())
    assert difference(run(decoder), plain) < 1e-5
    assert same(decoder.unet.state_dict(), stored)
    decoder.remove_all_hooks()
    assert same(state(decoder), weights)
    assert difference(run(decoder), plain) < 1e-5  # rounding depends on the memory alignment of weights


def test_model_offload_moves_merged_weights(decoder: KandinskyV22Pipeline) -> None:
    plain = run(decoder)
    tensors = tensors_for(decoder)
    expected = run(merge_by_hand(decoder, (0, 1.0)))
    with fake_accelerator() as device:
        decoder.load_lora_weights(tensors, adapter_name="style")
        decoder.enable_model_cpu_offload(device=device)
        assert difference(run(decoder), expected) < 1e-4
        decoder.set_adapters("style", 0.0)
        assert difference(run(decoder), plain) < 1e-4
        decoder.remove_all_hooks()
    assert difference(run(decoder), plain) < 1e-5


@pytest.mark.gpu
def test_networks_on_an_accelerator(make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline("Combined").to("cuda")
    plain, weights, tensors = run(pipe, "Combined"), state(pipe), tensors_for(pipe)
    expected = run(merge_by_hand(make_pipeline("Combined"), (0, 1.0)).to("cuda"), "Combined")
    pipe.load_lora_weights(tensors, adapter_name="style")
    assert difference(run(pipe, "Combined"), expected) < 1e-4
    pipe.enable_cuda_graphs()
    for weight, result in ((0.0, plain), (1.0, expected)):
        pipe.set_adapters("style", weight)
        assert difference(run(pipe, "Combined"), result) < 1e-4
    pipe.disable_cuda_graphs()
    for mode in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        getattr(pipe, mode)()
        for weight, result in ((0.0, plain), (1.0, expected)):
            pipe.set_adapters("style", weight)
            assert difference(run(pipe, "Combined"), result) < 1e-4
    pipe.remove_all_hooks()
    pipe.unload_lora_weights()
    pipe.to("cuda")
    assert same(state(pipe), weights)


@pytest.mark.slow
def test_compiled_networks_follow_their_adapters(decoder: KandinskyV22Pipeline) -> None:
    torch._dynamo.reset()
    plain, tensors = run(decoder), tensors_for(decoder)
    expected = run(merge_by_hand(decoder, (0, 1.0)))
    decoder.compile(backend="eager")
    assert difference(run(decoder), plain) < 1e-4
    decoder.load_lora_weights(tensors, adapter_name="style")
    assert difference(run(decoder), expected) < 1e-4
    decoder.set_adapters("style", 0.0)
    assert difference(run(decoder), plain) < 1e-4


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "int4"])
def test_quantized_networks_add_the_product(decoder: KandinskyV22Pipeline, kind: str) -> None:
    pytest.importorskip("torchao")
    tensors = tensors_for(decoder)
    exact = run(merge_by_hand(decoder, (0, 1.0))).float()
    if kind == "int4":
        decoder.to(torch.bfloat16)
    decoder.quantize(kind)
    plain, weights = run(decoder), decoder.unet.state_dict()
    decoder.load_lora_weights(tensors, adapter_name="style")
    assert difference(run(decoder).float(), exact) < 0.5 * difference(plain.float(), exact)
    assert same(decoder.unet.state_dict(), weights)
    with pytest.raises(InputError, match="is quantized"):
        decoder.fuse_lora()
    changed = run(decoder)
    decoder.set_adapters("style", 0.0)
    assert torch.equal(run(decoder), plain)
    decoder.enable_low_memory()
    decoder.set_adapters("style", 1.0)
    assert difference(run(decoder).float(), changed.float()) < 0.05
    decoder.remove_all_hooks()
    with pytest.raises(InputError, match=r"quantized \(int.*replaces its weight"):
        decoder.load_lora_weights({"mid_block.attentions.0.to_q.weight": torch.zeros(64, 64)})


def test_a_quantized_convolution_adds_the_product() -> None:
    pytest.importorskip("torchao")
    from kandinsky22.runtime.quantized_layers import QuantizedConv2d

    layer = QuantizedConv2d(nn.Conv2d(16, 16, 3, padding=1), dynamic=False)
    features, down, up = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 3, 3), torch.randn(16, 2)
    plain = layer(features, upsample=True)
    layer.set_low_rank((down, up))
    kernel = (up @ down.flatten(1)).view(16, 16, 3, 3)
    upsampled = nn.functional.interpolate(features, scale_factor=2.0)
    expected = plain + nn.functional.conv2d(upsampled, kernel, padding=1)
    torch.testing.assert_close(layer(features, upsample=True), expected, rtol=1e-4, atol=1e-4)
    layer.set_low_rank(None)
    assert torch.equal(layer(features, upsample=True), plain)


def test_quantizing_merged_networks(decoder: KandinskyV22Pipeline) -> None:
    pytest.importorskip("torchao")
    exact = run(merge_by_hand(decoder, (0, 1.0)))
    decoder.load_lora_weights(tensors_for(decoder), adapter_name="style")
    with pytest.raises(InputError, match=r"has adapters \(style\): quantize it before"):
        decoder.quantize("int8")
    decoder.fuse_lora()
    decoder.unload_lora_weights()
    decoder.quantize("int8")
    assert difference(run(decoder), exact) < 0.1


def test_adapters_in_bfloat16_and_after_conversion(decoder: KandinskyV22Pipeline) -> None:
    plain = state(decoder)
    decoder.load_lora_weights(tensors_for(decoder), adapter_name="style")
    merged = state(decoder)
    decoder.to(torch.bfloat16)
    assert same(state(decoder), {name: tensor.bfloat16() for name, tensor in merged.items()})
    decoder.to(torch.float32)
    decoder.unload_lora_weights()
    # the base weights were rounded like those of a network without adapters
    assert same(state(decoder), {name: tensor.bfloat16().float() for name, tensor in plain.items()})


def test_pipelines_that_share_a_network_share_its_adapters(
    combined: KandinskyV22CombinedPipeline,
) -> None:
    combined.load_lora_weights(tensors_for(combined), adapter_name="style")
    decoder, prior = KandinskyV22Pipeline.from_pipe(combined), KandinskyV22PriorPipeline.from_pipe(combined)
    assert decoder.get_active_adapters() == prior.get_active_adapters() == ["style"]
    decoder.set_adapters([])
    assert combined.decoder_pipe.get_active_adapters() == []
    assert combined.get_active_adapters() == ["style"], "it is still active in the prior"


def test_copies_and_pickles_have_adapters_of_their_own(decoder: KandinskyV22Pipeline) -> None:
    plain = run(decoder)
    decoder.load_lora_weights(tensors_for(decoder), adapter_name="style")
    changed = run(decoder)
    for unet in (copy.deepcopy(decoder.unet), pickle.loads(pickle.dumps(decoder.unet))):
        other = KandinskyV22Pipeline.from_pipe(decoder, unet=unet)
        assert difference(run(other), changed) < 1e-5
        other.unload_lora_weights()
        assert difference(run(other), plain) < 1e-5
        assert torch.equal(run(decoder), changed)


def test_a_callback_may_change_adapters(decoder: KandinskyV22Pipeline) -> None:
    decoder.load_lora_weights(tensors_for(decoder), adapter_name="style")
    call = {**two_step_call(""), "num_inference_steps": 3}

    def switch(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        pipe.set_adapters("style", 0.0 if step == 0 else 1.0)
        return {}

    fast = decoder(**call, generator=seeded(1), callback_on_step_end=switch).images
    decoder.unet.register_forward_hook(lambda *_: None)  # now each step calls the network as a module
    decoder.set_adapters("style")
    slow = decoder(**call, generator=seeded(1), callback_on_step_end=switch).images
    assert difference(fast, slow) < 1e-5


def test_adapters_do_not_change_during_calls_of_other_threads(decoder: KandinskyV22Pipeline) -> None:
    tensors, started, ended = tensors_for(decoder), threading.Event(), threading.Event()

    def wait(*_: Any) -> dict[str, Any]:
        started.set()
        ended.wait(30)
        return {}

    thread = threading.Thread(target=lambda: decoder(**two_step_call(""), callback_on_step_end=wait))
    thread.start()
    assert started.wait(30)
    try:
        with pytest.raises(InputError, match=r"load_lora_weights\(\) cannot run now"):
            decoder.load_lora_weights(tensors)
    finally:
        ended.set()
        thread.join()
    decoder.load_lora_weights(tensors)


# Mistakes


def test_nothing_has_changed_after_an_error(combined: KandinskyV22CombinedPipeline) -> None:
    combined.load_lora_weights(tensors_for(combined, 1), adapter_name="good")
    before, tensors = state(combined), tensors_for(combined, 2)
    with pytest.raises(CheckpointError, match=r"the dict does not fit .* 1 that fit nothing: unet\.nothing"):
        combined.load_lora_weights({**tensors, "unet.nothing.lora_A.weight": torch.zeros(1, 1)}, adapter_name="bad")
    assert combined.get_list_adapters() == {"unet": ["good"], "prior_prior": ["good"]}
    assert same(state(combined), before)


def test_a_failure_while_merging_undoes_all_networks(
    combined: KandinskyV22CombinedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kandinsky22.adapters import merging

    combined.load_lora_weights(tensors_for(combined, 1), adapter_name="good")
    before, merged, calls = state(combined), merging.merged, []

    def out_of_memory(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 30:  # the UNet is done, the prior is half done
            raise MemoryError("too little")
        return merged(*args)

    monkeypatch.setattr(merging, "merged", out_of_memory)
    with pytest.raises(MemoryError):
        combined.load_lora_weights(tensors_for(combined, 2), adapter_name="large")
    assert combined.get_list_adapters() == {"unet": ["good"], "prior_prior": ["good"]}
    assert same(state(combined), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.set_adapters("other"), r"adapter_names='other' is invalid: .* loaded adapters: style"),
        (lambda p: p.set_adapters(["style", "style"]), "different names"),
        (lambda p: p.set_adapters("style", [1, 2]), r"len\(adapter_weights\)=2"),
        (lambda p: p.set_adapters("style", "much"), "adapter_weights='much'"),
        (lambda p: p.set_adapters("style", float("nan")), "a finite number"),
        (lambda p: p.set_adapters("style", True), "a finite number"),
        (lambda p: p.set_adapters("style", 10**400), "a finite number"),
        (lambda p: p.set_adapters("style", {"vae": 1}), "numbers by component: unet"),
        (lambda p: p.set_adapters(5), "adapter_names=5"),
        (lambda p: p.delete_adapters("other"), "adapter_names='other'"),
        (lambda p: p.fuse_lora(components=["movq"]), "networks that take adapters"),
        (lambda p: p.fuse_lora(lora_scale="x"), "lora_scale='x'"),
        (lambda p: p.fuse_lora(adapter_names=["other"]), "adapter_names"),
        (lambda p: p.load_lora_weights({}, adapter_name="style"), "it is in use"),
        (lambda p: p.load_lora_weights({}, adapter_name=""), "adapter_name=''"),
        (lambda p: p.load_lora_weights({}, hotswap=True), "the name of the adapter that hotswap replaces"),
        (lambda p: p.load_lora_weights({}, "none", hotswap=True), "a loaded adapter: style"),
        (lambda p: p.load_lora_weights({}, prefix=5), "prefix=5"),
        (lambda p: p.load_lora_weights({}, colour=5), "no argument colour"),
        (lambda p: p.load_lora_weights({}), "has no tensors"),
        (lambda p: p.load_lora_weights("nowhere.safetensors"), "no adapter 'nowhere.safetensors'"),
        (lambda p: p.save_lora_weights("x", adapter_name="other"), "adapter_names='other'"),
        (lambda p: p.save_lora_weights("x", prior_lora_layers={}), "this pipeline has no prior"),
        (lambda p: p.save_lora_weights("x", {}, adapter_name="style"), "adapter_name='style'"),
        (lambda p: p.save_lora_weights("x", weight_name="a/b.safetensors"), "weight_name='a/b.safetensors'"),
    ],
)
def test_mistakes_are_named(decoder: KandinskyV22Pipeline, call: Callable[[Any], Any], message: str) -> None:
    decoder.load_lora_weights(tensors_for(decoder), adapter_name="style")
    before = state(decoder)
    with pytest.raises((InputError, CheckpointError), match=message):
        call(decoder)
    assert decoder.get_active_adapters() == ["style"] and same(state(decoder), before)


def test_an_adapter_for_another_network(
    decoder: KandinskyV22Pipeline, prior: KandinskyV22PriorPipeline, tmp_path: Path
) -> None:
    save_file(tensors_for(prior), tmp_path / "prior.safetensors")
    with pytest.raises(CheckpointError, match=r"prior\.safetensors does not fit UNet2DConditionModel: .* of the prior"):
        decoder.load_lora_weights(tmp_path / "prior.safetensors")
    bare = {name.removeprefix("prior."): tensor for name, tensor in tensors_for(prior).items()}
    with pytest.raises(CheckpointError, match=r"\d+ that fit nothing: transformer_blocks\.0\."):
        decoder.load_lora_weights(bare)
