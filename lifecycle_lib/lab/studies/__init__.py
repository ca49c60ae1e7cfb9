"""The experiments of the data half: each a design over many small models, recorded by `lifecycle evidence NAME`."""

from lifecycle_lib.lab.design import Design
from lifecycle_lib.lab.studies import mixing

STUDIES: dict[str, Design] = {
    "mixing": mixing.DESIGN,
}
