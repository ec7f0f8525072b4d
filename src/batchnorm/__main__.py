"""`python -m batchnorm`: the command line where no `batchnorm` is on the path."""

from batchnorm.cli.app import main

main()
