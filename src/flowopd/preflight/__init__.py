"""Before a run: what it will take, and whether it will run."""

from flowopd.preflight.check import SelfCheck

__all__ = ["SelfCheck"]
