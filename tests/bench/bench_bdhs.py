"""A guided round of BDHS, greedy, over the same records, masks and cuts, side by side in one process.

ours          bdhs.Sampler: hidden vectors left out, one prefill a record, all its sentences written as one batch; pair by pair, and all
              records together. Tower features at hand; tokenising, drawing, projecting and the similarity check are inside.
transformers  generate, sentence by sentence: from picture, prompt, the true text before it and its kept part to the first full stop,
              the end token or the same cap. "masked" gives all vectors and hides them by the attention mask, as Eq. 6 is written;
              "removed" lends it our saving and gives the visible ones alone. Both are told every position's id, without which
              transformers would move later text to the front of what is hidden, and both have the projected vectors at hand.
All texts must be the same in fp32: the last column counts them. Sides whose names match the regular expression --skip are left out, for at
the true shapes all but the first take minutes.
"""

import re
import statistics
import tempfile
from pathlib import Path

import torch
from common import (
    IMAGE,
    PAD,
    ROOT,
    alternate,
    heading,
    image_processor,
    make_model,
    make_picture,
    parse,
    ratio,
    vectors_of,
    write,
)
from peers import missing, peer_model

from minialign.data.chat_templates import decode_response, encode_prompt, encode_response
from minialign.data.packing import expand_image_placeholders
from minialign.data.records import Record
from minialign.data.tokenizer import Tokenizer
from minialign.models.loading import VLM
from minialign.pairs.bdhs import BdhsConfig, BdhsSampler, join_sentences, sample_round
from minialign.pairs.similarity import PolicyEmbeddings
from minialign.utils.files import read_json, write_json
from minialign.utils.seeding import seeded_generator

SEED = 0
TOGETHER, ALONE = "ours, all together", "ours, pair by pair"


def make_tokenizer(options, folder):
    """The tiny model's tokenizer with made-up words up to the vocabulary's size: never read, but what random weights write."""
    tiny, found = (
        ROOT / "data" / "tiny" / "model",
        read_json(ROOT / "data" / "tiny" / "model" / "tokenizer.json"),
    )
    found["model"]["vocab"] |= {f"▁w{id}": id for id in range(PAD + 1, options.vocab)}
    write_json(folder / "tokenizer.json", found)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        write_json(folder / name, read_json(tiny / name))
    return Tokenizer.load(folder)


def make_records(options, tokenizer, folder):
    """Records with a picture of noise and an answer of words that are one token each."""
    generator = torch.Generator().manual_seed(SEED)
    words = [
        text[1:]
        for text in map(tokenizer.token_text, range(PAD))
        if len(text) > 3 and text[0] in " ▁" and text[1:].isalpha()
    ]
    records = []
    for number in range(options.records):
        make_picture(options, number).save(folder / f"{number}.png")
        sentences = [
            " ".join(
                words[i]
                for i in torch.randint(len(words), (options.tokens - 1,), generator=generator)
            )
            + "."
            for _ in range(options.sentences)
        ]
        question = " ".join(
            words[i] for i in torch.randint(len(words), (options.prompt - 15,), generator=generator)
        )
        records.append(
            Record(
                str(number),
                f"{number}.png",
                (folder / f"{number}.png",),
                (f"<image>\n{question}?",),
                " ".join(sentences),
            )
        )
    return records


class Generate:
    """The round by transformers' generate; `removed`: hidden vectors are left out, else masked."""

    def __init__(self, peer, sampler, records, removed):
        self.peer, self.sampler, self.records, self.removed = peer, sampler, records, removed
        vlm, model = sampler.vlm, sampler.vlm.model
        self.counts = [vlm.num_image_tokens(record.paths[0]) for record in records]
        with torch.no_grad():
            self.vectors = model.project_image_features(
                [vlm.encode_images(record.paths)[0] for record in records]
            )

    @torch.no_grad()
    def __call__(self):
        """The rejected texts."""
        return [self._pair(*each) for each in zip(self.records, self.counts, self.vectors)]

    def _pair(self, record, count, vectors):
        vlm, settings = self.sampler.vlm, self.sampler.config
        one, prompt, texts = (
            sample_round(
                record.chosen, count, settings, generator=seeded_generator(SEED, record.id, 1)
            ),
            encode_prompt(vlm.tokenizer, vlm.template, record.turns),
            [],
        )
        for sentence in one.sentences:
            before = (record.chosen[: sentence.start] + sentence.kept).rstrip()
            context = encode_response(vlm.tokenizer, vlm.template, before)[:-1] if before else []
            new = [
                id
                for id in self._write(prompt + context, vectors, one.visible)
                if id != self.sampler.end_id
            ]
            texts.append(
                decode_response(vlm.tokenizer, vlm.template, context + new)[
                    len(decode_response(vlm.tokenizer, vlm.template, context)) :
                ]
            )
        return join_sentences(record.chosen, one.sentences, texts)

    def _write(self, ids, vectors, visible):
        """Greedy new ids after a context with one picture."""
        expanded = expand_image_placeholders(
            ids, [len(vectors)], IMAGE, visible if self.removed else None
        )
        ids, positions, is_vector = (
            torch.tensor([part], device=vectors.device)
            for part in (expanded.ids, expanded.positions, expanded.is_image)
        )
        embeddings, mask = self.peer.get_input_embeddings()(ids), torch.ones_like(ids)
        chosen = torch.tensor(visible, dtype=torch.long, device=vectors.device)
        embeddings[is_vector] = vectors[chosen] if self.removed else vectors
        if not self.removed:
            mask[is_vector] = torch.zeros(
                len(vectors), dtype=mask.dtype, device=mask.device
            ).index_fill(0, chosen, 1)
        return self.peer.generate(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            do_sample=False,
            pad_token_id=PAD,
            eos_token_id=sorted(self.sampler.sentence_end_ids),
            max_new_tokens=self.sampler.config.max_new_tokens,
        )[0].tolist()


