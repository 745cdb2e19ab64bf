"""An extension of griffe: examples of docstrings are shown as code."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts fences around what begins with ``>>>``, up to an empty line."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Before the docstring is parsed."""
        if obj.docstring and ">>>" in obj.docstring.value:
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
