"""Does this interpreter have what requirements.lock pins? Standard library only: it runs before any install.

    python tests/check_env.py [--lock requirements.lock]

Exit 0 and no output when it does; exit 1 and one line per difference when it does not. The Makefile asks it
whether an active environment can be used, and after an install whether the install is whole.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def canonical(name: str) -> str:
    """The one spelling of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(path: Path) -> dict[str, str]:
    """`name==version` lines as {canonical name: version}; ValueError on any other line but comments."""
    pins = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)==([\w.!]+)", text)
        if not match:
            raise ValueError(f"{path.name}:{number}: {text!r} is not name==version; run `make lock`")
        if canonical(match[1]) in pins:
            raise ValueError(f"{path.name}:{number}: {match[1]} is pinned twice; run `make lock`")
        pins[canonical(match[1])] = match[2]
    if not pins:
        raise ValueError(f"{path.name}: no pins; run `make lock`")
    return pins


def torch_pin(pyproject: Path) -> str:
    """The version pyproject.toml pins torch to."""
    for requirement in tomllib.loads(pyproject.read_text())["project"]["dependencies"]:
        name, _, version = requirement.partition("==")
        if canonical(name) == "torch":
            return version
    raise ValueError(f"{pyproject.name}: torch is not pinned among the dependencies; add torch==VERSION")


def differences(pins: dict[str, str]) -> list[str]:
    """One line for each pin that this interpreter does not meet (2.13.0+cpu meets 2.13.0)."""
    found = []
    for name, wanted in pins.items():
        try:
            have = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(f"{name}=={wanted} is not installed")
        else:
            if have != wanted and have.split("+")[0] != wanted:
                found.append(f"{name}=={wanted} is wanted, {have} is installed")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare this interpreter with requirements.lock.")
    parser.add_argument("--lock", type=Path, default=ROOT / "requirements.lock")
    args = parser.parse_args()
    found = differences({**read_lock(args.lock), "torch": torch_pin(ROOT / "pyproject.toml")})
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
