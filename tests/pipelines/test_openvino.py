"""Networks run by OpenVINO: the pictures of PyTorch, stored graphs, changed weights, and what is refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipelines.pictures import box_mask, hint, noise_picture
from tests.pipelines.tiny import difference, load_quietly, pair, seeded

from kandinsky22 import KandinskyV22CombinedPipeline, KandinskyV22ControlnetPipeline, KandinskyV22InpaintPipeline
from kandinsky22.engines import openvino
from kandinsky22.engines.networks import UNetEngine
from kandinsky22.errors import InputError, KandinskyError, MissingDependencyError
from kandinsky22.runtime.network_state import state_of

pytest.importorskip("openvino")

EXACT = 1e-4  # float32 against PyTorch, for pictures in about [-1, 1]: two steps of each stage magnify rounding


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of exported graphs, so that the tests of this file export the same weights once."""
    return tmp_path_factory.mktemp("graphs")


def generate(pipe: Any, prompt: Any = "a red cat", *, side: int = 64, scale: float = 4.0) -> torch.Tensor:
    options: dict[str, Any] = {"height": side, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
    return pipe(
        prompt,
        generator=seeded(3),
        prior_num_inference_steps=2,
        guidance_scale=scale,
        prior_guidance_scale=scale,
        **options,
    ).images.float()


CALLS: list[dict[str, Any]] = [
    {},
    {"prompt": ["a red cat, on 2 dogs", "cat"], "side": 128},
    {"scale": 1.0},
]


@pytest.fixture
def exported(combined: KandinskyV22CombinedPipeline, graphs: Path) -> KandinskyV22CombinedPipeline:
    return combined.to_openvino(cache_dir=graphs)


def test_float32_gives_the_picture_of_torch_for_all_sizes_and_batches(
    combined: KandinskyV22CombinedPipeline, graphs: Path
) -> None:
    expected = [generate(combined, **call) for call in CALLS]
    assert combined.to_openvino(cache_dir=graphs) is combined
    for call, picture_of_torch in zip(CALLS, expected, strict=True):
        ours = generate(combined, **call)
        assert 0 < difference(ours, picture_of_torch) < EXACT, "0 would mean that PyTorch ran"
    assert torch.equal(generate(combined), generate(combined))
    combined.to_torch()
    assert torch.equal(generate(combined), expected[0])


def mean_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().mean())


@pytest.mark.parametrize(
    ("precision", "bound"), [("bfloat16", 0.03), pytest.param("int8", 0.15, marks=pytest.mark.slow)]
)
def test_lower_precisions_are_bounded(
    combined: KandinskyV22CombinedPipeline, graphs: Path, precision: str, bound: float
) -> None:
    if precision == "int8":
        pytest.importorskip("nncf")
    expected = generate(combined)
    try:
        combined.to_openvino(precision=precision, cache_dir=graphs)
    except InputError as error:
        assert precision == "bfloat16" and "in which the CPU here computes" in str(error)
        pytest.skip("this processor has no bfloat16")
    assert EXACT < mean_difference(generate(combined), expected) < bound


def test_the_networks_own_type_is_the_default_precision(combined: KandinskyV22CombinedPipeline, graphs: Path) -> None:
    combined.to(torch.bfloat16)
    expected = generate(combined)
    try:
        combined.to_openvino(cache_dir=graphs)
    except InputError:
        pytest.skip("this processor has no bfloat16")
    engine = state_of(combined.unet).engine
    assert isinstance(engine, UNetEngine)
    assert (engine.settings.precision, engine.settings.element) == ("bfloat16", "bfloat16")
    assert mean_difference(generate(combined), expected) < 0.03


@pytest.mark.slow
def test_modes_with_pictures_and_hints(mode_folder: Path, graphs: Path) -> None:
    options: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    for name, kind, inputs in (
        ("Inpaint", KandinskyV22InpaintPipeline, {"image": noise_picture(1), "mask_image": box_mask()}),
        ("Controlnet", KandinskyV22ControlnetPipeline, {"hint": hint(1, 2)}),
    ):
        pipe = load_quietly(kind, mode_folder / name)
        expected = pipe(**pair(), **inputs, **options, generator=seeded(3)).images
        pipe.to_openvino(cache_dir=graphs)
        ours = pipe(**pair(), **inputs, **options, generator=seeded(3)).images
        assert 0 < difference(ours, expected) < EXACT, name


