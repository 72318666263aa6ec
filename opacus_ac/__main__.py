"""``python -m opacus_ac``: the command line."""

from opacus_ac.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
