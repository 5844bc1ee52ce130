"""Fine-tuning of Kandinsky 2.2 on pictures of a user: adapters, whole networks and subjects."""
