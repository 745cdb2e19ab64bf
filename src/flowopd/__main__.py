"""``python -m flowopd``."""

from flowopd.cli import main

if __name__ == "__main__":
    main()