def test_stored_graphs_are_used_until_the_weights_differ(
    combined: KandinskyV22CombinedPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    original = openvino.exported_model

    def recorded(part: openvino.ExportedPart) -> Any:
        names.append(part.name)
        return original(part)

    monkeypatch.setattr(openvino, "exported_model", recorded)
    combined.to_openvino(cache_dir=tmp_path)
    assert sorted(names) == ["movq-decoder", "prior", "unet"]
    expected = generate(combined)
    combined.to_torch().to_openvino(cache_dir=tmp_path)
    assert len(names) == 3
    assert torch.equal(generate(combined), expected)
    with torch.no_grad():
        combined.unet.conv_in.weight.mul_(1.5)
    assert len(list((tmp_path / "unet").iterdir())) == 1
    combined.to_openvino(cache_dir=tmp_path)
    assert names[3:] == ["unet"]
    assert difference(generate(combined), expected) > 1e-3
    assert not list(tmp_path.rglob(".saving-*"))


def test_a_folder_that_cannot_be_written_stores_nothing(
    combined: KandinskyV22CombinedPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = generate(combined)
    for name in ("prior", "unet", "movq-decoder"):
        (tmp_path / name).write_text("a file in the place of the folder")
    combined.to_openvino(cache_dir=tmp_path)
    assert "cannot be stored" in caplog.text
    assert difference(generate(combined), expected) < EXACT


def damage(graph: Path, how: str) -> None:
    """Damage a stored graph, as a full disk or a power failure does."""
    weights, description = graph / "model.bin", graph / "model.xml"
    if how == "no weights":
        weights.unlink()
    elif how == "no values":
        weights.write_bytes(bytes(weights.stat().st_size))
    else:
        path = weights if how == "half of the weights" else description
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def unet_engine(pipe: Any, folder: Path) -> UNetEngine:
    return UNetEngine(pipe.unet, openvino.EngineSettings("CPU", "float32", "float32", folder), lambda: [])


def prediction(engine: UNetEngine, unet: Any) -> torch.Tensor:
    embeds = torch.ones(1, unet.config.encoder_hid_dim)
    with torch.no_grad():
        result: torch.Tensor = engine.bind(unet, embeds)(torch.ones(1, 4, 8, 8), 500)
    return result


@pytest.mark.parametrize("how", ["half of the weights", "half of the description", "no weights", "no values"])
def test_damaged_graphs_are_exported_again(combined: KandinskyV22CombinedPipeline, tmp_path: Path, how: str) -> None:
    expected = prediction(unet_engine(combined, tmp_path), combined.unet)
    (graph,) = (tmp_path / "unet").iterdir()
    sizes = {file.name: file.stat().st_size for file in graph.iterdir()}
    damage(graph, how)
    assert torch.equal(prediction(unet_engine(combined, tmp_path), combined.unet), expected)
    assert {file.name: file.stat().st_size for file in graph.iterdir()} == sizes, "the stored graph is whole again"


def test_damaged_graphs_that_cannot_be_replaced_are_not_used(
    combined: KandinskyV22CombinedPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prediction(unet_engine(combined, tmp_path), combined.unet)
    (graph,) = (tmp_path / "unet").iterdir()
    damage(graph, "half of the weights")
    monkeypatch.setattr("shutil.rmtree", lambda *_args, **_options: None)
    assert torch.equal(prediction(unet_engine(combined, tmp_path), combined.unet), expected)


def test_a_graph_that_the_device_does_not_compile(
    combined: KandinskyV22CombinedPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("unsupported operation")

    exports: list[str] = []
    original = openvino.exported_model
    monkeypatch.setattr(openvino, "exported_model", lambda part: exports.append(part.name) or original(part))
    monkeypatch.setattr(openvino, "_compile_options", fail)
    for count in (1, 2):  # exported; then found, and exported again in case that it is damaged
        with pytest.raises(InputError, match=r"device='CPU' is invalid: .*unsupported operation"):
            unet_engine(combined, tmp_path)
        assert len(exports) == count


def test_a_graph_that_is_damaged_later_blames_no_device(
    combined: KandinskyV22CombinedPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices with fixed shapes read the stored graph when a size is new."""
    monkeypatch.setattr(openvino, "STATIC_DEVICES", ("CPU",))
    engine = unet_engine(combined, tmp_path)
    (graph,) = (tmp_path / "unet").iterdir()
    damage(graph, "half of the description")
    with pytest.raises(KandinskyError, match=r"cannot read its graph in .*model\.xml: call to_openvino\(\) again"):
        prediction(engine, combined.unet)


def test_graphs_are_on_the_disk_before_they_get_their_name(
    combined: KandinskyV22CombinedPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    replace, fsync = os.replace, os.fsync

    def record(descriptor: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def move(source: Any, target: Any) -> None:
        events.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", move)
    unet_engine(combined, tmp_path)
    commit = events.index("renamed")
    assert {"model.xml", "model.bin"} <= set(events[:commit]) and "unet" in events[commit:]


# Changes afterwards


def test_weights_that_changed_afterwards_are_an_error_until_they_are_exported_again(
    exported: KandinskyV22CombinedPipeline, graphs: Path
) -> None:
    before = generate(exported)
    with torch.no_grad():
        exported.unet.conv_out.weight.mul_(1.5)
    with pytest.raises(InputError, match="unet runs by OpenVINO as it was exported, and its weights have changed"):
        generate(exported)
    exported.to_openvino(cache_dir=graphs)
    again = generate(exported)
    exported.to_torch()
    assert difference(again, generate(exported)) < EXACT
    assert difference(again, before) > 1e-3


def test_hooks_are_an_error(exported: KandinskyV22CombinedPipeline) -> None:
    handle = exported.unet.mid_block.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match=r"unet cannot be exported, because mid_block has hooks"):
        generate(exported)
    handle.remove()
    generate(exported)


REFUSED: dict[str, Callable[[Any], Any]] = {
    "to": lambda pipe: pipe.to(torch.bfloat16),
    "compile": lambda pipe: pipe.compile(),
    "quantize": lambda pipe: pipe.quantize("int8"),
    "enable_low_memory": lambda pipe: pipe.enable_low_memory(),
    "enable_feature_caching": lambda pipe: pipe.enable_feature_caching(),
}


def test_what_has_no_effect_is_refused(exported: KandinskyV22CombinedPipeline) -> None:
    for method, call in REFUSED.items():
        with pytest.raises(InputError, match=rf"{method}\(\) has no effect on \w+, which runs by OpenVINO"):
            call(exported)
    exported.to("cpu")
    exported.to_torch()
    REFUSED["to"](exported)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda pipe: pipe.enable_low_memory(), r"is offloaded by enable_low_memory\(\)"),
        (lambda pipe: pipe.quantize("int8"), r"is quantized \(int8\) for PyTorch"),
        (lambda pipe: pipe.compile(), "is compiled by torch.compile"),
        (lambda pipe: pipe.enable_feature_caching(), "feature caching has no effect"),
        (lambda pipe: pipe.movq.enable_tiling(), "movq encodes and decodes in tiles"),
        (lambda pipe: pipe.prior_prior.register_forward_hook(lambda *_: None), "prior_prior cannot be exported"),
    ],
    ids=["low-memory", "quantized", "compiled", "caching", "tiling", "hooks"],
)
def test_what_cannot_be_exported_is_refused(
    combined: KandinskyV22CombinedPipeline, prepare: Callable[[Any], Any], words: str
) -> None:
    if "quantized" in words:
        pytest.importorskip("torchao")
    prepare(combined)
    with pytest.raises(InputError, match=words):
        combined.to_openvino()
    assert state_of(combined.movq).engine is None


def test_adapters_become_part_of_the_weights_and_later_ones_are_refused(
    combined: KandinskyV22CombinedPipeline, graphs: Path
) -> None:
    name = "down_blocks.1.attentions.0.to_q"
    width = combined.unet.get_submodule(name).weight.shape[0]
    adapter = {
        f"unet.{name}.lora_A.weight": torch.randn(4, width, generator=seeded(5)),
        f"unet.{name}.lora_B.weight": torch.randn(width, 4, generator=seeded(6)),
    }
    plain = generate(combined)
    combined.load_lora_weights(adapter, adapter_name="style")
    expected = generate(combined)
    combined.to_openvino(cache_dir=graphs)
    ours = generate(combined)
    assert difference(ours, expected) < EXACT < difference(expected, plain)
    for change in (combined.disable_lora, lambda: combined.load_lora_weights(adapter), combined.unload_lora_weights):
        with pytest.raises(InputError, match="a change of adapters has no effect on unet"):
            change()
    assert torch.equal(generate(combined), ours)
    combined.to_torch().unload_lora_weights()
    assert torch.equal(generate(combined), plain)


# Sharing, threads, slices


def test_pipelines_that_share_networks_share_the_engine_and_copies_do_not(
    exported: KandinskyV22CombinedPipeline,
) -> None:
    assert state_of(exported.decoder_pipe.unet).engine is state_of(exported.unet).engine
    assert state_of(copy.deepcopy(exported.unet)).engine is None
    exported.decoder_pipe.to_torch()
    assert state_of(exported.unet).engine is None
    assert state_of(exported.prior_prior).engine is not None


def test_slices_and_the_tiny_decoder_serve(exported: KandinskyV22CombinedPipeline) -> None:
    prompts = ["a red cat", "a dog"]
    together = generate(exported, prompts)
    exported.movq.enable_slicing()
    assert difference(generate(exported, prompts), together) < EXACT


def test_other_devices_compile_for_fixed_shapes(
    exported: KandinskyV22CombinedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of NPUs, here on the CPU, whose plugin crashes with its fused kernels for fixed shapes."""
    expected = [generate(exported, **call) for call in CALLS]
    engine: Any = state_of(exported.unet).engine
    options = {**openvino._compile_options(engine.settings), "SNIPPETS_MODE": "DISABLE"}
    monkeypatch.setattr(openvino, "_compile_options", lambda _: options)
    monkeypatch.setattr(openvino, "STATIC_DEVICES", ("CPU",))
    engine._graph._requests.clear()
    for call, picture_of_any_shape in zip(CALLS, expected, strict=True):
        assert difference(generate(exported, **call), picture_of_any_shape) < EXACT
    assert 2 <= len(engine._graph._requests) <= openvino.MAX_SHAPES


# Arguments


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cuda"}, "device='cuda' is invalid: expected one of"),
        ({"precision": "int4"}, "precision='int4' is invalid: expected one of"),
        ({"cache_dir": 3}, "cache_dir=3 is invalid"),
    ],
)
def test_invalid_arguments(combined: KandinskyV22CombinedPipeline, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        combined.to_openvino(**options)


@pytest.mark.parametrize("option", [{"device": "NPU"}, {"device": "GPU"}, {"precision": "float16"}], ids=str)
def test_what_this_machine_lacks_is_refused_by_name(
    combined: KandinskyV22CombinedPipeline, option: dict[str, str]
) -> None:
    capabilities = openvino.core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if option.get("device") in [name.split(".")[0] for name in openvino.core().available_devices]:
        pytest.skip("this machine has the device")
    if "precision" in option and "FP16" in capabilities:
        pytest.skip("this processor has float16")
    (name, value) = next(iter(option.items()))
    with pytest.raises(InputError, match=f"{name}='{value}' is invalid: expected one of"):
        combined.to_openvino(**option)


@pytest.mark.parametrize(("precision", "package"), [("float32", "openvino"), ("int8", "nncf")])
def test_a_missing_package_is_named_with_its_extra(
    combined: KandinskyV22CombinedPipeline, precision: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = openvino.importlib.util.find_spec
    monkeypatch.setattr(
        openvino.importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest)
    )
    with pytest.raises(MissingDependencyError, match=rf"needs {package} .*pip install 'kandinsky22\[openvino\]'"):
        combined.to_openvino(precision=precision)


def test_failures_of_openvino_are_errors_of_ours(exported: KandinskyV22CombinedPipeline) -> None:
    engine: Any = state_of(exported.unet).engine
    with pytest.raises(KandinskyError, match="OpenVINO failed to run unet"):
        engine._graph(torch.zeros(2, 4, 16), torch.zeros(1), torch.zeros(2, 128), torch.zeros(2, 32, 16))


@pytest.mark.slow
def test_nothing_is_reported_over_the_network() -> None:
    """In a process of its own, because the reports begin with the import. None remains in the environment."""
    program = """
import os
from openvino_telemetry.utils.sender import TelemetrySender
sent = []
TelemetrySender.send = lambda self, backend, message: sent.append(message)
from kandinsky22.engines import compression, networks, openvino
from kandinsky22 import VQModel
movq = VQModel(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
               up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), layers_per_block=1, num_vq_embeddings=12)
settings = openvino.EngineSettings("CPU", "float32", "float32", None)
networks.MoVQEngine(movq.eval(), settings)
compression._nncf()
print(sent, "CI" in os.environ, "NNCF_CI" in os.environ)
"""
    pytest.importorskip("nncf")
    variables = {name: value for name, value in os.environ.items() if name not in openvino.REPORTS_OFF}
    variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=variables)
    assert result.stdout.strip() == "[] False False", result.stderr
