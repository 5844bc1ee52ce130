"""Write the reference of training options, or compare it: `python docs/training_options.py [--check]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from kandinsky22.cli.train import KINDS
from kandinsky22.training.finetuning.option import Option
from kandinsky22.training.finetuning.options import (
    TinyDecoderOptions,
    TrainingOptions,
)

TINY_DECODER = next(kind for kind in KINDS if kind.options is TinyDecoderOptions)
PAGE = Path(__file__).parent / "reference" / "training-options.md"
INTRODUCTION = """# Training options

Options of `kandinsky22 train lora`, `full`, `subject`, `distill` and `tiny-decoder`, written by
`docs/training_options.py`.
[Train on your own pictures](../how-to/training.md) explains them.

- A YAML file may hold them: `--config FILE`, one `name: value` per line, with hyphens or underscores. The command line
  takes precedence.
- Options with several values are lists in YAML: `target_modules: [attention, blocks]`.
- Switches have a negative form: `--no-use-ema`.
- In Python they are the fields of `TrainingOptions`, `SubjectOptions`, `DistillOptions` and `TinyDecoderOptions`, with
  underscores.
"""
SWITCHES = {"True": "yes", "False": "no"}


def rows(options: list[Option]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield "| Option | Default | Meaning |"
    yield "|---|---|---|"
    for option in options:
        text = option.default_text
        default = SWITCHES.get(text, f"`{text}`") if text else ""
        choices = f": {', '.join(f'`{choice}`' for choice in option.choices)}" if option.choices else ""
        yield f"| `{option.flag}` | {default} | {option.help}{choices} |"


def page() -> str:
    """Return the text of the page."""
    parts = [INTRODUCTION]
    listed = list(TrainingOptions.options())
    for group in dict.fromkeys(option.group for option in listed):
        only = [kind.name for kind in KINDS if group in kind.without]
        note = f"\nNot for `train {'`, `train '.join(only)}`.\n" if only else ""
        parts.append(f"## {group[0].upper()}{group[1:]}\n{note}")
        parts.append("\n".join(rows([option for option in listed if option.group == group])) + "\n")
        lacking = [f"`{option.flag}`" for option in listed if option.group == group and not TINY_DECODER.has(option)]
        if lacking:
            parts.append(f"Not for `train tiny-decoder`: {', '.join(lacking)}.\n")
    titles = {"subject": "Subject", "distill": "Distillation", "tiny-decoder": "Tiny decoder"}
    for kind in (each for each in KINDS if each.name in titles):
        own = [option for option in kind.options.options() if option not in listed and kind.has(option)]
        parts.append(f"## {titles[kind.name]}\n\nOnly for `train {kind.name}`, or with another default there.\n")
        parts.append("\n".join(rows(own)) + "\n")
    parts.append(PYTHON)
    return "\n".join(parts)


PYTHON = """## In Python

::: kandinsky22.training.finetuning.finetune.finetune

::: kandinsky22.training.finetuning.subject.train_subject

::: kandinsky22.training.finetuning.distill.distill

::: kandinsky22.training.finetuning.tiny_decoder.train_tiny_decoder

::: kandinsky22.checkpoints.subject_file.load_subject

::: kandinsky22.checkpoints.subject_file.Subject
"""


def main() -> None:
    """Write the page, or compare it."""
    if "--check" in sys.argv[1:]:
        if PAGE.read_text(encoding="utf-8") != page():
            sys.exit(f"{PAGE} is not up to date: run python docs/training_options.py")
        return
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
