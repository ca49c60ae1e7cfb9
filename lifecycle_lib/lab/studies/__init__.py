"""The experiments of the data half and of post-training, recorded by `lifecycle evidence NAME`."""

from lifecycle_lib.lab.design import Design
from lifecycle_lib.lab.studies import (
    adapters_design,
    closures,
    dedup,
    distillation,
    erosion,
    habits_design,
    ledger,
    messy,
    mixing,
    overoptimisation_design,
    preferences,
    recipes,
    removal_design,
    scaling,
    sft_contract,
)

STUDIES: dict[str, Design] = {
    "peft_ranks": adapters_design.DESIGN,
    "D5": dedup.DESIGN,
    "D8": removal_design.D8,
    "closure_drill": closures.DESIGN,
    "sensitivity": recipes.DESIGN,
    "mixing": mixing.DESIGN,
    "D12": scaling.DESIGN,
    "D9": habits_design.DESIGN,
    "D10": messy.DESIGN,
    "D4": overoptimisation_design.DESIGN,
    "D2": erosion.DESIGN,
    "forgetting_ledger": ledger.DESIGN,
    "sft_contract": sft_contract.DESIGN,
    "distillation": distillation.NEEDED,
    "teacher_faults": distillation.FAULTS,
    "preference_kin": preferences.KIN_DESIGN,
}
