"""`python -m roro_fast`: the command line of `roro`."""

from roro_fast.cli import app

app()
