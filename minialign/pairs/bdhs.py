"""Bias-Driven Hallucination Sampling, BDHS (Sec. 3.4, Algorithm 1).

BDHS takes the rejected response from the model itself, while its decoder sees almost none of the
image:

1. Mask almost all image tokens (Eq. 6), so that the model has to guess from its language prior. The
   vision tower still reads the whole image, so a visible token knows a little of its surroundings.
2. Cut every sentence of the chosen response at a random word and let the model complete it (Eq. 7).
3. Compare the result with the chosen response (Sec. 3.4.3). If it says nearly the same, draw again.
   The last of several rounds writes a whole response freely, and it is taken as it is.

One prefill reads image, prompt and chosen response of the pending records, a row each. It serves
all sentences of a record, because each sentence forks the row at its cut. A new round has new
visible tokens and prefills anew. The sentences of all records are then decoded together.

"Masked" image tokens are left out of the sequence, which computes the same
(`expand_image_placeholders` in data/packing.py says why).

A batch computes things that one record alone would not: rows are padded, forks of the cache are
filled up, and finished sentences run along until the batch is compacted. No token that is kept sees
any of this. So a batch changes a pair only through rounding.

Each (seed, record id, round) has a random generator of its own. So the random numbers of a record
depend neither on the order of the records, nor on which of them are sampled together, nor on
restarts. Logits depend on the batch in their last bits, which matters only if a number lies that
close to the border between two tokens.

The generator gives, in this order, one number for each image token, two for each sentence, and
`max_new_tokens` for each sentence. So the numbers do shift if the image has another number of
tokens, the response another number of sentences, or `max_new_tokens` another value. Online
training puts (seed, step) in the place of the seed. The noise of BDHS-noise has a separate
generator, that of (seed, record id, round, "noise").
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch

from minialign.data.chat_templates import (
    decode_completion,
    decode_response,
    encode_prompt,
    encode_response,
    stop_ids,
)
from minialign.data.packing import PackedBatch, PackedExample
from minialign.data.records import Record
from minialign.generation.cache_limits import cache_limits, rows_that_fit
from minialign.generation.decoding import (
    DecodeRequest,
    SamplingParams,
    common_prefix_length,
    generate_continuations,
    packed_length,
    prefill,
)
from minialign.models.loading import VLM
from minialign.pairs.distortion import noisy_image_features
from minialign.pairs.pair_files import preference_pair
from minialign.pairs.sentence_encoder import Similarity
from minialign.pairs.sentences import CutSentence, choose_cut, join_sentences, split_sentences
from minialign.pairs.similarity import load_similarity
from minialign.utils.distributed import value_of_first_part
from minialign.utils.seeding import seeded_generator


@dataclass(frozen=True)
class BdhsConfig:
    """The settings of BDHS. The defaults are the paper's."""

    rho: float = 0.99  # probability that an image token is masked (rho_th)
    rounds: int = 5  # the most rounds for a record (N_BDHS)
    epsilon: float = 0.97  # cosine from which on a response is too similar (eps_s)
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256  # for each completion
    noise: int = 0  # diffusion steps of BDHS-noise, which takes the mask's place (then rho is 0)
    guided: bool = True  # complete sentences; False writes whole responses in every round


@dataclass
class RoundChoices:
    """What is drawn at random for a record in one round."""

    visible: list[int]  # indices of the image tokens that are not masked
    sentences: list[CutSentence]
    uniforms: list[torch.Tensor]  # for each sentence (max_new_tokens,) numbers from U(0, 1)


@dataclass
class RoundResponse:
    """A rejected response of one round."""

    text: str
    completions: list[str]  # what the model wrote: the ends of the sentences, or the whole response
    cuts: list[int] = field(default_factory=list)  # empty for a whole response


@dataclass
class RoundResult:
    """What a round gives for a record."""

    index: int  # of the record, in the list that is sampled
    round_number: int  # from 1
    choices: RoundChoices
    response: RoundResponse
    cosine: float  # of the response and the chosen one
    is_taken: bool  # whether this is the rejected response; otherwise there is another round


