"""`python -m abliterate`, and `torchrun -m abliterate`."""

from abliterate.cli import main

if __name__ == "__main__":
    main()
