"""Measure a guided round of BDHS, greedy, over the same records, masks and cuts.

All sides run in one process and take turns:

ours          `BdhsSampler`: hidden image tokens are left out, there is one prefill a record, and
              all sentences are decoded as one batch. Measured pair by pair, and with all records
              together. Features of the vision tower are at hand. Tokenizing, drawing, projecting
              and the similarity check are part of the time.
transformers  `generate`, sentence by sentence: from the image, the prompt, the true text before the
              sentence and its kept part, to the first full stop, the end token or the same limit.
              "masked" passes all image tokens and hides them by the attention mask, as Eq. 6 is
              written. "removed" passes the visible ones alone, and so has our saving too. Both get
              the position id of every token, without which transformers would move later text to
              the front of what is hidden. Both have the projected image tokens at hand.

In float32 all texts must be the same, which the last column counts. --skip is a regular expression
that leaves out the sides whose names it matches, except ours with all records together: at the
shapes of 7B models the others take minutes.
"""

import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from common import (
    IMAGE,
    PAD,
    ROOT,
    is_skipped,
    make_image,
    make_image_processor,
    make_model,
    num_image_tokens,
    parse_options,
)
from peers import make_peer, missing_packages
from report import heading, write_figures
from timing import alternate, time_ratio

from minialign.data.chat_templates import decode_completion, encode_prompt
from minialign.data.packing import expand_image_placeholders
from minialign.data.records import Record
from minialign.data.tokenizer import Tokenizer
from minialign.models.loading import VLM
from minialign.pairs.bdhs import BdhsConfig, BdhsSampler, choose_round
from minialign.pairs.sentences import join_sentences
from minialign.pairs.similarity import ModelEmbeddings
from minialign.utils.files import read_json, write_json
from minialign.utils.seeding import seeded_generator

SEED = 0
TOGETHER = "ours, all together"
PAIR_BY_PAIR = "ours, pair by pair"
TEMPLATE_TOKENS = 15  # of a prompt, about: what the chat template adds to the question

# --- Records


def make_tokenizer(options, folder):
    """Make the tokenizer of data/tiny as large as the vocabulary.

    The new words are invented. No record has one of them, but random weights sample them.
    """
    tiny = ROOT / "data" / "tiny" / "model"
    tokenizer = read_json(tiny / "tokenizer.json")
    for token_id in range(PAD + 1, options.vocab):
        tokenizer["model"]["vocab"][f"▁w{token_id}"] = token_id
    write_json(folder / "tokenizer.json", tokenizer)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        write_json(folder / name, read_json(tiny / name))
    return Tokenizer.load(folder)


def single_token_words(tokenizer):
    """Return the words of three letters or more that are one token each."""
    words = []
    for token_id in range(PAD):
        text = tokenizer.token_text(token_id)
        if len(text) > 3 and text[0] in " ▁" and text[1:].isalpha():
            words.append(text[1:])
    return words


def draw_words(words, count, generator):
    """Draw words with replacement, and return them as a text."""
    indices = torch.randint(len(words), (count,), generator=generator).tolist()
    return " ".join(words[i] for i in indices)


def make_records(options, tokenizer, folder):
    """Make records that have an image of noise and a response of random words."""
    generator = torch.Generator().manual_seed(SEED)
    words = single_token_words(tokenizer)
    records = []
    for i in range(options.records):
        file_name = f"{i}.png"
        make_image(options, seed=i).save(folder / file_name)
        sentences = []
        for _ in range(options.sentences):
            # The full stop is a token too.
            sentences.append(draw_words(words, options.tokens - 1, generator) + ".")
        question = draw_words(words, options.prompt - TEMPLATE_TOKENS, generator)
        record = Record(
            id=str(i),
            image=file_name,
            paths=(folder / file_name,),
            turns=(f"<image>\n{question}?",),
            chosen=" ".join(sentences),
        )
        records.append(record)
    return records


# --- Our sides


