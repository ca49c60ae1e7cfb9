"""Commands: data gate, diff and explain on the user's own JSONL."""

import argparse


def register(commands: "argparse._SubParsersAction") -> None:
    """Add these commands to the command line."""
