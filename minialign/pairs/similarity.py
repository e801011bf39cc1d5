"""Similarity of two responses, for the semantic check of BDHS (Sec. 3.4.3)."""

import torch
from torch.nn import functional as F

from minialign.pairs.sentence_encoder import SentenceEncoder, Similarity


def load_similarity(directory, model, tokenizer) -> Similarity:
    """Load the sentence encoder of a directory, or use the model's embeddings if there is none."""
    if directory:
        return SentenceEncoder(directory, model.device)
    return ModelEmbeddings(model, tokenizer)


class ModelEmbeddings(Similarity):
    """A sentence encoder made of a frozen copy of the model's token embeddings.

    It stands in where no real sentence encoder is given.

    It measures how many pairs of neighboring tokens two texts share, where similar pairs count in
    part. A mean of single embeddings would hardly notice one wrong word in a caption, and never
    another order.
    """

    name = "own embeddings (whitened, pairs)"  # a stored result names it

    def __init__(self, model, tokenizer):
        self.tokenizer = tokenizer
        # Whitening gives all directions of the embedding table (V, D) the same variance. Without
        # it, words of one kind ("Yes", "No") are nearly the same vector. It is a copy, which
        # training leaves alone.
        embeddings = model.language_model.embed_tokens
        table = embeddings.weight.detach().float()
        table = table - table.mean(0)
        covariance = table.T @ table / len(table)  # (D, D)
        variances, directions = torch.linalg.eigh(covariance)
        smallest = 1e-6 * variances.mean()  # against a division by zero
        scales = (variances.clamp(min=0) + smallest).sqrt()
        whitening = directions / scales  # (D, D)
        self.table = table @ whitening

    def embed(self, texts: list[str]) -> torch.Tensor:
        """Embed n texts as unit vectors (n, D) in float32."""
        vectors = [self.embed_text(text) for text in texts]
        return torch.stack(vectors)

    def embed_text(self, text):
        """Embed a text as the sum of its different pairs of neighbors, a unit vector (D,)."""
        # 1. Tokens, with the end token before the first. An empty text is the end token twice.
        boundary = self.tokenizer.eos
        ids = self.tokenizer.encode(text) or [boundary]
        ids = [boundary] + ids
        # 2. The different pairs of neighbors, in a fixed order.
        neighbors = zip(ids[:-1], ids[1:], strict=True)
        neighbors = sorted(set(neighbors))
        first, second = torch.tensor(neighbors, device=self.table.device).T
        # 3. A vector for each pair. The first token's is rolled by one, so that order counts.
        first_vectors = self.table[first].roll(1, -1)  # (pairs, D)
        second_vectors = self.table[second]
        pair_vectors = F.normalize(first_vectors * second_vectors, dim=-1)
        # 4. The text is their sum.
        return F.normalize(pair_vectors.sum(0), dim=-1)
