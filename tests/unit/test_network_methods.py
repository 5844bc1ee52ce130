"""Methods that scripts for the reference call on networks: configs, gradient checkpointing, processors, arguments."""

from __future__ import annotations

import inspect
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import attention_processor
from diffusers.training_utils import EMAModel
from tests.unit.tiny_models import TINY_MOVQ
from torch import Tensor, nn

from kandinsky22 import PriorTransformer, UNet2DConditionModel, VQModel
from kandinsky22.errors import ConfigError, InputError, KandinskyError
from kandinsky22.models import base
from kandinsky22.models.config_rules import MAX_LAYERS

UNET: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "encoder_hid_dim": 16,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
}
PRIOR: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "embedding_dim": 16, "num_layers": 3}
NETWORKS: dict[str, tuple[type[base.Model], dict[str, Any]]] = {
    "prior": (PriorTransformer, PRIOR),
    "unet": (UNet2DConditionModel, UNET),
    "movq": (VQModel, TINY_MOVQ),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Any:
    kind, config = NETWORKS[request.param]
    torch.manual_seed(0)
    network = kind(**config)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


def run(network: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    if isinstance(network, PriorTransformer):
        rows, mask = random(2, 16), torch.arange(77)[None] < torch.tensor([[5], [9]])
        return network(rows, 5, random(2, 16), random(2, 77, 16), mask).predicted_image_embedding
    if isinstance(network, UNet2DConditionModel):
        return network(random(2, 4, 8, 8), 5, added_cond_kwargs={"image_embeds": random(2, 16)}).sample
    return network(random(2, 3, 16, 16)).sample


# Configs


def test_configs_are_saved_and_loaded(network: Any, tmp_path: Path) -> None:
    network.save_config(tmp_path / "config only")
    assert [path.name for path in (tmp_path / "config only").iterdir()] == ["config.json"]
    config = type(network).load_config(tmp_path / "config only")
    assert config["_class_name"] == type(network).__name__
    assert type(network).load_config(tmp_path / "config only" / "config.json") == config
    assert type(network).load_config(tmp_path, subfolder="config only") == config
    assert type(network).load_config(tmp_path / "config only", return_unused_kwargs=True, a=1) == (config, {"a": 1})
    again = type(network).from_config(config)
    assert again.config == network.config
    assert type(network).from_config(tmp_path / "config only").config == network.config
    theirs = getattr(diffusers, type(network).__name__)
    assert (
        theirs.from_config(theirs.load_config(tmp_path / "config only")).state_dict().keys()
        == again.state_dict().keys()
    )


def test_settings_can_be_replaced() -> None:
    unet = UNet2DConditionModel.from_config(UNET, in_channels=9)
    assert unet.conv_in.in_channels == 9
    unet.conv_in = nn.Conv2d(8, 32, 3, padding=1)
    unet.register_to_config(in_channels=8)
    assert unet.config.in_channels == unet.config["in_channels"] == unet.config.get("in_channels") == 8
    for settings, words in (({"in_channels": "x"}, "in_channels='x'"), ({"unknown": 3}, "unknown=3")):
        with pytest.raises(ConfigError, match=words):
            unet.register_to_config(**settings)
    assert unet.config.in_channels == 8
    with pytest.raises(InputError, match="config="):
        UNet2DConditionModel.from_config(3)  # type: ignore[arg-type]


def test_replaced_settings_are_saved(tmp_path: Path) -> None:
    unet = UNet2DConditionModel(**UNET)
    unet.conv_in = nn.Conv2d(8, 32, 3, padding=1)
    unet.register_to_config(in_channels=8)
    unet.save_pretrained(tmp_path)
    assert UNet2DConditionModel.from_pretrained(tmp_path).conv_in.weight.shape == (32, 8, 3, 3)


def test_folders_of_moving_averages_load(network: Any, tmp_path: Path) -> None:
    """The reference's class for averages stores its own numbers in the config, with our networks and with its own."""
    kind = type(network)
    average = EMAModel(network.parameters(), decay=0.9, model_cls=kind, model_config=network.config)
    for parameter in network.parameters():
        parameter.data.mul_(2)
    average.step(network.parameters())
    average.save_pretrained(str(tmp_path / "ours"))
    stored = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (stored["decay"], stored["optimization_step"]) == (0.9, 1)
    loaded = kind.from_pretrained(tmp_path / "ours")
    assert torch.equal(next(loaded.parameters()), average.shadow_params[0])
    assert "decay" not in loaded.config
    again = EMAModel.from_pretrained(str(tmp_path / "ours"), kind)
    assert (again.decay, again.optimization_step) == (0.9, 1)

    theirs = getattr(diffusers, kind.__name__)
    their_network = theirs.from_config(dict(network.stored_config()))
    their_average = EMAModel(their_network.parameters(), model_cls=theirs, model_config=their_network.config)
    their_average.save_pretrained(str(tmp_path / "theirs"))
    assert torch.equal(next(kind.from_pretrained(tmp_path / "theirs").parameters()), next(their_network.parameters()))


@pytest.mark.parametrize("name", NETWORKS)
def test_positional_arguments_are_those_of_the_reference(name: str) -> None:
    kind, config = NETWORKS[name]
    order = list(inspect.signature(getattr(diffusers, kind.__name__)).parameters)
    assert list(kind.positional) == order[: len(kind.positional)]
    filled = kind(**config)
    values = [filled.stored_config()[argument] for argument in kind.positional]
    count = max(index for index, argument in enumerate(kind.positional) if argument in config) + 1
    rest = {argument: value for argument, value in config.items() if argument not in kind.positional}
    assert kind(*values[:count], **rest).config == filled.config
    with pytest.raises(ConfigError, match="both by position and by name"):
        kind(values[0], **{kind.positional[0]: values[0]})
    with pytest.raises(ConfigError, match="number of positional arguments"):
        kind(*range(60))


DEEP: list[Any] = []
for _ in range(900):
    DEEP = [DEEP]
JUNK: tuple[Any, ...] = (True, False, 0, -1, 10**6, 2**63, 10**400, 1.5, 0.0, -1.0, float("nan"), float("inf"), 1e300)
JUNK += ("", "16", "x", [], [1], [[1]], ["a"], {}, {"a": 1}, DEEP, [10**6] * 4, [32] * 10**4, b"x", object(), int)
JUNK += (1e-300, complex(1, 2), torch.zeros(2), lambda: 0, "self", {1, 2}, [True, True], [None])


@pytest.mark.parametrize("name", NETWORKS)
def test_junk_in_configs_is_an_error_of_ours_at_once(name: str) -> None:
    kind, config = NETWORKS[name]
    accepted: list[tuple[str, Any]] = []
    fields = {*kind.config_class.field_names(), *kind.config_class.supported_values, "unknown", "self", "", "config"}
    for field in sorted(fields):
        for value in JUNK:
            start = time.monotonic()
            try:
                with torch.device("meta"):
                    kind.from_config({**config, field: value})
                accepted.append((field, value))
            except KandinskyError:
                pass
            assert time.monotonic() - start < 5, (field, value)
    harmless = {"decay", *(field for field in fields if field not in kind.config_class.field_names())}
    harmless |= {"scaling_factor", "norm_eps"}
    assert [
        pair for pair in accepted if pair[0] not in harmless and isinstance(pair[1], bool | str | list | dict)
    ] == []


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("prior", {"num_layers": 10**6}, f"num_layers=1000000 is invalid: expected an integer from 1 to {MAX_LAYERS}"),
        ("prior", {"num_layers": 500, "num_attention_heads": 512, "attention_head_dim": 64}, "number of parameters"),
        ("prior", {"num_attention_heads": 60000, "attention_head_dim": 60000}, "num_attention_heads [*]"),
        ("prior", {"num_layers": True}, "num_layers=True"),
        ("unet", {"sample_size": "16"}, "sample_size='16' is invalid: expected an integer from 1"),
        ("unet", {"norm_eps": [1e-5]}, "norm_eps="),
        ("unet", {"norm_eps": 0.0}, "norm_eps=0.0 is invalid: expected a number above 0"),
        ("unet", {"norm_num_groups": 0}, "norm_num_groups=0"),
        ("unet", {"layers_per_block": 10**5}, "layers_per_block=100000"),
        ("unet", {"block_out_channels": [32] * 3000}, "block_out_channels="),
        ("unet", {"block_out_channels": "32"}, "block_out_channels='32'"),
        ("unet", {"block_out_channels": (32, 65528), "layers_per_block": 32}, "number of parameters"),
        ("unet", {"down_block_types": "ResnetDownsampleBlock2D"}, "down_block_types="),
        ("unet", {"act_fn": "gelu"}, "act_fn='gelu'"),
        ("unet", {"center_input_sample": 0}, "center_input_sample=0"),
        ("unet", {3: 4}, "name of a setting=3"),
        ("movq", {"num_vq_embeddings": 10**12}, "num_vq_embeddings="),
        ("movq", {"vq_embed_dim": 8}, "vq_embed_dim=8"),
        ("movq", {"norm_type": "group"}, "norm_type='group'"),
    ],
)
def test_impossible_settings_are_named(name: str, settings: dict[Any, Any], words: str) -> None:
    kind, config = NETWORKS[name]
    start = time.monotonic()
    with pytest.raises(ConfigError, match=words):
        kind.from_config({**config, **settings})
    assert time.monotonic() - start < 1


