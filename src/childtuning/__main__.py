"""``python -m childtuning``."""

from childtuning.cli import main

if __name__ == "__main__":
    main()
