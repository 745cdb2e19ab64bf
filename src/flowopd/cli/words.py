"""A parser of words without torch, whose refusals are sentences."""

from argparse import ArgumentParser
from typing import NoReturn

SAID = {
    "the following arguments are required: ": "these are missing: ",
    "unrecognized arguments: ": "these are not known: ",
}


class WordParser(ArgumentParser):
    """An ``ArgumentParser`` that raises instead of leaving.

    Raises:
        ValueError: by ``parse_args``, saying what is wrong.
    """

    def error(self, message: str) -> NoReturn:
        """Refuse in one sentence."""
        for theirs, ours in SAID.items():
            message = message.replace(theirs, ours)
        raise ValueError(f"{message}; see {self.prog} --help")
