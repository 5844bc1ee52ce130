"""Files of networks: exchange with the reference, formats, and damaged or wrong checkpoints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from tests.unit.tiny_models import TINY_MOVQ, TINY_PRIOR, TINY_UNET, assert_same_weights

from kandinsky22 import CheckpointError, ConfigError, InputError, PriorTransformer, UNet2DConditionModel, VQModel
from kandinsky22.checkpoints import weights

PAIRS = [
    (VQModel, diffusers.VQModel, TINY_MOVQ),
    (UNet2DConditionModel, diffusers.UNet2DConditionModel, TINY_UNET),
    (PriorTransformer, diffusers.PriorTransformer, TINY_PRIOR),
]
SINGLE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def model() -> VQModel:
    return VQModel(**TINY_MOVQ).eval()


@pytest.fixture
def saved(model: VQModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(("ours", "theirs", "config"), PAIRS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "40KB"}, {"safe_serialization": False, "variant": "fp16"}])
def test_checkpoints_of_the_reference_load(
    ours: Any, theirs: Any, config: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    oracle = theirs(**config)
    oracle.save_pretrained(tmp_path, **options)
    loaded = ours.from_pretrained(tmp_path, variant=options.get("variant"))
    assert_same_weights(loaded, oracle)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(("ours", "theirs", "config"), PAIRS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize(
    "options",
    [{}, {"max_shard_size": "40KB", "variant": "fp16"}, {"max_shard_size": 40_000, "safe_serialization": False}],
)
def test_saved_checkpoints_load_in_the_reference(
    ours: Any, theirs: Any, config: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    model = ours(**config)
    model.save_pretrained(tmp_path, **options)
    safe = options.get("safe_serialization")  # the reference reads sharded .bin files only on request
    loaded = theirs.from_pretrained(tmp_path, variant=options.get("variant"), use_safetensors=safe)
    assert_same_weights(model, loaded)
    assert all(loaded.config[name] == value or loaded.config[name] == list(value) for name, value in config.items())
    assert_same_weights(ours.from_pretrained(tmp_path, variant=options.get("variant")), model)


def test_the_config_survives(model: VQModel, saved: Path) -> None:
    stored = json.loads((saved / "config.json").read_text())
    assert stored["_class_name"] == "VQModel"
    assert VQModel.from_pretrained(saved).config == model.config
    assert VQModel.from_config(model.config).config == model.config


def test_dtypes(model: VQModel, tmp_path: Path) -> None:
    model.to(torch.float16).save_pretrained(tmp_path)
    assert VQModel.from_pretrained(tmp_path).dtype == torch.float32
    assert VQModel.from_pretrained(tmp_path, torch_dtype="auto").dtype == torch.float16
    assert VQModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    for wrong in (torch.int8, "float32", 16):
        with pytest.raises(InputError, match="torch_dtype"):
            VQModel.from_pretrained(tmp_path, torch_dtype=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_newly_initialised_tensors_have_the_stored_type(stored: torch.dtype, tmp_path: Path) -> None:
    UNet2DConditionModel(**TINY_UNET).to(stored).save_pretrained(tmp_path)
    options: dict[str, Any] = {"in_channels": 9, "ignore_mismatched_sizes": True}
    for dtype, expected in (("auto", stored), (None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        network: Any = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=dtype, **options)
        assert {parameter.dtype for parameter in network.parameters()} == {expected}
        condition = {"image_embeds": torch.zeros(1, network.config.encoder_hid_dim, dtype=expected)}
        with torch.no_grad():
            sample = network(torch.zeros(1, 9, 8, 8, dtype=expected), 5, added_cond_kwargs=condition).sample
        assert sample.dtype == expected


def test_tensors_of_another_shape_and_of_a_type_without_floats_are_refused(tmp_path: Path) -> None:
    network = UNet2DConditionModel(**TINY_UNET)
    network.save_pretrained(tmp_path)
    tensors = {
        name: tensor.int() if name == "conv_in.weight" else tensor for name, tensor in network.state_dict().items()
    }
    save_file(tensors, tmp_path / SINGLE, {"format": "pt"})
    for dtype in ("auto", None):
        with pytest.raises(CheckpointError, match=r"1 of the wrong type: conv_in\.weight int32"):
            UNet2DConditionModel.from_pretrained(
                tmp_path, torch_dtype=dtype, in_channels=9, ignore_mismatched_sizes=True
            )


def test_memory_formats_and_devices_do_not_show_in_files(model: VQModel, tmp_path: Path) -> None:
    model.to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    assert_same_weights(VQModel.from_pretrained(tmp_path), model)


def test_saving_over_the_files_in_use(model: VQModel, saved: Path) -> None:
    loaded = VQModel.from_pretrained(saved)
    loaded.save_pretrained(saved)
    assert_same_weights(loaded, model)
    assert_same_weights(VQModel.from_pretrained(saved), model)
    (saved / SINGLE).unlink()
    assert_same_weights(loaded, model)


def test_resaving_leaves_no_stale_shards(model: VQModel, saved: Path) -> None:
    model.save_pretrained(saved, max_shard_size="100KB")
    assert not (saved / SINGLE).exists()
    model.save_pretrained(saved, max_shard_size="400KB")
    assert_same_weights(VQModel.from_pretrained(saved), model)
    model.save_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", SINGLE]


def test_training_a_loaded_network_leaves_its_file_alone(model: VQModel, saved: Path) -> None:
    before = (saved / SINGLE).read_bytes()
    loaded = VQModel.from_pretrained(saved)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    assert (saved / SINGLE).read_bytes() == before


def test_safetensors_come_first_and_formats_can_be_chosen(model: VQModel, saved: Path) -> None:
    with torch.no_grad():
        next(model.parameters()).zero_()
    model.save_pretrained(saved, safe_serialization=False)
    first = next(iter(model.state_dict()))
    assert VQModel.from_pretrained(saved).state_dict()[first].any()
    assert not VQModel.from_pretrained(saved, use_safetensors=False).state_dict()[first].any()
    (saved / SINGLE).unlink()
    assert not VQModel.from_pretrained(saved).state_dict()[first].any()
    with pytest.raises(
        CheckpointError,
        match=r"expected diffusion_pytorch_model\.safetensors; the folder has .*diffusion_pytorch_model\.bin",
    ):
        VQModel.from_pretrained(saved, use_safetensors=True)


def test_bin_files_of_the_old_format(model: VQModel, saved: Path) -> None:
    (saved / SINGLE).unlink()
    torch.save(model.state_dict(), saved / "diffusion_pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same_weights(VQModel.from_pretrained(saved), model)


class Payload:
    def __reduce__(self) -> Any:
        return (print, ("a pickle ran",))


def test_bin_files_never_run_code(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (saved / SINGLE).unlink()
    torch.save({"weight": Payload()}, saved / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.bin"):
        VQModel.from_pretrained(saved)
    assert "a pickle ran" not in capsys.readouterr().out


def damage(folder: Path, how: str) -> str:
    """Damage a saved network and return what the error must name."""
    file, config = folder / SINGLE, folder / "config.json"
    if how in ("truncated", "empty", "noise"):
        content = file.read_bytes()
        file.write_bytes({"truncated": content[:-1000], "empty": b"", "noise": bytes(range(256)) * 20}[how])
        return SINGLE
    if how in ("config truncated", "config empty", "config a list", "config not text"):
        text = {"config truncated": b'{"in_channels": 3', "config empty": b"", "config a list": b"[]"}
        config.write_bytes(text.get(how, b"\xff\xfe"))
        return r"config\.json"
    (config if how == "config missing" else file).unlink()
    return r"config\.json" if how == "config missing" else SINGLE


@pytest.mark.parametrize(
    "how",
    [
        *("truncated", "empty", "noise", "missing"),
        *("config missing", "config truncated", "config empty", "config a list", "config not text"),
    ],
)
def test_damaged_files_are_named(how: str, saved: Path) -> None:
    named = damage(saved, how)
    with pytest.raises(CheckpointError, match=named) as raised:
        VQModel.from_pretrained(saved)
    assert str(saved) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not much", b"noise" * 50])
def test_damaged_bin_files_are_named(content: bytes, saved: Path) -> None:
    (saved / SINGLE).unlink()
    (saved / "diffusion_pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.bin"):
        VQModel.from_pretrained(saved)


def test_missing_shards_and_bad_indices(model: VQModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = next(iter(content["weight_map"].values()))
    (tmp_path / shard).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=shard):
        VQModel.from_pretrained(tmp_path)
    for weight_map in ({"a": "../../etc/passwd"}, {"a": 3}, None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=r"index\.json"):
            VQModel.from_pretrained(tmp_path)


def test_tensors_that_do_not_fit_are_listed(model: VQModel, saved: Path) -> None:
    tensors = dict(model.state_dict())
    dropped = list(tensors)[:12]
    for name in dropped:
        del tensors[name]
    tensors["stray"] = torch.zeros(1)
    reshaped = next(iter(tensors))
    tensors[reshaped] = torch.zeros(7)
    weights.write_tensors(saved, tensors, variant=None, max_shard_size="1GB", safe=True)
    with pytest.raises(CheckpointError) as raised:
        VQModel.from_pretrained(saved)
    message = str(raised.value)
    assert "12 missing" in message and dropped[7] in message and dropped[8] not in message
    assert "1 unexpected: stray" in message
    assert f"1 of the wrong shape: {reshaped} (7,) instead of" in message


def test_wrong_configs(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    for change, named in (
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ({"act_fn": "relu"}, "act_fn"),
        ({"fancy": 3}, "fancy"),
        ({"norm_type": "group"}, "norm_type"),
    ):
        (saved / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ConfigError, match=named):
            VQModel.from_pretrained(saved)


def test_configs_of_another_size_are_reported_by_shapes(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "block_out_channels": [64, 64]}))
    with pytest.raises(CheckpointError, match="of the wrong shape"):
        VQModel.from_pretrained(saved)


@pytest.mark.parametrize("size", [0, -1, 1.5, "many", "5", "GB", True, None])
def test_invalid_shard_sizes_are_refused(size: Any, model: VQModel, tmp_path: Path) -> None:
    message = f"max_shard_size={size!r} is invalid: expected a positive number of bytes, or text such as '5GB'"
    with pytest.raises(InputError, match=re.escape(message)):
        model.save_pretrained(tmp_path, max_shard_size=size)
    assert not list(tmp_path.iterdir())


def test_shard_sizes() -> None:
    sizes = [weights.byte_count(size) for size in (7, "7B", "5GB", "2GiB", "1.5 kb")]
    assert sizes == [7, 7, 5 * 10**9, 2 * 2**30, 1500]


def test_unwritable_folders_are_reported(model: VQModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(CheckpointError, match=str(folder)):
            model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"variant='\.\./fp16' is invalid: expected 1 to 64 letters, digits, - and _"):
        model.save_pretrained(tmp_path, variant="../fp16")


def test_a_failed_save_leaves_the_old_files(model: VQModel, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def half(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(weights, "save_file", half)
    with pytest.raises(CheckpointError, match="disk full"):
        VQModel(**TINY_MOVQ).save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


LOAD = """
import resource, sys
from kandinsky22 import PriorTransformer
tiny = {"num_attention_heads": 1, "attention_head_dim": 2, "embedding_dim": 4, "num_layers": 1}
PriorTransformer.from_config(tiny)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = PriorTransformer.from_pretrained(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
sum(float(p.sum()) for p in model.parameters())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted in other units elsewhere")
def test_loading_takes_no_more_memory_than_the_weights(tmp_path: Path) -> None:
    big = PriorTransformer(num_attention_heads=8, attention_head_dim=64, embedding_dim=64, num_layers=6)
    big.save_pretrained(tmp_path)
    size = (tmp_path / SINGLE).stat().st_size / 1024
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout.split()
    loaded, used = (float(figure) / size for figure in printed)
    assert loaded < 0.3, "weights are mapped, not read"
    assert used < 1.3
