"""Exact CPU fast paths. Each falls back to the plain torch operation; nothing here imports the rest of kandinsky22."""