# Gradient checkpointing


def gradients(network: Any) -> tuple[list[Tensor], int]:
    """Return the gradients of a loss and the number of elements that the forward pass stored for them."""
    network.zero_grad()
    parameters, stored = {p.data_ptr() for p in network.parameters()}, [0]

    def pack(tensor: Tensor) -> Tensor:
        stored[0] += 0 if tensor.data_ptr() in parameters else tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run(network).square().mean()
    loss.backward()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None], stored[0]


def test_gradient_checkpointing_saves_memory(network: Any) -> None:
    network.train()
    expected, everything = gradients(network)
    assert not network.is_gradient_checkpointing
    network.enable_gradient_checkpointing()
    assert network.is_gradient_checkpointing
    checkpointed, inputs = gradients(network)
    assert len(checkpointed) == len(expected)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(checkpointed, expected, strict=True))
    assert inputs < everything / 2
    with torch.no_grad():
        result = run(network)
    network.disable_gradient_checkpointing()
    assert not network.is_gradient_checkpointing
    assert gradients(network)[1] == everything
    with torch.no_grad():
        assert torch.equal(run(network), result)


def test_another_checkpoint_function_runs(network: Any) -> None:
    calls: list[nn.Module] = []

    def record(module: nn.Module, *args: Any) -> Any:
        calls.append(module)
        return module(*args)

    network.enable_gradient_checkpointing(record)
    run(network).sum().backward()
    assert len(calls) > 2
    with pytest.raises(InputError, match="gradient_checkpointing_func=3"):
        network.enable_gradient_checkpointing(3)


