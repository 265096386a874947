"""The spaces that come with the project, and how to find one or the user's own."""

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
    """Find a space by what the user typed.

    Args:
        spec: A name of the registry, or `package.module:NAME` for a space of the user's own, in a
            module that Python can import from where it runs.

    Raises:
        SpaceError: There is no such space, its module cannot be imported, or it is no space; the
            message is one line.
    """
    if ":" in spec:
        return _import_space(spec)
    if spec not in SPACES:
        raise SpaceError(
            f"unknown space {spec!r}; there are {', '.join(SPACES)}, and package.module:NAME for"
            f" your own{_closest(spec, SPACES)}"
        )
    return SPACES[spec]


def _import_space(spec: str) -> Space:
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    # Whatever the user's module does wrong, the user hears of it here; a script may also exit.
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SpaceError(f"cannot import the module of space {spec!r}: {reason}") from error
    if not hasattr(module, name):
        raise SpaceError(f"module {module_name} holds no {name!r}{_closest(name, vars(module))}")
    space = getattr(module, name)
    if not isinstance(space, Space):
        raise SpaceError(f"{spec} is of type {type(space).__name__}, not a search_spaces.Space")
    return space


def _closest(name: str, names: Mapping[str, object]) -> str:
    matches = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
