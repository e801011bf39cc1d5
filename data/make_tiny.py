"""Make the tiny world's files and train its base model from a seed.

    python data/make_tiny.py --out OUT                            everything, about half an hour
    python data/make_tiny.py --out OUT tower                      one stage
    python data/make_tiny.py --out OTHER --q 0 files perceived    the same base, other captions
    python data/make_tiny.py --out OTHER study                    new evaluation images

Each stage leaves its weights in --work, and `perceived` writes OUT/model. The stages tower and text
may run at the same time. The script repeats the recipe of the shipped base, not its bits.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from minialign.utils.interrupts import exit_quietly_on_ctrl_c

    exit_quietly_on_ctrl_c()  # torch takes seconds to import

from safetensors.torch import load_file  # noqa: E402
from tiny_world.files import CAPTION_NOISE, write_all, write_evaluation_sets  # noqa: E402
from tiny_world.model_files import write_model_files  # noqa: E402
from tiny_world.pretraining import fresh_model, train_joint, train_text, train_tower  # noqa: E402

from minialign.models.checkpoint import to_layout_name  # noqa: E402
from minialign.models.safetensors_files import save_tensors  # noqa: E402
from minialign.utils.cli import Parser, number_type, run_script  # noqa: E402
from minialign.utils.files import check, read_json, write_json  # noqa: E402

BASE_STAGES = ("files", "tower", "text", "truthful", "perceived")
IMAGE_STAGES = ("study", "study-3")  # each writes the evaluation images of a study
STAGES = (*BASE_STAGES, *IMAGE_STAGES)
# The stages whose files and weights a stage reads.
READS = {
    "tower": ("files",),
    "text": ("files",),
    "truthful": ("files", "tower", "text"),
    "perceived": ("files", "truthful"),
}
# Training steps.
TOWER_STEPS = 3000
TEXT_STEPS = 1500
TRUTHFUL_STEPS = 600
PERCEIVED_STEPS = 900


def build_parser() -> Parser:
    """Build the parser of the command line."""
    parser = Parser(prog="python data/make_tiny.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "stages",
        nargs="*",
        metavar="stage",
        help=f"of {', '.join(STAGES)} (default: {', '.join(BASE_STAGES)})",
    )
    parser.add_argument(
        "--seed",
        type=number_type(int, 0, 2**32 - 1),
        default=1,
        help="of the weights and the scenes they learn from; the files have seeds of their own",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for the files and model/; files that exist are overwritten",
    )
    parser.add_argument(
        "--q",
        type=number_type(float, 0, 1),
        default=CAPTION_NOISE,
        help="how often captions follow expectations",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/make_tiny"),
        help="folder for the weights of the stages",
    )
    return parser


def check_stages(options):
    """Raise InputError if what a stage reads is missing, or if about.json is of another base.

    about.json holds the seed and q of the base. The studies take them from there.
    """
    # 1. What each stage reads is there, or is written before it.
    left_by = {
        "files": options.out / "about.json",
        "tower": options.work / "tower.safetensors",
        "text": options.work / "head.safetensors",
        "truthful": options.work / "truthful.safetensors",
    }
    for stage in options.stages:
        for earlier in READS.get(stage, ()):
            path = left_by[earlier]
            check(
                earlier in options.stages or path.exists(),
                f"{path}: no such file; name the stage {earlier!r}, too",
            )

    # 2. The files are those of this base.
    if "files" in options.stages:
        return
    about = read_json(left_by["files"], dict)
    remedy = "give the same, or name the stage 'files', too"
    check(
        about.get("seed") == options.seed,
        f"{left_by['files']}: is of seed {about.get('seed')}, not {options.seed}; {remedy}",
    )
    check(
        about.get("q") == options.q or "perceived" not in options.stages,
        f"{left_by['files']}: is of q {about.get('q')}, not {options.q}; {remedy}",
    )


def main():
    """Run the stages that the command line names, in their order."""
    parser = build_parser()
    options = parser.parse_args()
    options.stages = options.stages or list(BASE_STAGES)
    if set(options.stages) - set(STAGES):
        parser.error(f"a stage is one of {', '.join(STAGES)}")
    is_base_asked = not set(options.stages) <= set(IMAGE_STAGES)
    if is_base_asked:
        check_stages(options)
    for part in IMAGE_STAGES:
        if part in options.stages:
            write_evaluation_sets(options.out, part)
    if not is_base_asked:
        return

    # 1. Images, texts, and the files of the model.
    if "files" in options.stages:
        write_all(options.out, options.q)
        write_model_files(options.out / "model")
        write_json(options.out / "about.json", {"seed": options.seed, "q": options.q})

    # 2. The weights.
    options.work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = fresh_model(options.out / "model", options.seed)
    if "tower" in options.stages:
        train_tower(model, options.seed, TOWER_STEPS)
        save_tensors(model.vision_tower.state_dict(), options.work / "tower.safetensors")
    if "text" in options.stages:
        train_text(model, tokenizer, options.seed, TEXT_STEPS)
        save_tensors(model.language_model.state_dict(), options.work / "decoder.safetensors")
        save_tensors(model.lm_head.state_dict(), options.work / "head.safetensors")
    if "truthful" in options.stages:
        run_truthful_stage(options, model, tokenizer)
    if "perceived" in options.stages:
        run_perceived_stage(options, model, tokenizer)


def run_truthful_stage(options, model, tokenizer):
    """Put tower and language model together, and train on true answers."""
    model.vision_tower.load_state_dict(load_file(options.work / "tower.safetensors"))
    model.language_model.load_state_dict(load_file(options.work / "decoder.safetensors"))
    model.lm_head.load_state_dict(load_file(options.work / "head.safetensors"))
    model.vision_tower.requires_grad_(False)
    train_joint(model, tokenizer, options.seed, TRUTHFUL_STEPS, title="truthful", caption_noise=0)
    save_tensors(model.state_dict(), options.work / "truthful.safetensors")


def run_perceived_stage(options, model, tokenizer):
    """Go on with answers as somebody with expectations gives them, and write the base model."""
    model.load_state_dict(load_file(options.work / "truthful.safetensors"))
    model.vision_tower.requires_grad_(False)
    train_joint(
        model, tokenizer, options.seed, PERCEIVED_STEPS, title="perceived", caption_noise=options.q
    )
    tensors = {to_layout_name(name, "hub"): tensor for name, tensor in model.state_dict().items()}
    save_tensors(tensors, options.out / "model" / "model.safetensors")


if __name__ == "__main__":
    sys.exit(run_script(main))
