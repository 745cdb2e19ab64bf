"""Names that are given twice, and names that are nearly right."""

import difflib
from collections.abc import Iterable, Sequence


def refuse_duplicates(kind: str, names: Sequence[str]) -> None:
    """Refuse a name that is given twice.

    Raises:
        ValueError: naming it.

    >>> refuse_duplicates("reward", ["text", "crispness", "text"])
    Traceback (most recent call last):
    ValueError: more than one reward 'text'; expected one
    """
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"more than one {kind} {duplicates[0]!r}; expected one")


def perhaps(name: str, known: Iterable[str]) -> str:
    """The known name that is meant, as a question in brackets, or nothing.

    >>> perhaps("txt", ["composition", "text"])
    " (did you mean 'text'?)"
    >>> perhaps("txt", ["composition"])
    ''
    """
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
