"""Files of adapters: all layouts are read completely, and what does not fit is listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.unit.adapter_layers import (
    attention_layers,
    flat_layout,
    peft_layout,
    processor_layout,
    random_pairs,
)
from tests.unit.tiny_models import TINY_PRIOR, TINY_UNET
from torch import Tensor

from kandinsky22 import PriorTransformer, UNet2DConditionModel
from kandinsky22.adapters.files import (
    distilled_steps,
    file_digest,
    find_adapter_files,
    find_distilled_files,
    read_adapter,
    write_adapter,
)
from kandinsky22.adapters.formats import PRIOR, UNET, match_updates
from kandinsky22.adapters.updates import LowRankUpdate, ReplacementUpdate, merged
from kandinsky22.errors import CheckpointError, InputError

CONVOLUTION = "down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(**TINY_UNET)


@pytest.fixture(scope="module")
def prior() -> PriorTransformer:
    return PriorTransformer(**TINY_PRIOR)


def assert_updates_give(network: Any, adapter: Any, expected: dict[str, Tensor]) -> None:
    """Check that the updates change the weights of exactly these layers, by exactly these differences."""
    assert adapter.keys() == {f"{path}.weight" for path in expected}
    for path, difference in expected.items():
        base = network.get_parameter(f"{path}.weight").detach()
        changed = merged(base, [(1.0, adapter[f"{path}.weight"])])
        torch.testing.assert_close(changed.double(), base.double() + difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "unet.", "base_model.model.", "unet.base_model.model.", "transformer."])
@pytest.mark.parametrize("layout", [peft_layout, processor_layout])
def test_both_dotted_layouts_are_read_completely(
    unet: UNet2DConditionModel, layout: Callable[..., dict[str, Tensor]], prefix: str
) -> None:
    pairs = random_pairs(unet, attention_layers(unet))
    adapters = match_updates(layout(pairs, prefix), {UNET: unet}, origin="file")
    assert_updates_give(unet, adapters[UNET], {path: pair.difference() for path, pair in pairs.items()})


def test_the_old_layout_loads_all_pairs_of_the_conditioning(tmp_path: Path) -> None:
    """Seven attention layers with six projections: 42 pairs, of which the reference reads 28."""
    unet = UNet2DConditionModel(
        **{
            **TINY_UNET,
            "block_out_channels": (32, 32, 64),
            "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 2),
            "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 2, "ResnetUpsampleBlock2D"),
        }
    )
    layers = attention_layers(unet)
    pairs = random_pairs(unet, layers)
    tensors = processor_layout(pairs)
    assert len(tensors) == 84
    assert any("add_k_proj_lora" in name for name in tensors)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    stored = read_adapter(tmp_path)
    adapters = match_updates(stored.tensors, {UNET: unet}, origin=stored.origin)
    assert len(adapters[UNET]) == 42
    assert_updates_give(unet, adapters[UNET], {path: pair.difference() for path, pair in pairs.items()})


def test_flattened_names_with_alpha_and_convolutions_are_read(unet: UNet2DConditionModel) -> None:
    pairs = random_pairs(unet, [*attention_layers(unet), CONVOLUTION], rank=4)
    adapters = match_updates(flat_layout(pairs, alpha=2.0), {UNET: unet}, origin="file")
    assert_updates_give(unet, adapters[UNET], {path: pair.difference(0.5) for path, pair in pairs.items()})


def test_matrices_and_1x1_kernels_stand_for_each_other(unet: UNet2DConditionModel) -> None:
    shortcut, linear = "up_blocks.0.resnets.0.conv_shortcut", "down_blocks.1.attentions.0.to_q"
    pairs = random_pairs(unet, [shortcut, linear])
    expected = {path: pair.difference() for path, pair in pairs.items()}
    tensors = peft_layout(pairs)
    swapped = {key: value[:, :, None, None] if value.ndim == 2 else value[:, :, 0, 0] for key, value in tensors.items()}
    assert_updates_give(unet, match_updates(swapped, {UNET: unet}, origin="file")[UNET], expected)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"unet.r": 4, "unet.lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 2, "rank_pattern": {"^mid_block.attentions.0.to_q": 4}, "lora_alpha": 4}, 1.0),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"attentions.0.to_q": 12}}, 3.0),
        ({}, 1.0),
    ],
)
def test_settings_state_the_scale(unet: UNet2DConditionModel, settings: dict[str, Any], scale: float) -> None:
    pairs = random_pairs(unet, ["mid_block.attentions.0.to_q"])
    adapter = match_updates(peft_layout(pairs), {UNET: unet}, origin="file", settings=settings)[UNET]
    assert_updates_give(unet, adapter, {path: pair.difference(scale) for path, pair in pairs.items()})


def test_whole_weights_replace_those_of_the_network(unet: UNet2DConditionModel) -> None:
    other = {name: torch.randn_like(tensor) for name, tensor in unet.state_dict().items()}
    adapter = match_updates(other, {UNET: unet}, origin="file")[UNET]
    assert len(adapter) == len(other)
    name = "mid_block.attentions.0.to_q.weight"
    update, base = adapter[name], unet.get_parameter(name).detach()
    assert isinstance(update, ReplacementUpdate)
    assert torch.equal(merged(base, [(1.0, update)]), other[name])
    torch.testing.assert_close(merged(base, [(0.5, update)]), (base + other[name]) / 2)


def test_one_file_serves_prior_and_unet(unet: UNet2DConditionModel, prior: PriorTransformer) -> None:
    of_unet = random_pairs(unet, ["mid_block.attentions.0.to_k", "time_embedding.linear_1"])
    of_prior = random_pairs(prior, ["transformer_blocks.0.attn1.to_k", "time_embedding.linear_1"], seed=1)
    networks = {UNET: unet, PRIOR: prior}
    prefixed = peft_layout(of_unet, "unet.") | peft_layout(of_prior, "prior.")
    adapters = match_updates(prefixed, networks, origin="file")
    assert_updates_give(unet, adapters[UNET], {path: pair.difference() for path, pair in of_unet.items()})
    assert_updates_give(prior, adapters[PRIOR], {path: pair.difference() for path, pair in of_prior.items()})
    # without prefixes, the layer that both networks have goes where its shape fits
    assert match_updates(peft_layout(of_prior), networks, origin="file").keys() == {PRIOR}
    only = match_updates(prefixed, {UNET: unet}, origin="file", prefix="unet")
    assert only[UNET].keys() == adapters[UNET].keys()
    with pytest.raises(CheckpointError, match=r"4 of the prior: prior\.transformer_blocks"):
        match_updates(prefixed, {UNET: unet}, origin="file")


def broken(kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    down, up = list(tensors)[:2]
    first = tensors[down]
    return {
        "unknown": {"mid_block.nothing.lora_A.weight": first, "text_encoder.x.weight": first},
        "partner": {down: first},
        "ranks": {down: first[:2], up: tensors[up]},
        "empty rank": {down: first[:0], up: tensors[up][:, :0]},
        "shape": {down: torch.cat([first, first], dim=1), up: tensors[up]},
        "type": {down: first.to(torch.int32), up: tensors[up]},
        "dora": {**tensors, down.replace("lora_A.weight", "lora_magnitude_vector"): first[0]},
        "loha": {"lora_unet_mid_block_attentions_0_to_q.hada_w1_a": first},
        "twice": {**tensors, f"unet.{down}": first},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("unknown", r"2 that fit nothing: mid_block\.nothing\.lora_A\.weight, text_encoder"),
        ("partner", r"1 without their partner: .*to_q\.lora_A"),
        ("ranks", r"1 whose ranks disagree: .* has 2, .* 4"),
        ("empty rank", r"1 whose ranks disagree"),
        ("shape", r"1 of the wrong shape: .*to_q"),
        ("type", r"1 of the wrong type: .*int32"),
        ("dora", r"1 of a method other than LoRA: .*magnitude"),
        ("loha", r"1 of a method other than LoRA: .*hada"),
        ("twice", r"1 without their partner"),
    ],
)
def test_what_does_not_fit_is_listed(unet: UNet2DConditionModel, kind: str, message: str) -> None:
    tensors = broken(kind, peft_layout(random_pairs(unet, ["mid_block.attentions.0.to_q"])))
    with pytest.raises(CheckpointError, match=message):
        match_updates(tensors, {UNET: unet}, origin="some/file")


def test_many_problems_are_counted_and_a_few_are_named(unet: UNet2DConditionModel, prior: PriorTransformer) -> None:
    with pytest.raises(CheckpointError) as error:
        match_updates(prior.state_dict(), {UNET: unet}, origin="other.safetensors")
    text = str(error.value)
    assert text.startswith("other.safetensors does not fit UNet2DConditionModel: tensors ")
    assert "that fit nothing: " in text and ", ..." in text and len(text) < 1000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 8}, "whose rank is not that of the file's settings: .* 4 instead of 8"),
        ({"peft_type": "LOKR"}, "kind 'LOKR'"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'"),
        ({"alpha_pattern": {"(a+)+": 1}}, "expected a name"),
        ({"alpha_pattern": 5}, "alpha_pattern is 5"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"alpha_pattern": {"to_q": float("nan")}}, "lora_alpha is nan"),
        ({"r": 4.5}, "r is 4.5: expected an integer"),
        ({"r": float("inf")}, "r is inf"),
        ({"rank_pattern": {"to_q": float("nan")}}, "r is nan"),
        ({"use_rslora": "no"}, "use_rslora is 'no': expected true or false"),
        ({"lora_alpha": 9e8, "use_rslora": True}, "whose alpha is not a finite number below 1e9"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(
    unet: UNet2DConditionModel, settings: dict[str, Any], message: str
) -> None:
    tensors = peft_layout(random_pairs(unet, ["mid_block.attentions.0.to_q"]))
    with pytest.raises(CheckpointError, match=message):
        match_updates(tensors, {UNET: unet}, origin="file", settings=settings)


CHANGED_BASE = ("pissa", "pissa_niter_16", "PiSSA", "corda", "olora", "OLoRA", "lora_ga", "loftq")


@pytest.mark.parametrize("initialisation", CHANGED_BASE)
@pytest.mark.parametrize("prefix", ["", "unet."])
def test_adapters_that_change_the_base_weights_too_are_refused(
    unet: UNet2DConditionModel, initialisation: str, prefix: str
) -> None:
    tensors = peft_layout(random_pairs(unet, ["mid_block.attentions.0.to_q"]))
    advice = "PEFT does not convert it" if initialisation == "loftq" else "path_initial_model_for_weight_conversion"
    with pytest.raises(CheckpointError, match=f"file has .* init_lora_weights='{initialisation}', .*{advice}"):
        settings = {f"{prefix}init_lora_weights": initialisation, f"{prefix}r": 4}
        match_updates(tensors, {UNET: unet}, origin="file", settings=settings)


@pytest.mark.parametrize("initialisation", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_adapters_of_other_initialisations_are_read(unet: UNet2DConditionModel, initialisation: Any) -> None:
    pairs = random_pairs(unet, ["mid_block.attentions.0.to_q"])
    settings = {"init_lora_weights": initialisation}
    adapters = match_updates(peft_layout(pairs), {UNET: unet}, origin="file", settings=settings)
    assert_updates_give(unet, adapters[UNET], {path: pair.difference() for path, pair in pairs.items()})


@pytest.mark.parametrize("alpha", [float("inf"), float("-inf"), float("nan"), 1e30])
def test_values_of_alpha_that_no_adapter_has(unet: UNet2DConditionModel, alpha: float) -> None:
    tensors = flat_layout(random_pairs(unet, ["mid_block.attentions.0.to_q"]), alpha=alpha)
    with pytest.raises(CheckpointError, match=r"1 whose alpha is not a finite number below 1e9: .*to_q\.alpha"):
        match_updates(tensors, {UNET: unet}, origin="file")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool])
def test_types_of_alpha_that_are_no_number(unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    pairs = random_pairs(unet, ["mid_block.attentions.0.to_q"])
    tensors = {key: value.to(dtype) if key.endswith("alpha") else value for key, value in flat_layout(pairs, 1).items()}
    with pytest.raises(CheckpointError, match="1 of the wrong type"):
        match_updates(tensors, {UNET: unet}, origin="file")


# Files


def test_a_written_adapter_is_read_again(unet: UNet2DConditionModel, prior: PriorTransformer, tmp_path: Path) -> None:
    of_unet = random_pairs(unet, ["mid_block.attentions.0.to_q", CONVOLUTION])
    adapter = match_updates(flat_layout(of_unet, alpha=3.0), {UNET: unet}, origin="file")[UNET]
    path = write_adapter(tmp_path / "one", {UNET: adapter})
    assert path.name == "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["lora_alpha"] == 3
        assert "mid_block.attentions.0.to_q.lora_A.weight" in file.keys()  # noqa: SIM118 - not a mapping
    again = read_adapter(tmp_path / "one")
    expected = {path: pair.difference(0.75) for path, pair in of_unet.items()}
    matched = match_updates(again.tensors, {UNET: unet}, origin="file", settings=again.settings)
    assert_updates_give(unet, matched[UNET], expected)

    of_prior = match_updates(
        peft_layout(random_pairs(prior, ["transformer_blocks.0.attn1.to_q"], rank=2)), {PRIOR: prior}, origin="file"
    )
    write_adapter(tmp_path / "both", {UNET: adapter, **of_prior})
    both = read_adapter(tmp_path / "both")
    assert {name.split(".")[0] for name in both.tensors} == {"unet", "prior"}
    matched = match_updates(both.tensors, {UNET: unet, PRIOR: prior}, origin="file", settings=both.settings)
    assert_updates_give(unet, matched[UNET], expected)
    update = matched[PRIOR]["transformer_blocks.0.attn1.to_q.weight"]
    assert isinstance(update, LowRankUpdate) and update.rank == 2 and update.scale == 1


def test_a_pickled_file_holds_no_alpha(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    pairs = random_pairs(unet, ["mid_block.attentions.0.to_q"])
    plain = match_updates(peft_layout(pairs), {UNET: unet}, origin="file")
    path = write_adapter(tmp_path, plain, safe_serialization=False)
    assert read_adapter(path).tensors.keys() == peft_layout(pairs).keys()
    scaled = match_updates(flat_layout(pairs, alpha=1.0), {UNET: unet}, origin="file")
    with pytest.raises(InputError, match="no place for alpha"):
        write_adapter(tmp_path, scaled, safe_serialization=False)


def test_a_failed_write_leaves_the_old_file(
    unet: UNet2DConditionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kandinsky22.adapters import files

    adapters = match_updates(
        peft_layout(random_pairs(unet, ["mid_block.attentions.0.to_q"])), {UNET: unet}, origin="file"
    )
    digest = file_digest(write_adapter(tmp_path, adapters))

    def full_disk(tensors: Any, path: Path, **_options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        write_adapter(tmp_path, adapters)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert file_digest(tmp_path / "pytorch_lora_weights.safetensors") == digest


def test_the_file_of_a_folder_is_found(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    tensors = peft_layout(random_pairs(unet, ["mid_block.attentions.0.to_q"]))
    with pytest.raises(CheckpointError, match="the folder has no files"):
        find_adapter_files(tmp_path)
    save_file(tensors, tmp_path / "style.safetensors")
    assert [path.name for path in find_adapter_files(tmp_path)] == ["style.safetensors"]
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="pass weight_name="):
        find_adapter_files(tmp_path)
    assert [path.name for path in find_adapter_files(tmp_path, weight_name="other.safetensors")] == [
        "other.safetensors"
    ]
    (tmp_path / "unet").mkdir()
    unet.save_pretrained(tmp_path / "unet", max_shard_size="200KB")
    shards = find_adapter_files(tmp_path, subfolder="unet")
    assert len(shards) > 1
    assert read_adapter(tmp_path, subfolder="unet").tensors.keys() == unet.state_dict().keys()


def test_the_distilled_adapter_of_a_checkpoint_is_found(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    tensors = peft_layout(random_pairs(unet, ["mid_block.attentions.0.to_q"]))
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")  # an adapter of another kind
    with pytest.raises(CheckpointError, match=r"has no distilled adapter, .*: no folder 'distilled' in"):
        find_distilled_files(tmp_path)
    path = tmp_path / "distilled" / "pytorch_lora_weights.safetensors"
    path.parent.mkdir()
    with pytest.raises(CheckpointError, match=r"has no distilled adapter, .*: no adapter in"):
        find_distilled_files(tmp_path)
    save_file(tensors, path)
    assert find_distilled_files(tmp_path) == find_adapter_files(tmp_path / "distilled") == [path]
    assert find_distilled_files("embedded") == find_adapter_files("embedded/distilled")
    assert distilled_steps(path) is None
    for text, steps in (("4", 4), ("0", None), ("-1", None), ("a", None), ("9" * 5, None)):
        save_file(tensors, path, metadata={"num_inference_steps": text})
        if steps is None:
            with pytest.raises(CheckpointError, match="num_inference_steps in its header"):
                distilled_steps(path)
        else:
            assert distilled_steps(path) == steps


@pytest.mark.parametrize("source", ["nowhere.safetensors", "./nowhere", "", 5, {"a": 1}, {1: torch.zeros(1)}, "a\0b"])
def test_sources_that_are_none(source: Any) -> None:
    with pytest.raises((CheckpointError, InputError)):
        read_adapter(source)


def test_damaged_files_are_one_error(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        read_adapter(tmp_path / "a.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors", metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_adapter(tmp_path / "b.safetensors")
