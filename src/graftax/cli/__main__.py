"""`python -m graftax.cli`, where the `graftax` command is not on the path."""

from graftax.cli import main

if __name__ == "__main__":
    main()
