"""`python -m pe_dpo`."""

from pe_dpo.cli import main

if __name__ == "__main__":
    main()
