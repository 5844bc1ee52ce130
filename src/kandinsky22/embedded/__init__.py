"""The embedded model: weights and model card of a small Kandinsky 2.2, trained from scratch by this project."""
