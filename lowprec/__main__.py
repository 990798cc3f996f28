"""`python -m lowprec`: the command line."""

from lowprec.cli import app

app(prog_name="lowprec")
