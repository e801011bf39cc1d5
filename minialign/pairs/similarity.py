"""How alike two responses are: sentence encoders whose cosine BDHS's semantic check compares (Sec. 3.4.3)."""

import torch
from torch.nn import functional as F

from minialign.pairs.sentence_encoder import SentenceEncoder, Similarity


def load_similarity(directory, model, tokenizer):
    """The sentence encoder of a directory or, where it is None, of the policy's own embeddings: `name`, `embed`, `cosine`."""
    return (
        SentenceEncoder(directory, model.language_model.embed_tokens.weight.device)
        if directory
        else PolicyEmbeddings(model, tokenizer)
    )


class PolicyEmbeddings(Similarity):
    """A sentence encoder made of the policy's own token embeddings: soft overlap of neighbouring word pairs.

    The table is whitened, since words of one kind ("Yes", "No") lie close in it; each pair of neighbours (the beginning
    included) is the product of the first, rolled by one place, and the second, so that order counts; a text is the sum over
    its different pairs, each at length 1. A mean of single embeddings would call a caption with one wrong word the same.
    """

    name = "own embeddings (whitened, pairs)"

    def __init__(self, model, tokenizer):
        table = model.language_model.embed_tokens.weight.detach().float()
        table = table - table.mean(0)
        values, vectors = torch.linalg.eigh(table.T @ table / len(table))
        self.table = table @ (vectors / (values.clamp(min=0) + 1e-6 * values.mean()).sqrt())
        self.tokenizer, self.end = tokenizer, tokenizer.eos

    def embed(self, texts):
        """(n, D) fp32 unit vectors of n texts."""
        return torch.stack([self._embed(text) for text in texts])

    def _embed(self, text):
        ids = [self.end, *(self.tokenizer.encode(text) or [self.end])]
        first, second = torch.tensor(sorted(set(zip(ids, ids[1:]))), device=self.table.device).T
        pairs = F.normalize(
            self.table[first].roll(1, -1) * self.table[second], dim=-1
        )  # (pairs, D)
        return F.normalize(pairs.sum(0), dim=-1)
