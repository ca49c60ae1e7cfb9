"""Commands: rights of a corpus: prove, check, compose, lineage."""

import argparse


def register(commands: "argparse._SubParsersAction") -> None:
    """Add these commands to the command line."""
