"""Commands: contamination audit against the registry of evaluation sets."""

import argparse


def register(commands: "argparse._SubParsersAction") -> None:
    """Add these commands to the command line."""
