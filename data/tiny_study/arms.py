"""The arms of the studies: which questions they ask, and which runs answer them.

An arm is one way to train a model, or to decode the base. A run is an arm on one base model with
one alignment seed. A base is a folder that data/make_tiny.py writes: model/, train/ and about.json,
which names its seed and q, how often its captions follow expectations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CENTRAL_Q = 0.35  # the q that the recipe was made for


@dataclass(frozen=True)
class Arm:
    """One way to train a model, or to decode the base."""

    name: str
    train_options: str | None = None  # of train.py, beside the recipe; None: no training
    contrast: float = 0.0  # strength of the contrast with a masked image while decoding
    # The sampler of its pairs, a key of SAMPLERS in records.py. None: its training samples them, or
    # needs none.
    sampler: str | None = None


@dataclass(frozen=True)
class LaterArm(Arm):
    """An arm that starts from the model that another arm of its base and seed has trained."""

    first: str = ""  # the name of the other arm


@dataclass(frozen=True)
class Part:
    """One question of the study."""

    title: str
    arms: tuple[Arm, ...]
    num_seeds: int  # alignment seeds of each base
    wants: Callable[[float], bool]  # whether it is asked of bases with this q


@dataclass(frozen=True)
class Study:
    """Several questions, and how they are measured."""

    parts: tuple[Part, ...]
    # Whether all arms learn from the same records (records.py), which also have their pairs.
    # Otherwise each takes all records of the file that its method needs.
    shares_records: bool = False
    # The arm that all others are compared with. None: the control, or what the report says.
    compared_with: str | None = None
    by_seed: bool = False  # the first seed of all bases comes before the second seed of any


@dataclass(frozen=True)
class Run:
    """One model to measure."""

    base: str  # the folder of the base
    arm: Arm
    seed: int

    def folder(self, out) -> Path:
        """Return the folder of this run under `out`."""
        base_name = Path(self.base).name
        return Path(out) / "arms" / base_name / f"{self.arm.name.replace(' ', '_')}-{self.seed}"


def runs_of(part: Part, bases: dict) -> list[Run]:
    """Return the runs of a part on {folder: about.json}. An arm without training has one seed."""
    runs = []
    for base, about in bases.items():
        if not part.wants(about["q"]):
            continue
        for arm in part.arms:
            num_seeds = part.num_seeds if arm.train_options else 1
            runs += [Run(base, arm, seed) for seed in range(num_seeds)]
    return runs


def ordered_runs(study: Study, parts: tuple[Part, ...], bases: dict) -> list[Run]:
    """Return the runs of some parts of a study in the order in which they are done, each once."""
    runs = []
    for part in parts:
        runs += runs_of(part, bases)
    if study.by_seed:
        arms = []
        for part in parts:
            arms += part.arms
        runs.sort(key=lambda run: (run.seed, arms.index(run.arm)))  # stable: bases keep their order
    return list(dict.fromkeys(runs))


def is_central(q: float) -> bool:
    """Return whether a q is the one that the recipe was made for."""
    return q == CENTRAL_Q


def is_not_central(q: float) -> bool:
    """Return whether a q is another than the one that the recipe was made for."""
    return q != CENTRAL_Q


def is_truthful(q: float) -> bool:
    """Return whether captions with this q are true."""
    return q == 0


def is_any(q: float) -> bool:
    """Return True: the part is asked of all bases."""
    return True


# The arms that each base has, and that the other arms are shown beside.
MAIN_ARMS = (
    Arm("base"),
    Arm("control", "--method sft"),
    Arm("bdhs", "--method bdhs"),
)
PARTS = (
    Part("BDHS + DPO against a supervised control", MAIN_ARMS, num_seeds=3, wants=is_central),
    Part("Strength of the expectations in the captions", MAIN_ARMS, 1, wants=is_not_central),
    Part(
        "What is hidden, and how the rejected response is written",
        (
            Arm("rho 0, nothing hidden", "--method bdhs --rho 0"),
            Arm("rho 0.5", "--method bdhs --rho 0.5"),
            Arm("rho 0.9", "--method bdhs --rho 0.9"),
            Arm("rho 1, all hidden", "--method bdhs --rho 1"),
            Arm("unguided", "--method bdhs --unguided"),
            Arm("one round, no similarity check", "--method bdhs --rounds 1"),
        ),
        num_seeds=1,
        wants=is_central,
    ),
    Part(
        "Other methods and losses",
        (
            Arm("dpo, rule-corrupted pairs", "--method dpo"),
            Arm("online-bdhs", "--method online-bdhs"),
            Arm("online-dpo, true annotator", "--method online-dpo"),
            Arm("mixed-dpo, true annotator", "--method mixed-dpo"),
            Arm("distortion", "--method distortion"),
            Arm("bdhs, IPO", "--method bdhs --loss ipo"),
            Arm("bdhs, SLiC", "--method bdhs --loss slic"),
        ),
        num_seeds=1,
        wants=is_central,
    ),
    Part(
        "Contrasting the picture with its absence while decoding the base",
        (
            Arm("a = 0.25", contrast=0.25),
            Arm("a = 0.5", contrast=0.5),
            Arm("a = 1.0", contrast=1.0),
            Arm("a = 2.0", contrast=2.0),
        ),
        num_seeds=1,
        wants=is_any,
    ),
    Part(
        "Closing the gap with truthful captions",
        (
            Arm("bdhs, 300 steps", "--method bdhs --steps 300"),
            Arm("bdhs, beta 0.1", "--method bdhs --beta 0.1"),
            Arm("bdhs, IPO, q = 0", "--method bdhs --loss ipo"),
            Arm("bdhs, epsilon 0.99", "--method bdhs --epsilon 0.99"),
            Arm("bdhs, unguided, q = 0", "--method bdhs --unguided"),
            Arm("dpo, pairs that differ in a few words", "--method dpo"),
        ),
        num_seeds=1,
        wants=is_truthful,
    ),
)

# The study of contrastive distillation, in the order in which its arms are done.
DISTILLATION_PARTS = (
    Part(
        "Contrastive distillation",
        (
            Arm("base"),
            Arm("a = 0.5", contrast=0.5),
            Arm("a = 1.0", contrast=1.0),
            Arm("control", "--method sft"),
            Arm("bdhs", "--method dpo", sampler="bdhs"),
            Arm("distill", "--method distill"),
            Arm("unguided", "--method dpo", sampler="unguided"),
            Arm("online-dpo, true annotator", "--method online-dpo"),
            Arm("distill, half the steps", "--method distill --steps 50"),
        ),
        num_seeds=3,
        wants=is_any,
    ),
)


def question(title: str, *arms: Arm) -> Part:
    """Return a part that is asked of all bases, with one alignment seed."""
    return Part(title, arms, num_seeds=1, wants=is_any)


# The study of the parts of contrastive distillation. Each question changes one of its settings.
DISTILL = Arm("distill", "--method distill")
# At this weight the gradients of distillation and of DPO on BDHS pairs are about equally large.
ADDED_WEIGHT = 30
SETTING_PARTS = (
    question(
        "Distillation as the recipe has it, beside BDHS + DPO",
        *MAIN_ARMS,
        DISTILL,
    ),
    question(
        "How strongly is what the image adds sharpened? (a)",
        Arm("a = 0.25, taught", "--method distill --contrast 0.25"),
        Arm("a = 0.5, taught", "--method distill --contrast 0.5"),
        Arm("a = 2, taught", "--method distill --contrast 2"),
    ),
    question(
        "Which tokens are plausible?",
        Arm("plausibility 0", "--method distill --plausibility 0"),
        Arm("plausibility 0.5", "--method distill --plausibility 0.5"),
    ),
    question(
        "How is the image hidden?",
        Arm("rho 0.97", "--method distill --rho 0.97"),
        Arm("noise", "--method distill --by noise"),
    ),
    question(
        "Whose responses are read?",
        Arm("on the policy's responses", "--method distill --on policy --max-new-tokens 64"),
        Arm(
            "on the reference's responses",
            "--method distill --on reference --max-new-tokens 64",
        ),
    ),
    question(
        "Which divergence is minimized?",
        Arm("reverse divergence", "--method distill --divergence reverse"),
    ),
    question(
        "How many steps?",
        Arm("20 steps", "--method distill --steps 20"),
        Arm("40 steps", "--method distill --steps 40"),
        Arm("300 steps", "--method distill --steps 300"),
    ),
    question(
        "Together with DPO on BDHS pairs",
        Arm("both losses added", f"--method bdhs --distill-weight {ADDED_WEIGHT}"),
        LaterArm("distilled first, then bdhs", "--method bdhs", first=DISTILL.name),
    ),
)

STUDIES = {
    "bdhs": Study(PARTS),
    "distillation": Study(DISTILLATION_PARTS, shares_records=True, by_seed=True),
    "parts": Study(SETTING_PARTS, compared_with=DISTILL.name),
}
