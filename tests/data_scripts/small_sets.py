"""Write small evaluation sets: the first images of a shipped one, with their questions."""

import json
import shutil

from conftest import TINY


def write_small_set(name, folder, num_images=6):
    """Write the first images of a shipped evaluation set, with their questions."""
    shipped = TINY / "final" / name
    (folder / "images").mkdir(parents=True)
    raw = json.loads((shipped / "captions.json").read_text())
    raw["captions"] = raw["captions"][:num_images]
    (folder / "captions.json").write_text(json.dumps(raw))
    images = {row["image"] for row in raw["captions"]}
    for image in images:
        shutil.copy(shipped / "images" / image, folder / "images")
    for path in shipped.glob("pope_*.jsonl"):
        lines = []
        for line in path.read_text().splitlines(keepends=True):
            if json.loads(line)["image"] in images:
                lines.append(line)
        (folder / path.name).write_text("".join(lines))
