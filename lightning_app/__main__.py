"""`python -m lightning_app fit|validate|test|predict|analyze|compare|export|benchmark ...`."""
from .cli import main

if __name__ == '__main__':
    main()
