"""Checkpoint files: finding them in folders and on the Hub, strict reading, atomic writing, fingerprints."""
