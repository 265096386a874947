"""The built-in spaces, and the lookup of built-in and user-defined ones."""

import difflib
import importlib
from collections.abc import Mapping

from search_spaces import article, dose, dropout, finetune, layerwise, placebo
from search_spaces.ranges import SpaceError
from search_spaces.space import Space

SPACES: Mapping[str, Space] = {
    space.name: space
    for space in (
        dropout.SPACE,
        finetune.SPACE,
        article.SPACE,
        dose.SPACE,
        layerwise.SPACE,
        placebo.SPACE,
    )
}


def find_space(spec: str) -> Space:
    """Find a space by its name or import path.

    Args:
        spec: The name of a built-in space, or `package.module:NAME` for a user-defined one, whose
            module must be importable.

    Raises:
        SpaceError: There is no such space, its module cannot be imported, or the object is not a
            Space; the message is one line.
    """
    if ":" in spec:
        return _import_space(spec)
    if spec not in SPACES:
        raise SpaceError(
            f"unknown space {spec!r}; choose from {', '.join(SPACES)}, or give your own as"
            f" package.module:NAME{_closest(spec, SPACES)}"
        )
    return SPACES[spec]


def _import_space(spec: str) -> Space:
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    # The user's module may raise anything; a script may also exit.
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SpaceError(f"cannot import the module of space {spec!r}: {reason}") from error
    if not hasattr(module, name):
        raise SpaceError(f"module {module_name} has no {name!r}{_closest(name, vars(module))}")
    space = getattr(module, name)
    if not isinstance(space, Space):
        raise SpaceError(f"{spec} is of type {type(space).__name__}, not a search_spaces.Space")
    return space


def _closest(name: str, names: Mapping[str, object]) -> str:
    matches = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
