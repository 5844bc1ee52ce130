"""Adapters: files of LoRA weights and of fine-tuned weights, and networks that apply several of them."""
