"""Recipes: files with the options of one run, such as those of the paper's rows in data/paper.

    {"row": "what it is", "paper": {"POPE": 88.18}, "needs": "data and models",
     "options": {"method": "dpo", "beta": 0.1}}

Only "options" is needed. It holds options of train.py without their dashes.

data/tiny/recipe.json is the recipe of the tiny world. It has its options on top, and those of
single methods under "methods". A run without --model takes its defaults from both.
"""

import argparse
from pathlib import Path

from minialign.options import TINY_WORLD
from minialign.utils.cli import flag
from minialign.utils.files import check, read_json
from minialign.utils.messages import printable

PAPER_RECIPES = Path(__file__).resolve().parent.parent.parent / "data" / "paper"
TINY_RECIPE = TINY_WORLD / "recipe.json"
TINY_ROW = "none: the tiny world, the defaults without --model"
FIELDS = {"row": str, "paper": dict, "needs": str, "options": dict}
# Options that a recipe cannot hold, because they concern one run or ask for help.
NO_RECIPE_OPTIONS = ("help", "recipe", "recipes", "out", "resume", "export", "plan")
# Both say how long to train. So a typed option also replaces the other one in the recipe.
INSTEAD = {"--steps": "epochs", "--epochs": "steps"}


def add_recipe_options(parser):
    """Add --recipe and --recipes."""
    group = parser.add_argument_group("recipes")
    group.add_argument(
        "--recipe",
        metavar="FILE",
        help="read options from this file; those that are typed beside it take precedence",
    )
    group.add_argument(
        "--recipes",
        action=ListRecipes,
        nargs=0,
        help="list the recipes, those of data/paper with the paper's figures, and exit",
    )


class ListRecipes(argparse.Action):
    """Prints the table of recipes and ends the script, as --help prints the help."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Print the table and exit."""
        print(recipes_table(PAPER_RECIPES))
        parser.exit()


def with_recipe(parser, argv) -> list[str]:
    """Return the words of a command line, after those of the recipe that its --recipe names.

    An option that is typed replaces that of the recipe. Exits with one line that names the recipe
    if the parser refuses one of its options.
    """
    # 1. Find the recipe.
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--recipe")
    try:
        path = finder.parse_known_args(argv)[0].recipe
    except argparse.ArgumentError:
        path = None  # --recipe without a file, which the parser of all options refuses
    if path is None:
        return argv

    # 2. Turn its options into words. Typed --steps replace its epochs, and the reverse.
    options = read_recipe(path)["options"]
    typed_names = {word.split("=")[0] for word in argv}
    for typed, replaced in INSTEAD.items():
        if typed in typed_names:
            options.pop(replaced, None)
    words = recipe_words(parser, options, path)

    # 3. Refuse a recipe that is wrong by itself, in an error that begins with its name.
    parser.prog = f"{parser.prog} with {printable(path)}"
    parser.parse_args(words)

    # 4. Leave out those options that are typed as well. The parser refuses a list given twice.
    not_typed = {}
    for name, value in options.items():
        if flag(name) not in typed_names:
            not_typed[name] = value
    return [*recipe_words(parser, not_typed, path), *argv]


def read_recipe(path) -> dict:
    """Read a recipe and check the types of its fields. Raises InputError if one is wrong."""
    recipe = read_json(path, dict)
    if "methods" in recipe:
        del recipe["methods"]  # the defaults of the method apply without being named here
        recipe = {"row": TINY_ROW, "options": recipe}
    for name, value in recipe.items():
        check(
            name in FIELDS,
            f"{path}: unknown field {name!r}; a recipe has {', '.join(FIELDS)}",
        )
        kind = "text" if FIELDS[name] is str else "JSON object"
        check(isinstance(value, FIELDS[name]), f"{path}: field {name!r} is not a {kind}")
    for name, figure in recipe.get("paper", {}).items():
        check(isinstance(figure, int | float), f"{path}: the figure {name!r} is not a number")
    check("options" in recipe, f"{path}: has no field 'options', the options of train.py")
    return recipe


def recipe_words(parser, options, path) -> list[str]:
    """Return the options of a recipe as words of a command line.

    Raises InputError for an option that train.py does not have, and for a value that cannot be
    typed.
    """
    actions = {action.dest: action for action in parser._actions}
    words = []
    for name, value in options.items():
        check(
            name in actions and name not in NO_RECIPE_OPTIONS,
            f"{path}: unknown option {name!r}; name options of train.py, with _ for -",
        )
        is_flag = actions[name].nargs == 0
        remedy = "give true or false" if is_flag else "give a value as it is typed"
        check(
            isinstance(value, bool) == is_flag,
            f"{path}: option {name!r} is {value!r}; {remedy}",
        )
        if is_flag:
            words += _flag_words(actions[name], value)
        elif isinstance(value, list):
            texts = [_text_of(item, name, path) for item in value]
            words += [flag(name), *texts]
        else:
            # In one word, so that a value is never taken for an option.
            words.append(f"{flag(name)}={_text_of(value, name, path)}")
    return words


def _flag_words(action, value):
    """Return the words of an option without a value: --x for true, --no-x or none for false."""
    if value:
        return action.option_strings[:1]
    return [text for text in action.option_strings if text.startswith("--no-")]


def _text_of(value, name, path):
    """Return an option's value as it is typed. Raises InputError unless it is text or a number."""
    is_plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    check(
        is_plain and not str(value).startswith("--"),
        f"{path}: option {name!r} holds {value!r}; give a value as it is typed",
    )
    return str(value)


def recipes_table(folder) -> str:
    """Return a Markdown table of the tiny world's recipe and those of a folder."""
    # 1. The columns: every figure that any recipe has, once and in the order of the recipes.
    recipes = {"data/tiny/recipe.json": read_recipe(TINY_RECIPE)}
    columns = {}  # used as an ordered set
    for path in sorted(Path(folder).glob("*.json")):
        recipes[path.name] = read_recipe(path)
        columns.update(dict.fromkeys(recipes[path.name].get("paper", {})))

    # 2. A row for each recipe.
    headings = ["recipe", "row of the paper", *columns]
    rows = [headings, ["---"] * len(headings)]
    for name, recipe in recipes.items():
        cells = [name, recipe.get("row", "")]
        for column in columns:
            value = recipe.get("paper", {}).get(column)
            cells.append("" if value is None else f"{value:.2f}")
        rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
