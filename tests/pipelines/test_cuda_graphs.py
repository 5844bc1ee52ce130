"""CUDA graphs: the same images from recorded steps, and refusals without a CUDA device."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from tests.pipelines.tiny import difference, pair, seeded

from kandinsky22 import InputError, KandinskyV22CombinedPipeline, KandinskyV22Pipeline, UNet2DConditionModel
from kandinsky22.runtime import cuda_graphs
from kandinsky22.runtime.cuda_graphs import DenoisingGraphs


def generate(pipe: Any, seed: int = 3, **options: Any) -> torch.Tensor:
    call: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 4, "output_type": "pt", **options}
    return pipe(**pair(seed=seed), **call, generator=seeded(seed)).images.float().cpu()


def test_a_cpu_pipeline_is_refused(decoder: KandinskyV22Pipeline) -> None:
    with pytest.raises(InputError, match="CUDA graphs need a CUDA device, but the networks are on cpu"):
        decoder.enable_cuda_graphs()
    decoder.disable_cuda_graphs()


def test_on_cpus_steps_run_as_usual(decoder: KandinskyV22Pipeline) -> None:
    """As after `pipe.to("cpu")` of a pipeline with graphs."""
    expected = generate(decoder)
    decoder._cuda_graphs = DenoisingGraphs()
    assert torch.equal(generate(decoder), expected)


def test_both_stages_share_the_setting(combined: KandinskyV22CombinedPipeline) -> None:
    graphs = combined._cuda_graphs = DenoisingGraphs()
    assert combined.decoder_pipe._cuda_graphs is graphs
    combined.disable_cuda_graphs()
    assert combined.decoder_pipe._cuda_graphs is None


def test_tensors_of_conditions_are_copied_by_structure() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(32, 32),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        encoder_hid_dim=32,
        cross_attention_dim=16,
    )
    with torch.no_grad():
        condition = unet.encode_condition(torch.randn(1, 32, generator=seeded(1)))
    copied = cuda_graphs._map_tensors(condition, torch.clone)
    assert type(copied) is type(condition)
    assert all(isinstance(layer, type(condition.layers[0])) for layer in copied.layers)
    pairs = list(zip(cuda_graphs._tensors(condition), cuda_graphs._tensors(copied), strict=True))
    assert len(pairs) == 1 + 2 * len(condition.layers)
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)


class Item(NamedTuple):
    value: torch.Tensor


def test_nested_tuples_keep_their_classes() -> None:
    value = (Item(torch.ones(2)), None, (torch.zeros(1),))
    copied = cuda_graphs._map_tensors(value, lambda tensor: tensor + 1)
    assert isinstance(copied[0], Item)
    assert copied[1] is None
    assert [tensor.tolist() for tensor in cuda_graphs._tensors(copied)] == [[2.0, 2.0], [1.0]]


@pytest.mark.gpu
def test_replayed_steps_give_the_same_images(decoder: KandinskyV22Pipeline) -> None:
    decoder.to("cuda")
    calls: list[dict[str, Any]] = [
        {},
        {"seed": 5},
        {"width": 128},
        {"guidance_scale": 1.0},
        {"guidance_interval": (0.0, 0.5)},
    ]
    expected = [generate(decoder, **call) for call in calls]
    decoder.enable_cuda_graphs()
    for _ in range(2):
        for call, image in zip(calls, expected, strict=True):
            assert difference(generate(decoder, **call), image) < 1e-5
    assert decoder._cuda_graphs is not None
    assert 0 < len(decoder._cuda_graphs._graphs) <= cuda_graphs.MAX_GRAPHS
    decoder.disable_cuda_graphs()
    assert difference(generate(decoder), expected[0]) < 1e-5


@pytest.mark.gpu
def test_moved_weights_are_recorded_again(decoder: KandinskyV22Pipeline) -> None:
    decoder.to("cuda").enable_cuda_graphs()
    before = generate(decoder)
    with torch.no_grad():
        decoder.unet.conv_out.weight.data = decoder.unet.conv_out.weight.data * 0.5
    changed = generate(decoder)
    decoder.disable_cuda_graphs()
    assert difference(changed, generate(decoder)) < 1e-5
    assert difference(changed, before) > 1e-4