def make_sampler(options, vlm, *, rounds, temperature):
    """Make our sampler, which compares texts by the embeddings of the model."""
    config = BdhsConfig(
        rho=options.rho,
        rounds=rounds,
        temperature=temperature,
        max_new_tokens=options.cap,
    )
    return BdhsSampler(vlm, config, ModelEmbeddings(vlm.model, vlm.tokenizer), SEED)


def sample_together(sampler, records):
    """Return the rejected texts of all records, sampled together."""
    return [pair["rejected"] for pair in sampler.pairs(records)]


def sample_pair_by_pair(sampler, records):
    """Return the rejected texts of all records, sampled one after the other."""
    texts = []
    for record in records:
        texts += sample_together(sampler, [record])
    return texts


def count_same_in_groups(options, vlm, records):
    """Count the pairs that do not depend on how many records are sampled together.

    The pairs are sampled at temperature 1 in up to five rounds. They must agree to the letter.
    """
    group_sizes = [int(size) for size in options.groups.split(",") if size]
    if not group_sizes:
        return None

    # 1. The pairs of all records, for each group size.
    sampler = make_sampler(options, vlm, rounds=5, temperature=1.0)
    pairs_by_size = []
    for size in group_sizes:
        pairs = []
        for start in range(0, len(records), size):
            pairs += sampler.pairs(records[start : start + size])
        pairs_by_size.append(pairs)

    # 2. Compare those of each record with those of the first size.
    num_same = 0
    for pairs_of_record in zip(*pairs_by_size, strict=True):
        if all(pair == pairs_of_record[0] for pair in pairs_of_record):
            num_same += 1
    print(
        f"sampled in groups of {', '.join(map(str, group_sizes))}: "
        f"{num_same} of {len(records)} pairs the same in all"
    )
    return num_same


# --- The sides of transformers


class TransformersRound:
    """The same round by transformers' `generate`.

    removes_hidden: whether hidden image tokens are left out. If not, they are masked.
    """

    def __init__(self, peer, sampler, records, *, removes_hidden):
        self.peer = peer
        self.sampler = sampler
        self.records = records
        self.removes_hidden = removes_hidden
        vlm = sampler.vlm
        features = []
        for record in records:
            features += vlm.encode_images(record.paths)
        with torch.no_grad():
            self.image_tokens = vlm.model.project_image_features(features)  # each (I, D)

    @torch.no_grad()
    def __call__(self):
        """Return the rejected texts of all records."""
        texts = []
        for record, image_tokens in zip(self.records, self.image_tokens, strict=True):
            texts.append(self.reject(record, image_tokens))
        return texts

    def reject(self, record, image_tokens):
        """Return the rejected text of a record."""
        vlm = self.sampler.vlm
        generator = seeded_generator(SEED, record.id, 1)  # that of our first round
        choices = choose_round(
            record.chosen, len(image_tokens), self.sampler.config, generator=generator
        )
        prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, record.turns)
        completions = []
        for sentence in choices.sentences:
            text_before = record.chosen[: sentence.start] + sentence.kept
            context = self.sampler.encode_context(text_before)
            new_ids = self.generate(prompt_ids + context, image_tokens, choices.visible)
            text = decode_completion(vlm.tokenizer, vlm.template, context, new_ids)
            completions.append(text)
        return join_sentences(record.chosen, choices.sentences, completions)

    def generate(self, context_ids, image_tokens, visible):
        """Generate greedily after a context with one image; return the new ids."""
        # 1. Ids and positions of the context, with image tokens in place of the placeholder.
        device = image_tokens.device
        kept = set(visible) if self.removes_hidden else None
        expanded = expand_image_placeholders(context_ids, [len(image_tokens)], IMAGE, kept)
        ids = torch.tensor([expanded.ids], device=device)  # (1, T)
        positions = torch.tensor([expanded.positions], device=device)
        is_image = torch.tensor([expanded.is_image], device=device)

        # 2. Embeddings, and the attention mask.
        visible = torch.tensor(visible, dtype=torch.long, device=device)
        embeddings = self.peer.get_input_embeddings()(ids)  # (1, T, D)
        attention_mask = torch.ones_like(ids)
        if self.removes_hidden:
            embeddings[is_image] = image_tokens[visible]
        else:
            embeddings[is_image] = image_tokens
            is_visible = attention_mask.new_zeros(len(image_tokens))
            attention_mask[is_image] = is_visible.index_fill(0, visible, 1)

        # 3. The new ids.
        new_ids = self.peer.generate(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=positions,
            do_sample=False,
            pad_token_id=PAD,
            eos_token_id=sorted(self.sampler.sentence_end_ids),
            max_new_tokens=self.sampler.config.max_new_tokens,
        )
        return new_ids[0].tolist()


