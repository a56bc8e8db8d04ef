"""`python -m lightning_app COMMAND ...`."""
from .cli import main

if __name__ == '__main__':
    main()