class BdhsSampler:
    """Samples rejected responses from a model by BDHS."""

    def __init__(self, vlm: VLM, config: BdhsConfig, similarity: Similarity, seed: int):
        self.vlm = vlm
        self.config = config
        self.similarity = similarity
        self.seed = seed
        self.sampling_params = SamplingParams(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
        )
        # A completion ends with any token that has a full stop in it, or with an end token. Where
        # the sentences of a chosen response end is another rule (`split_sentences`).
        self.end_ids = stop_ids(vlm.tokenizer, vlm.template)
        self.sentence_end_ids = set(self.end_ids)
        for token_id in range(vlm.tokenizer.size):
            if "." in vlm.tokenizer.token_text(token_id):
                self.sentence_end_ids.add(token_id)

    def metadata(self) -> dict:
        """Return the settings for the header of an unfinished file of pairs."""
        return {
            "settings": asdict(self.config),
            "seed": self.seed,
            "similarity": self.similarity.name,
        }

    def pairs(self, records: list[Record], step: int | None = None) -> list[dict]:
        """Sample a pair for each record: Algorithm 1 for all records at once.

        Online training passes its `step`, so that the draws of each step are new.
        """
        pairs = [None] * len(records)  # records end in different rounds, in another order
        for result in self.rounds(records, step):
            if result.is_taken:
                pairs[result.index] = self.as_pair(records[result.index], result)
        return pairs

    @torch.no_grad()
    def rounds(self, records: list[Record], step: int | None = None) -> Iterator[RoundResult]:
        """Run the rounds of Algorithm 1, and yield what each of them gives for each record.

        The results of a round follow each other. A record has none in later rounds once its
        response differs enough from the chosen one. So every record has one result that is taken.
        """
        seed = self.seed
        if step is not None:
            seed = (self.seed, step)
        pending = list(range(len(records)))  # indices of the records without a rejected response
        for round_number in range(1, self.config.rounds + 1):
            is_last_round = round_number == self.config.rounds
            round_records = [records[index] for index in pending]
            # 1. Choose the visible image tokens (Eq. 6) and a cut in every sentence.
            all_choices = self.draw(round_records, round_number, seed)
            examples = self.pack_records(round_records, all_choices, round_number, seed)
            # 2. Let the model write with the image masked (Eq. 7).
            responses = self.write_responses(round_number, round_records, examples, all_choices)
            # 3. Compare with the chosen response (Sec. 3.4.3). The last round is taken as it is.
            too_similar = []
            for index, choices, response in zip(pending, all_choices, responses, strict=True):
                local_cosine = self.similarity.cosine(response.text, records[index].chosen)
                cosine = value_of_first_part(local_cosine)  # all parts must decide alike
                is_taken = cosine < self.config.epsilon or is_last_round
                yield RoundResult(index, round_number, choices, response, cosine, is_taken)
                if not is_taken:
                    too_similar.append(index)
            # 4. Draw again for the records that are too similar.
            pending = too_similar
            if not pending:
                break

    def completes_sentences(self, round_number):
        """Return whether a round completes sentences: all but the last of several (Alg. 1)."""
        is_last_of_several = round_number == self.config.rounds and round_number > 1
        return self.config.guided and not is_last_of_several

    def draw(self, records, round_number, seed) -> list[RoundChoices]:
        """Draw the RoundChoices of each record in a round."""
        all_choices = []
        for record in records:
            num_image_tokens = self.vlm.total_image_tokens(record.paths)
            generator = seeded_generator(seed, record.id, round_number)
            choices = choose_round(
                record.chosen, num_image_tokens, self.config, generator=generator
            )
            all_choices.append(choices)
        return all_choices

    def image_features(self, record, round_number, seed):
        """Encode the images of a record, with new noise in every round of BDHS-noise."""
        if not self.config.noise:
            return self.vlm.encode_images(record.paths)
        generator = seeded_generator(seed, record.id, round_number, "noise")
        return noisy_image_features(self.vlm, record.paths, self.config.noise, generator)

    def pack_records(self, records, all_choices, round_number, seed) -> list[PackedExample]:
        """Pack the visible image tokens, the prompt and the chosen response of each record."""
        tokenizer = self.vlm.tokenizer
        template = self.vlm.template
        examples = []
        for record, choices in zip(records, all_choices, strict=True):
            prompt_ids = encode_prompt(tokenizer, template, record.turns, system=record.system)
            chosen_ids = encode_response(tokenizer, template, record.chosen)
            features = self.image_features(record, round_number, seed)
            example = PackedExample.of(prompt_ids, features, [chosen_ids], choices.visible)
            examples.append(example)
        return examples

    def write_responses(self, round_number, records, examples, all_choices) -> list[RoundResponse]:
        """Let the model write for all records, as many at a time as fit the prefilled cache."""
        model = self.vlm.model
        # Each record has a row of the prefilled cache, padded to the longest one.
        row_lengths = [packed_length(model, example, len(example.visible)) for example in examples]
        chunk_size = rows_that_fit(cache_limits(model).prefilled, max(row_lengths))
        responses = []
        for start in range(0, len(records), chunk_size):
            chunk = slice(start, start + chunk_size)
            if self.completes_sentences(round_number):
                responses += self.complete_sentences(
                    records[chunk], examples[chunk], all_choices[chunk]
                )
            else:
                responses += self.write_whole_responses(examples[chunk], all_choices[chunk])
        return responses

    def complete_sentences(self, records, examples, all_choices) -> list[RoundResponse]:
        """Let the model complete every cut sentence (Eq. 7).

        The context of a sentence is the true text before its cut, never another completion. So the
        sentences do not depend on each other, and all of them are decoded at the same time.
        """
        # 1. Read image, prompt and chosen response of each record once.
        cache, batch = prefill(self.vlm.model, examples)
        # 2. Rewind to the cut of each sentence.
        contexts = []
        requests = []
        for row, (record, choices) in enumerate(zip(records, all_choices, strict=True)):
            for sentence, uniforms in zip(choices.sentences, choices.uniforms, strict=True):
                context = self.encode_context(record.chosen[: sentence.start] + sentence.kept)
                request = rewind_to_cut(
                    batch,
                    row,
                    examples[row],
                    context=context,
                    uniforms=uniforms,
                    stop_ids=self.sentence_end_ids,
                )
                contexts.append(context)
                requests.append(request)
        # 3. Decode all of them as one batch.
        new_ids = generate_continuations(self.vlm.model, cache, requests, self.sampling_params)
        texts = []
        for context, ids in zip(contexts, new_ids, strict=True):
            text = decode_completion(self.vlm.tokenizer, self.vlm.template, context, ids)
            texts.append(text)
        # 4. Put the sentences of each record together.
        responses = []
        first = 0
        for record, choices in zip(records, all_choices, strict=True):
            completions = texts[first : first + len(choices.sentences)]
            first += len(choices.sentences)
            text = join_sentences(record.chosen, choices.sentences, completions)
            cuts = [sentence.cut for sentence in choices.sentences]
            responses.append(RoundResponse(text, completions, cuts))
        return responses

    def write_whole_responses(self, examples, all_choices) -> list[RoundResponse]:
        """Let the model write the whole response of each record, under the same masks.

        The chosen response in the row is not used here.
        """
        cache, batch = prefill(self.vlm.model, examples)
        requests = []
        for row, (example, choices) in enumerate(zip(examples, all_choices, strict=True)):
            # With an empty context the cache is rewound to the prompt.
            request = rewind_to_cut(
                batch,
                row,
                example,
                context=[],
                uniforms=choices.uniforms[0],
                stop_ids=self.end_ids,
            )
            requests.append(request)
        new_ids = generate_continuations(self.vlm.model, cache, requests, self.sampling_params)
        responses = []
        for ids in new_ids:
            text = decode_response(self.vlm.tokenizer, self.vlm.template, ids)
            responses.append(RoundResponse(text.strip(), completions=[text]))
        return responses

    def encode_context(self, text):
        """Encode a beginning of a response, which has no end token."""
        text = text.rstrip()
        if not text:
            return []
        return encode_response(self.vlm.tokenizer, self.vlm.template, text)[:-1]

    def as_pair(self, record: Record, result: RoundResult) -> dict:
        """Return the pair of a record as it is written to a file."""
        pair = preference_pair(record, result.response.text)
        pair["rounds"] = result.round_number
        pair["similarity"] = round(result.cosine, 6)
        if self.config.noise:
            pair["noise"] = self.config.noise
        else:
            pair["visible"] = result.choices.visible
        pair["cuts"] = result.response.cuts
        pair["completed"] = result.response.completions
        pair["seed"] = self.seed
        return pair


