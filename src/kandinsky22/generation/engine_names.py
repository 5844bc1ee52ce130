"""Names of the engines that run networks, as users type them and recipes record them."""

from __future__ import annotations

TORCH = "torch"
OPENVINO = "openvino"
# OpenVINO's devices by name; the name without a device stands for the CPU.
OPENVINO_DEVICES = {
    OPENVINO: "CPU",
    f"{OPENVINO}:gpu": "GPU",
    f"{OPENVINO}:npu": "NPU",
    f"{OPENVINO}:auto": "AUTO",
}
ENGINES = (TORCH, *OPENVINO_DEVICES)
