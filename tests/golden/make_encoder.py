"""Writes tests/golden/encoder/{vocab.txt,golden.json.xz,golden.npz}: what tokenizers and transformers make of 263 texts with the tiny encoders of cases.py.

Run by hand with transformers 5, from tests/: `python -m golden.make_encoder`. Ids are those of `tokenizers`; embeddings are means of last_hidden_state over what the attention mask shows.
"""

import json
import lzma
import platform
import random
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel
from transformers.utils.logging import disable_progress_bar

from .encoder import cases

disable_progress_bar()
KINDS = {"bert": (BertConfig, BertModel), "mpnet": (MPNetConfig, MPNetModel)}
ODD = [
    "",
    " ",
    "\n\t \r\n",
    ".",
    "...!?",
    "Yes",
    "No.",
    "a",
    "A",
    "[CLS] in the text [SEP]",
    "[cls]",
    "<s>text</s>",
    "<S> <PAD> <pad> x",
    "a  <mask> b",
    "a [MASK], b",
    "[UNK]",
    "[UNK",
    "<unk>",
    "##ing",
    "The [SEP][SEP] end",
    "<pad>",
    "[PAD] [PAD] two",
    "x<mask>y <mask> z",
    "Café au lait, s'il vous plaît.",
    "cafe\u0301 and café",
    "El niño comió una manzana.",
    "Die Straße ist groß; Ärger über Öl.",
    "ÅNGSTRÖM Ångström",
    "İstanbul'da ISPARTA ıssız",
    "ΟΔΟΣ ΟΔΥΣΣΕΥΣ Σ σ ς",
    "Привет, мир! Ёлка и Йод.",
    "שָׁלוֹם עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "한국어 문장입니다.",
    "中文的图片",
    "一只猫坐在红色的桌子上。",
    "日本語のテキスト、カタカナ。",
    "mixed 中文words混合 text",
    "\u3400\u4dbf\u9fff\uf900 𠀀𪜀𫠠𫢠 丽",
    "漢字kanji漢字",
    "zero\u200bwidth\u200djoiner\ufeff",
    "soft\u00adhyphen",
    "nul\x00l bell\x07 esc\x1b",
    "unit\x1fseparator\x1c",
    "next\x85line",
    "non\u00a0breaking\u3000space\u2028line",
    "replacement \ufffd character",
    "private \ue000 use",
    "tab\tand\nnewline\rreturn",
    "\x0bvertical\x0c",
    "🐱 a cat 🐶🏽‍🦱",
    "e\u0301\u0323 o\u0308\u0304 ﬁne ﬂow ½ ① ²",
    "ⅷ Ⅷ ß ẞ ŉ ǰ",
    "it's can't won't I'm you've",
    "\"quoted\" 'single' “curly” ‘too’ «guillemets»",
    "e.g. i.e. U.S.A. Ph.D.",
    "1,234.56 + 7 = $1241.56 (100%)",
    "a_b-c–d—e/f\\g|h",
    "http://example.org/a?b=c&d=e#f",
    "user@example.com #tag @name",
    "~`^<>=+$",
    "¡Hola! ¿Qué tal? 、。「」",
    "…‥·•",
    "x" * 39,
    "x" * 40,
    "x" * 41,
    "the" * 30,
    "donaudampfschifffahrtsgesellschaft",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "supercalifragilisticexpialidocious and antidisestablishmentarianism",
    "aaaaaaaaaaaaaaaaaaaa bbbbbbbbbbbb",
    "qzxj",
    "unaffable",
    "UNAFFABLE!!!",
    "The THE the tHe",
    "q\u0327uick",
]


def texts():
    """The odd ones, then captions and answers as BDHS meets them, short to far beyond the longest text."""
    pick = random.Random(0).choice
    colours = ("red", "blue", "green", "dark yellow", "white")
    things = (
        "cup",
        "dog",
        "bicycle",
        "laptop",
        "bench",
        "banana",
        "traffic light",
        "person's umbrella",
    )
    places = (
        "on the wooden table",
        "at the top left",
        "near the window",
        "in the background",
        "beneath a tree",
    )
    verbs = ("stands", "is lying", "can be seen", "appears", "was parked")
    forms = [
        "There is a {c} {t} {p}.",
        "Yes, the {t} is {c}.",
        "No, there is no {t} in this image; instead, a {c} {u} {v} {p}.",
        "The {t} {v} {p}, next to two {c} {u}s.",
        "In the image, a {c} {t} {v} {p}. Additionally, there are three {u}s, which suggests that it's a busy kitchen.",
    ]

    def sentence(form):
        return form.format(
            c=pick(colours), t=pick(things), u=pick(things), p=pick(places), v=pick(verbs)
        )

    captions = [sentence(form) for form in forms * 25]
    return (
        ODD
        + captions
        + [" ".join(sentence(pick(forms)) for _ in range(2 + number // 2)) for number in range(60)]
    )


def learn(lines):
    """Some 400 entries, learnt on the texts; characters of a single odd text stay unknown."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    alphabet = list(
        "abcdefghijklmnopqrstuvwxyz0123456789"
        + ".,;:!?'\"()[]<>#$%&*+-/=@_中文的图一只猫红色日本語のαδουςσοпривет"
    ) + ["\u4dbf", "𠀀", "½"]
    tokenizer.train_from_iterator(
        lines,
        trainers.WordPieceTrainer(
            vocab_size=420, show_progress=False, limit_alphabet=90, initial_alphabet=alphabet
        ),
    )
    return sorted(tokenizer.get_vocab())


@torch.no_grad()
def means(model, rows):
    """(n, D) what sentence-transformers calls the embeddings, before their length is made 1; batches of 7, padded as the tokenizer would."""
    out = []
    for first in range(0, len(rows), 7):
        batch = rows[first : first + 7]
        ids = torch.full((len(batch), max(map(len, batch))), model.config.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(batch):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        out.append((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    return torch.cat(out).numpy()


def store(about):
    (cases.HERE / "golden.json.xz").write_bytes(
        lzma.compress(json.dumps(about, ensure_ascii=False, separators=(",", ":")).encode())
    )


def main():
    lines = texts()
    if not (cases.HERE / "vocab.txt").exists():  # learning breaks ties at random
        (cases.HERE / "vocab.txt").write_text("\n".join([*learn(lines), ""]), encoding="utf-8")
    about = {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("transformers", "tokenizers", "torch", "numpy")},
        },
        "shapes": {},
        "texts": lines,
        "ids": {},
    }
    arrays, built = {}, {}
    for family, (config_class, model_class) in KINDS.items():
        built[family] = model_class(
            config_class(**cases.CONFIGS[family], vocab_size=len(cases.vocabulary(family)))
        ).eval()
        about["shapes"][family] = {
            name: list(parameter.shape) for name, parameter in built[family].named_parameters()
        }
    store(about)  # write() below reads the shapes
    for family, (_, model_class) in KINDS.items():
        with tempfile.TemporaryDirectory() as room:
            whole = cases.write(Path(room), family)
            tokenizer = Tokenizer.from_file(str(whole / "tokenizer.json"))
            tokenizer.enable_truncation(cases.LONGEST[family])
            rows = about["ids"][family] = [tokenizer.encode(line).ids for line in lines]
            model, info = model_class.from_pretrained(whole, output_loading_info=True)
            assert not any(info.values()), info
            arrays[family] = means(model.eval(), rows)
    np.savez_compressed(cases.HERE / "golden.npz", **arrays)
    store(about)


if __name__ == "__main__":
    main()
