"""``python -m flowopd``."""

from flowopd.cli.main import main

if __name__ == "__main__":
    main()
