"""`python -m lightning_app fit|validate|test|predict|analyze|compare|dashboard|export|sweep|benchmark ...`."""
from .cli import main

if __name__ == '__main__':
    main()
