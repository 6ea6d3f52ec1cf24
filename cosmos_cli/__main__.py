"""`python -m cosmos_cli` is `cosmos`."""

from cosmos_cli.app import main

main()