def choose_round(
    text: str, num_image_tokens: int, config: BdhsConfig, *, generator: torch.Generator
) -> RoundChoices:
    """Draw the mask, the cuts and the random numbers of a round for the chosen response `text`."""
    # Eq. 6: image token i stays visible if rho_i >= rho_th.
    rhos = torch.rand(num_image_tokens, generator=generator)
    is_visible = rhos >= config.rho
    visible = is_visible.nonzero()[:, 0].tolist()
    sentences = []
    for start, end in split_sentences(text):
        sentences.append(choose_cut(text, start, end, generator=generator))
    uniforms = [torch.rand(config.max_new_tokens, generator=generator) for _ in sentences]
    return RoundChoices(visible, sentences, uniforms)


def rewind_to_cut(
    batch: PackedBatch, row: int, example: PackedExample, *, context, uniforms, stop_ids
) -> DecodeRequest:
    """Make the request that continues the response after `context` (ids) in a prefilled row.

    The context is a beginning of the chosen response, which the cache holds already. Only its last
    tokens may differ: where yes became no, or where a shorter text ends in other tokens. Those are
    read anew.

    An example: the chosen response is "A red cup.". The prefix is the visible image tokens and the
    prompt without its last token. It fills n positions of the cache. A masked image token keeps its
    position id but has no place in the cache, so the position id p behind the prefix is n or more.
    The row was prefilled as

        cache position   0 .. n-1   n           n+1   n+2   n+3   n+4
        position id      0 .. p-1   p           p+1   p+2   p+3   p+4
        token            prefix     prompt[-1]  A     red   cup   .

    The context "A red" has both of its tokens in common with the row. To continue it, the logits
    behind "red" are needed. The cache has keys but no logits, so the last common token is read
    again:

        cache_positions = 0 .. n+1,  input_ids = ["red"],  position = p + 2

    The context "A blue" has only "A" in common with the row, so "A" and "blue" are read:

        cache_positions = 0 .. n,    input_ids = ["A", "blue"],  position = p + 1
    """
    ((lead, chosen_ids),) = example.branches  # the lead is the prompt's last token
    num_common = common_prefix_length(context, chosen_ids[:-1])
    last_common_token = (lead + chosen_ids)[num_common]
    return DecodeRequest(
        row=row,
        cache_positions=range(batch.prefix_lengths[row] + num_common),
        input_ids=[last_common_token, *context[num_common:]],
        position=batch.first_positions[row] + num_common,
        uniforms=uniforms,
        stop_ids=stop_ids,
    )


def bdhs_sampler(options, vlm: VLM) -> BdhsSampler:
    """Make the sampler that the options of a script describe."""
    # BDHS-noise shows the model all image tokens, of a noisy image.
    uses_noise = options.by == "noise"
    config = BdhsConfig(
        rho=0.0 if uses_noise else options.rho,
        rounds=options.rounds,
        epsilon=options.epsilon,
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        noise=options.noise_steps if uses_noise else 0,
        guided=not options.unguided,
    )
    similarity = load_similarity(options.similarity, vlm.model, vlm.tokenizer)
    return BdhsSampler(vlm, config, similarity, options.seed)
