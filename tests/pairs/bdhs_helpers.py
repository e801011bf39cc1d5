"""Helpers for the tests of BDHS: small settings, given similarities, and what a round draws."""

from dataclasses import replace

from minialign.data.diffusion import diffuse
from minialign.data.image_processor import preprocess
from minialign.data.images import open_image
from minialign.pairs import bdhs
from minialign.pairs.bdhs import BdhsConfig, BdhsSampler, choose_round
from minialign.utils.seeding import seeded_generator

QUICK = BdhsConfig(rho=0.97, rounds=3, max_new_tokens=8)
ONE_ROUND = replace(QUICK, rounds=1)
NOISE = replace(QUICK, rho=0.0, noise=500)
NUM_IMAGE_TOKENS = 64  # of an image of the tiny world


class GivenCosines:
    """A similarity that returns given values in turn, and then the last one for ever."""

    name = "given"

    def __init__(self, *values):
        self.values = list(values)

    def cosine(self, first, second):
        if len(self.values) > 1:
            return self.values.pop(0)
        return self.values[0]


def make_sampler(vlm, config=QUICK, similarity=None, seed=0):
    """Make a sampler that is content with every response, unless a similarity is given."""
    if similarity is None:
        similarity = GivenCosines(0.0)
    return BdhsSampler(vlm, config, similarity, seed)


def sample_pairs(vlm, records, config=QUICK, similarity=None):
    """Sample a pair for each record with the sampler that `make_sampler` makes."""
    return make_sampler(vlm, config, similarity).pairs(records)


def drawn_choices(record, config, round_number, seed=0):
    """Return what a sampler must draw for a record in a round."""
    generator = seeded_generator(seed, record.id, round_number)
    return choose_round(record.chosen, NUM_IMAGE_TOKENS, config, generator=generator)


def cuts_of(choices):
    """Return the cuts of the sentences of a RoundChoices."""
    return [sentence.cut for sentence in choices.sentences]


def noisy_features(vlm, record, noise_steps, *key):
    """Encode the image of a record with the noise of a generator with this key."""
    tiles, size = preprocess(open_image(record.paths[0]), vlm.image_processor)
    noisy_tiles = diffuse(tiles, noise_steps, seeded_generator(*key))
    return vlm.model.encode_images([(noisy_tiles, size)])


def script_completions(monkeypatch, vlm, *texts):
    """Make every request write one of these texts in turn, over and over, without the model.

    Returns a list to which each decoding appends its requests.
    """
    decodings = []
    num_written = 0

    def write_scripted(model, cache, requests, sampling):
        nonlocal num_written
        decodings.append(requests)
        responses = []
        for _ in requests:
            text = texts[num_written % len(texts)]
            num_written += 1
            responses.append(vlm.tokenizer.encode(text, after="text"))
        return responses

    monkeypatch.setattr(bdhs, "generate_continuations", write_scripted)
    return decodings


def unusual_records(records):
    """Return four records of the file, and others with unusual texts and with several turns."""
    texts = [
        "Yes, there is a dog. No, it is not red.",
        "No.",
        "Wow! Look.  A cup\nis here. 3.5 m",
        "Ünï cödé is here, it is.",
    ]
    unusual = list(records[:4])
    for i, text in enumerate(texts):
        unusual.append(replace(records[0], id=f"odd-{i}", chosen=text))
    turns = (records[1].turns[0], records[1].chosen, "And what else?")
    unusual.append(replace(records[1], id="turns", turns=turns))
    return unusual
