"""The embedded model: weights and card of a small Kandinsky 2.2 that this project trained itself."""
