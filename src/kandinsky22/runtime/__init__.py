"""Running networks: device and dtype, offloading, lazy loading, quantization, compilation."""
