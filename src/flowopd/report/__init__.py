"""What runs made of themselves, on one page: HTML that stands alone, the same in Markdown, and PNGs."""

from flowopd.report.write import write

__all__ = ["write"]