def test_checkpointed_training_works_with_frozen_networks_and_adapters() -> None:
    prior = PriorTransformer(**PRIOR).requires_grad_(False)
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.1)
    prior.transformer_blocks[0].attn1.to_q.requires_grad_(True)
    expected, _ = gradients(prior)
    prior.enable_gradient_checkpointing()
    checkpointed, _ = gradients(prior)
    assert len(expected) == 2
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(checkpointed, expected, strict=True))


# Attention processors and other settings without effect


def test_standard_attention_processors_are_accepted(network: Any) -> None:
    before = run(network)
    theirs = getattr(diffusers, type(network).__name__).from_config(dict(network.stored_config()))
    if hasattr(theirs, "attn_processors"):
        assert network.attn_processors.keys() == theirs.attn_processors.keys()
        network.set_attn_processor(theirs.attn_processors)
    for name in ("AttnProcessor", "AttnProcessor2_0", "AttnAddedKVProcessor", "AttnAddedKVProcessor2_0"):
        network.set_attn_processor(getattr(attention_processor, name)())
    network.set_attn_processor(network.attn_processors)
    network.set_default_attn_processor()
    assert torch.equal(run(network), before)


def test_other_attention_processors_are_refused(network: Any) -> None:
    class Mine:
        def __call__(self, *args: Any) -> None: ...

    for processor in (Mine(), None, dict.fromkeys(network.attn_processors, Mine()), {"x": None}):
        with pytest.raises(InputError, match="processor"):
            network.set_attn_processor(processor)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda network: network.enable_xformers_memory_efficient_attention(), "xformers has no effect"),
        (lambda network: network.set_use_memory_efficient_attention_xformers(True), "xformers has no effect"),
        (lambda network: network.set_attention_slice("max"), "attention slicing has no effect"),
        (lambda network: network.fuse_qkv_projections(), "fuse_qkv_projections[(][)] has no effect"),
    ],
)
def test_what_has_no_effect_says_so(
    network: Any, call: Callable[[Any], None], words: str, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr("kandinsky22.verbosity._shown", set())
    before = run(network)
    with caplog.at_level(logging.WARNING):
        call(network)
    assert caplog.text
    network.disable_xformers_memory_efficient_attention()
    network.unfuse_qkv_projections()
    assert torch.equal(run(network), before)
    assert words.split("[")[0] in caplog.text


def test_parameters_are_counted(network: Any) -> None:
    theirs = getattr(diffusers, type(network).__name__).from_config(dict(network.stored_config()))
    next(network.parameters()).requires_grad_(False)
    next(theirs.parameters()).requires_grad_(False)
    for arguments in ((), (False,), (True,), (False, True), (True, True)):
        assert network.num_parameters(*arguments) == theirs.num_parameters(*arguments)


def test_outputs_read_like_dictionaries() -> None:
    output = run_output()
    assert output.sample is output["sample"] is output[0] is output.get("sample") is output.to_tuple()[0]
    assert output[:1] == (output.sample,)
    assert list(output.keys()) == list(output) == ["sample"]
    assert next(iter(output.values())) is output.sample
    assert next(iter(output.items())) == ("sample", output.sample)
    assert output.get("other", 3) == 3
    assert "sample" in output
    output["sample"] = torch.zeros(1)
    assert output.sample.shape == (1,)
    with pytest.raises(KeyError):
        output["other"] = 1


def run_output() -> Any:
    unet = UNet2DConditionModel(**UNET)
    return unet(torch.randn(1, 4, 8, 8), 5, added_cond_kwargs={"image_embeds": torch.randn(1, 16)})
