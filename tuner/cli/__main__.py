"""`python -m tuner.cli` is `tuner`."""

from tuner.cli import main

if __name__ == "__main__":
    main()
