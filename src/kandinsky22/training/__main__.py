"""`python -m kandinsky22.training`: train the embedded model from scratch, stage by stage, resuming unfinished stages.

Each stage uses one thread. Stages that do not depend on each other can run at the same time in several processes: the
prior and the decoder, once CLIP and the autoencoder are finished.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from kandinsky22.training.assemble import assemble
from kandinsky22.training.clip import Towers, train_clip
from kandinsky22.training.decoder import train_decoder
from kandinsky22.training.loop import is_finished
from kandinsky22.training.movq import load_autoencoder, train_autoencoder, train_movq
from kandinsky22.training.prior import train_prior
from kandinsky22.training.shared_unet import train_shared


def _prior(out: Path) -> None:
    train_prior(out / "prior", train_clip(out / "clip"))


def _decoder(out: Path) -> None:
    train_decoder(out / "decoder", train_autoencoder(out / "movq").requires_grad_(False), train_clip(out / "clip"))


def _shared(out: Path) -> None:
    if not is_finished(out / "decoder"):
        _decoder(out)
    # Loading writes no files, unlike training again: the second stage of MoVQ may be running at the same time.
    movq, towers = load_autoencoder(out / "movq"), Towers.load(out / "clip" / "model")
    train_shared(out / "shared", out / "decoder", movq, towers)


# In order of dependency. A stage uses the results of the previous ones, and trains them first if they are missing.
STAGES: dict[str, Callable[[Path], object]] = {
    "clip": lambda out: train_clip(out / "clip"),
    "autoencoder": lambda out: train_autoencoder(out / "movq"),
    "prior": _prior,
    "decoder": _decoder,
    "movq": lambda out: train_movq(out / "movq"),
    "shared": _shared,
    "assemble": assemble,
}


def main(arguments: list[str] | None = None) -> None:
    """Run training stages.

    Args:
        arguments: Command line arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m kandinsky22.training", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("training"), help="folder of checkpoints, logs and results")
    parser.add_argument(
        "--stage", action="append", choices=list(STAGES), help="stage to run; may be repeated (default: all stages)"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.stage or STAGES:
        print(f"stage {name}", flush=True)
        STAGES[name](options.out)


if __name__ == "__main__":
    main()
