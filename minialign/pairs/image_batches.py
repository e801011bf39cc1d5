"""Give packed examples their images, in batches that fit into memory."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from minialign.data.packing import PackedExample
from minialign.generation.decoding import packed_length
from minialign.logprobs import batches_that_fit
from minialign.models.loading import VLM


def batches_with_images(
    vlm: VLM,
    examples: list[PackedExample],
    paths: list[tuple],
    encode: Callable[[int], list],
    *,
    batch_size: int | None = None,
) -> Iterator[list[PackedExample]]:
    """Yield the examples with their images, batch by batch, to be read without gradients.

    Only the images of one batch are encoded at a time.

    Args:
        examples: without their images.
        paths: for each example, the files of its images.
        encode: returns the ImageFeatures of an example, given its index.
        batch_size: the most examples in a batch, None for no limit but that of `batches_that_fit`.
    """
    lengths = []
    for example, paths_of_example in zip(examples, paths, strict=True):
        num_image_tokens = vlm.total_image_tokens(paths_of_example)
        lengths.append(packed_length(vlm.model, example, num_image_tokens))
    for batch in batches_that_fit(lengths, batch_size):
        rows = []
        for i in range(batch.start, batch.stop):
            rows.append(replace(examples[i], image_features=encode(i)))
        yield rows
