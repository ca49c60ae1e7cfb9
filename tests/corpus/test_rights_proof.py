"""Proofs that hold for their rows only, and what they do not prove; notices."""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import replace

import pytest

from lifecycle_lib.corpus import rights_proof
from lifecycle_lib.corpus.rights import JobSpec
from lifecycle_lib.corpus.rights_log import ClaimsLog
from lifecycle_lib.corpus.rights_proof import MerkleTree, check_proof, notice, prove, seal

OPEN = JobSpec(name="open", purpose="commercial", distribution="OPEN", allowed_tags=("attribution",), date="2026-06-01")


def rows_of(*pairs: tuple[str, str], n: int = 3) -> list[dict]:
    return [{"id": f"{source}-{i}", "text": f"text {i} of {source}", "source": source, "licence": licence}
            for source, licence in pairs for i in range(n)]


def recursive_root(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, as it is written there."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    k = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + recursive_root(leaves[:k]) + recursive_root(leaves[k:])).digest()


def test_merkle_root_is_that_of_rfc_6962():
    for n in (1, 2, 3, 5, 8, 13, 100):
        tree, leaves = MerkleTree(), [str(i).encode() for i in range(n)]
        for leaf in leaves:
            tree.add(leaf)
        assert tree.root() == recursive_root(leaves).hex()
        assert len(tree.full) <= n.bit_length()


ROWS = rows_of(("M", "MIT"), ("C", "CC-BY-4.0"))


def test_a_proof_holds_for_its_rows_only():
    proof = json.loads(json.dumps(prove(OPEN, ROWS)))
    assert proof["complies"] and proof["rows"] == 6 and [s["rows"] for s in proof["sources"]] == [3, 3]
    assert check_proof(proof, ROWS) == []
    edits = [ROWS[1:], [ROWS[1], ROWS[0], *ROWS[2:]], [*ROWS, ROWS[0]],
             *([{**ROWS[0], field: "CC0-1.0"}, *ROWS[1:]] for field in ("id", "text", "source", "licence"))]
    for rows in edits:
        assert any("a row" in problem for problem in check_proof(proof, rows))


@pytest.mark.parametrize("edit", [
    {"rows": 7}, {"root": "0" * 64}, {"complies": False}, {"sources": []}, {"refused_rows": 1},
    {"claims_fingerprint": "x"}, {"conflicts": [{}]}, {"rules": {}}, {"approved": "yes"},
])
def test_an_edited_proof_is_rejected_even_when_it_is_sealed_again(edit):
    proof = prove(OPEN, ROWS)
    assert any("edited after" in problem for problem in check_proof({**proof, **edit}, ROWS))
    assert check_proof(seal({**proof, **edit}), ROWS)


def test_a_milder_job_in_the_proof_is_caught_by_whoever_knows_the_job_or_the_key():
    rows, key = [*ROWS, *rows_of(("S", "CC-BY-SA-4.0"))], b"k" * 16
    honest = prove(OPEN, rows, key=key)
    assert not honest["complies"] and check_proof(honest, rows, key=key) == []
    forged = prove(replace(OPEN, allowed_tags=("attribution", "share-alike")), rows)
    assert forged["complies"] and check_proof(forged, rows) == []  # valid, of another job: what no key cannot tell
    assert check_proof(forged, rows, spec=OPEN) == ["it is the proof of another job: allowed_tags differ"]
    assert check_proof(forged, rows, key=key) == ["it is not signed"]
    assert check_proof(prove(OPEN, rows, key=b"x" * 16), rows, key=key) == ["it is not signed with this key"]
    body = json.dumps({k: v for k, v in honest.items() if k not in ("seal", "signature")}, sort_keys=True,
                      separators=(",", ":")).encode()
    assert honest["signature"] == hmac.new(key, body, "sha256").hexdigest()
    with pytest.raises(ValueError, match="a key of 3 bytes"):
        prove(OPEN, rows, key=b"abc")


def test_a_proof_that_hashes_ids_only_would_pass_an_edited_text(monkeypatch):
    edited = [{**ROWS[0], "text": "text 7 of M"}, *ROWS[1:]]
    assert check_proof(prove(OPEN, ROWS), edited)
    monkeypatch.setattr(rights_proof, "leaf_of", lambda row, terms: row["id"].encode())
    assert check_proof(prove(OPEN, ROWS), edited) == []


def test_refusals_name_the_rows():
    proof = prove(OPEN, [*ROWS, *rows_of(("N", "CC-BY-NC-4.0"), ("", "MIT"), ("U", ""), n=1)])
    assert [row["id"] for row in proof["refused"]] == ["N-0", "-0", "U-0"] and not proof["complies"]
    assert "no source is named" in proof["refused"][1]["problems"][0]


def test_rows_are_streamed_and_refusals_capped(monkeypatch):
    monkeypatch.setattr(rights_proof, "MAX_LISTED", 2)
    proof = prove(OPEN, (row for row in rows_of(("N", "CC-BY-NC-4.0"), n=500)))
    assert proof["refused_rows"] == 500 and len(proof["refused"]) == 2


def test_bad_input_to_prove():
    with pytest.raises(ValueError, match="nothing to prove"):
        prove(OPEN, [])
    with pytest.raises(ValueError, match="a.jsonl:2: text=None"):
        prove(OPEN, [ROWS[0], {"id": "x"}], where="a.jsonl")
    with pytest.raises(ValueError, match="not a rights proof"):
        check_proof({"seal": "x"}, ROWS)


def test_the_notice_names_every_source_and_its_gaps():
    log = ClaimsLog([{"source": "F", "date": "2026-01-10", "event": "granted", "licence": "CC-BY-4.0", "holder": "f"}])
    entries = [{"source": s, "licence": x, "rows": 2} for s, x in (("F", "CC-BY-4.0"), ("M", "MIT"), ("Z", "CC0-1.0"))]
    text, gaps = notice("model", entries, log, "2026-02-01")
    for entry in entries:
        assert f"## {entry['source']}\n- licence: {entry['licence']}\n- rows: 2\n" in text
        assert f"https://spdx.org/licenses/{entry['licence']}.html" in text
    assert "- by: f\n" in text and gaps == ["M: who to name is not on file"]
    assert "U: no licence is claimed" in notice("model", [{"source": "U", "licence": "", "rows": 1}])[1]
    with pytest.raises(ValueError, match="no sources"):
        notice("model", [])
