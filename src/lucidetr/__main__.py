"""Run the command line as `python -m lucidetr`."""

from lucidetr.cli import main

if __name__ == "__main__":
    main()
