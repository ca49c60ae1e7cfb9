"""Commands: rebuild from a card, recipe freeze, closure check."""

import argparse


def register(commands: "argparse._SubParsersAction") -> None:
    """Add these commands to the command line."""
