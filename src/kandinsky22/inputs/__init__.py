"""Conversion of user input (images, masks, hints, prompts, embeddings) to checked tensors, without networks."""