def same_in_groups(options, vlm, records):
    """How many pairs, sampled at temperature 1 over five rounds, are the same to the letter whatever the number of records together."""
    groups = [int(size) for size in options.groups.split(",") if size]
    if not groups:
        return None
    sampler = BdhsSampler(
        vlm,
        BdhsConfig(options.rho, 5, 0.97, 1.0, 1.0, options.cap),
        PolicyEmbeddings(vlm.model, vlm.tokenizer),
        SEED,
    )
    found = [
        [
            pair
            for first in range(0, len(records), group)
            for pair in sampler.pairs(records[first : first + group])
        ]
        for group in groups
    ]
    same = sum(all(one == other for other in others) for one, *others in zip(*found))
    print(
        f"sampled in groups of {', '.join(map(str, groups))}: {same} of {len(records)} pairs the same in all"
    )
    return same


def main():
    options = parse(
        __doc__, records=8, sentences=4, tokens=20, cap=24, rho=0.99, skip="", groups="1,4,32"
    )
    model, absent = make_model(options), missing("transformers")
    with tempfile.TemporaryDirectory() as folder:
        vlm = VLM(model, make_tokenizer(options, Path(folder)), "vicuna", image_processor(options))
        records = make_records(options, vlm.tokenizer, Path(folder))
        sampler = BdhsSampler(
            vlm,
            BdhsConfig(options.rho, 1, 0.97, 0.0, 1.0, options.cap),
            PolicyEmbeddings(model, vlm.tokenizer),
            SEED,
        )
        sides = {
            TOGETHER: lambda: [pair["rejected"] for pair in sampler.pairs(records)],
            ALONE: lambda: [sampler.pairs([record])[0]["rejected"] for record in records],
        }
        if absent:
            print(f"transformers is left out: {', '.join(absent)} not installed")
        elif not (options.skip and re.search(options.skip, "generate")):
            peer = peer_model(options, model)
            sides |= {
                f"generate, {name}": Generate(peer, sampler, records, name == "removed")
                for name in ("removed", "masked")
            }
        sides = {
            name: side
            for name, side in sides.items()
            if name == TOGETHER or not (options.skip and re.search(options.skip, name))
        }
        texts, seconds = alternate(sides, options)
        same = same_in_groups(options, vlm, records)
    print(heading(options))
    print(
        f"{options.records} records of {options.sentences} sentences of {options.tokens} tokens, at most {options.cap} new tokens each, rho {options.rho}"
    )
    print(f"{'side':24}{'ms a pair':>10}{'together':>10}{'by pair':>10}{'same texts':>12}")
    figures = {}
    for name, values in seconds.items():
        own = figures[name] = {
            "seconds_a_pair": statistics.median(values) / options.records,
            "over_together": ratio(seconds, name, TOGETHER),
            "over_by_pair": ratio(seconds, name, ALONE) if ALONE in seconds else None,
            "same": sum(a == b for a, b in zip(texts[name], texts[TOGETHER])),
        }
        by_pair = f"{own['over_by_pair']:9.2f}x" if own["over_by_pair"] else " " * 10
        print(
            f"{name:24}{1000 * own['seconds_a_pair']:10.0f}{own['over_together']:9.2f}x{by_pair}{own['same']:9} of {options.records}"
        )
    write(options, {"vectors": vectors_of(options), "sides": figures, "same_in_groups": same})


if __name__ == "__main__":
    main()
