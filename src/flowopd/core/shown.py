"""Objects that print what they are."""

import inspect


class Shown:
    """Prints itself as it would be made again."""

    def __repr__(self) -> str:
        return shown(self)


def shown(thing: object) -> str:
    """An object as it would be made again: its class, and every argument of its constructor that it kept.

    What says itself how it prints, prints so.

    >>> class Kernel:
    ...     def __init__(self, width: float, shape: str = "box", seed: int = 0) -> None:
    ...         self.width, self.shape = width, shape
    >>> shown([Kernel(0.5), 3])
    "[Kernel(width=0.5, shape='box'), 3]"
    """
    if isinstance(thing, list):
        return f"[{', '.join(map(shown, thing))}]"
    if type(thing).__repr__ not in (object.__repr__, Shown.__repr__):
        return repr(thing)
    kept = [name for name in inspect.signature(type(thing)).parameters if hasattr(thing, name)]
    return f"{type(thing).__name__}({', '.join(f'{name}={shown(getattr(thing, name))}' for name in kept)})"
