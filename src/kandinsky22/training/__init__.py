"""How the networks are trained: the recipes of the embedded model, on pictures the project draws itself."""
