"""`python -m tiedconv` is the same as `tiedconv`."""

from tiedconv.cli import main

if __name__ == "__main__":
    main()
