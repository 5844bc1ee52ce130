"""One generation: timesteps, the denoising loop, guidance and presets. Nothing here knows a pipeline."""
