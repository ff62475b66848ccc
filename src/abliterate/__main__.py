"""`python -m abliterate`, and `accelerate launch --module abliterate`."""

from abliterate.cli import main

if __name__ == "__main__":
    main()
