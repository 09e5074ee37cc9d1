"""`python -m microlm` is the `microlm` command."""

from microlm.cli import main

if __name__ == "__main__":
    main()
