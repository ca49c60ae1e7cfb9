"""The experiments of the data half: each a design over many small models, recorded by `lifecycle evidence NAME`."""

from lifecycle_lib.lab.design import Design
from lifecycle_lib.lab.studies import closures, mixing, recipes, scaling

STUDIES: dict[str, Design] = {
    "closure_drill": closures.DESIGN,
    "sensitivity": recipes.DESIGN,
    "mixing": mixing.DESIGN,
    "D12": scaling.DESIGN,
}
