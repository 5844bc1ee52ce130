"""All targets, by name."""

from __future__ import annotations

from tests.fuzz.calls import Calls, Methods
from tests.fuzz.checkpoints import Checkpoints
from tests.fuzz.commands import Commands, Recipes
from tests.fuzz.constructors import Constructors
from tests.fuzz.harness import Target
from tests.fuzz.pictures import Pictures
from tests.fuzz.world import World

CLASSES = (Calls, Methods, Constructors, Checkpoints, Pictures, Recipes, Commands)
NAMES = tuple(target.name for target in CLASSES)
# Share of the cases of a run: targets whose cases are slow get fewer.
SHARES = {
    "calls": 0.3,
    "methods": 0.1,
    "constructors": 0.2,
    "checkpoints": 0.08,
    "pictures": 0.2,
    "recipes": 0.06,
    "commands": 0.06,
}


def targets_of(world: World) -> dict[str, Target]:
    """Return all targets on these checkpoints."""
    return {target.name: target(world) for target in CLASSES}