# --- The benchmark


def make_sides(options, sampler, records):
    """Return all sides by name, except those that `--skip` leaves out."""
    sides = {
        TOGETHER: partial(sample_together, sampler, records),
        PAIR_BY_PAIR: partial(sample_pair_by_pair, sampler, records),
    }
    missing = missing_packages("transformers")
    if missing:
        print(f"transformers is left out: {', '.join(missing)} not installed")
    elif not is_skipped(options, "generate"):
        peer = make_peer(options, sampler.vlm.model)
        for name in ("removed", "masked"):
            sides[f"generate, {name}"] = TransformersRound(
                peer, sampler, records, removes_hidden=name == "removed"
            )
    kept = {}
    for name, side in sides.items():
        if name == TOGETHER or not is_skipped(options, name):
            kept[name] = side
    return kept


def print_table(options, texts, seconds):
    """Print a line for each side, and return its figures."""
    print(f"{'side':24}{'ms a pair':>10}{'together':>10}{'by pair':>10}{'same texts':>12}")
    figures = {}
    for name in seconds:
        seconds_a_pair = statistics.median(seconds[name]) / options.records
        over_together = time_ratio(seconds, name, TOGETHER)
        over_by_pair = None
        by_pair_cell = " " * 10
        if PAIR_BY_PAIR in seconds:
            over_by_pair = time_ratio(seconds, name, PAIR_BY_PAIR)
            by_pair_cell = f"{over_by_pair:9.2f}x"
        num_same = 0
        for text, our_text in zip(texts[name], texts[TOGETHER], strict=True):
            num_same += text == our_text
        print(
            f"{name:24}{1000 * seconds_a_pair:10.0f}{over_together:9.2f}x{by_pair_cell}"
            f"{num_same:9} of {options.records}"
        )
        figures[name] = {
            "seconds_a_pair": seconds_a_pair,
            "over_together": over_together,
            "over_by_pair": over_by_pair,
            "same": num_same,
        }
    return figures


def main():
    """Run the benchmark."""
    options = parse_options(
        __doc__,
        records=8,
        sentences=4,
        tokens=20,
        cap=24,
        rho=0.99,
        skip="",
        groups="1,4,32",
    )
    model = make_model(options)
    with tempfile.TemporaryDirectory() as folder_name:
        # 1. A model that is ready to be asked, and its records.
        folder = Path(folder_name)
        vlm = VLM(
            model=model,
            tokenizer=make_tokenizer(options, folder),
            template="vicuna",
            image_processor=make_image_processor(options),
        )
        records = make_records(options, vlm.tokenizer, folder)

        # 2. All sides in turn, greedily.
        sampler = make_sampler(options, vlm, rounds=1, temperature=0.0)
        sides = make_sides(options, sampler, records)
        texts, seconds = alternate(sides, options)
        num_same_in_groups = count_same_in_groups(options, vlm, records)

    # 3. The table.
    print(heading(options))
    print(
        f"{options.records} records of {options.sentences} sentences of {options.tokens} tokens, "
        f"at most {options.cap} new tokens each, rho {options.rho}"
    )
    figures = {
        "vectors": num_image_tokens(options),
        "sides": print_table(options, texts, seconds),
        "same_in_groups": num_same_in_groups,
    }
    write_figures(options, figures)


if __name__ == "__main__":
    main()
