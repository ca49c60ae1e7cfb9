"""After D2: does a lower learning rate keep the refusals, at equal skill, and was LoRA's rate to blame?

D2 trains plain arms at one rate and adapters at a higher one. This question was put after its result had been seen, so
it is measured on its own, its claim fixed on a pilot seed before the run. The same bases, rows, marks and exams as D2;
only the rate differs. Refusals are read where exact pass crosses the target, interpolated between two checkpoints.

Left out: schedules, batch sizes, a rate for every leash.
"""

from lifecycle_lib.core.store import Artifact
from lifecycle_lib.lab.design import Design, Row
from lifecycle_lib.lab.stages import Lab
from lifecycle_lib.lab.studies import erosion
from lifecycle_lib.lab.studies.erosion import Arm, ErosionConfig, fine_tuned, interpolated

ARMS = {"plain": Arm(), "plain, rate / 4": Arm(lr=5e-4), "plain, rate / 10": Arm(lr=2e-4),
        "LoRA r=16": Arm(rank=16, lr=5e-3), "LoRA r=16, rate of plain": Arm(rank=16)}
PAIRS = (("plain, rate / 10", "plain"), ("plain, rate / 4", "plain"),
         ("LoRA r=16, rate of plain", "LoRA r=16"), ("LoRA r=16, rate of plain", "plain"))


def measure(lab: Lab, cfg: ErosionConfig | None = None) -> tuple[Row, list[Artifact]]:
    """Refusal, over-refusal and step at exactly the target skill, an arm at a time; "reached" 0: it never got there."""
    cfg = cfg or erosion.SIZES[lab.profile.name]
    row: dict = {}
    made = []
    for name, arm in ARMS.items():
        made.append(fine_tuned(lab, cfg, name, arm))
        curve = made[-1].card["measured"]["curve"]
        at = {k: interpolated(curve, k, cfg.target) for k in ("refusal", "over_refusal", "step")}
        row |= {f"{name}.{k}": 0.0 if v is None else v for k, v in at.items()}
        row |= {f"{name}.reached": float(at["step"] is not None), f"{name}.end_exact": curve[-1]["exact"]}
        row[f"{name}.curve"] = [{k: round(v, 4) for k, v in c.items()} for c in curve]
    return row, made


DESIGN = Design(
    measure=measure, notebook="09", smallest=0.10, n_items=erosion.DESIGN.n_items, items=erosion.DESIGN.items,
    rows=("S2-05d", "S4-29", "S3-9.28"),
    claim="at 50 % exact pass a tenth of the learning rate keeps at least 10 points more of the refusals than the full "
          "rate does",
    falsifier="a tenth of the rate keeps under 10 points more, over the seeds in which both rates reach the skill",
    effects=(*((f"refusal at equal skill, {a} - {b}", f"{a}.refusal", f"{b}.refusal", "share",
                (f"{a}.reached", f"{b}.reached")) for a, b in PAIRS),
             *((f"{a}: {what} at equal skill", f"{a}.{key}", None, unit, (f"{a}.reached",)) for a in ARMS
               for what, key, unit in (("refusal", "refusal", "share"), ("over-refusal", "over_refusal", "share"),
                                       ("step", "step", "steps"))),
             *((f"{a}: reached the skill", f"{a}.reached", None, "share of seeds") for a in ARMS),
             *((f"{a}: exact pass at the end", f"{a}.end_exact", None, "share") for a in ARMS)))
