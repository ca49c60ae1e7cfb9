"""One tiny GPT, from random weights to a released returns assistant, on two CPU cores.

The folders are the lifecycle: `corpus` feeds training, `train` changes weights, `serve` uses them frozen, `judge`
decides what passes, and `lab` lets a person drive; `core`, `desk` and `model` are what they stand on. A file
imports only from folders on a floor below its own (tests/test_floors.py). Importing this package loads nothing else.
"""

__version__ = "0.1.0"
