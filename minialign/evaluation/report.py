"""Hallucination measured: POPE, CHAIR with recall, colours, length and repeats, on a folder of pictures with annotations."""

from minialign.evaluation.answers import answer_questions
from minialign.evaluation.chair import caption_counts, chair_scores
from minialign.evaluation.pope import POPE_SPLITS, pope_scores, says_yes


def evaluate_set(vlm, held, title="evaluate", contrast=0.0):
    """Scores of one evaluation set, in the form that evaluation.json has for it, and for each caption its `caption_counts`."""

    def asked(rows, field):
        """Pictures and question of each row."""
        return [((str(held["images"] / row["image"]),), row[field]) for row in rows]

    captions, pope = held["captions"], held["pope"]
    answers = answer_questions(
        vlm,
        [
            *asked(captions, "prompt"),
            *(key for rows in pope.values() for key in asked(rows, "text")),
        ],
        title,
        contrast=contrast,
    )
    counts = [
        caption_counts(answers[key], row["objects"], held["vocabulary"])
        for key, row in zip(asked(captions, "prompt"), captions)
    ]
    scores = chair_scores(counts) if counts else {}
    scores["pope"] = {
        split: pope_scores(
            [says_yes(answers[key]) for key in asked(rows, "text")],
            [row["label"] == "yes" for row in rows],
        )
        for split, rows in pope.items()
    }
    return scores, counts


COLUMNS = (
    ("CHAIR_i", "chair_i"),
    ("CHAIR_s", "chair_s"),
    ("recall", "recall"),
    ("colour", "colour"),
    ("words", "words"),
    ("repeats", "repeats"),
)


def results_table(results):
    """The Markdown table of {arm: {set: scores}}: shares in per cent, POPE as accuracy (yes-ratio) by split."""
    sets = list(dict.fromkeys(name for arm in results.values() for name in arm))
    lines = [
        "| set | model | "
        + " | ".join(title for title, _ in COLUMNS)
        + " | POPE random (yes) | popular (yes) | adversarial (yes) |",
        "|" + "---|" * (len(COLUMNS) + 5),
    ]
    for name in sets:
        for arm, scores in (
            (arm, sets_of[name]) for arm, sets_of in results.items() if name in sets_of
        ):
            cells = [
                (f"{scores[key]:.1f}" if key == "words" else f"{100 * scores[key]:.1f}")
                if key in scores
                else ""
                for _, key in COLUMNS
            ]
            pope = [scores["pope"].get(split) for split in POPE_SPLITS]
            cells += [
                f"{100 * one['accuracy']:.1f} ({100 * one['yes']:.0f})" if one else ""
                for one in pope
            ]
            lines.append(f"| {name} | {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
