"""`python -m dgrad_cli` is `dgrad`."""

from dgrad_cli.main import main

if __name__ == "__main__":
    main()
