"""`python -m kandinsky22.training.drawings`: train the embedded model on drawings, stage by stage, resuming them.

Each stage uses one thread. Stages that do not depend on each other can run at the same time in several processes: CLIP
and the autoencoder, then the towers and the decoder, then the prior and the shared UNet.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from kandinsky22.errors import CheckpointError
from kandinsky22.training.drawings.assemble import assemble
from kandinsky22.training.drawings.clip import Clip, train_clip, train_towers
from kandinsky22.training.drawings.decoder import load_decoder, train_decoder
from kandinsky22.training.drawings.movq import load_movq, train_autoencoder, train_movq
from kandinsky22.training.drawings.prior import train_prior
from kandinsky22.training.drawings.shared import train_shared
from kandinsky22.training.drawings.sprites import Sprites
from kandinsky22.training.loop import is_finished


def _clip(out: Path, stage: str = "towers") -> Clip:
    """Return CLIP after a stage: "clip", after which the sums of parts are final, or "towers"."""
    _require(out / stage)
    return Clip.load(out / stage)


def _require(folder: Path) -> None:
    if not is_finished(folder):
        raise CheckpointError(f"the stage {folder} is not finished; run the stages in order")


def _decoder(out: Path, sprites: Sprites) -> None:
    _require(out / "movq" / "autoencoder")
    train_decoder(out / "decoder", load_movq(out / "movq", sprites), _clip(out, "clip"), sprites)


def _shared(out: Path, sprites: Sprites) -> None:
    _require(out / "decoder")
    train_shared(out / "shared", load_decoder(out / "decoder"), load_movq(out / "movq", sprites), _clip(out), sprites)


# In order of dependency.
STAGES: dict[str, Callable[[Path, Sprites], object]] = {
    "clip": lambda out, sprites: train_clip(out / "clip", sprites),
    "towers": lambda out, sprites: train_towers(out / "towers", _clip(out, "clip"), sprites),
    "autoencoder": lambda out, sprites: train_autoencoder(out / "movq", sprites),
    "prior": lambda out, sprites: train_prior(out / "prior", _clip(out)),
    "decoder": _decoder,
    "shared": _shared,
    "movq": lambda out, sprites: train_movq(out / "movq", sprites),
    "assemble": assemble,
}


def main(arguments: list[str] | None = None) -> None:
    """Run training stages.

    Args:
        arguments: Command line arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m kandinsky22.training.drawings", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("training"), help="folder of checkpoints, logs and results")
    parser.add_argument(
        "--stage", action="append", choices=list(STAGES), help="stage to run; may be repeated (default: all stages)"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sprites = Sprites(options.out)
    for name in options.stage or STAGES:
        print(f"stage {name}", flush=True)
        STAGES[name](options.out, sprites)


if __name__ == "__main__":
    main()
