"""`python -m svag_fast`: the same program as `svag-fast`."""

from svag_fast.cli.main import main

main(prog_name="svag-fast")
