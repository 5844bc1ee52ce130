"""How networks run: device and dtype, offloading, lazy loading, quantization, compilation."""
