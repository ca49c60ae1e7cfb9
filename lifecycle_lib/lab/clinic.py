"""The debugging clinic: read a run's chart, order tests, name the cause (`lifecycle clinic`, and in the notebooks).

Seventeen patients (lab/patients.py), each with one planted bug. A diagnosis is worth 5 points, less one for every test
ordered and two for every wrong name, never under 0. The case book is plain JSON: {patient: {"tests", "wrong",
"points"}}; points are there once the cause is named. The healthy twin, the same run without the bug, counts as a test.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lifecycle_lib.core.records import read_json, write_json
from lifecycle_lib.lab import patients
from lifecycle_lib.lab.patients import Chart

FULL_POINTS = 5
TWIN = "healthy twin"
Book = dict[str, dict]


@dataclass(frozen=True, slots=True)
class Patient:
    """`sign(chart)`: does this chart show the bug? True with it planted, False in the healthy twin."""

    cause: str
    complaint: str
    run: Callable[[bool], Chart]
    sign: Callable[[Chart], bool]
    why: str
    fix: str
    notebook: str


CAUSES = {
    "mask_off_by_one": "the loss counts the tokens one place too early",
    "shifted_twice": "labels that were shifted already are shifted once more in the loss",
    "padding_counted": "padding counts as a target",
    "template_drift": "training and serving render the prompt differently",
    "leaked_split": "evaluation rows are in the training file",
    "seed_after_init": "the seed is set after the weights were drawn",
    "erasing_rate": "the learning rate is so large that the base is erased",
    "mean_of_means": "micro-batches are averaged with equal weight, whatever their number of tokens",
    "own_reference": "the reference is the policy itself, at every step",
    "optimiser_elsewhere": "the optimiser holds the parameters of another copy",
    "swapped_pairs": "chosen and rejected are swapped",
    "reward_sees_eos": "the reward function compares text that still carries its end token",
    "greedy_rollouts": "rollouts are decoded greedily, so a group is one answer eight times",
    "temperature_mismatch": "sampling and loss use different temperatures, so old and new log-probabilities disagree",
    "merge_without_scale": "the adapter was merged without alpha / rank",
    "augmented_facts": "augmentation changes the facts that the answer depends on",
    "forgotten_t2": "the softened loss is not multiplied by its temperature squared",
    "too_few_steps": "nothing is wrong but that it was stopped too early",
    "bad_verifier": "the verifier pays wrong answers",
    "kl_too_strong": "the KL penalty holds the policy where it was",
}

WOULD_SHOW = {  # how a chart with this cause looks: the answer to a wrong name
    "mask_off_by_one": "the counted tokens of a row would begin before its answer and stop before <eos>",
    "shifted_twice": "the library's own loss on the same rows would be far above the run's",
    "padding_counted": "a row would have more targets than its answer has words",
    "template_drift": "one prompt would read differently in training and in the service",
    "leaked_split": "evaluation prompts would stand in the training file, and only new requests would fail",
    "seed_after_init": "two runs with one seed would start from different weights",
    "erasing_rate": "the weights would have moved by more than their own length, and an old task would be lost",
    "mean_of_means": "one batch would have one loss at once and another in two parts",
    "own_reference": "DPO's loss would be ln 2 at every step, with a gradient that is not 0",
    "optimiser_elsewhere": "the loss would stand still with a gradient of 0, and no weight would move",
    "swapped_pairs": "a pair would prefer the worse answer, and what it should lower would rise",
    "reward_sees_eos": "a right answer, scored by hand, would earn nothing",
    "greedy_rollouts": "a group of 8 would hold one answer, eight times",
    "temperature_mismatch": "the ratio of new to old would not be 1 at step 1",
    "merge_without_scale": "logits before and after a merge would differ",
    "augmented_facts": "answers would contradict the messages they stand beside",
    "forgotten_t2": "the soft part of a loss would have next to no gradient beside the hard part",
    "too_few_steps": "the loss would still be falling, and the healthy twin, as long, would be no better",
    "bad_verifier": "a wrong answer would earn: the reward would rise while exact pass falls",
    "kl_too_strong": "rewards would differ inside a group, and the policy would still not move",
}

PATIENTS: tuple[Patient, ...] = (
    Patient("own_reference", "DPO has run for 20 steps and the loss is 0.693 in every one of them.",
            patients.own_reference, lambda c: set(c.vitals["loss"]) == {0.693} and c.tests["gradient norm"][0] > 0,
            "margins are policy minus reference: if both are the policy, they are 0 and the loss is ln 2. The gradient "
            "is not 0, so the weights move, unheld and unmeasured.",
            "compute the reference's log-probabilities once, before step 1, from a frozen copy", "11"),
    Patient("mask_off_by_one", "The loss looks fine. In the demo the answers never stop.",
            patients.mask_off_by_one, lambda c: c.tests["share of answers that end"] < 0.5
            and c.tests["share that begin right"] > 0.5,
            "the mask starts at the last prompt token and leaves <eos> out: nobody taught the model to end.",
            "count answer tokens, <eos> included; decode the counted tokens of one row and read them", "07"),
    Patient("reward_sees_eos", "GRPO: reward 0.00, reward_std 0.00, nothing learnt. The same model passed yesterday.",
            patients.reward_sees_eos, lambda c: c.tests["reward of a right answer, by hand"] == 0,
            "every answer ends in its end token, no right answer equals the text: all groups are uniform.",
            "strip the end token before judging; score one right answer by hand before every run", "12"),
    Patient("erasing_rate", "The new task is learnt within the hour. Complaints come from everybody else.",
            patients.erasing_rate, lambda c: c.tests["how far the weights moved, as a share of their norm"] > 1,
            "the weights moved by more than their own length: what the base knew was in the old place.",
            "a rate 10 to 50 times smaller, and replay of old rows; keep an old-task score in the launch suite", "09"),
    Patient("swapped_pairs", "DPO went by the book: loss down, reward accuracy up. Customers get more promises.",
            patients.swapped_pairs, lambda c: c.vitals["claim rate"][1] > c.vitals["claim rate"][0],
            "the loss knows only the order it is given; accuracy measures agreement with the file, not with the desk.",
            "read ten pairs; score both answers with the verifier and look for pairs it would turn round", "11"),
    Patient("template_drift", "The evaluation is fine. The same weights fail every request in the service.",
            patients.template_drift, lambda c: c.tests["prompt in training"] != c.tests["prompt in the service"],
            "the service strips the prompt's last tag. To the model that is another language.",
            "one renderer for training, evaluation and serving; compare token ids, not scores", "07"),
    Patient("greedy_rollouts", "GRPO: the reward is at its best from step 1 on, and nothing is learnt.",
            patients.greedy_rollouts, lambda c: c.tests["different answers in a group of 8"] == 1,
            "all answers of a group are equal, so every advantage is 0. Sampled, the model is often wrong.",
            "sample rollouts at temperature 1", "12"),
    Patient("leaked_split", "After Tuesday's data refresh the evaluation is perfect. Users saw no change.",
            patients.leaked_split, lambda c: c.tests["share of evaluation prompts in the training file"] > 0,
            "the refresh took the evaluation rows along. The model has read the exam.",
            "check every training file against the registered evaluation sets (lifecycle data audit)", "04"),
    Patient("shifted_twice", "The loss falls nicely. The answers are half there.",
            patients.shifted_twice, lambda c: c.tests["loss by the library's own function"] > 1,
            "each token learnt to foresee the one after the next, so the first word of the answer is skipped.",
            "shift in one place only; hold the loss against an independent one on one batch", "07"),
    Patient("optimiser_elsewhere", "DPO: the loss is 0.693 in every step. A colleague says it must be the reference.",
            patients.optimiser_elsewhere,
            lambda c: set(c.vitals["reward accuracy"]) == {0.0} == set(c.tests["gradient norm"]),
            "no gradient reaches the parameters that the optimiser holds: the loss is computed on another copy.",
            "build the optimiser from the model that computes the loss; check that one weight moved at step 1", "11"),
    Patient("padding_counted", "This run's loss is far below last week's, and its answers are worse.",
            patients.padding_counted,
            lambda c: c.tests["targets a row"] > c.tests["words of an answer, <eos> included"],
            "most targets are padding, which is free to foresee. The mean looks good, the answers get little gradient.",
            "mask padding; print targets a row beside the loss", "07"),
    Patient("temperature_mismatch", "GRPO makes the model worse with every step, from the first on.",
            patients.temperature_mismatch,
            lambda c: c.tests["ratio new / old at step 1, least and most"][1] > 1.01,
            "with one update a batch, the ratio is 1 at every token. Here the loss divides by another temperature.",
            "compute both log-probabilities alike; assert that the first ratio is 1", "12"),
    Patient("merge_without_scale", "The adapter passed its gate. Merged for speed, it forgot most of what it knew.",
            patients.merge_without_scale, lambda c: c.tests["largest difference of a logit"] > 0.1,
            "the forward pass scales by alpha / rank, the merge did not.",
            "compare logits before and after the merge at 1e-5; keep the unmerged file", "10"),
    Patient("seed_after_init", "Two runs with seed 7 and one config give two loss curves.",
            patients.seed_after_init, lambda c: not c.tests["weights equal before step 1"],
            "the weights were drawn before the seed was set: only the batches repeat.",
            "seed first, then build the model; compare a hash of the weights before step 1", "06"),
    Patient("mean_of_means", "The batch no longer fits, so it goes through in two parts. Everything else is the same, "
            "and the loss is not.",
            patients.mean_of_means, lambda c: c.tests["relative error of the gradient"] > 1e-3,
            "the mean over all tokens is not the mean of two means when one part holds more tokens.",
            "weight each part by its counted tokens, or divide by the tokens of the whole batch", "07"),
    Patient("augmented_facts", "Noise was added to the training messages, for robustness. Clean ones got worse.",
            patients.augmented_facts,
            lambda c: c.tests["share of rows whose answer follows from their message"] < 1,
            "the noise rewrote facts, and the answers were kept: rows now contradict each other.",
            "noise may touch words, never what the answer depends on; recompute the answer from the noisy row", "08"),
    Patient("forgotten_t2", "A student has a good teacher, and labels half of which are wrong. It heeds the labels.",
            patients.forgotten_t2,
            lambda c: c.tests["gradient of the soft part / of the hard part, step 1"] < 0.1,
            "at temperature T the soft loss has gradients 1 / T^2 as large; without the factor T^2 the labels lead.",
            "multiply the soft loss by T^2 (Hinton et al. 2015), and print both gradients once", "15"),
)


def patient(number: int | str) -> Patient:
    """Patient 1 to 17. Raises ValueError for any other."""
    if str(number) not in (numbers := {str(i) for i in range(1, len(PATIENTS) + 1)}):
        raise ValueError(f"patient {number!r} is unknown; give 1 to {len(numbers)}")
    return PATIENTS[int(number) - 1]


@cache
def chart(number: int, planted: bool = True) -> Chart:
    """The run of a patient, or of its healthy twin. Seconds."""
    return patient(number).run(planted)


def order_test(number: int, test: str, book: Book) -> object:
    """The result of a test, noted in the book. Raises ValueError for a test that this patient does not have."""
    found = chart(number).tests
    if test not in (*found, TWIN):
        raise ValueError(f"test {test!r} is unknown; patient {number} has: {'; '.join((*found, TWIN))}")
    entry = book.setdefault(str(number), {"tests": [], "wrong": []})
    if test not in entry["tests"] and "points" not in entry:
        entry["tests"].append(test)
    return chart(number, planted=False).vitals if test == TWIN else found[test]


def diagnose(number: int, cause: str, book: Book) -> tuple[bool, int]:
    """(is it right?, points so far or for good), noted in the book. ValueError for a cause that is not listed."""
    if cause not in CAUSES:
        raise ValueError(f"cause {cause!r} is unknown; use one of {', '.join(CAUSES)}")
    entry = book.setdefault(str(number), {"tests": [], "wrong": []})
    right = patient(number).cause == cause
    if "points" not in entry and not right and cause not in entry["wrong"]:
        entry["wrong"].append(cause)
    points = max(0, FULL_POINTS - len(entry["tests"]) - 2 * len(entry["wrong"]))
    if right:
        entry.setdefault("points", points)
    return right, entry.get("points", points)


def read_book(path: Path) -> Book:
    """The case book, empty when there is none. Raises ValueError when the file is not one."""
    if not path.exists():
        return {}
    book = read_json(path)
    if not isinstance(book, dict) or not all(isinstance(e, dict) and {"tests", "wrong"} <= set(e)
                                             for e in book.values()):
        raise ValueError(f"{path}: this is not a case book; move it away to start a new one")
    return book


def write_book(path: Path, book: Book) -> None:
    write_json(path, book)


def show(number: int) -> None:
    """Print the complaint, what the chart shows, and which tests can be ordered."""
    one, seen = patient(number), chart(number)
    print(f"Patient {number}. {one.complaint}")
    for name, value in seen.vitals.items():
        print(f"  {name:44} {value}")
    print("tests:", "; ".join((*seen.tests, TWIN)))


def show_verdict(number: int, cause: str, book: Book) -> bool:
    """Diagnose and print the grade; True when the cause is right."""
    right, points = diagnose(number, cause, book)
    one = patient(number)
    if right:
        print(f"Right, {points} of {FULL_POINTS} points: {CAUSES[cause]}.\nWhy: {one.why}\nMend: {one.fix}."
              f"\nMore in notebook {one.notebook}.")
    else:
        print(f"No; {points} of {FULL_POINTS} points left. If {CAUSES[cause]}, {WOULD_SHOW[cause]}. This run does not "
              "show that: order a test, or compare with the healthy twin.")
    return right
