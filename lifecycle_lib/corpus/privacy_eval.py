"""How good are the privacy detectors, what does a small classifier add, and how much leaks past both?

- `read_presidio`: rows and gold spans of the presidio-research synthetic file. Its texts are templates filled in, so
  `split_by_template` keeps all rows of a template on one side: detectors are written on one half, reported on the other.
- `TokenClassifier`: logistic regression on hashed features of a token and its neighbours (feature hashing: Weinberger
  et al. 2009). It finds names without a cue word. `recall_gain` compares it with the patterns at a fixed precision,
  with a bootstrap over templates.
- `residual_leak`: people read a sample of admitted rows; the Clopper-Pearson (1934) upper bound says how much may still
  leak, and `n_to_bound` how many must be read.

Left out: transformers, gazetteers, and sequence models; the point is what fifty lines buy.
"""

import math
import random
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import betaincinv

from lifecycle_lib.core.records import read_json
from lifecycle_lib.core.seeds import derive_seed, rng
from lifecycle_lib.core.stats import Effect
from lifecycle_lib.corpus.privacy import Span, find_pii

Rows = Sequence[Mapping[str, Any]]
PRESIDIO_KINDS = {"CREDIT_CARD": "CARD", "PHONE_NUMBER": "PHONE", "EMAIL_ADDRESS": "EMAIL", "DOMAIN_NAME": "URL",
                  "IBAN_CODE": "IBAN", "IP_ADDRESS": "IP", "STREET_ADDRESS": "ADDRESS", "ZIP_CODE": "ZIP",
                  "DATE_TIME": "DATE", "US_DRIVER_LICENSE": "ID_NUMBER"}
PRESIDIO_MERGE = {"BIRTH_DATE": "DATE"}  # that file does not tell them apart
NOT_PERSONAL = frozenset({"GPE", "ORGANIZATION", "NRP", "TITLE"})  # countries, companies, nationalities, "Mrs."
BUCKETS = 2**14


def read_presidio(path: str | Path) -> list[dict[str, Any]]:
    """Rows {"text", "spans", "template"} with our names of kinds; kinds we have no detector for keep theirs.

    Raises ValueError naming file and row where a span's text is not the text at its place."""
    rows = []
    for i, raw in enumerate(read_json(path)):
        text, spans = raw["full_text"], []
        for s in raw["spans"]:
            span = Span(s["start_position"], s["end_position"], PRESIDIO_KINDS.get(s["entity_type"], s["entity_type"]),
                        s["entity_value"])
            if text[span.start:span.end] != span.text:
                raise ValueError(f"{path}: row {i}: characters {span.start}..{span.end} are not {span.text!r}; "
                                 "get the file again")
            spans.append(span)
        rows.append({"text": text, "spans": sorted(spans, key=lambda s: s.start), "template": raw["template_id"]})
    return rows


def split_by_template(rows: Rows, seed: int = 0) -> tuple[list, list]:
    """(one half, the other half): every template is whole on one side. ValueError for fewer than 2 templates."""
    templates = sorted({row["template"] for row in rows})
    if len(templates) < 2:
        raise ValueError(f"{len(templates)} template in {len(rows)} rows: a split needs 2; give rows of more templates")
    random.Random(seed).shuffle(templates)  # the patterns were written on the first half of seed 0
    first = set(templates[:len(templates) // 2])
    return [r for r in rows if r["template"] in first], [r for r in rows if r["template"] not in first]
