"""Write tests/golden/encoder/: ids and embeddings of 263 texts by tokenizers and transformers.

Run it by hand with transformers 5, from tests/: `python -m golden.make_encoder`. The models are the
tiny ones of cases.py. Embeddings are means of last_hidden_state over the attention mask.
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
FAMILIES = {"bert": (BertConfig, BertModel), "mpnet": (MPNetConfig, MPNetModel)}
PACKAGES = ("transformers", "tokenizers", "torch", "numpy")
BATCH_SIZE = 7
ODD_TEXTS = [
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
COLORS = ("red", "blue", "green", "dark yellow", "white")
THINGS = (
    "cup",
    "dog",
    "bicycle",
    "laptop",
    "bench",
    "banana",
    "traffic light",
    "person's umbrella",
)
PLACES = (
    "on the wooden table",
    "at the top left",
    "near the window",
    "in the background",
    "beneath a tree",
)
VERBS = ("stands", "is lying", "can be seen", "appears", "was parked")
FORMS = [
    "There is a {c} {t} {p}.",
    "Yes, the {t} is {c}.",
    "No, there is no {t} in this image; instead, a {c} {u} {v} {p}.",
    "The {t} {v} {p}, next to two {c} {u}s.",
    "In the image, a {c} {t} {v} {p}. Additionally, there are three {u}s, "
    "which suggests that it's a busy kitchen.",
]
# Characters that the vocabulary has for certain. Those of a single odd text stay unknown.
ALPHABET = [
    *"abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()[]<>#$%&*+-/=@_",
    *"中文的图一只猫红色日本語のαδουςσοпривет",
    "\u4dbf",
    "𠀀",
    "½",
]


def make_texts():
    """Return the odd texts, then captions and answers as BDHS meets them, short and long."""
    rng = random.Random(0)

    def sentence(form):
        return form.format(
            c=rng.choice(COLORS),
            t=rng.choice(THINGS),
            u=rng.choice(THINGS),
            p=rng.choice(PLACES),
            v=rng.choice(VERBS),
        )

    texts = list(ODD_TEXTS)
    for form in FORMS * 25:
        texts.append(sentence(form))
    for i in range(60):  # the last ones are far longer than the models take
        sentences = []
        for _ in range(2 + i // 2):
            form = rng.choice(FORMS)
            sentences.append(sentence(form))
        texts.append(" ".join(sentences))
    return texts


def learn_vocabulary(texts):
    """Return some 400 WordPiece tokens learned on the texts."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=420, show_progress=False, limit_alphabet=90, initial_alphabet=ALPHABET
    )
    tokenizer.train_from_iterator(texts, trainer)
    return sorted(tokenizer.get_vocab())


@torch.no_grad()
def mean_embeddings(model, rows):
    """Return sentence-transformers' embeddings (n, D) of rows of ids, not yet normalized."""
    means = []
    for start in range(0, len(rows), BATCH_SIZE):
        batch = rows[start : start + BATCH_SIZE]
        T = max(len(row) for row in batch)
        ids = torch.full((len(batch), T), model.config.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(batch):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, T, D)
        means.append((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    return torch.cat(means).numpy()


def store(about):
    """Write golden.json.xz."""
    text = json.dumps(about, ensure_ascii=False, separators=(",", ":"))
    (cases.HERE / "golden.json.xz").write_bytes(lzma.compress(text.encode()))


def tensor_shapes(family):
    """Return the shapes of a model's parameters by their names."""
    config_class, model_class = FAMILIES[family]
    vocab_size = len(cases.vocabulary(family))
    model = model_class(config_class(**cases.CONFIGS[family], vocab_size=vocab_size))
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def main():
    # 1. Texts and vocabulary. Learning breaks ties at random, so the vocabulary is kept.
    texts = make_texts()
    vocab_file = cases.HERE / "vocab.txt"
    if not vocab_file.exists():
        vocab_file.write_text("\n".join(learn_vocabulary(texts)) + "\n", encoding="utf-8")

    # 2. Shapes. They are stored first, because cases.write reads them.
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = version(package)
    about = {"versions": versions, "shapes": {}, "texts": texts, "ids": {}}
    for family in FAMILIES:
        about["shapes"][family] = tensor_shapes(family)
    store(about)

    # 3. Ids and embeddings.
    embeddings = {}
    for family, (_, model_class) in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            directory = cases.write(Path(folder), family)
            tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
            tokenizer.enable_truncation(cases.LONGEST[family])
            rows = [tokenizer.encode(text).ids for text in texts]
            model, loading_info = model_class.from_pretrained(directory, output_loading_info=True)
            assert not any(loading_info.values()), loading_info
            about["ids"][family] = rows
            embeddings[family] = mean_embeddings(model.eval(), rows)
    np.savez_compressed(cases.HERE / "golden.npz", **embeddings)
    store(about)


if __name__ == "__main__":
    main()
