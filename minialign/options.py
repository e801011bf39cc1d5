"""What the command lines share: bad input ends with one line and exit status 2, an interrupt with 130."""

from minialign.data.chat_templates import TEMPLATES
from minialign.data.formats import FORMATS
from minialign.utils.cli import number_type


def add_model_options(parser, **more):
    """--model --template --dtype --device; `more`: argparse's default or required, of --model."""
    parser.add_argument("--model", metavar="DIR", help="LLaVA checkpoint directory", **more)
    parser.add_argument(
        "--template", choices=sorted(TEMPLATES), help="prompt template; none: the checkpoint's own"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of weights and activations; none: the checkpoint's own",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to compute")


def add_data_options(parser, what, **more):
    """--data --format --images; `what` the files hold; `more`: argparse's default or required, of --data."""
    parser.add_argument("--data", nargs="+", metavar="FILE", help=what, **more)
    parser.add_argument(
        "--format", choices=sorted(FORMATS), help="of --data; none: told from the fields"
    )
    parser.add_argument(
        "--images", metavar="DIR", help="folder of their pictures; none: images/ beside each file"
    )


def add_sampling_options(parser):
    """--rho --rounds --epsilon and how BDHS writes."""
    parser.add_argument(
        "--rho",
        type=number_type(float, 0, 1),
        default=0.99,
        help="share of picture vectors hidden (rho_th)",
    )
    parser.add_argument(
        "--rounds", type=number_type(int, 1), default=5, help="draws at most for a record (N_BDHS)"
    )
    parser.add_argument(
        "--epsilon",
        type=number_type(float, -1, 2),
        default=0.97,
        help="cosine at which a draw is too like the chosen response (eps_s)",
    )
    parser.add_argument(
        "--similarity",
        metavar="DIR",
        help="sentence encoder (MPNet, BERT) for the check; none: the policy's own embeddings",
    )
    parser.add_argument(
        "--noise-steps",
        type=number_type(int, 1, 999),
        default=500,
        help="forward diffusion of the picture, for noise and distortion (N)",
    )
    parser.add_argument(
        "--unguided",
        action="store_true",
        help="write whole responses in every round, not the ends of sentences",
    )
    parser.add_argument(
        "--group", type=number_type(int, 1), default=32, help="records sampled together"
    )
