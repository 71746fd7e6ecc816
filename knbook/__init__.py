"""The press: notebooks run and stored, the book rendered, sweeps, and the command line."""
